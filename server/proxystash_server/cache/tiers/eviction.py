"""Which entry goes when a tier is full: the policies, in memory and as SQL.

A policy orders keys; it neither holds entries nor locks. The tier that owns it calls it under its own lock.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol

# The same three policies for a table: the entry that sorts first goes first. `id` grows with insertion and
# survives updates, `recency` grows with every use.
SQL_ORDER: dict[str, str] = {"lru": "recency", "lfu": "access_count, recency", "fifo": "id"}


class EvictionPolicy(Protocol):
    """An order of keys, the next to be evicted first. Not thread-safe: its tier's lock guards it."""

    def record_put(self, key: str, access_count: int) -> None:
        """Note that `key` was stored, new or again, with a count of earlier uses."""

    def record_use(self, key: str, access_count: int) -> None:
        """Note that `key`, which is held, was used; `access_count` includes this use."""

    def remove(self, key: str) -> None:
        """Forget `key`, if it is held."""

    def clear(self) -> None:
        """Forget every key."""

    def victims(self) -> Iterator[str]:
        """The keys in the order of their eviction.

        The caller stops iterating before it changes the policy.
        """


class FifoPolicy:
    """First in, first out: neither use nor replacement changes an entry's place."""

    def __init__(self) -> None:
        self._keys: OrderedDict[str, None] = OrderedDict()

    def record_put(self, key: str, access_count: int) -> None:
        self._keys.setdefault(key, None)

    def record_use(self, key: str, access_count: int) -> None:
        pass

    def remove(self, key: str) -> None:
        self._keys.pop(key, None)

    def clear(self) -> None:
        self._keys.clear()

    def victims(self) -> Iterator[str]:
        return iter(self._keys)


class LruPolicy(FifoPolicy):
    """Least recently used: a put or a use moves the key to the end."""

    def __init__(self) -> None:
        super().__init__()
        # On the path of every hit, so without a function in between: a count of at least 1 is as good as the
        # True that `move_to_end` takes.
        self.record_use = self._keys.move_to_end  # type: ignore[method-assign,assignment]

    def record_put(self, key: str, access_count: int) -> None:
        self._keys[key] = None
        self._keys.move_to_end(key)


class LfuPolicy:
    """Least frequently used, by the entry's access count; among equals, the least recently used.

    One ordered bucket of keys for each count, as in Shah, Mitra and Matani, "An O(1) algorithm for
    implementing the LFU cache eviction scheme" (2010). Their list of counts can only be walked, and counts
    jump, since an entry brings its own along when it is promoted; so the counts stand in a sorted array.
    Everything is O(1) but for a count that nobody else has: it is searched in O(log n) of n distinct counts,
    and the greater ones are moved by one place, in one go (some 20 microseconds for 100,000).
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._buckets: dict[int, OrderedDict[str, None]] = {}
        self._order: list[int] = []

    def record_put(self, key: str, access_count: int) -> None:
        self.remove(key)
        self._counts[key] = access_count
        bucket = self._buckets.get(access_count)
        if bucket is None:
            bucket = self._buckets[access_count] = OrderedDict()
            insort(self._order, access_count)
        bucket[key] = None

    record_use = record_put

    def remove(self, key: str) -> None:
        count = self._counts.pop(key, None)
        if count is None:
            return
        bucket = self._buckets[count]
        del bucket[key]
        if not bucket:
            del self._buckets[count]
            del self._order[bisect_left(self._order, count)]

    def clear(self) -> None:
        self._counts.clear()
        self._buckets.clear()
        self._order.clear()

    def victims(self) -> Iterator[str]:
        for count in self._order:
            yield from self._buckets[count]


_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LruPolicy, "lfu": LfuPolicy, "fifo": FifoPolicy}


def make_policy(name: str) -> EvictionPolicy:
    """A fresh policy by its configured name: `lru`, `lfu` or `fifo`."""
    return _POLICIES[name]()
