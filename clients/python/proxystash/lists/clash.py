"""YAML as clash has it: a list of mappings under `proxies`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import yaml

from proxystash.lists.opening import Source
from proxystash.lists.outcomes import FoundRecords, ProxyFileError, Record, Rejected
from proxystash.lists.text import read_line
from proxystash.lists.words import is_wrapper

_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PROXIES = re.compile(r"^proxies:[ \t]*(?:#.*)?$", re.MULTILINE)
_NEXT_KEY = re.compile(r"[^\s:#-][^:]*:\s*(?:#.*)?")
_ITEM = re.compile(r"^( *)- ", re.MULTILINE)
_YES = frozenset(("true", "yes", "on"))


class _Loader(_SafeLoader):  # type: ignore[misc,valid-type]  # which of the two it is depends on how PyYAML was built
    """Reads texts as they stand: 0123, 1e5, 12:30 and yes are passwords here. Makes no other objects."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag in {"tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"}
    ]
    for first, resolvers in _SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(source: Source, shape: str | None) -> FoundRecords:
    """The records of a YAML document. Where it is damaged, those that are whole. Raises ProxyFileError."""
    text = source.document()
    try:
        elements = _list_of(yaml.load(text, _Loader))  # noqa: S506 -- a safe loader with fewer types
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        yield from _read_items(text, f"{source.shown} is not YAML: {_describe(error)}", shape)
        return
    if elements is None:
        raise ProxyFileError(f"{source.shown} holds no list of proxies: it wants one under the key proxies")
    for number, element in enumerate(elements, 1):
        where = f"record {number}"
        for record in _records(where, element, shape):
            yield where, record, None
        source.tell(number / len(elements))


def _list_of(document: object) -> list[object] | None:
    if isinstance(document, list):
        return document
    if isinstance(document, Mapping):
        for name, value in document.items():
            if isinstance(name, str) and is_wrapper(name) and isinstance(value, list | None):
                return value or []
    return None


def _records(where: str, element: object, shape: str | None) -> Iterator[Record | Rejected]:
    if isinstance(element, str) and element.strip():
        yield from read_line(where, element.strip(), shape)
    elif isinstance(element, Mapping):
        yield _with_tls(where, {str(name): value for name, value in element.items()})
    else:
        yield Rejected(where, "neither a mapping nor a text", "failed")


def _with_tls(where: str, record: dict[str, object]) -> Record | Rejected:
    """`tls: true` makes https of http; SOCKS inside TLS has no scheme."""
    if str(record.get("tls", "")).lower() not in _YES:
        return record
    if str(record.get("type", "")).lower() in {"http", "https"}:
        return {**record, "type": "https"}
    return Rejected(where, "tls goes with type http alone", "skipped")


def _read_items(text: str, reason: str, shape: str | None) -> FoundRecords:
    """The items of a damaged list, each read by itself. Raises ProxyFileError if none is whole."""
    kept: list[tuple[str, Record | Rejected, None]] = []
    whole = False
    for number, item in enumerate(_items(text), 1):
        where = f"record {number}"
        try:
            elements = _list_of(yaml.load(item, _Loader))  # noqa: S506 -- as above
        except (yaml.YAMLError, RecursionError, ValueError):
            elements = None
        if elements is None or len(elements) != 1:
            kept.append((where, Rejected(where, "not YAML", "failed"), None))
        else:
            kept += [(where, record, None) for record in _records(where, elements[0], shape)]
            whole = True
        if whole:
            yield from kept
            kept.clear()
    if not whole:
        raise ProxyFileError(reason)


def _items(text: str) -> Iterator[str]:
    """The items under `proxies`, in their own lines each."""
    begin = _PROXIES.search(text)
    first = _ITEM.search(text, begin.end()) if begin else None
    if begin is None or first is None or text[begin.end() : first.start()].strip():
        return
    indent = first[1]
    item: list[str] = []
    for line in text[first.start() :].splitlines():
        starts = line.startswith(f"{indent}- ")
        if _NEXT_KEY.fullmatch(line):
            break
        if starts and item:
            yield "\n".join(item)
            item = []
        # A line that stands further out belongs to no item.
        if starts or line.startswith(f"{indent} "):
            item.append(line)
    yield "\n".join(item)


def _describe(error: Exception) -> str:
    """Where it is damaged; what the parser says of it may quote a password."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    mark = getattr(error, "problem_mark", None)
    return f"damaged at line {mark.line + 1}" if mark is not None else "damaged"
