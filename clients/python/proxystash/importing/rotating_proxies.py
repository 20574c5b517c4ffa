"""The list of scrapy-rotating-proxies: the file that a setting of Scrapy names, or the setting itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from proxystash.lists.opening import opened
from proxystash.lists.outcomes import FoundRecords, ProxyFileError, Rejected
from proxystash.lists.reader import ListFile
from proxystash.lists.text import read_line, read_lines

_LIST: Final = "ROTATING_PROXY_LIST"
_PATH: Final = "ROTATING_PROXY_LIST_PATH"


def read_rotating_proxies(file: ListFile, name: str, shape: str | None) -> FoundRecords:
    """The records of a list, or of settings (`.py`), which are not run. Raises ProxyFileError."""
    with opened(file, name, None) as source:
        if Path(source.name).suffix == ".py":
            yield from _read_settings(source.document(), name, shape)
        else:
            yield from read_lines(source.lines(), shape)


def _read_settings(text: str, name: str, shape: str | None) -> FoundRecords:
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ProxyFileError(f"{name} is no Python") from None
    assigned = {name: value for statement in module.body for name, value in _assigned(statement)}
    if _LIST not in assigned:
        hint = f"{_PATH} names a file: import that" if _PATH in assigned else f"it does not set {_LIST}"
        raise ProxyFileError(f"{name} holds no proxies: {hint}")
    for where, element in _elements(assigned[_LIST], name):
        if element is None:
            yield where, Rejected(where, "not a text", "failed"), None
        # The middleware takes what begins like this for a comment, here as well.
        elif element.strip() and not element.strip().startswith("#"):
            for record in read_line(where, element.strip(), shape):
                yield where, record, None


def _assigned(statement: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
        yield from ((target.id, statement.value) for target in targets if isinstance(target, ast.Name))


def _elements(value: ast.expr, name: str) -> Iterator[tuple[str, str | None]]:
    """The texts of a setting, each with its place, and None for what is none."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        # What Scrapy makes of it.
        for text in value.value.split(","):
            yield f"line {value.lineno}", text
    elif isinstance(value, ast.List | ast.Tuple | ast.Set):
        for element in value.elts:
            found = element.value if isinstance(element, ast.Constant) else None
            yield f"line {element.lineno}", found if isinstance(found, str) else None
    else:
        raise ProxyFileError(f"{name} does not list the texts of {_LIST}: import a file of them")
