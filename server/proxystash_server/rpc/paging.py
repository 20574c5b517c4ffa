"""Page tokens: where a listing goes on, bound to the filter it was asked with."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from typing import Final

from proxystash_server.cache import EntryFilter
from proxystash_server.cache.entry.limits import MAX_KEY_BYTES
from proxystash_server.rpc.errors import Reason, invalid

_VERSION: Final = b"\x01"
_DIGEST_SIZE: Final = 8
# Of a token with the longest key.
_MAX_LENGTH: Final = 4 * (1 + _DIGEST_SIZE + MAX_KEY_BYTES + 2) // 3


def make_page_token(last_key: str, entry_filter: EntryFilter) -> str:
    """The token of the page after `last_key`."""
    return make_token(last_key, _scope(entry_filter))


def read_page_token(token: str, entry_filter: EntryFilter) -> str:
    """The key after which the page begins; raises RequestError for a token that this filter did not get."""
    return read_token(token, _scope(entry_filter))


def make_token(place: str, scope: Sequence[str]) -> str:
    """The token of the page after `place`, for requests of this scope."""
    encoded = place.encode()
    token = _VERSION + _digest(encoded, scope) + encoded
    return base64.urlsafe_b64encode(token).decode().rstrip("=")


def read_token(token: str, scope: Sequence[str]) -> str:
    """The place after which the page begins, empty for the first; raises RequestError for another's token."""
    if not token:
        return ""
    try:
        if len(token) > _MAX_LENGTH:
            raise ValueError
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        digest, place = raw[1 : 1 + _DIGEST_SIZE], raw[1 + _DIGEST_SIZE :]
        if raw[:1] == _VERSION and digest == _digest(place, scope):
            return place.decode()
    except (binascii.Error, ValueError):
        pass
    raise invalid(
        "page_token",
        Reason.INVALID_PAGE_TOKEN,
        "page_token is damaged, or was given for another filter; start again without it",
    )


def _scope(entry_filter: EntryFilter) -> Sequence[str]:
    return (
        entry_filter.source,
        " ".join(sorted(entry_filter.health_statuses)),
        " ".join(sorted(entry_filter.schemes)),
        *(part for label in sorted(entry_filter.labels.items()) for part in label),
    )


def _digest(place: bytes, scope: Sequence[str]) -> bytes:
    """A checksum over place and scope: it guards against mistakes, and need not withstand forgery."""
    digest = hashlib.blake2b(digest_size=_DIGEST_SIZE)
    for part in (place, *(text.encode() for text in scope)):
        digest.update(len(part).to_bytes(4, "big"))
        digest.update(part)
    return digest.digest()
