"""Rounds are interleaved, and their figures are medians with extremes."""

import pytest

from tests.benchmarks.rounds import Spread, interleave, ratio, spread


def test_every_round_runs_each_action_once_in_turn() -> None:
    calls: list[str] = []

    def action(name: str) -> dict[str, float]:
        calls.append(name)
        return {"calls": len(calls)}

    measured = interleave({"a": lambda: action("a"), "b": lambda: action("b")}, 3)

    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert measured == {"a": {"calls": [1, 3, 5]}, "b": {"calls": [2, 4, 6]}}


def test_a_ratio_is_that_of_the_medians_with_the_extremes_of_the_rounds() -> None:
    assert ratio([10, 20, 90], [10, 10, 10]) == Spread(2, 1, 9)


def test_one_disturbed_round_changes_the_spread_and_not_the_ratio() -> None:
    disturbed = ratio([10, 10, 1], [20, 20, 20])

    assert disturbed.value == ratio([10, 10, 10], [20, 20, 20]).value
    assert disturbed.low == pytest.approx(0.05)


def test_what_a_call_is_worth_counts() -> None:
    assert ratio([3, 3, 3], [10, 10, 10], factor=100) == Spread(30, 30, 30)
    assert spread([2, 1, 4], factor=10) == Spread(20, 10, 40)


def test_series_of_different_lengths_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratio([1, 2], [1])
