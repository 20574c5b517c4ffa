"""What is known of proxies and targets: evidence that decays, scores, and breakers that say who rests.

Whose fault an outcome was decides what rests: the proxy everywhere, the proxy at one target, or neither.
Times are seconds of a steady clock; targets and slots are small numbers, target 0 is none in particular.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

HALF_LIFE: Final = 30 * 60.0
PROXY_REST: Final = 2 * 60.0
PAIR_REST: Final = 10 * 60.0
LONGEST_REST: Final = 30 * 60.0
MAX_RESTS: Final = 8
# How many observations what is known of others is worth, and the latency that halves what a score is worth.
PRIOR: Final = 2.0
PATIENCE: Final = 20.0
# What the last latency weighs in the moving average.
_LATENCY_WEIGHT: Final = 0.2

MAX_TARGETS: Final = 1024
MAX_TARGETS_OF_A_PROXY: Final = 64
MAX_PAIRS: Final = 250_000

NO_TARGET: Final = 0

Random = Callable[[], float]


class Outcome(IntEnum):
    """What became of a use; the numbers are the contract's."""

    SUCCESS = 1
    CONNECT_ERROR = 2
    AUTH_ERROR = 3
    TIMEOUT = 4
    BLOCKED = 5
    RATE_LIMITED = 6
    BAD_CONTENT = 7
    TARGET_ERROR = 8
    ABANDONED = 9


class Blame(NamedTuple):
    """What a failure says of the proxy, and of the proxy at the target.

    First how much it weighs as evidence, then how many in a row open the breaker; 0 for never. `reaches` says
    that the proxy itself worked, since it got through to the target.
    """

    proxy: float
    pair: float
    opens_proxy_at: int
    opens_pair_at: int
    reaches: bool = False


_BLAME: Final = {
    Outcome.CONNECT_ERROR: Blame(1.0, 0.0, 1, 0),
    Outcome.AUTH_ERROR: Blame(1.0, 0.0, 1, 0),
    Outcome.TIMEOUT: Blame(0.5, 0.5, 2, 0),
    Outcome.BLOCKED: Blame(0.0, 1.0, 0, 1, reaches=True),
    Outcome.RATE_LIMITED: Blame(0.0, 1.0, 0, 1, reaches=True),
    Outcome.BAD_CONTENT: Blame(0.0, 1.0, 0, 2),
    Outcome.TARGET_ERROR: Blame(0.0, 0.0, 0, 0),
}


def reaches_target(outcome: Outcome) -> bool:
    """Whether the proxy itself worked, whatever the target made of it."""
    return outcome is Outcome.SUCCESS or (outcome in _BLAME and _BLAME[outcome].reaches)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of `count` uses alike. `begun_at` is when they began, as far as that is known."""

    outcome: Outcome
    begun_at: float
    finished_at: float
    latency: float | None = None
    count: int = 1
    retry_after: float = 0.0


class Opened(NamedTuple):
    """Which breakers a result has opened."""

    proxy: bool
    pair: bool


_NOTHING: Final = Opened(proxy=False, pair=False)


class Evidence:
    """Successes and failures, each halved every half-life."""

    __slots__ = ("at", "failures", "successes")

    def __init__(self) -> None:
        self.successes = 0.0
        self.failures = 0.0
        self.at = 0.0

    def counts(self, now: float) -> tuple[float, float]:
        """What is left of both by now."""
        if now <= self.at:
            return self.successes, self.failures
        keep = 0.5 ** ((now - self.at) / HALF_LIFE)
        return self.successes * keep, self.failures * keep

    def add(self, now: float, successes: float, failures: float) -> None:
        had_successes, had_failures = self.counts(now)
        self.successes = had_successes + successes
        self.failures = had_failures + failures
        self.at = max(now, self.at)


class Breaker(IntEnum):
    """Whether something rests; the numbers are the contract's."""

    CLOSED = 1
    OPEN = 2
    HALF_OPEN = 3


