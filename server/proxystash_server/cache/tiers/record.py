"""What both disk formats share: the parts of an entry as plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from json.encoder import encode_basestring
from typing import Any, Final

from proxystash.models import HealthMonitoring
from proxystash_server.cache.credentials import CredentialEncryptor
from proxystash_server.cache.entry import CacheEntry, to_datetime, to_microseconds

_MOMENTS = ("last_health_check", "next_check_time")
_COUNTS = (
    "consecutive_health_failures",
    "consecutive_health_successes",
    "recovery_attempt",
    "total_health_checks",
    "total_health_check_failures",
)


# A text as JSON, in quotes. Records are written piece by piece: a fraction of what `json.dumps` costs.
quoted: Final = encode_basestring


class CorruptRecordError(Exception):
    """A stored record that cannot be trusted; the tier itself is not at fault."""


def sealed_of(entry: CacheEntry, encryptor: CredentialEncryptor) -> bytes | None:
    """The entry's credentials as they go to disk, sealed now unless that was done before."""
    stored = entry.content
    if stored.sealed is not None or (stored.username is None and stored.password is None):
        return stored.sealed
    return encryptor.seal(stored.username, stored.password)


def labels_text(labels: Mapping[str, str]) -> str:
    """Labels as a JSON object."""
    return f"{{{','.join([f'{quoted(name)}:{quoted(value)}' for name, value in labels.items()])}}}"


def monitoring_text(monitoring: HealthMonitoring | None) -> str | None:
    """Health monitoring as a JSON object."""
    return None if monitoring is None else json.dumps(monitoring_to_plain(monitoring))


def monitoring_to_plain(monitoring: HealthMonitoring | None) -> dict[str, Any] | None:
    """Health monitoring as JSON-ready values, times in microseconds; fields that say nothing are left out."""
    if monitoring is None:
        return None
    plain: dict[str, Any] = {name: getattr(monitoring, name) for name in _COUNTS if getattr(monitoring, name)}
    for name in _MOMENTS:
        moment = getattr(monitoring, name)
        if moment is not None:
            plain[name] = to_microseconds(moment)
    if monitoring.last_health_error is not None:
        plain["last_health_error"] = monitoring.last_health_error
    return plain


def monitoring_from_plain(plain: dict[str, Any] | None) -> HealthMonitoring | None:
    """The inverse of `monitoring_to_plain`."""
    if plain is None:
        return None
    values = dict(plain)
    for name in _MOMENTS:
        if name in values:
            values[name] = to_datetime(values[name])
    return HealthMonitoring(**values)
