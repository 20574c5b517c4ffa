"""What becomes of a record: an entry, or a reason why not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

Record = Mapping[str, object]

_SURROGATE = re.compile(r"[\ud800-\udfff]")
# What the error handler "surrogateescape" makes of a byte.
_BYTE = re.compile(r"[\udc80-\udcff]")


class ProxyFileError(ValueError):
    """A file that cannot be read as a whole, such as a missing one."""


class UnusableRecordError(ValueError):
    """A record that is no usable proxy, or is damaged. The message names the field and quotes no value.

    `group` is the message without what differs from record to record.
    """

    def __init__(self, reason: str, group: str = "", kind: Literal["skipped", "failed"] = "skipped") -> None:
        super().__init__(reason)
        self.group = group
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that did not become an entry: where it stands, and why. No text in it holds a credential.

    `skipped` is a readable record that is no usable proxy; `failed` is one that could not be read. Records
    with the same `group` (or, where there is none, the same reason) were rejected for the same reason.
    """

    where: str
    reason: str
    kind: Literal["skipped", "failed"]
    group: str = field(default="", compare=False, repr=False)

    @classmethod
    def of(cls, where: str, error: UnusableRecordError) -> Rejected:
        """What an unusable record is rejected as."""
        return cls(where, str(error), error.kind, error.group)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What stands where a field should: there, but nothing that can be read."""


def check_unicode(text: str, name: str) -> None:
    """Raise UnusableRecordError for a text with surrogates; bytes that were not UTF-8 have become such."""
    if is_damaged(text):
        raise UnusableRecordError("not UTF-8", kind="failed")
    if not text.isascii() and _SURROGATE.search(text):
        raise UnusableRecordError(f"{name} is not valid Unicode")


def is_damaged(text: str) -> bool:
    """Whether a text had bytes that were not UTF-8."""
    return not text.isascii() and _BYTE.search(text) is not None


@dataclass(frozen=True, slots=True)
class Default:
    """The scheme of records that say none: with a notice if it is a guess, or why there is none."""

    scheme: str = ""
    notice: str = ""
    refusal: str = ""


# What a reader yields: where the record stands; the record, or what is wrong with it; and what the list has
# said, up to this place, about the scheme of records that say none.
Found = tuple[str, "Record | Rejected", "Default | None"]
FoundRecords = Iterator[Found]
# A line with where it stands, or what is wrong with it.
Line = tuple[str, "str | Rejected"]