class Standing(Evidence):
    """What is known of a proxy, or of a proxy at a target: its evidence and its breaker.

    `trial` is the lease whose use decides whether it has recovered; empty if there is none.
    """

    __slots__ = (
        "last_outcome",
        "last_result",
        "latency",
        "opened_at",
        "rests",
        "streak",
        "trial",
        "until",
        "used_at",
    )

    def __init__(self) -> None:
        super().__init__()
        self.latency = 0.0
        self.until = -math.inf
        self.opened_at = -math.inf
        self.rests = 0
        self.streak = 0
        self.trial = ""
        self.last_outcome = 0
        self.last_result = 0.0
        # When it was last lent, for a target.
        self.used_at = -math.inf

    def breaker(self, now: float) -> Breaker:
        if self.until > now:
            return Breaker.OPEN
        return Breaker.HALF_OPEN if self.rests else Breaker.CLOSED

    def is_kept_back(self, now: float) -> bool:
        """Whether it rests, or somebody tries whether it has recovered."""
        return self.until > now or bool(self.trial)

    def take(self, result: Result, now: float, successes: float, failures: float) -> None:
        """Add a result to the evidence."""
        self.add(now, successes, failures)
        if result.latency is not None and result.outcome is Outcome.SUCCESS:
            if self.latency:
                self.latency += _LATENCY_WEIGHT * (result.latency - self.latency)
            else:
                self.latency = result.latency
        self.last_outcome = result.outcome
        self.last_result = result.finished_at

    def succeed(self, begun_at: float, now: float) -> None:
        """It worked: a rest that began before ends, and how long the next would be falls by one step."""
        if begun_at < self.opened_at:
            return
        self.until = min(self.until, now)
        self.streak = 0
        self.rests = max(0, self.rests - 1)

    def fail(self, result: Result, now: float, opens_at: int, base: float, random: Random) -> bool:
        """It failed: whether it comes to rest.

        `opens_at` failures in a row do that, or one once it has rested. Those of uses begun before a rest do
        not count.
        """
        if self.until > now:
            if result.retry_after:
                self.until = max(self.until, result.finished_at + result.retry_after)
            return False
        if result.begun_at < self.opened_at:
            return False
        self.streak += result.count
        if not self.rests and self.streak < opens_at:
            return False
        rest = min(LONGEST_REST, base * 2**self.rests) * (0.8 + 0.4 * random())
        self.opened_at = now
        self.until = max(now + rest, result.finished_at + result.retry_after)
        self.rests = min(self.rests + 1, MAX_RESTS)
        self.streak = 0
        return True


class Target(Evidence):
    """How one target fares with all proxies together."""

    __slots__ = ("last_result", "leases", "name", "slots", "waiting")

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        # Leases held for it, calls that wait for one, and the slots of which anything is known at it.
        self.leases = 0
        self.waiting = 0
        self.slots: set[int] = set()
        self.last_result = 0.0


