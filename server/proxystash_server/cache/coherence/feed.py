"""The change feed: what the authority has committed, told to subscribers inside the process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple

from proxystash_server.cache.counting.statistics import EvictionCause
from proxystash_server.cache.entry.entry import CacheEntry

logger = logging.getLogger(__name__)


class ChangeKind(StrEnum):
    """What became of a key, or, with CLEAR and RESET, of all of them."""

    PUT = "put"
    HEALTH = "health"
    DELETE = "delete"
    EXPIRY = "expiry"
    EVICTION = "eviction"
    CLEAR = "clear"
    # What is held may differ from what was told: whoever keeps a copy has to begin anew.
    RESET = "reset"


class Change(NamedTuple):
    """One committed change.

    `revision` is its place in the order of all changes, and the version of the entry that a PUT or HEALTH
    stored, which is `entry`. `cause` says why an EVICTION came about. CLEAR and RESET have no key.
    """

    revision: int
    kind: ChangeKind
    key: str
    entry: CacheEntry | None = None
    cause: EvictionCause | None = None


Listener = Callable[[Sequence[Change]], None]


class ChangeFeed:
    """Tells every change once, in the order of revisions, after it is committed and memory has it.

    Listeners are called in the thread that made the change, before it is acknowledged and while the changed
    keys are locked, one group of changes at a time: what a listener has been told of is what any read gives
    from then on. It must be quick, and must not call the cache. One that raises is logged, and called again
    with the next changes.
    """

    def __init__(self) -> None:
        # Replaced, never changed, so that telling needs no lock.
        self._listeners: tuple[Listener, ...] = ()

    @property
    def has_listeners(self) -> bool:
        """Whether anyone wants to be told."""
        return bool(self._listeners)

    def add(self, listener: Listener) -> None:
        """Tell `listener` from now on. The caller keeps changes out meanwhile."""
        self._listeners = (*self._listeners, listener)

    def remove(self, listener: Listener) -> None:
        """Tell `listener` no more. The caller keeps changes out meanwhile."""
        self._listeners = tuple(one for one in self._listeners if one != listener)

    def tell(self, changes: Sequence[Change]) -> None:
        """Tell every listener of changes, by one thread at a time. No changes are nothing to tell."""
        if not changes:
            return
        for listener in self._listeners:
            try:
                listener(changes)
            except Exception:
                # The change is made, whatever becomes of those who are told.
                logger.exception("a listener of the change feed failed")
