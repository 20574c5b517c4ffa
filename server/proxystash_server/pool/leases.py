"""The leases and sessions that are held, as a table that is looked up in every way that is needed."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from proxystash_server.pool.requests import Lease

MAX_LEASES: Final = 100_000
MAX_SESSIONS: Final = 100_000
# Leases that have ended by themselves, of which a late result can still be taken in.
MAX_EXPIRED: Final = 100_000
# Leases that are looked at for one page of a list.
_MOST_LOOKED_AT: Final = 5000


class LeaseTable:
    """Leases by id, key, holder and request, in the order of their granting. Not thread-safe."""

    def __init__(self) -> None:
        self._by_id: dict[str, Lease] = {}
        self._by_key: dict[str, dict[str, Lease]] = {}
        self._by_holder: dict[str, dict[str, Lease]] = {}
        self._by_request: dict[str, dict[str, Lease]] = {}
        self._expired: OrderedDict[str, Lease] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._by_id.values())

    def get(self, lease_id: str) -> Lease | None:
        return self._by_id.get(lease_id)

    def of_key(self, key: str) -> list[Lease]:
        return list(self._by_key.get(key, {}).values())

    def count_of_key(self, key: str) -> int:
        return len(self._by_key.get(key, ()))

    def of_holder(self, holder: str) -> Iterable[Lease]:
        return self._by_holder.get(holder, {}).values()

    def of_request(self, request_id: str) -> list[Lease]:
        return list(self._by_request.get(request_id, {}).values())

    def add(self, lease: Lease) -> None:
        self._by_id[lease.id] = lease
        for name, index in self._indices(lease):
            if name:
                index.setdefault(name, {})[lease.id] = lease

    def end(self, lease: Lease) -> None:
        """Take a lease out, and mark it as ended."""
        del self._by_id[lease.id]
        for name, index in self._indices(lease):
            if name:
                del index[name][lease.id]
                if not index[name]:
                    del index[name]
        lease.ended = True

    def remember_expired(self, lease: Lease) -> None:
        """Know a lease that has ended by itself for a while, for a result that comes late."""
        self._expired[lease.id] = lease
        if len(self._expired) > MAX_EXPIRED:
            self._expired.popitem(last=False)

    def expired(self, lease_id: str) -> Lease | None:
        """A lease that has ended by itself."""
        return self._expired.get(lease_id)

    def forget_expired(self, lease_id: str) -> Lease | None:
        """A lease that has ended by itself, which is known no longer: its result counts once."""
        return self._expired.pop(lease_id, None)

    def page(
        self, after: int, limit: int, wanted: Callable[[Lease], bool], key: str = "", holder: str = ""
    ) -> tuple[list[Lease], int | None]:
        """Up to `limit` leases that were granted after number `after`, and the number to go on after."""
        if key:
            leases = self.of_key(key)
        elif holder:
            leases = list(self.of_holder(holder))
        else:
            leases = list(self._by_id.values())
        start = bisect_right(leases, after, key=lambda lease: lease.sequence)
        found: list[Lease] = []
        for lease in leases[start : start + _MOST_LOOKED_AT]:
            if len(found) == limit:
                return found, found[-1].sequence
            if wanted(lease):
                found.append(lease)
        if start + _MOST_LOOKED_AT < len(leases):
            return found, leases[start + _MOST_LOOKED_AT - 1].sequence
        return found, None

    def _indices(self, lease: Lease) -> tuple[tuple[str, dict[str, dict[str, Lease]]], ...]:
        return (
            (lease.key, self._by_key),
            (lease.holder, self._by_holder),
            (lease.request_id, self._by_request),
        )


class Session:
    """Which proxy a session keeps to, until nobody asks for so long, or it is too old."""

    __slots__ = ("ends_at", "id", "idle_timeout", "key", "target", "used_at")

    def __init__(self, session_id: str, target: str, key: str) -> None:
        self.id = session_id
        self.target = target
        self.key = key
        self.used_at = 0.0
        self.idle_timeout = 0.0
        # When it is too old even if in use; None for never.
        self.ends_at: float | None = None

    def until(self) -> float:
        """When it is forgotten, if it is not used before."""
        idle_at = self.used_at + self.idle_timeout
        return idle_at if self.ends_at is None else min(idle_at, self.ends_at)
