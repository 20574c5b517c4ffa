"""Page tokens: where a List goes on, bound to the filter it was asked with."""

from __future__ import annotations

import base64
import binascii
import hashlib
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
    key = last_key.encode()
    token = _VERSION + _digest(key, entry_filter) + key
    return base64.urlsafe_b64encode(token).decode().rstrip("=")


def read_page_token(token: str, entry_filter: EntryFilter) -> str:
    """The key after which the page begins; raises RequestError for a token that this filter did not get."""
    if not token:
        return ""
    try:
        if len(token) > _MAX_LENGTH:
            raise ValueError
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        digest, key = raw[1 : 1 + _DIGEST_SIZE], raw[1 + _DIGEST_SIZE :]
        if raw[:1] == _VERSION and digest == _digest(key, entry_filter):
            return key.decode()
    except (binascii.Error, ValueError):
        pass
    raise invalid(
        "page_token",
        Reason.INVALID_PAGE_TOKEN,
        "page_token is damaged, or was given for another filter; start again without it",
    )


def _digest(key: bytes, entry_filter: EntryFilter) -> bytes:
    """A checksum over key and filter: it guards against mistakes, and need not withstand forgery."""
    parts = [
        key,
        entry_filter.source.encode(),
        " ".join(sorted(entry_filter.health_statuses)).encode(),
        " ".join(sorted(entry_filter.schemes)).encode(),
        *(part.encode() for label in sorted(entry_filter.labels.items()) for part in label),
    ]
    digest = hashlib.blake2b(digest_size=_DIGEST_SIZE)
    for part in parts:
        digest.update(len(part).to_bytes(4, "big"))
        digest.update(part)
    return digest.digest()
