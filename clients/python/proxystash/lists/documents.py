"""JSON: documents of every shape that lists are published in, and lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from proxystash.lists.opening import Source
from proxystash.lists.outcomes import FoundRecords, Line, ProxyFileError, Record, Rejected, is_damaged
from proxystash.lists.salvage import describe, salvage
from proxystash.lists.text import read_line
from proxystash.lists.words import field_of, flag_of, is_foreign, is_wrapper

_DEEPEST_WRAPPER: Final = 4
_WANTED: Final = (
    "it wants an array of objects or texts, alone, or under a key such as proxies or the name of a scheme"
)


def read_document(source: Source, shape: str | None) -> FoundRecords:
    """The records of a JSON document. Where it is damaged, those that are whole. Raises ProxyFileError."""
    text = source.document()
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from read_json_lines(_lines_of(text), shape)
        else:
            yield from _read_damaged(text, f"{source.shown} is not JSON: {_describe(error)}", shape)
        return
    elements = [*_elements(document, source.shown)]
    for number, (element, scheme) in enumerate(elements, 1):
        where = f"record {number}"
        for record in _records(where, element, scheme, shape):
            yield where, record, None
        source.tell(number / len(elements))


def read_json_lines(lines: Iterable[Line], shape: str | None) -> FoundRecords:
    """The records of JSON Lines: an object, a text, or a whole array on each."""
    for where, line in lines:
        if isinstance(line, Rejected):
            yield where, line, None
        elif line.strip():
            for record in _records_of_line(where, line.strip(), shape):
                yield where, record, None


def _records_of_line(where: str, line: str, shape: str | None) -> Iterator[Record | Rejected]:
    try:
        element = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = "not UTF-8" if is_damaged(line) else f"not JSON: {_describe(error, in_line=True)}"
        yield Rejected(where, reason, "failed", reason.partition(":")[0])
        return
    for part in element if isinstance(element, list) and element else [element]:
        yield from _records(where, part, None, shape)


def _records(
    where: str, element: object, scheme: str | None, shape: str | None
) -> Iterator[Record | Rejected]:
    """The records that an element of a list is, `scheme` being what the list is called."""
    if isinstance(element, str) and element.strip():
        for record in read_line(where, element.strip(), shape):
            yield record if isinstance(record, Rejected) else _with_scheme(record, scheme)
    elif isinstance(element, dict):
        yield _with_scheme(element, scheme)
    else:
        yield Rejected(where, "neither an object nor a text", "failed")


def _with_scheme(record: Record, scheme: str | None) -> Record:
    if scheme is None or any((field_of(name) or ("", 0))[0] == "scheme" for name in record):
        return record
    return {**record, "protocol": scheme}


def _elements(document: object, shown: str) -> Iterator[tuple[object, str | None]]:
    """The elements of the list or lists in a document, each with the scheme that its list is called by."""
    found = _find_elements(document, 0)
    if found is None:
        raise ProxyFileError(f"{shown} holds no list of proxies: {_WANTED}")
    return found


def _find_elements(document: object, depth: int) -> Iterator[tuple[object, str | None]] | None:
    if isinstance(document, list):
        return ((element, None) for element in document)
    if not isinstance(document, Mapping) or depth > _DEEPEST_WRAPPER:
        return None
    found: list[Iterator[tuple[object, str | None]]] = []
    by_scheme = [name for name, value in document.items() if flag_of(name) and isinstance(value, list)]
    for name, value in document.items():
        # What stands beside them under the name of something that is no proxy must not vanish.
        if name in by_scheme or (by_scheme and isinstance(value, list) and is_foreign(name)):
            found.append(_under(value, flag_of(name) or name))
    for name, value in document.items():
        if is_wrapper(name) and isinstance(value, list | dict):
            inner = _find_elements(value, depth + 1)
            if inner is not None:
                found.append(inner)
    if found:
        return (element for elements in found for element in elements)
    if any((field_of(name) or ("", 0))[0] in {"proxy_url", "host"} for name in document) or any(
        map(flag_of, document)
    ):
        return iter([(document, None)])
    return None


def _under(elements: list[object], scheme: str) -> Iterator[tuple[object, str | None]]:
    return ((element, scheme) for element in elements)


def _read_damaged(text: str, reason: str, shape: str | None) -> FoundRecords:
    """The elements that are whole, one after the other; each stretch that is not is one failure.

    Raises ProxyFileError with the reason if there is none that is whole.
    """
    kept: list[tuple[str, Record | Rejected, None]] = []
    whole = False
    for number, (element, scheme, failure) in enumerate(salvage(text), 1):
        where = f"record {number}"
        if failure:
            found: list[Record | Rejected] = [Rejected(where, failure, "failed", "not JSON")]
        else:
            found = [*_records(where, element, scheme, shape)]
            whole = whole or any(not isinstance(record, Rejected) for record in found)
        kept += [(where, record, None) for record in found]
        if whole:
            yield from kept
            kept.clear()
    if not whole:
        raise ProxyFileError(reason)


def _lines_of(text: str) -> Iterator[Line]:
    for number, line in enumerate(text.split("\n"), 1):
        yield f"line {number}", line


def _describe(error: Exception, *, in_line: bool = False) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = "" if in_line else f"line {error.lineno}, "
        return f"{error.msg} at {line}column {error.colno}"
    return describe(error)
