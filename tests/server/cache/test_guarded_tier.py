"""A disk tier behind its breaker: what becomes of an attempt."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from proxystash_server.cache import CacheEntry, CacheTierType, TierState
from proxystash_server.cache.coherence.breaker import CircuitBreaker
from proxystash_server.cache.coherence.guard import GuardedTier
from proxystash_server.cache.counting.statistics import StatisticsRecorder, TierFacts
from proxystash_server.cache.errors import TierError, TierLostError
from tests.server.cache.support import START_US, FakeMonotonic, run_in_threads, stored


class Tier:
    """As much of a tier as its guard looks at; fails with `error`, if it has one."""

    backend = "test"
    tier_type = CacheTierType.L2

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.error: Exception | None = None

    def get(self, key: str) -> CacheEntry | None:
        self._fail()
        return stored(key)

    def maintain(self) -> None:
        self._fail()

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
def tier() -> Tier:
    return Tier()


@pytest.fixture
def statistics(monotonic: FakeMonotonic) -> StatisticsRecorder:
    return StatisticsRecorder(START_US, monotonic)


@pytest.fixture
def guard(tier: Tier, monotonic: FakeMonotonic, statistics: StatisticsRecorder) -> GuardedTier[Any]:
    enough: Any = tier
    return GuardedTier(enough, CircuitBreaker(monotonic), statistics)


def fail(error: Exception) -> Callable[[], Any]:
    def failing() -> None:
        raise error

    return failing


def errors(statistics: StatisticsRecorder) -> int:
    """How many errors of L2 are counted."""
    facts = {tier: TierFacts("test", TierState.ACTIVE, 0, 0) for tier in CacheTierType}
    return statistics.snapshot(START_US, facts, 0, 0).l2_stats.errors


def test_an_attempt_gives_the_result_or_the_default(guard: GuardedTier[Any]) -> None:
    assert guard.attempt("read", 0, lambda: 42) == (True, 42)
    assert guard.attempt("read", 0, fail(TierError("oops"))) == (False, 0)
    with pytest.raises(ZeroDivisionError):
        guard.attempt("read", 0, fail(ZeroDivisionError()))


def test_an_attempt_hands_its_arguments_on(guard: GuardedTier[Any]) -> None:
    assert guard.attempt("write", "", str.join, "-", ["a", "b"]) == (True, "a-b")
    assert guard.attempt("read", 0, int, "11", base=2) == (True, 3)


def test_a_get_tells_what_is_not_there_from_what_could_not_be_read(
    guard: GuardedTier[Any], tier: Tier
) -> None:
    assert guard.get("a") == (True, stored("a"))
    tier.error = TierError("oops")
    assert guard.get("a") == (False, None)
    tier.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        guard.get("a")


def test_a_write_says_whether_it_worked(guard: GuardedTier[Any]) -> None:
    assert guard.write(lambda: None)
    assert not guard.write(fail(TierError("oops")))


OPERATIONS: dict[str, Callable[[GuardedTier[Any]], object]] = {
    "read": lambda guard: guard.attempt("read", None, fail(TierError("oops"))),
    "get": lambda guard: guard.get("a"),
    "write": lambda guard: guard.write(fail(TierError("oops"))),
    "upkeep": lambda guard: guard.maintain(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_tier_that_goes_on_failing_is_skipped_and_that_is_told_once(
    guard: GuardedTier[Any],
    tier: Tier,
    statistics: StatisticsRecorder,
    caplog: pytest.LogCaptureFixture,
    operation: str,
) -> None:
    tier.error = TierError("oops")
    seen = []
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            OPERATIONS[operation](guard)
            seen.append(guard.is_open)
    assert seen == [True, True, False, False, False]
    assert not guard.is_lost
    assert errors(statistics) == 5
    [record] = caplog.records
    facts = {name: vars(record)[name] for name in ("tier", "backend", "error")}
    assert (record.getMessage(), facts) == (
        "tier degraded",
        {"tier": "l2", "backend": "test", "error": "oops"},
    )


def test_failures_that_do_not_follow_each_other_are_counted_but_do_no_harm(
    guard: GuardedTier[Any], tier: Tier, statistics: StatisticsRecorder
) -> None:
    for _ in range(4):
        for tier.error in (TierError("oops"), TierError("oops"), None):
            guard.get("a")
            guard.write(fail(tier.error) if tier.error else lambda: None)
    assert guard.is_open
    assert errors(statistics) == 16


def test_upkeep_that_works_says_nothing_of_what_failed_before(guard: GuardedTier[Any], tier: Tier) -> None:
    for _ in range(3):
        guard.write(fail(TierError("oops")))
        guard.maintain()
    assert not guard.is_open


def test_a_tier_that_is_lost_is_skipped_at_once(guard: GuardedTier[Any]) -> None:
    guard.attempt("read", None, fail(TierLostError("gone")))
    assert guard.is_lost
    assert not guard.is_open


def test_a_tier_that_is_given_up_is_lost_only_if_its_files_are(guard: GuardedTier[Any]) -> None:
    guard.give_up(TierError("it could not be emptied"))
    assert not guard.is_open
    assert not guard.is_lost
    guard.give_up(TierLostError("gone"))
    assert guard.is_lost


def test_a_tier_that_is_switched_off_is_not_open(
    monotonic: FakeMonotonic, statistics: StatisticsRecorder
) -> None:
    enough: Any = Tier(enabled=False)
    guard: GuardedTier[Any] = GuardedTier(enough, CircuitBreaker(monotonic), statistics)
    assert not guard.is_open
    assert not guard.enabled


def test_what_works_is_timed(guard: GuardedTier[Any], tier: Tier, statistics: StatisticsRecorder) -> None:
    guard.attempt("read", None, lambda: None)
    guard.get("a")
    guard.write(lambda: None)
    tier.error = TierError("oops")
    guard.get("a")
    guard.write(fail(tier.error))
    reads, writes = (
        statistics.latency(CacheTierType.L2, "read"),
        statistics.latency(CacheTierType.L2, "write"),
    )
    assert [sum(map(sum, map(dict.values, window._slices))) for window in (reads, writes)] == [2, 1]


def test_failures_of_several_threads_degrade_a_tier_once(
    guard: GuardedTier[Any], tier: Tier, caplog: pytest.LogCaptureFixture
) -> None:
    tier.error = TierError("oops")
    with caplog.at_level(logging.WARNING):
        run_in_threads(*[partial(guard.get, "a")] * 8)
    assert len(caplog.records) == 1
    assert not guard.is_open
