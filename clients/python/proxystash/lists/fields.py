"""What the fields of a record hold: strict for what makes the proxy, lenient for all beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from proxystash.lists.outcomes import Record, Unreadable, UnusableRecordError, check_unicode
from proxystash.lists.words import country_code, field_of, flag_of
from proxystash.models import HealthStatus
from proxystash.times import as_utc

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_EPOCH = re.compile(r"-?[0-9]+(?:\.[0-9]*)?")
_WHOLE = re.compile(r"(-?[0-9]{1,19})(?:\.0*)?")
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s|sec|m|min|h|d)", re.IGNORECASE)
_UNITS = {"ms": 0.001, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
# Seconds since the epoch have ten digits until the year 2286: what is greater counts milliseconds.
_FIRST_MILLISECONDS = 1e11
_NO_COUNTRY = frozenset(("", "-", "--", "??", "ZZ", "XX", "UNKNOWN", "N/A", "NONE", "NULL"))


class Fields:
    """The fields of a record by the names they have here, whatever the list calls them.

    Methods that read what makes a proxy raise UnusableRecordError, which quotes no value. The others give a
    default for what they cannot read, and note the field's name in `lost`.
    """

    __slots__ = ("_values", "flags", "guess", "lost")

    def __init__(self, record: Record, lost: list[str] | None = None) -> None:
        self.lost: list[str] = [] if lost is None else lost
        # What to tell if the record is loaded for something that it does not say itself.
        self.guess = ""
        # The value of each column or key that is called as a scheme is.
        self.flags: dict[str, object] = {}
        self._values: dict[str, tuple[int, str, object]] = {}
        for name, value in record.items():
            place = field_of(name)
            if isinstance(value, Unreadable):
                self.lost.append(name)
            elif place is None:
                flag = flag_of(name)
                if flag is not None:
                    self.flags.setdefault(flag, value)
            elif value is not None and value != "":
                field, rank = place
                held = self._values.get(field)
                if held is None or rank < held[0]:
                    self._values[field] = rank, name, value

    def name(self, field: str) -> str:
        """What the record calls a field."""
        held = self._values.get(field)
        return field if held is None else held[1]

    def value(self, field: str) -> object:
        """The value as it is; None for none."""
        held = self._values.get(field)
        return None if held is None else held[2]

    def add(self, field: str, value: object) -> None:
        """Give a field the value that was found elsewhere, unless it has one."""
        self._values.setdefault(field, (0, field, value))

    # --- what makes the proxy

    def text(self, field: str, *, strip: bool = True) -> str | None:
        """A text, or a number as a text."""
        value = self.value(field)
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool):
            value = _digits(value)
        if not isinstance(value, str):
            raise UnusableRecordError(f"{self.name(field)} is not text")
        check_unicode(value, self.name(field))
        return (value.strip() if strip else value) or None

    def printable(self, field: str) -> str | None:
        """A text without control characters, as it is."""
        value = self.text(field, strip=False)
        if value is not None and _CONTROL.search(value):
            raise UnusableRecordError(f"{self.name(field)} contains a control character")
        return value

    def port(self) -> str | None:
        """The digits of a port, which may be written as a text, padded, or as 8080.0."""
        value = self.value("port")
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        try:
            return _digits(_whole(value))
        except ValueError:
            raise UnusableRecordError(f"{self.name('port')} is not a whole number") from None

    def ttl(self) -> timedelta | None:
        """A number of seconds, or a duration such as 90s, 15m, 2h or 7d."""
        value = self.value("ttl")
        if value is None:
            return None
        try:
            seconds = _seconds(value)
            if seconds > 0:
                return timedelta(seconds=seconds)
        except (ValueError, OverflowError):
            self._lose("ttl")
            return None
        raise UnusableRecordError(f"{self.name('ttl')} is not greater than zero")

    # --- what stands beside it

    def side_text(self, field: str) -> str | None:
        """A text, or a number as a text."""
        try:
            return self.text(field, strip=False)
        except UnusableRecordError:
            self._lose(field)
            return None

    def time(self, field: str) -> datetime | None:
        """A time as ISO 8601 (naive means UTC), or as seconds or milliseconds since the epoch."""
        value = self.value(field)
        if value is None:
            return None
        try:
            if isinstance(value, str) and not _EPOCH.fullmatch(value):
                return as_utc(datetime.fromisoformat(_without_zone_name(value)))
            seconds = _number(value)
            return datetime.fromtimestamp(
                seconds / 1000 if abs(seconds) >= _FIRST_MILLISECONDS else seconds, UTC
            )
        except (ValueError, OverflowError, OSError):
            self._lose(field)
            return None

    def count(self, field: str, largest: int) -> int:
        """A count; `largest` for one that is greater."""
        value = self.value(field)
        if value is None:
            return 0
        try:
            count = _whole(value)
            if count >= 0:
                return min(count, largest)
        except ValueError:
            pass
        self._lose(field)
        return 0

    def is_set(self, field: str) -> bool:
        """Whether a field says true; a CSV cell holds it as a word."""
        return str(self.value(field)).lower() == "true"

    def health_status(self) -> HealthStatus:
        """One of the words that a health status has."""
        value = self.value("health_status")
        if value is None:
            return HealthStatus.UNKNOWN
        try:
            return HealthStatus(value.strip().lower() if isinstance(value, str) else "")
        except ValueError:
            self._lose("health_status")
            return HealthStatus.UNKNOWN

    def inner(self, field: str) -> Record | None:
        """A nested object; a CSV cell holds it as JSON."""
        value = self.value(field)
        if value is None:
            return None
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = None
        if isinstance(value, dict):
            return value
        self._lose(field)
        return None

    def labels(self) -> dict[str, str]:
        """The labels, and the country as one of them, if no label says another."""
        labels: dict[str, str] = {}
        for name, value in (self.inner("labels") or {}).items():
            if isinstance(value, str) and not _SURROGATE.search(name + value):
                labels[name] = value
            else:
                self._lose("labels")
        country = self.country()
        if country is not None:
            labels.setdefault("country", country)
        return labels

    def country(self) -> str | None:
        """The two-letter code of the country, in capitals."""
        value = self.value("country")
        if value is None:
            place = self.value("location")
            return Fields(place, self.lost).country() if isinstance(place, Mapping) else None
        if isinstance(value, str) and (value.strip().upper() in _NO_COUNTRY):
            return None
        code = country_code(value) if isinstance(value, str) else None
        if code is None:
            self._lose("country")
        return code

    def _lose(self, field: str) -> None:
        self.lost.append(self.name(field))


def _whole(value: object) -> int:
    """A whole number, also as a text or as 8080.0; ValueError for what is none."""
    if isinstance(value, str):
        match = _WHOLE.fullmatch(value.strip())
        value = int(match[1]) if match and value.isascii() else None
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError  # noqa: TRY004 -- whoever asks takes any value for what it may be
    return value


def _digits(value: int) -> str:
    try:
        return str(value)
    except ValueError:  # thousands of them
        raise UnusableRecordError("a number has too many digits") from None


def _number(value: object) -> float:
    if isinstance(value, str):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError
    return value


def _seconds(value: object) -> float:
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    return float(match[1]) * _UNITS[match[2].lower()] if match else _number(value)


def _without_zone_name(text: str) -> str:
    text = text.strip()
    return text[:-4].rstrip() + "Z" if text.endswith((" UTC", " GMT")) else text
