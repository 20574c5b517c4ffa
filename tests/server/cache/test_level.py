"""One disk tier as the others see it: what it has missed, and what becomes of an attempt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from proxystash_server.cache import CacheTierType
from proxystash_server.cache.breaker import CircuitBreaker
from proxystash_server.cache.errors import TierError, TierLostError
from proxystash_server.cache.level import DiskLevel
from proxystash_server.cache.statistics import StatisticsRecorder
from proxystash_server.cache.tiers.base import EVERYTHING
from tests.server.cache.support import START_US, FakeMonotonic


class Tier:
    """As much of a tier as a level looks at."""

    backend = "test"
    tier_type = CacheTierType.L2
    enabled = True


@pytest.fixture
def level(monotonic: FakeMonotonic) -> DiskLevel:
    statistics = StatisticsRecorder(START_US, monotonic)
    return DiskLevel(Tier(), CircuitBreaker(monotonic), statistics)  # type: ignore[arg-type]  # enough of one


def fail(error: Exception) -> Callable[[], Any]:
    def failing() -> None:
        raise error

    return failing


def test_of_several_changes_missed_for_a_key_the_latest_counts(level: DiskLevel) -> None:
    level.add_missed({"a": 5, "b": 1})
    level.add_missed({"a": 3, "b": 2})
    assert level.missed() == {"a": 5, "b": 2}
    assert level.missed_of(["b", "c"]) == {"b": 2}
    assert level.drop_missed(["a", "c"]) == ["a"]
    assert level.missed() == {"b": 2}


def test_a_tier_serves_every_key_but_those_it_has_missed(level: DiskLevel) -> None:
    seen = [(level.works, level.is_complete, level.serves("a"), level.serves("b"))]
    level.add_missed({"a": 1})
    seen.append((level.works, level.is_complete, level.serves("a"), level.serves("b")))
    level.add_missed({EVERYTHING: 2})
    seen.append((level.works, level.is_complete, level.serves("a"), level.serves("b")))
    assert seen == [(True, True, True, True), (True, False, False, True), (False, False, False, False)]


def test_an_attempt_gives_the_result_or_the_default(level: DiskLevel) -> None:
    assert level.attempt("read", 0, lambda: 42) == (True, 42)
    assert level.attempt("read", 0, fail(TierError("oops"))) == (False, 0)
    with pytest.raises(ZeroDivisionError):
        level.attempt("read", 0, fail(ZeroDivisionError()))


def test_a_tier_that_is_lost_is_skipped_at_once(level: DiskLevel) -> None:
    level.attempt("read", None, fail(TierLostError("gone")))
    assert not level.works
