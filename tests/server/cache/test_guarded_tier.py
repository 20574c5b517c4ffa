"""A disk tier behind its breaker: what becomes of an attempt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from proxystash_server.cache import CacheTierType
from proxystash_server.cache.coherence.breaker import CircuitBreaker
from proxystash_server.cache.coherence.guard import GuardedTier
from proxystash_server.cache.counting.statistics import StatisticsRecorder
from proxystash_server.cache.errors import TierError, TierLostError
from tests.server.cache.support import START_US, FakeMonotonic


class Tier:
    """As much of a tier as its guard looks at."""

    backend = "test"
    tier_type = CacheTierType.L2
    enabled = True


@pytest.fixture
def guard(monotonic: FakeMonotonic) -> GuardedTier[Any]:
    statistics = StatisticsRecorder(START_US, monotonic)
    return GuardedTier(Tier(), CircuitBreaker(monotonic), statistics)


def fail(error: Exception) -> Callable[[], Any]:
    def failing() -> None:
        raise error

    return failing


def test_an_attempt_gives_the_result_or_the_default(guard: GuardedTier[Any]) -> None:
    assert guard.attempt("read", 0, lambda: 42) == (True, 42)
    assert guard.attempt("read", 0, fail(TierError("oops"))) == (False, 0)
    with pytest.raises(ZeroDivisionError):
        guard.attempt("read", 0, fail(ZeroDivisionError()))


def test_a_tier_that_is_lost_is_skipped_at_once(guard: GuardedTier[Any]) -> None:
    guard.attempt("read", None, fail(TierLostError("gone")))
    assert guard.is_lost
    assert not guard.is_open
