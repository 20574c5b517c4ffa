"""Latencies over a sliding minute."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxystash_server.cache import LatencySummary
from proxystash_server.cache.counting.latency import LatencyWindow
from tests.server.cache.support import FakeMonotonic, run_in_threads


@pytest.fixture
def window(monotonic: FakeMonotonic) -> LatencyWindow:
    return LatencyWindow(monotonic)


def test_an_empty_window_has_zeros(window: LatencyWindow) -> None:
    assert window.summary() == LatencySummary(p50_us=0.0, p99_us=0.0, max_us=0.0)


def test_one_duration_is_all_three_numbers(window: LatencyWindow) -> None:
    window.record(123_456)
    summary = window.summary()
    assert summary.max_us == 123.456
    assert summary.p50_us == summary.p99_us == pytest.approx(123.456, rel=0.1)


@given(st.lists(st.integers(min_value=0, max_value=10**12), min_size=1, max_size=300))
def test_percentiles_are_off_by_a_tenth_at_most(durations: list[int]) -> None:
    window = LatencyWindow(FakeMonotonic())
    for duration in durations:
        window.record(duration)
    ordered = sorted(durations)
    summary = window.summary()
    for fraction, reported in ((0.50, summary.p50_us), (0.99, summary.p99_us)):
        rank = max(1, -(-len(ordered) * round(fraction * 100) // 100))
        exact = ordered[rank - 1] / 1000
        assert exact * 0.999 <= reported <= exact * 1.13 + 0.001
    assert summary.max_us == ordered[-1] / 1000
    assert summary.p50_us <= summary.p99_us <= summary.max_us


def test_durations_are_forgotten_after_a_minute(window: LatencyWindow, monotonic: FakeMonotonic) -> None:
    window.record(9_000_000)
    monotonic.advance(54)
    window.record(1_000)
    assert window.summary().max_us == 9000
    monotonic.advance(6)
    assert window.summary().max_us == 1
    monotonic.advance(60)
    assert window.summary() == LatencySummary()


def test_what_is_forgotten_no_longer_counts_towards_a_percentile(
    window: LatencyWindow, monotonic: FakeMonotonic
) -> None:
    for _ in range(100):
        window.record(1_000)
    monotonic.advance(60)
    window.record(9_000_000)
    assert window.summary().p50_us == pytest.approx(9000, rel=0.1)


def test_a_long_silence_leaves_nothing_behind(window: LatencyWindow, monotonic: FakeMonotonic) -> None:
    window.record(5_000)
    monotonic.advance(100_000)
    assert window.summary() == LatencySummary()
    window.record(7_000)
    assert window.summary().max_us == 7


def test_what_no_bucket_is_wide_enough_for_still_counts(window: LatencyWindow) -> None:
    window.record(10**15)
    window.record(-5)
    assert window.summary().max_us == 10**12


def test_durations_from_several_threads_are_all_counted(window: LatencyWindow) -> None:
    def record() -> None:
        for duration in random.Random(1).sample(range(1, 10_000), 500):
            window.record(duration)

    run_in_threads(*[record] * 4)
    assert sum(sum(counts.values()) for counts in window._slices) == 2000