class Health:
    """The standings of all proxies and targets. Not thread-safe: the pool's lock guards it.

    Bounded: targets, standings of one proxy and standings of all proxies at targets; the longest unused go.
    `dropped` is told of each standing that goes in this way, so that nothing rests because of it any more.
    `changed` has what is to be written down, as (slot, target); it is emptied by whoever does.
    """

    def __init__(
        self, random: Random, dropped: Callable[[int, int], None] = lambda _slot, _target: None
    ) -> None:
        self._random = random
        self._dropped = dropped
        self.fleet = Evidence()
        self._numbers: OrderedDict[str, int] = OrderedDict()
        self._targets: dict[int, Target] = {}
        self._next_target = NO_TARGET + 1
        self._proxies: dict[int, Standing] = {}
        # By target << 32 | slot, the longest unused first.
        self._pairs: OrderedDict[int, Standing] = OrderedDict()
        self._targets_of: dict[int, dict[int, None]] = {}
        self.changed: set[tuple[int, int]] = set()
        self.changed_targets: set[int] = set()

    # -- targets

    def target_number(self, name: str) -> int:
        """The number of a target, which is made if it is new; 0 of the empty name."""
        if not name:
            return NO_TARGET
        number = self._numbers.get(name)
        if number is not None:
            self._numbers.move_to_end(name)
            return number
        if len(self._numbers) >= MAX_TARGETS:
            self._drop_a_target()
        number = self._next_target
        self._next_target += 1
        self._numbers[name] = number
        self._targets[number] = Target(name)
        return number

    def find_target(self, name: str) -> int | None:
        """The number of a target of which something is known."""
        return self._numbers.get(name) if name else NO_TARGET

    def target(self, number: int) -> Target | None:
        return self._targets.get(number)

    def targets(self) -> list[Target]:
        return list(self._targets.values())

    def numbered_targets(self) -> list[tuple[int, Target]]:
        return list(self._targets.items())

    def _drop_a_target(self) -> None:
        """Forget the longest unused target that nothing is leased or wanted for."""
        for name, number in self._numbers.items():
            target = self._targets[number]
            if not target.leases and not target.waiting:
                for slot in list(target.slots):
                    self._drop_pair(slot, number)
                del self._numbers[name], self._targets[number]
                self.changed_targets.discard(number)
                return

    # -- standings

    def proxy(self, slot: int) -> Standing | None:
        return self._proxies.get(slot)

    def pair(self, slot: int, target: int) -> Standing | None:
        return self._pairs.get(target << 32 | slot)

    def pairs_of(self, slot: int) -> Iterator[tuple[int, Standing]]:
        """The targets at which anything is known of a proxy."""
        for target in self._targets_of.get(slot, ()):
            yield target, self._pairs[target << 32 | slot]

    def proxies(self) -> Iterator[tuple[int, Standing]]:
        return iter(self._proxies.items())

    def pairs(self) -> Iterator[tuple[int, int, Standing]]:
        for pair, standing in self._pairs.items():
            yield pair & 0xFFFFFFFF, pair >> 32, standing

    def make_proxy(self, slot: int) -> Standing:
        standing = self._proxies.get(slot)
        if standing is None:
            standing = self._proxies[slot] = Standing()
        return standing

    def make_pair(self, slot: int, target: int) -> Standing:
        """The standing of a proxy at a target, as the last that is forgotten."""
        pair = target << 32 | slot
        standing = self._pairs.get(pair)
        if standing is not None:
            self._pairs.move_to_end(pair)
            return standing
        standing = self._pairs[pair] = Standing()
        targets = self._targets_of.setdefault(slot, {})
        targets[target] = None
        self._targets[target].slots.add(slot)
        if len(targets) > MAX_TARGETS_OF_A_PROXY:
            oldest = min(
                (other for other in targets if other != target),
                key=lambda other: max(
                    self._pairs[other << 32 | slot].at, self._pairs[other << 32 | slot].used_at
                ),
            )
            self._drop_pair(slot, oldest)
        elif len(self._pairs) > MAX_PAIRS:
            oldest_pair = next(iter(self._pairs))
            self._drop_pair(oldest_pair & 0xFFFFFFFF, oldest_pair >> 32)
        return standing

    def forget(self, slot: int) -> bool:
        """Forget all that is known of a proxy; whether anything was."""
        known = self._proxies.pop(slot, None) is not None
        for target in list(self._targets_of.get(slot, ())):
            self._forget_pair(slot, target)
            known = True
        self.changed.discard((slot, NO_TARGET))
        return known

    def _drop_pair(self, slot: int, target: int) -> None:
        self._forget_pair(slot, target)
        self._dropped(slot, target)

    def _forget_pair(self, slot: int, target: int) -> None:
        del self._pairs[target << 32 | slot]
        targets = self._targets_of[slot]
        del targets[target]
        if not targets:
            del self._targets_of[slot]
        self._targets[target].slots.discard(slot)
        self.changed.discard((slot, target))

    # -- learning

    def note_lent(self, slot: int, target: int, lease_id: str, now: float) -> bool:
        """A proxy is lent; whether this use is a trial: nobody else gets it for this target meanwhile."""
        trial = False
        standing = self._proxies.get(slot)
        if standing is not None and standing.rests:
            standing.trial = lease_id
            trial = True
        if target:
            pair = self.make_pair(slot, target)
            pair.used_at = now
            if pair.rests:
                pair.trial = lease_id
                trial = True
        return trial

    def end_trial(self, slot: int, target: int, lease_id: str) -> None:
        """A lease has ended, or brought a result: if it was a trial, the next may try."""
        for standing in (self._proxies.get(slot), self.pair(slot, target) if target else None):
            if standing is not None and standing.trial == lease_id:
                standing.trial = ""

    def record(self, slot: int, target: int, result: Result, now: float) -> Opened:
        """Take in a result; which breakers it opened. ABANDONED says nothing."""
        outcome = result.outcome
        if outcome is Outcome.ABANDONED:
            return _NOTHING
        good = result.count if outcome is Outcome.SUCCESS else 0
        bad = result.count - good
        self.fleet.add(now, good, bad)
        self.changed_targets.add(NO_TARGET)
        if target:
            at = self._targets[target]
            at.add(now, good, bad)
            at.last_result = result.finished_at
            self.changed_targets.add(target)
        proxy = self.make_proxy(slot)
        pair = self.make_pair(slot, target) if target else None
        self.changed.add((slot, NO_TARGET))
        if pair is not None:
            self.changed.add((slot, target))
        if outcome is Outcome.SUCCESS:
            for standing in (proxy, pair):
                if standing is not None:
                    standing.take(result, now, good, 0.0)
                    standing.succeed(result.begun_at, now)
            return _NOTHING
        blame = _BLAME[outcome]
        proxy.take(result, now, 0.0, bad * blame.proxy)
        opened_pair = opened_proxy = False
        if pair is not None:
            pair.take(result, now, 0.0, bad * blame.pair)
            if blame.opens_pair_at:
                opened_pair = pair.fail(result, now, blame.opens_pair_at, PAIR_REST, self._random)
        if blame.opens_proxy_at:
            base = LONGEST_REST if outcome is Outcome.AUTH_ERROR else PROXY_REST
            opened_proxy = proxy.fail(result, now, blame.opens_proxy_at, base, self._random)
        elif blame.reaches:
            proxy.succeed(result.begun_at, now)
        return Opened(opened_proxy, opened_pair)

    # -- judging

    def score(self, slot: int, target: int, now: float) -> float:
        """The estimated chance that a use succeeds, 0 to 1.

        A proxy that was never tried at a target is judged by what is known of the two apart.
        """
        good, bad = self.fleet.counts(now)
        mean = (good + 1.0) / (good + bad + 2.0)
        proxy = self._proxies.get(slot)
        of_proxy = mean
        if proxy is not None:
            good, bad = proxy.counts(now)
            of_proxy = (good + PRIOR * mean) / (good + bad + PRIOR)
        if not target:
            return of_proxy
        good, bad = self._targets[target].counts(now)
        of_target = (good + mean) / (good + bad + 1.0)
        prior = min(0.98, max(0.02, of_proxy * of_target / mean))
        pair = self._pairs.get(target << 32 | slot)
        if pair is None:
            return prior
        good, bad = pair.counts(now)
        return (good + PRIOR * prior) / (good + bad + PRIOR)

    def worth(self, slot: int, target: int, leases: int, now: float) -> float:
        """What choosing a proxy is worth: its score, less where it is slow or lent already."""
        proxy = self._proxies.get(slot)
        latency = proxy.latency if proxy is not None else 0.0
        return self.score(slot, target, now) * PATIENCE / (PATIENCE + latency) / (1 + leases)
