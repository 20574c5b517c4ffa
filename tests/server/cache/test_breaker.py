"""When a failing tier is skipped, and when it is tried again."""

from __future__ import annotations

from functools import partial

import pytest

from proxystash_server.cache.coherence.breaker import CircuitBreaker
from tests.server.cache.support import FakeMonotonic, run_in_threads


@pytest.fixture
def breaker(monotonic: FakeMonotonic) -> CircuitBreaker:
    return CircuitBreaker(monotonic, jitter=lambda: 0.0)


def open_it(breaker: CircuitBreaker) -> None:
    while not breaker.is_open:
        breaker.record_failure("read")


def pause_of(breaker: CircuitBreaker, monotonic: FakeMonotonic) -> float:
    """How long it takes from now until a probe is due, to a hundredth of a second."""
    waited = 0.0
    while not breaker.begin_probe():
        monotonic.advance(0.01)
        waited += 0.01
    return round(waited, 1)


def test_it_opens_at_the_third_failure_in_a_row_and_says_so_once(breaker: CircuitBreaker) -> None:
    assert [bool(breaker.record_failure("read")) for _ in range(5)] == [False, False, True, False, False]
    assert breaker.is_open


def test_a_success_in_between_starts_the_count_over(breaker: CircuitBreaker) -> None:
    for _ in range(4):
        breaker.record_failure("read")
        breaker.record_failure("read")
        breaker.record_success("read")
    assert not breaker.is_open


def test_reads_that_work_are_no_excuse_for_writes_that_fail(breaker: CircuitBreaker) -> None:
    for _ in range(2):
        breaker.record_failure("write")
        breaker.record_failure("read")
        breaker.record_success("read")
    assert not breaker.is_open
    assert breaker.record_failure("write")
    assert breaker.is_open


def test_nothing_but_a_probe_closes_it(breaker: CircuitBreaker) -> None:
    open_it(breaker)
    breaker.record_success("read")
    assert breaker.is_open


def test_it_can_be_opened_at_once(breaker: CircuitBreaker, monotonic: FakeMonotonic) -> None:
    breaker.force_open()
    assert breaker.is_open
    assert pause_of(breaker, monotonic) == 1.0


def test_no_probe_is_due_while_it_is_closed(breaker: CircuitBreaker, monotonic: FakeMonotonic) -> None:
    monotonic.advance(1000)
    assert not breaker.begin_probe()


def test_pauses_double_from_one_second_to_a_minute(breaker: CircuitBreaker, monotonic: FakeMonotonic) -> None:
    open_it(breaker)
    pauses = []
    for _ in range(9):
        pauses.append(pause_of(breaker, monotonic))
        breaker.end_probe(False)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_random_part_of_up_to_half_is_taken_off_each_pause(monotonic: FakeMonotonic) -> None:
    for jitter, expected in ((0.0, 1.0), (0.5, 0.8), (1.0, 0.5)):
        breaker = CircuitBreaker(monotonic, jitter=partial(float, jitter))
        open_it(breaker)
        assert pause_of(breaker, monotonic) == pytest.approx(expected, abs=0.06)


def test_a_probe_that_worked_closes_it(breaker: CircuitBreaker, monotonic: FakeMonotonic) -> None:
    open_it(breaker)
    pause_of(breaker, monotonic)
    breaker.end_probe(True)
    assert not breaker.is_open
    # And the failures from before it count no more.
    breaker.record_failure("read")
    breaker.record_failure("read")
    assert not breaker.is_open


def test_after_a_recovery_the_pauses_begin_at_one_second_again(
    breaker: CircuitBreaker, monotonic: FakeMonotonic
) -> None:
    open_it(breaker)
    for _ in range(4):
        pause_of(breaker, monotonic)
        breaker.end_probe(False)
    pause_of(breaker, monotonic)
    breaker.end_probe(True)
    open_it(breaker)
    assert pause_of(breaker, monotonic) == 1.0


def test_only_one_probe_is_under_way_at_a_time(breaker: CircuitBreaker, monotonic: FakeMonotonic) -> None:
    open_it(breaker)
    monotonic.advance(1.0)
    claims = run_in_threads(*[breaker.begin_probe] * 8)
    assert sum(claims) == 1
    monotonic.advance(1000)
    assert not breaker.begin_probe()
    breaker.end_probe(False)
    assert not breaker.begin_probe()
    monotonic.advance(2.0)
    assert breaker.begin_probe()


def test_failures_from_several_threads_open_it_once(breaker: CircuitBreaker) -> None:
    assert sum(map(bool, run_in_threads(*[partial(breaker.record_failure, "read")] * 8))) == 1
