"""What a put is to do with an entry that is stored already, from its request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from proxystash.v1 import cache_service_pb2 as pb
from proxystash_server.cache.config import MAX_TTL_SECONDS
from proxystash_server.cache.entry.fields import public_name
from proxystash_server.cache.entry.limits import MAX_LABELS
from proxystash_server.cache.entry.merging import (
    LABEL,
    MERGED_FIELDS,
    Combine,
    if_absent,
    keep_credentials,
    merge_seen,
    update_fields,
)
from proxystash_server.rpc.errors import Reason, invalid

# Names in messages, and in the cache.
_NAMES: Final[Mapping[str, str]] = {public_name(name): name for name in MERGED_FIELDS}
# What stands for the URL of an entry that is changed by its key.
_ANY_URL: Final = "http://unknown.invalid:1"
_MOST_PATHS: Final = len(_NAMES) + 2 * MAX_LABELS


def read_mode(mode: int) -> Callable[[pb.CacheEntry], Combine | None]:
    """What becomes of each entry of a request; raises RequestError."""
    match mode:
        case pb.PUT_MODE_UNSPECIFIED | pb.PUT_MODE_REPLACE:
            return _replace
        case pb.PUT_MODE_MERGE:
            return _merge
        case pb.PUT_MODE_IF_ABSENT:
            return lambda _message: if_absent
    raise invalid("mode", Reason.INVALID_MODE, f"mode has the unknown value {mode}; known: 1 to 3")


def _replace(message: pb.CacheEntry) -> Combine | None:
    if message.credentials_omitted and not (message.username or message.password):
        return keep_credentials
    return None


def _merge(message: pb.CacheEntry) -> Combine:
    names = {_NAMES[field.name] for field, _ in message.ListFields() if field.name in _NAMES}
    if message.health_status == pb.HEALTH_STATUS_UNKNOWN:
        # Which says nothing.
        names.remove("health_status")
    return merge_seen(names)


def read_update(request: pb.PutRequest) -> Combine:
    """What becomes of the stored entry of a request with a mask; raises RequestError.

    Gives an entry that is changed by its key, and has no URL, one that nobody looks at.
    """
    if request.mode:
        raise invalid("mode", Reason.INVALID_MODE, "mode cannot be set together with update_mask")
    paths = request.update_mask.paths
    if len(paths) > _MOST_PATHS:
        raise invalid(
            "update_mask",
            Reason.INVALID_UPDATE_MASK,
            f"update_mask has {len(paths):,} paths, which is too many",
        )
    names = set(map(_name, paths))
    if "ttl_us" not in names:
        # That of the stored entry counts, whatever it is.
        request.entry.ttl.FromSeconds(MAX_TTL_SECONDS)
    if not request.entry.proxy_url and "proxy_url" not in names and request.entry.key:
        request.entry.proxy_url = _ANY_URL
    return update_fields(names)


def _name(path: str) -> str:
    if path.startswith(LABEL):
        return path
    name = _NAMES.get(path)
    if name is None:
        known = ", ".join(sorted(_NAMES))
        raise invalid(
            "update_mask", Reason.INVALID_UPDATE_MASK, f"a path is unknown; known: {known}, labels.NAME"
        )
    return name
