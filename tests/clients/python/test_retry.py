"""When a call is made again, by a clock and dice that the tests hold."""

from __future__ import annotations

import math

import pytest

from proxystash import DeadlineExceededError, InvalidArgumentError, ProxystashError, UnavailableError
from proxystash._retry import Attempts, Backoff, RetryPolicy

POLICY = RetryPolicy(initial=0.1, multiplier=2, maximum=0.5)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_pauses_are_drawn_from_zero_to_a_growing_ceiling() -> None:
    assert [Backoff(POLICY, lambda: 0.0).next_pause() for _ in range(3)] == [0, 0, 0]

    highest = Backoff(POLICY, lambda: 1.0)

    assert [highest.next_pause() for _ in range(5)] == [0.1, 0.2, 0.4, 0.5, 0.5]


def test_after_a_success_pauses_are_short_again() -> None:
    backoff = Backoff(POLICY, lambda: 1.0)
    backoff.next_pause()
    backoff.next_pause()

    backoff.reset()

    assert backoff.next_pause() == 0.1


def test_a_call_is_repeated_until_its_deadline_and_then_fails_with_what_went_wrong(clock: Clock) -> None:
    attempts = Attempts(2.0, POLICY, repeatable=True, clock=clock, rand=lambda: 1.0)
    error = UnavailableError("gone")
    pauses = []

    def run_out_of_time() -> None:
        while True:
            pauses.append(attempts.pause_after(error))
            clock.now += pauses[-1]

    with pytest.raises(UnavailableError) as caught:
        run_out_of_time()

    assert caught.value is error
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5, 0.3])
    assert attempts.remaining() == pytest.approx(0)


def test_a_pause_never_reaches_beyond_the_deadline(clock: Clock) -> None:
    attempts = Attempts(0.15, RetryPolicy(0.1, 2, 100), repeatable=True, clock=clock, rand=lambda: 0.5)

    assert attempts.pause_after(UnavailableError("gone")) == 0.05
    assert attempts.pause_after(UnavailableError("gone")) == pytest.approx(0.075)


def test_time_that_passes_in_the_attempts_counts(clock: Clock) -> None:
    attempts = Attempts(2.0, POLICY, repeatable=True, clock=clock)
    clock.now += 1.95

    assert attempts.remaining() == pytest.approx(0.05)
    with pytest.raises(UnavailableError):
        attempts.pause_after(UnavailableError("gone"))


@pytest.mark.parametrize(
    "error", [InvalidArgumentError("no"), ProxystashError("no"), DeadlineExceededError("no")]
)
def test_only_unavailability_is_repeated(clock: Clock, error: ProxystashError) -> None:
    attempts = Attempts(2.0, POLICY, repeatable=True, clock=clock)

    with pytest.raises(type(error)) as caught:
        attempts.pause_after(error)

    assert caught.value is error


def test_what_may_happen_once_only_is_repeated_if_it_was_never_sent(clock: Clock) -> None:
    attempts = Attempts(2.0, POLICY, repeatable=False, clock=clock, rand=lambda: 1.0)

    assert attempts.pause_after(UnavailableError("refused", sent=False)) == 0.1
    with pytest.raises(UnavailableError):
        attempts.pause_after(UnavailableError("lost"))


def test_without_a_policy_nothing_is_repeated(clock: Clock) -> None:
    attempts = Attempts(2.0, None, repeatable=True, clock=clock)

    with pytest.raises(UnavailableError):
        attempts.pause_after(UnavailableError("refused", sent=False))


def test_running_out_of_time_in_a_repetition_is_told_as_the_unavailability_before_it(clock: Clock) -> None:
    attempts = Attempts(2.0, POLICY, repeatable=True, clock=clock)
    attempts.pause_after(UnavailableError("gone"))

    with pytest.raises(UnavailableError, match="gone"):
        attempts.pause_after(DeadlineExceededError("late"))


@pytest.mark.parametrize(
    "numbers",
    [
        (0, 2, 1),
        (-1, 2, 1),
        (2, 2, 1),
        (0.1, 0.5, 1),
        (0.1, math.inf, 1),
        (0.1, 2, math.inf),
        (math.nan, 2, 1),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(numbers: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="retry policy"):
        RetryPolicy(*numbers)
