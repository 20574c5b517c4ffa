"""What a cache may hold for each key, given what was asked of it and what it answered.

A set of possible states for each key: one if everything is known, more while the outcome of a change is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from tests.torture.tally import BreachError, Kind

NEVER: Final = 1 << 62


class Seen(NamedTuple):
    """What a read told of an entry: the tag of the put that stored it, and its failure count."""

    tag: str
    failures: int


class Invalidated(NamedTuple):
    """What an invalidation told."""

    found: bool
    evicted: bool
    failures: int


@dataclass(frozen=True, slots=True)
class State:
    """An entry that may be stored."""

    tag: str
    failures: int = 0
    expires_at_us: int = NEVER

    def seen_at(self, now_us: int) -> Seen | None:
        """What a read at that time should tell."""
        return Seen(self.tag, self.failures) if self.expires_at_us > now_us else None


Possible = frozenset[State | None]
_ABSENT: Final[Possible] = frozenset({None})


def _banned(failures: int) -> State:
    """Nothing is stored, and whatever is put has so many failures."""
    return State("", failures, 0)


def _is_ban(state: State | None) -> bool:
    return state is not None and not state.tag


class Model:
    """The possible states of every key.

    Each change has `certain`: whether it was acknowledged; otherwise it may or may not have happened. A read
    raises BreachError if it shows what none of the possible states explains. With `bans`, what is evicted
    for its failures has them again when it is put, until it is deleted.
    """

    def __init__(self, keys: Iterable[str], *, threshold: int, bans: bool = False) -> None:
        self.threshold = threshold
        self._bans = bans
        self.possible: dict[str, Possible] = dict.fromkeys(keys, _ABSENT)
        # By key what comes back if memory loses a change that stands nowhere else.
        self._fallback: dict[str, Possible] = {}

    def put(self, key: str, new: State, now_us: int, *, healthy: bool = False, certain: bool = True) -> None:
        """A put. Unless the entry is healthy, the failures of what it replaces go on."""
        before = self.possible[key]
        counts = {
            state.failures if state is not None and (_is_ban(state) or state.seen_at(now_us)) else 0
            for state in before
        }
        failures = {0} if healthy else {max(new.failures, count) for count in counts}
        after: Possible = frozenset(State(new.tag, count, new.expires_at_us) for count in failures)
        self._become(key, after, certain=certain)

    def put_blindly(self, key: str, new: State) -> None:
        """Also possible: the put could not read what it replaced, and counted from its own failures."""
        self.possible[key] |= {new}

    def delete(self, key: str, *, certain: bool = True) -> None:
        """A delete."""
        if not certain:
            # The entry may have gone, and the ban not.
            failures = {state.failures for state in self.possible[key] if state is not None}
            if self._bans:
                self.possible[key] |= {_banned(count) for count in failures if count >= self.threshold}
        self._become(key, _ABSENT, certain=certain)

    def clear(self, *, certain: bool = True) -> None:
        """A clear."""
        for key in self.possible:
            self.delete(key, certain=certain)

    def invalidate(self, key: str, answer: Invalidated | None, now_us: int, *, lenient: bool = False) -> None:
        """An invalidation and its answer; None if there was none, so that it may not have happened.

        `lenient` says that the entry may be out of reach, so that "not found" says nothing.
        """
        before = self.possible[key]
        if answer is None:
            after_it = before.union(*(self._invalidated(state, now_us)[1] for state in before))
            # Evicted, and not banned yet.
            evicted = any(map(_is_ban, after_it - before))
            self.possible[key] = after_it | (_ABSENT if evicted else frozenset())
            return
        if not answer.found and lenient:
            return
        after = {
            result
            for state in before
            for told, results in [self._invalidated(state, now_us)]
            if told == answer
            for result in results
        }
        if not after:
            raise self._breach(key, f"invalidation told {answer}", missing=not answer.found)
        self._become(key, frozenset(after), certain=True)

    def may_fall_back(self, key: str, before: Possible) -> None:
        """The last change of a key stands in memory alone: what was possible before it may come back."""
        self._fallback[key] = before
        self.possible[key] |= before

    def read(self, key: str, seen: Seen | None, now_us: int, *, lenient: bool = False, how: str = "") -> None:
        """A read and what it showed; `lenient` says that a miss says nothing, as where a tier is away."""
        if seen is None and lenient:
            return
        explained = frozenset(
            state for state in self.possible[key] if (state and state.seen_at(now_us)) == seen
        )
        if not explained:
            raise self._breach(key, f"{how or 'a read'} showed {seen}", missing=seen is None)
        if not lenient:
            self._fallback.pop(key, None)
        self.possible[key] = explained | self._fallback.get(key, frozenset())

    def time_passed(self, now_us: int) -> None:
        """What has expired by now may be removed at any time."""
        for possible in (self.possible, self._fallback):
            for key, states in possible.items():
                if any(state is not None and state.expires_at_us <= now_us for state in states):
                    possible[key] = states | _ABSENT

    def known(self, key: str, now_us: int) -> Seen | None:
        """What a read must show now; only for a key without doubt."""
        (seen,) = _visible(self.possible[key], now_us)
        return seen

    def in_doubt(self, key: str) -> bool:
        """Whether more than one state is possible."""
        return len(self.possible[key]) != 1

    def _become(self, key: str, after: Possible, *, certain: bool) -> None:
        if certain:
            self._fallback.pop(key, None)
        self.possible[key] = after if certain else self.possible[key] | after

    def _invalidated(self, state: State | None, now_us: int) -> tuple[Invalidated, Possible]:
        seen = state and state.seen_at(now_us)
        if _is_ban(state):
            return Invalidated(False, False, 0), frozenset({state})
        if state is None or not seen:
            return Invalidated(False, False, 0), frozenset({state, None})
        failures = state.failures + 1
        if failures >= self.threshold:
            return Invalidated(True, True, failures), frozenset(
                {_banned(failures)}
            ) if self._bans else _ABSENT
        changed = State(state.tag, failures, state.expires_at_us)
        return Invalidated(True, False, failures), frozenset({changed})

    def _breach(self, key: str, what: str, *, missing: bool) -> BreachError:
        kind: Kind = "lost" if missing else "resurrected" if self.possible[key] == _ABSENT else "stale"
        return BreachError(kind, f"{what} of {key!r}; possible is {sorted(map(str, self.possible[key]))}")


def _visible(states: Possible, now_us: int) -> set[Seen | None]:
    return {None if state is None else state.seen_at(now_us) for state in states}
