"""Rates between snapshots."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from proxystash.cli.rates import RateMeter
from proxystash.models import CacheStatistics

TIME = datetime(2026, 1, 2, tzinfo=UTC)
FIRST = CacheStatistics(
    observed_at=TIME,
    started_at=TIME,
    tiers=(),
    hits=100,
    misses=10,
    hit_rate=0.9,
    entries=3,
    promotions=0,
    demotions=0,
    removals=0,
    stats_subscribers=1,
    watch_subscribers=0,
)


def test_rates_are_what_was_counted_by_the_time_between() -> None:
    rates_of = RateMeter()
    second = replace(FIRST, observed_at=TIME + timedelta(seconds=2), hits=150, removals=1)

    assert rates_of(FIRST) is None
    assert rates_of(second) == {"hits": 25, "misses": 0, "promotions": 0, "demotions": 0, "removals": 0.5}
    # The same once more, as after a connection that was lost.
    assert rates_of(second) is None


def test_a_restart_has_no_rate() -> None:
    rates_of = RateMeter()
    later = TIME + timedelta(seconds=9)
    rates_of(FIRST)

    assert rates_of(replace(FIRST, observed_at=later, started_at=later, hits=0)) is None
    again = replace(FIRST, observed_at=later + timedelta(seconds=1), started_at=later, hits=7)
    assert rates_of(again) == {"hits": 7, "misses": 0, "promotions": 0, "demotions": 0, "removals": 0}
