"""Puts: entries stored in every tier, those of concurrent callers together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from proxystash.models import HealthStatus
from proxystash_server.cache.config import CacheTierType
from proxystash_server.cache.entry import CacheEntry, stamped
from proxystash_server.cache.errors import CacheError, CacheUnavailableError, TierError
from proxystash_server.cache.group_commit import GroupCommit
from proxystash_server.cache.keylocks import KeyLocks
from proxystash_server.cache.stack import TierStack

StoredIn = tuple[CacheTierType, ...]

# Enough to share the cost of a commit, and few enough that nobody waits long for the others of a group.
_MOST_TOGETHER: Final = 500


# For how many seconds a group that had company waits for the same again.
_PATIENCE: Final = 0.002

# An entry on its way into the cache: its key, itself, and its credentials as they go to disk.
NewEntry = tuple[str, CacheEntry, bytes | None]


class Puts:
    """Stores entries, those of concurrent callers in one commit for each tier. Thread-safe.

    What belongs to one entry alone (checks, sealing) is done before it comes here, in its caller's thread.
    The callers of a group are answered one by one: of equal keys the last counts, and who came earlier is
    answered as if the other had come right after.
    """

    def __init__(self, stack: TierStack, locks: KeyLocks, check_open: Callable[[], None]) -> None:
        self._stack = stack
        self._locks = locks
        self._check_open = check_open
        self._commits: GroupCommit[Sequence[NewEntry], list[StoredIn] | Exception] = GroupCommit(
            self._store_batches, _MOST_TOGETHER, len, _PATIENCE
        )

    def put(self, entries: Sequence[NewEntry]) -> list[StoredIn]:
        """Store entries: for each, the tiers that hold it now, none if no tier could take it.

        The failure count of an entry that is replaced goes on, unless the new one is healthy.
        """
        try:
            stored = self._commits.submit(entries)
        except TierError as error:
            raise CacheUnavailableError("the write was interrupted; try again") from error
        if isinstance(stored, Exception):
            raise stored
        return stored

    def _store_batches(self, batches: Sequence[Sequence[NewEntry]]) -> list[list[StoredIn] | Exception]:
        try:
            stored = iter(self._store([new for batch in batches for new in batch]))
        except CacheError:
            raise
        except Exception:
            if len(batches) == 1:
                raise
            # What is wrong with one of them must not be the others' fault. A put may be made twice.
            return [self._store_alone(batch) for batch in batches]
        return [[next(stored) for _ in batch] for batch in batches]

    def _store_alone(self, batch: Sequence[NewEntry]) -> list[StoredIn] | Exception:
        try:
            return self._store(batch)
        except Exception as error:  # noqa: BLE001 -- raised again in the thread of its caller
            return error

    def _store(self, entries: Sequence[NewEntry]) -> list[StoredIn]:
        stack = self._stack
        # Only a success starts the count of failures over; being found again on a list is none.
        counted = {
            key for key, entry, _ in entries if entry.content.health_status is not HealthStatus.HEALTHY
        }
        with self._locks.hold_many([key for key, _, _ in entries]):
            self._check_open()
            changes = self._stamp(entries, stack.failures_of(counted))
            outcome = stack.write(list(changes.items()))
            pushed_out: dict[CacheTierType, Iterable[str]] = {
                tier: outcome.evicted.get(tier, ()) for tier in outcome.stored_in
            }
            if stack.l1.enabled:
                pushed_out[CacheTierType.L1] = stack.put_in_l1(*changes.values())
        stack.drop_evicted(outcome)
        stored_in = tuple(sorted(pushed_out))
        # A batch may push out what it has just brought in.
        if changes.keys().isdisjoint(key for keys in pushed_out.values() for key in keys):
            return [stored_in] * len(entries)
        authority = stack.disk.authority
        gone = set(pushed_out.get(authority.name, ())) if authority is not None else set()
        out = {tier: set(keys) for tier, keys in pushed_out.items()}
        return [
            () if key in gone else tuple(tier for tier in stored_in if key not in out[tier])
            for key, _, _ in entries
        ]

    def _stamp(self, entries: Sequence[NewEntry], failures: dict[str, int]) -> dict[str, CacheEntry]:
        """The entries by key, as they go into the tiers; `failures` is what is counted of each key so far."""
        changes: dict[str, CacheEntry] = {}
        first_version = self._stack.versions.take(len(entries))
        for version, (key, entry, sealed) in enumerate(entries, first_version):
            count = 0
            stored = entry.content
            if stored.health_status is not HealthStatus.HEALTHY:
                earlier = changes.get(key)
                if earlier is not None:
                    failures[key] = 0 if self._stack.is_expired(earlier) else earlier.failure_count
                count = max(stored.failure_count, failures.get(key, 0))
            changes[key] = stamped(entry, key, version, count, sealed)
        return changes
