"""The fields of an entry, from which its forms in memory, on disk and in messages are made.

A new field, say `anonymity: str`, is written down

- in cache_service.proto, from which scripts/generate makes the stubs;
- here: in `Fields`, behind `version`, with the value of entries that were stored without it, and in
  `EntryArguments`;
- in the signatures of what makes an entry: `make_entry`, CacheEntry and CacheManager.new_entry;
- in sqlite/format.py: a column, and the upgrade that adds it and renews the checksums;
- in proxystash/models.py, for the client and for proxy files.

A limit is a check in limits.py that `make_entry` calls. A field of a type that none has yet has its forms in
plain.py, rpc/convert.py, proxystash/messages.py and proxystash/lists, by its type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypedDict

from pydantic import SecretStr

from proxystash.compiled import compile_function, types_of
from proxystash.models import HealthMonitoring, HealthStatus


class Fields:
    """What one write stores, in the order in which it stands on disk.

    Times are in microseconds since the epoch, and named `..._us`; their `public_name` is without that.
    """

    __slots__ = ()

    key: str
    proxy_url: str
    username: SecretStr | None
    password: SecretStr | None
    # The credentials as they stand on disk, once they have been there, so that no tier seals them twice.
    sealed: bytes | None
    source: str
    fetch_time_us: int
    expires_at_us: int
    health_status: HealthStatus
    failure_count: int
    health_monitoring: HealthMonitoring | None
    labels: Mapping[str, str]
    # Names the write that stored this content; uses of an earlier write never reach a later one.
    version: int
    # Leases of the proxy that may be held at once; 0 for as many as of any other.
    max_leases: int = 0
    # Room for the content as an answer of the service, which is built once; see `keep_encoded`.
    encoded: bytes | None


FIELDS: Final = tuple(types_of(Fields))
# What says something of the proxy. The others are the cache's own.
PUBLIC_FIELDS: Final = tuple(name for name in FIELDS if name not in ("sealed", "version", "encoded"))


class Content(Fields):
    """What one write stored; shared by every state of use of its entry, and unchanged once it is shared."""

    __slots__ = FIELDS


class EntryArguments(TypedDict, total=False):
    """What whoever makes an entry may say of it beside its URL: the arguments of `new_entry`."""

    key: str
    username: str | None
    password: str | None
    source: str
    fetch_time_us: int | None
    ttl_us: int | None
    health_status: HealthStatus
    failure_count: int
    health_monitoring: HealthMonitoring | None
    labels: Mapping[str, str] | None
    max_leases: int


def public_name(name: str) -> str:
    """What a field is called where its times are no integers, and on disk."""
    return name.removesuffix("_us")


# A copy that may be changed.
copy_of_content: Callable[[Content], Content] = compile_function(
    "copy_of_content(content)",
    [
        "copy = Content()",
        *(f"copy.{name} = content.{name}" for name in FIELDS if name != "encoded"),
        "copy.encoded = None",
        "return copy",
    ],
    globals(),
)
