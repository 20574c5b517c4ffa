"""What the headers inside a list, and the name of its file, say about the scheme of what follows."""

from __future__ import annotations

import re
from typing import Final

from proxystash.lists.outcomes import Default
from proxystash.lists.words import flag_of, schemes_within, word_set

_HINT: Final = "--scheme decides"
GUESSED_HTTP: Final = Default("http", notice="no scheme was given, http was taken")

_MARKS: Final = ("#", "//", ";")
# What may surround the schemes in a header, beside numbers and punctuation.
_HEADER_WORDS: Final = word_set(
    """
    proxy proxies list lists server servers free fresh public private premium elite anonymous transparent
    live alive working checked verified tested all only total count type types protocol protocols scheme
    section the of and or updated update last at on utc gmt version v here below start begin mon tue wed
    thu fri sat sun jan feb mar apr may jun jul aug sep oct nov dec
    """
)
_WORD = re.compile(r"[a-z]+", re.IGNORECASE)
_SCHEME = r"(?:https?|ssl|socks(?:[\s_-]?v?\s?(?:4a?|5h?))?)"
_SCHEMES_OF_PROXIES = re.compile(
    rf"(?<![a-z0-9]){_SCHEME}(?:[\s,/|&+]+(?:and\s+|or\s+)?{_SCHEME})*\s+(?:prox(?:y|ies)|servers?|list)\b",
    re.IGNORECASE,
)
# A header without a comment mark: nothing but schemes, "proxies" and decoration.
_BARE_HEADER = re.compile(
    rf"[\W_]*{_SCHEME}(?:[\s,/|&+]+{_SCHEME})*(?:\s+(?:prox(?:y|ies)|servers?|list))*\s*(?:\(\d+\))?[\W_]*",
    re.IGNORECASE,
)
_MAX_HEADER = 200
# What stands around schemes in the names of files.
_AROUND_SCHEMES = re.compile(r"_|prox(?:y|ies)|list", re.IGNORECASE)


def is_comment(line: str) -> bool:
    """Whether a line is none of the records."""
    return line.startswith(_MARKS)


class Section:
    """The part of a list that is being read, and the scheme that its header names."""

    def __init__(self) -> None:
        self.default: Default | None = None

    def read(self, line: str) -> bool:
        """Takes a line that is no record, and says whether it is none: a comment or a header."""
        if is_comment(line):
            if len(line) <= _MAX_HEADER and _is_header(line):
                self._begin(line)
            return True
        if len(line) <= _MAX_HEADER and _BARE_HEADER.fullmatch(line):
            self._begin(line)
            return True
        return False

    def _begin(self, header: str) -> None:
        schemes, foreign = schemes_within(header)
        self.default = _default(schemes, foreign, "the header above them")


def default_of_name(name: str, folder: str) -> Default:
    """What a file's name says, such as socks5.txt; else what its folder's does, as in socks5/data.txt."""
    stem = _AROUND_SCHEMES.sub(" ", name.partition(".")[0])
    shown = f"the name {name}"
    schemes, foreign = schemes_within(stem)
    if not schemes and not foreign and flag_of(folder) is not None:
        shown = f"the name of the folder {folder}"
        schemes, foreign = schemes_within(folder)
    if not schemes and not foreign:
        return GUESSED_HTTP
    default = _default(schemes, [] if schemes else foreign, shown)
    if not default.scheme:
        return default
    return Default(default.scheme, notice=f"no scheme was given, {default.scheme} was taken from {shown}")


def _is_header(comment: str) -> bool:
    """Whether a comment names schemes as a header does, and not somewhere in a sentence."""
    schemes, foreign = schemes_within(comment)
    if not schemes and not foreign:
        return False
    if _SCHEMES_OF_PROXIES.search(comment):
        return True
    words = [word.lower() for word in _WORD.findall(_without_schemes(comment))]
    return all(word in _HEADER_WORDS for word in words)


def _without_schemes(text: str) -> str:
    spaced = re.sub(rf"(?<![a-z0-9]){_SCHEME}(?![a-z0-9])", " ", text, flags=re.IGNORECASE)
    _, foreign = schemes_within(spaced)
    for word in foreign:
        spaced = re.sub(rf"\b{word}\b", " ", spaced, flags=re.IGNORECASE)
    return spaced


def _default(schemes: list[str], foreign: list[str], whose: str) -> Default:
    if foreign:
        return Default(
            refusal=f"{whose} says {foreign[0]}, which is no proxy of a kind that is kept here; {_HINT}"
        )
    if schemes == ["socks"]:
        return Default(refusal=f"{whose} says socks and not which; {_HINT}")
    if len(schemes) == 1:
        return Default(schemes[0])
    if set(schemes) == {"http", "https"}:
        return Default("http", notice="http was taken where http and https were named together")
    return Default(
        refusal=f"{whose} says {' and '.join(schemes)}, and the record does not say which; {_HINT}"
    )
