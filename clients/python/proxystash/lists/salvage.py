"""What is whole in a damaged JSON document: the elements of its lists, one after the other.

An element that cannot be read ends where the next one of its kind seems to begin. A stretch that is not
understood is one failure; what is read from there on is sound JSON, or else the next failure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Final

from proxystash.lists.words import flag_of, is_wrapper

_BLANK: Final = re.compile(r"[ \t\r\n]*")
# Where a list may begin, with the key it stands under.
_LIST_BEGINS = re.compile(r'(?:"((?:[^"\\]|\\.){0,64})"\s{0,64}:\s{0,64})?\[')
# Where the next element begins, or the document ends, in a list of objects and in one of texts.
_RESUMES: Final = {
    "{": re.compile(r",\s*(?=\{)|\}\s*(?=\]\s*(?:[}\]]|$))"),
    '"': re.compile(r',\s*(?=")|"\s*(?=\]\s*(?:[}\]]|$))'),
}
_TEXT_ENDS = re.compile(r'"\s*([:,\]])')
# How often the document may be read in vain: damage can make every element look as long as the rest of it.
_PATIENCE: Final = 16

# An element, the scheme that its list is called by, and what is wrong where there is no element.
Salvaged = tuple[object, "str | None", str]


class _Text(str):
    """A text whose lines json does not count at each failure, which would take as long as the text is."""

    __slots__ = ()

    def count(self, *_: object) -> int:
        return 0

    def rfind(self, *_: object) -> int:
        return -1


def salvage(document: str) -> Iterator[Salvaged]:
    """The elements of the lists of proxies in a damaged document, or what is wrong with each."""
    text = _Text(document)
    begin, patience = _next_list(text, 0, first=True), _PATIENCE * (len(text) + 1000)
    while begin is not None:
        elements = _Elements(text, begin, patience)
        yield from elements
        patience = elements.patience
        begin = _next_list(text, elements.position)


def _next_list(text: str, position: int, *, first: bool = False) -> re.Match[str] | None:
    """Where the next list begins that is called as lists of proxies are; or the one that is the document."""
    start = _skip(text, 0) if first else -1
    for begin in _LIST_BEGINS.finditer(text, position):
        name = begin[1]
        if begin.start() == start if name is None else is_wrapper(name) or flag_of(name) is not None:
            return begin
    return None


class _Elements(Iterator[Salvaged]):
    """The elements of one list, until its end or the beginning of another list of proxies."""

    def __init__(self, text: str, begin: re.Match[str], patience: int) -> None:
        self.position = begin.end()
        self.patience = patience
        self._text = text
        self._scheme = None if begin[1] is None else flag_of(begin[1])
        self._decoder = json.JSONDecoder()
        self._kind = _kind_of(text, self.position)
        self._ended = False
        self._beyond: int | None = None

    def __next__(self) -> Salvaged:
        position = self.position = _skip(self._text, self.position)
        if self._ended or (self._text[position : position + 1] == "]" and self._ends_at(position)):
            raise StopIteration
        if position == len(self._text):
            self._ended = True
            return None, None, "the file ends in the midst of the list"
        try:
            element, end = self._decoder.raw_decode(self._text, position)
        except json.JSONDecodeError as error:
            return self._fail(f"{error.msg} at character {error.pos + 1}", error.pos - position)
        except (ValueError, RecursionError) as error:
            return self._fail(describe(error), 0)
        after = _skip(self._text, end)
        if not self._goes_on(after):
            return self._fail("neither a comma nor the end of the list follows it", after - position)
        self.position = after + (self._text[after : after + 1] == ",")
        return element, self._scheme, ""

    def _fail(self, reason: str, read: int) -> Salvaged:
        """Go on where the next element begins, if that is not behind the beginning of another list."""
        if self._beyond is None or self._beyond < self.position:
            another = _next_list(self._text, self.position)
            self._beyond = len(self._text) + 1 if another is None else another.start()
        self.patience -= read
        resumes = _RESUMES[self._kind].search(self._text, self.position) if self.patience > 0 else None
        failure = f"not JSON: {reason}"
        if self._beyond <= len(self._text) and (resumes is None or resumes.end() >= self._beyond):
            self._ended = True
            self.position = self._beyond
        elif resumes is None:
            self._ended = True
            self.position = len(self._text)
            failure += "; nothing after it can be read"
        else:
            self.position = resumes.end()
        return None, None, failure

    def _ends_at(self, position: int) -> bool:
        """Whether a bracket ends the list, and is no damage."""
        return _first_of(self._text, position + 1) in {"", ",", "}", "]", "["}

    def _goes_on(self, position: int) -> bool:
        """Whether what follows an element is a comma, an end, or an element that lacks only its comma."""
        following = self._text[position : position + 1]
        if following in {",", "]", ""} or following == self._kind == "{":
            return True
        if not following == self._kind == '"':
            return False
        try:
            element, end = self._decoder.raw_decode(self._text, position)
        except ValueError:
            return False
        return ":" in element and _first_of(self._text, end) in {",", "]"}


def describe(error: Exception) -> str:
    """What is wrong with JSON where its parser says no place."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def _kind_of(text: str, position: int) -> str:
    """What the elements of a list begin with, even if the first of them is damaged: texts have no keys."""
    ends = [match[1] for match in islice(_TEXT_ENDS.finditer(text, position), 6)]
    begins = text[(start := _skip(text, position)) : start + 1]
    return "{" if 2 * ends.count(":") >= len(ends) and (ends or begins == "{") else '"'


def _first_of(text: str, position: int) -> str:
    """The first character from a position on that is no blank; nothing at the end."""
    position = _skip(text, position)
    return text[position : position + 1]


def _skip(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position
