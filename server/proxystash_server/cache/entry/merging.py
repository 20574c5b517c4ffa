"""What a put makes of an entry that is stored already, other than taking its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import partial
from typing import Final

from proxystash.proxies import KEY_LENGTH, key_of
from proxystash_server.cache.entry.entry import CacheEntry, entry_of_content
from proxystash_server.cache.entry.fields import Content, EntryArguments, copy_of_content
from proxystash_server.cache.entry.limits import checked_labels
from proxystash_server.cache.errors import NotStoredError

# Given the live entry that is stored, or None, and the one that is put: the one to store, which is the stored
# one itself if that is to stay as it is. Raises InvalidEntryError, NotStoredError.
Combine = Callable[[CacheEntry | None, CacheEntry], CacheEntry]

_DERIVED_KEY: Final = re.compile(rf"[0-9a-f]{{{KEY_LENGTH}}}")
MERGED_FIELDS: Final = frozenset(EntryArguments.__annotations__) - {"key"} | {"proxy_url"}
LABEL: Final = "labels."


def if_absent(stored: CacheEntry | None, new: CacheEntry) -> CacheEntry:
    """The stored entry stays."""
    return stored or new


def may_lack_credentials(key: str, entry: CacheEntry) -> bool:
    """Whether an entry has no credentials, but perhaps a key that was made with a username."""
    content = entry.content
    if content.username is not None or content.password is not None or not _DERIVED_KEY.fullmatch(key):
        return False
    return key != key_of(content.proxy_url, None)


def keep_credentials_of_key(stored: CacheEntry | None, new: CacheEntry) -> CacheEntry:
    """The new entry, which has no credentials, with the stored ones, if its key is that of their username."""
    username = None if stored is None else stored.username
    if username is None or key_of(new.proxy_url, username.get_secret_value()) != new.key:
        return new
    return keep_credentials(stored, new)


def keep_credentials(stored: CacheEntry | None, new: CacheEntry) -> CacheEntry:
    """The new entry, which has no credentials, with the stored ones, if there are any."""
    if stored is None or (stored.username is None and stored.password is None):
        return new
    content = copy_of_content(new.content)
    _take(content, stored.content, ("username", "password", "sealed"))
    return _with_content(new, content)


def merge_seen(names: Collection[str]) -> Combine:
    """The stored entry was seen again: it lives on from now, with `names` of what is put, and its labels."""
    return partial(_merge_seen, names)


def _merge_seen(names: Collection[str], stored: CacheEntry | None, new: CacheEntry) -> CacheEntry:
    if stored is None:
        return new
    content = copy_of_content(stored.content)
    # They may also have come in the URL.
    credentials = [name for name in ("username", "password") if getattr(new, name) is not None]
    _take(content, new.content, {*names, *credentials})
    if "labels" in names:
        content.labels = checked_labels({**stored.labels, **new.labels})
    # An earlier sighting is no reason to go earlier.
    content.fetch_time_us = max(stored.fetch_time_us, new.fetch_time_us)
    content.expires_at_us = content.fetch_time_us + (new if "ttl_us" in names else stored).ttl_us
    return _with_content(stored, content)


def update_fields(names: Collection[str]) -> Combine:
    """The stored entry, which there must be, with `names` of what is put.

    `labels.NAME` is the label of that name alone. Names that have been checked by `MERGED_FIELDS`.
    """
    return partial(_update_fields, names)


def _update_fields(names: Collection[str], stored: CacheEntry | None, new: CacheEntry) -> CacheEntry:
    if stored is None:
        raise NotStoredError(f"there is no entry {new.key!r} to be changed")
    content = copy_of_content(stored.content)
    _take(content, new.content, names)
    labels = dict(content.labels)
    for name in names:
        if name.startswith(LABEL):
            label = name.removeprefix(LABEL)
            labels.pop(label, None)
            if label in new.labels:
                labels[label] = new.labels[label]
    content.labels = checked_labels(labels)
    if "fetch_time_us" in names or "ttl_us" in names:
        content.expires_at_us = content.fetch_time_us + (new if "ttl_us" in names else stored).ttl_us
    return _with_content(stored, content)


def _take(content: Content, source: Content, names: Collection[str]) -> None:
    for name in names:
        if name in Content.__slots__:
            setattr(content, name, getattr(source, name))
    if "sealed" not in names and not {"username", "password"}.isdisjoint(names):
        content.sealed = None


def _with_content(entry: CacheEntry, content: Content) -> CacheEntry:
    return entry_of_content(content, entry.access_count, entry.last_accessed_us, entry.evicted_from_l1)
