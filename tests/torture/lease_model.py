"""Which leases may be held, given what was asked of a pool and what it answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from tests.torture.tally import BreachError


class LeaseModel:
    """The leases that are held for certain, and those that may be. None of them ends by itself.

    What ends with its entry is written down with the next lease, release or round of maintenance: a kill
    before that may bring it back. Raises BreachError for what cannot be.
    """

    def __init__(self, max_leases: int) -> None:
        self._max_leases = max_leases
        # By id the key of each.
        self._held: dict[str, str] = {}
        self._perhaps: dict[str, str] = {}
        # Ended with their entries, and perhaps not written down.
        self._ended: dict[str, str] = {}
        self._unanswered = 0

    def granted(self, lease: str, key: str) -> None:
        """An acquire gave a lease."""
        if lease in self._held or self._count(self._held, key) >= self._max_leases:
            raise BreachError("lent twice", f"{key!r} is lent as {lease}, and is held by {self._held}")
        self._held[lease] = key
        self.written_down()

    def refused(self, there: Iterable[str]) -> None:
        """An acquire gave none, though these proxies are there and do not rest."""
        for key in there:
            if self._count(self._held, key) + self._count(self._perhaps, key) < self._max_leases:
                raise BreachError("withheld", f"{key!r} is free, and was not lent")

    def released(self, lease: str, released: bool) -> None:
        """A release was answered."""
        self._answered(lease, released, "release")
        self._held.pop(lease, None)
        self._perhaps.pop(lease, None)
        self.written_down()

    def renewed(self, lease: str, held: bool) -> None:
        """A renewal was answered."""
        self._answered(lease, held, "renewal")

    def _answered(self, lease: str, held: bool, what: str) -> None:
        if lease in self._held and not held:
            raise BreachError("lost", f"the {what} of {lease} says that it is not held")
        if held and lease not in self._held | self._perhaps:
            raise BreachError("resurrected", f"the {what} of {lease} says that it is held")

    def removed(self, key: str, *, certain: bool = True) -> None:
        """An entry was removed, and its leases with it; or perhaps it was."""
        gone = [lease for lease, of_key in self._held.items() if of_key == key]
        (self._ended if certain else self._perhaps).update({lease: self._held.pop(lease) for lease in gone})

    def written_down(self) -> None:
        """Everything until now outlasts a kill."""
        self._ended.clear()

    def may_be_granted(self) -> None:
        """An acquire was not answered."""
        self._unanswered += 1

    def may_be_released(self, lease: str) -> None:
        """A release was not answered."""
        if lease in self._held:
            self._perhaps[lease] = self._held.pop(lease)

    def listed(self, leases: Mapping[str, str], *, is_whole: bool) -> None:
        """What the next process lists; `is_whole` says that it knows which entries are there."""
        lost = self._held.keys() - leases.keys()
        if lost:
            raise BreachError("lost", f"leases are gone: {lost}")
        unknown = leases.keys() - self._held.keys() - self._perhaps.keys() - self._ended.keys()
        if len(unknown) > self._unanswered:
            raise BreachError("resurrected", f"nobody was given {unknown}")
        most = max(Counter(leases.values()).values(), default=0)
        if most > self._max_leases:
            raise BreachError("lent twice", f"a proxy has {most} leases: {leases}")
        if is_whole:
            self._held, self._perhaps = dict(leases), {}
        else:
            # Those of entries that are not there end as soon as that is known.
            self._perhaps = {lease: key for lease, key in leases.items() if lease not in self._held}
        self._ended.clear()
        self._unanswered = 0

    @staticmethod
    def _count(leases: Mapping[str, str], key: str) -> int:
        return sum(of_key == key for of_key in leases.values())
