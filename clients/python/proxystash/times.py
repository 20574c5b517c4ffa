"""Times as records have them: ISO 8601 in UTC."""

from __future__ import annotations

from datetime import UTC, datetime


def as_utc(time: datetime) -> datetime:
    """The same moment in UTC, a naive time being UTC already."""
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def time_text(time: datetime | None) -> str | None:
    """A time as ISO 8601 in UTC, to the microsecond."""
    return None if time is None else as_utc(time).isoformat().replace("+00:00", "Z")
