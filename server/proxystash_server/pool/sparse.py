"""A set of numbers out of 0 to size - 1, of which those that are not in it can be drawn at random."""

from __future__ import annotations

from typing import Final

# Numbers that may be out of their places, beside four for each that is blocked.
_SLACK: Final = 16


class SparsePermutation:
    """The numbers 0 to size - 1 in two parts, the free and behind them the blocked.

    Memory is O(blocked): only what is out of its place is stored. Every operation is O(1), some amortized.
    The idea is that of the Fisher-Yates shuffle with a dictionary in place of the array. Not thread-safe.
    """

    __slots__ = ("_at", "_place", "blocked", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.blocked = 0
        # The number at a place, and the place of a number, where the two differ.
        self._at: dict[int, int] = {}
        self._place: dict[int, int] = {}

    @property
    def free(self) -> int:
        """How many numbers are free."""
        return self.size - self.blocked

    def free_at(self, place: int) -> int:
        """The free number at a place below `free`; of a random place, a random free number."""
        return self._at.get(place, place)

    def is_blocked(self, number: int) -> bool:
        return self._place.get(number, number) >= self.size - self.blocked

    def block(self, number: int) -> None:
        """Add a number to the set; idempotent."""
        if not self.is_blocked(number):
            self.blocked += 1
            self._swap(number, self.size - self.blocked)

    def unblock(self, number: int) -> None:
        """Take a number out of the set; idempotent."""
        if self.is_blocked(number):
            self._swap(number, self.size - self.blocked)
            self.blocked -= 1
            if len(self._at) > 4 * self.blocked + _SLACK:
                self._tidy()

    def grow(self) -> None:
        """Have one number more, free."""
        number = self.size
        self.size += 1
        if self.blocked:
            self._swap(number, self.size - 1 - self.blocked)

    def shrink(self, number: int) -> None:
        """Drop `number`, in whose place comes the last one, free or blocked as it was."""
        last = self.size - 1
        if number != last:
            if self.is_blocked(last):
                self.block(number)
            else:
                self.unblock(number)
        self.unblock(last)
        self._swap(last, self.size - self.blocked - 1)
        self._swap(last, last)
        self.size -= 1

    def _tidy(self) -> None:
        """Put the free in their places: each that was blocked and freed may have left two out of theirs."""
        blocked = [self._at.get(place, place) for place in range(self.free, self.size)]
        self.blocked = 0
        self._at.clear()
        self._place.clear()
        for number in blocked:
            self.block(number)

    def _swap(self, number: int, place: int) -> None:
        """Put `number` at `place`, and what is there where `number` was."""
        here = self._place.get(number, number)
        other = self._at.get(place, place)
        for value, where in ((number, place), (other, here)):
            if value == where:
                self._at.pop(where, None)
                self._place.pop(value, None)
            else:
                self._at[where] = value
                self._place[value] = where
