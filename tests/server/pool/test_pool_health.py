"""Whose fault it was decides what rests, for how long, and what a proxy is judged by."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxystash_server.pool import health as health_module
from proxystash_server.pool.health import (
    HALF_LIFE,
    LONGEST_REST,
    PAIR_REST,
    PROXY_REST,
    Breaker,
    Evidence,
    Health,
    Outcome,
    Result,
)

SLOT = 0


def middle() -> float:
    """Randomness without jitter: a rest of exactly its length."""
    return 0.5


@pytest.fixture
def health() -> Health:
    return Health(middle)


def report(
    health: Health,
    outcome: Outcome,
    now: float,
    target: int = 0,
    *,
    begun: float | None = None,
    **rest: float,
) -> bool:
    begun_at = now if begun is None else begun
    return health.record(SLOT, target, Result(outcome, begun_at, now, **rest), now).proxy  # type: ignore[arg-type]


def breakers(health: Health, target: int, now: float) -> tuple[Breaker, Breaker]:
    return health.make_proxy(SLOT).breaker(now), health.make_pair(SLOT, target).breaker(now)


def test_evidence_halves_every_half_life() -> None:
    evidence = Evidence()
    evidence.add(100.0, 4.0, 2.0)
    assert evidence.counts(100.0 + HALF_LIFE) == (2.0, 1.0)
    evidence.add(100.0 + 2 * HALF_LIFE, 0.0, 0.0)
    assert evidence.counts(100.0 + 3 * HALF_LIFE) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("outcome", "times", "proxy", "pair"),
    [
        (Outcome.SUCCESS, 5, Breaker.CLOSED, Breaker.CLOSED),
        (Outcome.CONNECT_ERROR, 1, Breaker.OPEN, Breaker.CLOSED),
        (Outcome.AUTH_ERROR, 1, Breaker.OPEN, Breaker.CLOSED),
        (Outcome.TIMEOUT, 1, Breaker.CLOSED, Breaker.CLOSED),
        (Outcome.TIMEOUT, 2, Breaker.OPEN, Breaker.CLOSED),
        (Outcome.BLOCKED, 1, Breaker.CLOSED, Breaker.OPEN),
        (Outcome.RATE_LIMITED, 1, Breaker.CLOSED, Breaker.OPEN),
        (Outcome.BAD_CONTENT, 1, Breaker.CLOSED, Breaker.CLOSED),
        (Outcome.BAD_CONTENT, 2, Breaker.CLOSED, Breaker.OPEN),
        (Outcome.TARGET_ERROR, 50, Breaker.CLOSED, Breaker.CLOSED),
        (Outcome.ABANDONED, 50, Breaker.CLOSED, Breaker.CLOSED),
    ],
)
def test_what_an_outcome_opens(
    health: Health, outcome: Outcome, times: int, proxy: Breaker, pair: Breaker
) -> None:
    target = health.target_number("shop.example")
    for _ in range(times):
        report(health, outcome, 10.0, target)
    assert breakers(health, target, 10.0) == (proxy, pair)
    # Told at once of as many uses, the same follows.
    together = Health(middle)
    report(together, outcome, 10.0, together.target_number("shop.example"), count=times)
    assert breakers(together, target, 10.0) == (proxy, pair)


def test_a_success_between_two_timeouts_starts_the_row_over(health: Health) -> None:
    for outcome in (Outcome.TIMEOUT, Outcome.SUCCESS, Outcome.TIMEOUT):
        assert not report(health, outcome, 10.0)
    assert report(health, Outcome.TIMEOUT, 10.0)


def test_rests_grow_to_the_longest_and_shrink_with_each_success(health: Health) -> None:
    now, lengths = 0.0, []
    for _ in range(7):
        assert report(health, Outcome.CONNECT_ERROR, now)
        standing = health.make_proxy(SLOT)
        lengths.append(standing.until - now)
        now = standing.until
        assert standing.breaker(now) is Breaker.HALF_OPEN
    assert lengths == [PROXY_REST * 2**k for k in range(4)] + [LONGEST_REST] * 3
    standing = health.make_proxy(SLOT)
    for rests in range(6, -1, -1):
        report(health, Outcome.SUCCESS, now)
        assert standing.rests == rests
    assert standing.breaker(now) is Breaker.CLOSED


def test_a_proxy_that_was_away_for_long_needs_few_successes(health: Health) -> None:
    now = 0.0
    for _ in range(50):
        assert report(health, Outcome.CONNECT_ERROR, now)
        now = health.make_proxy(SLOT).until
    for _ in range(8):
        assert health.make_proxy(SLOT).breaker(now) is Breaker.HALF_OPEN
        report(health, Outcome.SUCCESS, now)
    assert health.make_proxy(SLOT).breaker(now) is Breaker.CLOSED


def test_a_pair_rests_as_long_as_the_target_asks(health: Health) -> None:
    target = health.target_number("shop.example")
    report(health, Outcome.RATE_LIMITED, 0.0, target, retry_after=7200.0)
    assert health.make_pair(SLOT, target).until == 7200.0
    other = health.target_number("news.example")
    report(health, Outcome.RATE_LIMITED, 0.0, other, retry_after=1.0)
    assert health.make_pair(SLOT, other).until == PAIR_REST


def test_what_began_before_a_rest_neither_prolongs_nor_ends_it(health: Health) -> None:
    report(health, Outcome.CONNECT_ERROR, 100.0)
    standing = health.make_proxy(SLOT)
    until = standing.until
    assert not report(health, Outcome.CONNECT_ERROR, 110.0, begun=95.0)
    report(health, Outcome.SUCCESS, 110.0, begun=95.0)
    assert (standing.until, standing.rests) == (until, 1)
    # Also after the rest: they were sent before.
    assert not report(health, Outcome.CONNECT_ERROR, until + 1, begun=95.0)
    assert standing.breaker(until + 1) is Breaker.HALF_OPEN


def test_a_success_begun_during_a_rest_ends_it(health: Health) -> None:
    report(health, Outcome.CONNECT_ERROR, 100.0)
    report(health, Outcome.SUCCESS, 110.0, begun=105.0)
    assert health.make_proxy(SLOT).breaker(110.0) is Breaker.CLOSED


def test_whoever_was_blocked_by_the_target_got_through(health: Health) -> None:
    report(health, Outcome.CONNECT_ERROR, 100.0)
    target = health.target_number("shop.example")
    now = health.make_proxy(SLOT).until
    report(health, Outcome.BLOCKED, now, target)
    assert breakers(health, target, now) == (Breaker.CLOSED, Breaker.OPEN)


def test_one_lease_at_a_time_tries_and_leaves_it_to_the_next(health: Health) -> None:
    report(health, Outcome.CONNECT_ERROR, 0.0)
    standing = health.make_proxy(SLOT)
    now = standing.until
    assert health.note_lent(SLOT, 0, "first", now)
    assert standing.is_kept_back(now)
    health.end_trial(SLOT, 0, "another")
    assert standing.is_kept_back(now)
    health.end_trial(SLOT, 0, "first")
    assert not standing.is_kept_back(now)


def test_rests_are_jittered() -> None:
    lengths = set()
    for seed in range(20):
        health = Health(random.Random(seed).random)
        report(health, Outcome.CONNECT_ERROR, 0.0)
        lengths.add(health.make_proxy(SLOT).until)
    assert len(lengths) == 20
    assert all(0.8 * PROXY_REST <= length <= 1.2 * PROXY_REST for length in lengths)


def test_an_unknown_pair_is_judged_by_its_proxy_and_its_target(health: Health) -> None:
    """Given a good and a bad proxy, and a target where half of all fails."""
    strict, easy = health.target_number("strict.example"), health.target_number("easy.example")
    for turn in range(50):
        health.record(1, easy, Result(Outcome.SUCCESS, 0.0, 0.0), 0.0)
        health.record(2, easy, Result(Outcome.CONNECT_ERROR, 0.0, 0.0), 0.0)
        health.record(3, strict, Result(Outcome.BLOCKED if turn % 2 else Outcome.SUCCESS, 0.0, 0.0), 0.0)
        health.record(3, easy, Result(Outcome.SUCCESS, 0.0, 0.0), 0.0)
    assert health.score(1, strict, 0.0) > health.score(2, strict, 0.0)
    assert health.score(4, strict, 0.0) < health.score(4, easy, 0.0)
    assert health.score(1, 0, 0.0) > 0.9
    assert health.score(2, 0, 0.0) < 0.1
    assert health.score(3, strict, 0.0) < health.score(3, easy, 0.0)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.integers(0, 2),
            st.sampled_from(list(Outcome)),
            st.integers(1, 1000),
            st.floats(0, 10_000),
        ),
        max_size=40,
    )
)
def test_scores_and_breakers_are_sane_whatever_is_reported(
    reports: list[tuple[int, int, Outcome, int, float]],
) -> None:
    health = Health(random.Random(1).random)
    numbers = [0, health.target_number("a.example"), health.target_number("b.example")]
    now = 0.0
    for slot, target, outcome, count, step in reports:
        now += step
        health.record(slot, numbers[target], Result(outcome, now, now, None, count), now)
        for number in numbers:
            assert 0.0 <= health.score(slot, number, now) <= 1.0
        standing = health.make_proxy(slot)
        assert standing.until <= now + 1.2 * LONGEST_REST
        assert 0 <= standing.rests <= health_module.MAX_RESTS


def test_the_pair_that_was_not_used_for_longest_is_forgotten(
    health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_module, "MAX_PAIRS", 2)
    target = health.target_number("shop.example")
    for slot in (0, 1, 0, 2):
        health.note_lent(slot, target, "lease", 1.0)
    assert [slot for slot, _, _ in health.pairs()] == [0, 2]


def test_the_target_that_was_not_used_for_longest_is_forgotten(
    health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_module, "MAX_TARGETS", 2)
    for name in ("a", "b", "a", "c"):
        health.target_number(name)
    assert [target.name for target in health.targets()] == ["a", "c"]


def test_evidence_that_comes_late_makes_none_of_it_younger() -> None:
    evidence = Evidence()
    evidence.add(100.0 + HALF_LIFE, 2.0, 0.0)
    evidence.add(100.0, 2.0, 0.0)
    assert evidence.counts(100.0 + 2 * HALF_LIFE) == (2.0, 0.0)


def test_only_what_worked_says_how_fast_a_proxy_is(health: Health) -> None:
    report(health, Outcome.SUCCESS, 10.0, latency=0.5)
    report(health, Outcome.TIMEOUT, 11.0, latency=30.0)
    assert health.make_proxy(SLOT).latency == 0.5


def test_the_target_of_a_proxy_that_was_not_used_for_longest_is_forgotten(
    health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_module, "MAX_TARGETS_OF_A_PROXY", 2)
    targets = [health.target_number(name) for name in ("a", "b", "c")]
    for now, target in enumerate((*targets[:2], targets[0], targets[2])):
        report(health, Outcome.SUCCESS, float(now), target)
    assert {target for target, _ in health.pairs_of(SLOT)} == {targets[0], targets[2]}


def test_everything_that_grows_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest unused go, a target only while nothing is leased for it, and whoever blocks is told."""
    monkeypatch.setattr(health_module, "MAX_TARGETS", 5)
    monkeypatch.setattr(health_module, "MAX_TARGETS_OF_A_PROXY", 3)
    monkeypatch.setattr(health_module, "MAX_PAIRS", 8)
    dropped: list[tuple[int, int]] = []
    health = Health(middle, lambda slot, target: dropped.append((slot, target)))
    kept = health.target_number("kept.example")
    leased = health.target(kept)
    assert leased is not None
    leased.leases = 1
    for number in range(50):
        target = health.target_number(f"t{number}.example")
        for slot in range(4):
            health.record(slot, target, Result(Outcome.BLOCKED, number, number), number)
        assert len(health._numbers) <= 5
        assert len(health._pairs) <= 8
        assert sum(1 for _ in health.pairs_of(0)) <= 3
    assert health.find_target("kept.example") == kept
    assert len(dropped) == 200 - len(health._pairs)
    assert health.changed <= {(slot, target) for slot, target, _ in health.pairs()} | {
        (s, 0) for s in range(4)
    }


def test_a_forgotten_proxy_leaves_nothing(health: Health) -> None:
    target = health.target_number("shop.example")
    report(health, Outcome.BLOCKED, 0.0, target)
    assert health.forget(SLOT)
    assert not health.forget(SLOT)
    assert health.pair(SLOT, target) is None
    assert not list(health.pairs_of(SLOT))
    assert not health.changed
    assert not health.targets()[0].slots
