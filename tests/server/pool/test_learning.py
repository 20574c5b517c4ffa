"""What is reported decides what is lent, across restarts, and what the cache counts."""

from __future__ import annotations

from typing import Any

import pytest

from proxystash_server.cache import CacheUnavailableError, HealthStatus
from proxystash_server.pool.health import LONGEST_REST, PAIR_REST, PROXY_REST, Breaker, Outcome
from proxystash_server.pool.requests import (
    HealthEffect,
    LeaseNotFoundError,
    Release,
    Report,
    Shortage,
    UseResult,
)
from tests.server.pool.conftest import Fleet

TARGET = "shop.example"


def report(fleet: Fleet, key: str, outcome: Outcome, target: str = "", **fields: Any) -> HealthEffect:
    [effect] = fleet.pool.report(
        [Report(UseResult(outcome, fleet.time.steady, target=target, **fields), key)]
    )
    assert isinstance(effect, HealthEffect)
    return effect


def overall(fleet: Fleet, key: str) -> Breaker:
    health = fleet.pool.health_of(key)
    assert health is not None
    return health.overall.breaker


def test_who_is_banned_rests_at_that_target_alone(fleet: Fleet) -> None:
    entry = fleet.put(1)
    effect = report(fleet, entry.key, Outcome.BLOCKED, TARGET)
    assert effect.resting_until is None
    assert effect.resting_at_target_until is not None
    answer = fleet.answer(target=TARGET)
    assert (answer.granted, answer.shortage) == ([], Shortage.RESTING)
    assert 0.8 * PAIR_REST <= (answer.retry_after or 0) <= 1.2 * PAIR_REST
    assert len(fleet.acquire(target="news.example")) == 1


def test_who_is_not_reached_rests_everywhere_until_one_trial_succeeds(fleet: Fleet) -> None:
    entry = fleet.put(1)
    [lease] = fleet.acquire(target=TARGET)
    fleet.pool.release([Release(lease.id, UseResult(Outcome.CONNECT_ERROR, fleet.time.steady))])
    assert fleet.answer().shortage is Shortage.RESTING
    fleet.time.pass_time(1.2 * PROXY_REST)
    assert overall(fleet, entry.key) is Breaker.HALF_OPEN
    [trial] = fleet.acquire(target=TARGET)
    assert trial.trial
    assert fleet.acquire() == []
    fleet.pool.release([Release(trial.id, UseResult(Outcome.SUCCESS, fleet.time.steady))])
    [usual] = fleet.acquire()
    assert not usual.trial
    assert overall(fleet, entry.key) is Breaker.CLOSED


@pytest.mark.parametrize("how", ["released", "expired", "abandoned"])
def test_a_trial_that_tells_nothing_leaves_it_to_the_next(fleet: Fleet, how: str) -> None:
    entry = fleet.put(1)
    report(fleet, entry.key, Outcome.BLOCKED, TARGET)
    fleet.time.pass_time(1.2 * PAIR_REST)
    [first] = fleet.acquire(target=TARGET, duration=30.0)
    assert first.trial
    assert fleet.acquire(target=TARGET) == []
    if how == "released":
        fleet.pool.release([Release(first.id)])
    elif how == "expired":
        fleet.time.pass_time(31.0)
    else:
        fleet.pool.release([Release(first.id, UseResult(Outcome.ABANDONED, fleet.time.steady))])
    [second] = fleet.acquire(target=TARGET)
    assert second.trial


def test_a_trial_at_one_target_keeps_nobody_from_another(fleet: Fleet) -> None:
    entry = fleet.put(1)
    fleet.pool._max_leases = 5
    report(fleet, entry.key, Outcome.BLOCKED, TARGET)
    fleet.time.pass_time(1.2 * PAIR_REST)
    [trial] = fleet.acquire(target=TARGET)
    [other] = fleet.acquire(target="news.example")
    assert (trial.trial, other.trial) == (True, False)
    assert fleet.acquire(target=TARGET) == []


def test_a_trial_that_fails_rests_for_longer(fleet: Fleet) -> None:
    entry = fleet.put(1)
    report(fleet, entry.key, Outcome.CONNECT_ERROR)
    fleet.time.pass_time(1.2 * PROXY_REST)
    [trial] = fleet.acquire()
    fleet.pool.release([Release(trial.id, UseResult(Outcome.TIMEOUT, fleet.time.steady))])
    health = fleet.pool.health_of(entry.key)
    assert health is not None
    assert health.overall.resting_until is not None
    assert health.overall.resting_until - fleet.time.steady >= 0.8 * 2 * PROXY_REST


def test_refused_credentials_rest_longest(fleet: Fleet) -> None:
    entry = fleet.put(1)
    effect = report(fleet, entry.key, Outcome.AUTH_ERROR)
    assert (effect.resting_until or 0) - fleet.time.steady >= 0.8 * LONGEST_REST


def test_any_number_may_rest(fleet: Fleet) -> None:
    keys = [fleet.put(number).key for number in range(50)]
    for key in keys[:49]:
        report(fleet, key, Outcome.BLOCKED, TARGET)
    assert [lease.key for lease in fleet.acquire(target=TARGET, count=5)] == [keys[49]]


def test_each_opening_is_one_failure_and_three_evict(fleet: Fleet) -> None:
    entry = fleet.put(1)
    for failures in (1, 2, 3):
        effect = report(fleet, entry.key, Outcome.CONNECT_ERROR)
        for _ in range(5):
            # These are during the rest.
            report(fleet, entry.key, Outcome.CONNECT_ERROR)
        assert (effect.failure_count, effect.evicted) == (failures, failures == 3)
        fleet.time.pass_time(2 * LONGEST_REST)
    assert fleet.manager.get(entry.key) is None
    assert not report(fleet, entry.key, Outcome.SUCCESS).found


@pytest.mark.parametrize("outcome", [Outcome.SUCCESS, Outcome.BLOCKED])
def test_whoever_gets_through_starts_the_count_over(fleet: Fleet, outcome: Outcome) -> None:
    entry = fleet.put(1)
    for _ in range(6):
        effect = report(fleet, entry.key, Outcome.CONNECT_ERROR)
        assert (effect.failure_count, effect.health_status) == (1, HealthStatus.UNHEALTHY)
        fleet.time.pass_time(LONGEST_REST * 1.2)
        effect = report(fleet, entry.key, outcome, TARGET)
        assert (effect.failure_count, effect.health_status) == (0, HealthStatus.HEALTHY)
    stored = fleet.manager.get(entry.key)
    assert stored is not None
    assert (stored.failure_count, stored.health_status) == (0, HealthStatus.HEALTHY)


def test_bans_never_evict(fleet: Fleet) -> None:
    entry = fleet.put(1)
    for _ in range(20):
        assert report(fleet, entry.key, Outcome.BLOCKED, TARGET).failure_count == 0
        fleet.time.pass_time(LONGEST_REST * 1.2)
    assert fleet.manager.get(entry.key) is not None


def test_invalidate_by_health_is_a_connect_error_to_the_pool(fleet: Fleet) -> None:
    entry = fleet.put(1)
    fleet.manager.invalidate_by_health(entry.key)
    assert overall(fleet, entry.key) is Breaker.OPEN
    health = fleet.pool.health_of(entry.key)
    assert health is not None
    assert health.overall.failures == 1.0


def test_what_the_pool_tells_the_cache_is_not_told_back(fleet: Fleet) -> None:
    entry = fleet.put(1)
    report(fleet, entry.key, Outcome.CONNECT_ERROR)
    health = fleet.pool.health_of(entry.key)
    assert health is not None
    assert health.overall.failures == 1.0
    assert not fleet.pool._own_failures


def test_what_the_cache_cannot_be_told_of_it_is_told_later(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = fleet.put(1)

    def unavailable(_key: str) -> None:
        raise CacheUnavailableError("away")

    with monkeypatch.context() as context:
        context.setattr(fleet.manager, "invalidate_by_health", unavailable)
        report(fleet, entry.key, Outcome.CONNECT_ERROR)
        fleet.pool.maintain()
    stored = fleet.manager.get(entry.key)
    assert stored is not None
    assert stored.failure_count == 0
    fleet.pool.maintain()
    stored = fleet.manager.get(entry.key)
    assert stored is not None
    assert stored.failure_count == 1


def test_what_was_learned_survives_a_kill(fleet: Fleet) -> None:
    """Given a proxy banned at one target, one that rests everywhere, and one on trial."""
    banned, resting, tried = (fleet.put(number) for number in range(3))
    report(fleet, banned.key, Outcome.BLOCKED, TARGET)
    report(fleet, resting.key, Outcome.CONNECT_ERROR)
    report(fleet, tried.key, Outcome.BLOCKED, "news.example")
    report(fleet, tried.key, Outcome.SUCCESS, TARGET, latency=2.0)
    before = [fleet.pool.health_of(entry.key) for entry in (banned, resting, tried)]
    targets = fleet.pool.targets("", 9)
    fleet.pool.maintain()
    fleet.crash()
    after = [fleet.pool.health_of(entry.key) for entry in (banned, resting, tried)]
    for old, new in zip(before, after, strict=True):
        assert old is not None
        assert new is not None
        assert new.overall.score == pytest.approx(old.overall.score)
        assert new.overall.breaker is old.overall.breaker
        assert [(one.target, one.breaker, one.rests) for one in new.targets] == [
            (one.target, one.breaker, one.rests) for one in old.targets
        ]
        assert new.overall.latency == old.overall.latency
    assert [(one.target, one.resting) for one in fleet.pool.targets("", 9)[0]] == [
        (one.target, one.resting) for one in targets[0]
    ]
    assert [lease.key for lease in fleet.acquire(target=TARGET, count=3)] == [tried.key]
    fleet.time.pass_time(1.2 * PROXY_REST)
    assert len(fleet.acquire(count=3, target="x.example")) == 3


def test_after_a_boot_with_an_earlier_clock_nothing_rests_longer_than_it_was_to(fleet: Fleet) -> None:
    """Given a wall clock that has gone back a year while the machine was off."""
    entry = fleet.put(1)
    report(fleet, entry.key, Outcome.BLOCKED, TARGET)
    report(fleet, entry.key, Outcome.CONNECT_ERROR)
    fleet.put(2)
    [lease] = fleet.acquire(target=TARGET)
    fleet.pool.release([Release(lease.id, UseResult(Outcome.SUCCESS, fleet.time.steady))])
    fleet.pool.maintain()
    fleet.time.reboot()
    fleet.time.step(-365 * 86_400.0)
    fleet.crash()
    health = fleet.pool.health_of(entry.key)
    assert health is not None
    assert health.overall.resting_until is not None
    assert health.overall.resting_until - fleet.time.steady <= 1.2 * PROXY_REST
    fleet.time.pass_time(1.2 * PAIR_REST)
    assert len(fleet.acquire(target=TARGET, count=2, reuse_delay=60.0)) == 2
    # What is learned from now on counts, and what was known fades.
    report(fleet, entry.key, Outcome.CONNECT_ERROR)
    health = fleet.pool.health_of(entry.key)
    assert health is not None
    assert health.overall.breaker is Breaker.OPEN
    assert health.overall.failures == pytest.approx(1.0 + 0.5 ** (1.2 * PAIR_REST / 1800.0), abs=0.05)


def test_a_rest_that_is_prolonged_ends_later_and_is_over_then(fleet: Fleet) -> None:
    entry = fleet.put(1)
    report(fleet, entry.key, Outcome.BLOCKED, TARGET)
    report(fleet, entry.key, Outcome.RATE_LIMITED, TARGET, retry_after=3600.0)
    fleet.time.pass_time(3599.0)
    assert fleet.answer(target=TARGET).shortage is Shortage.RESTING
    fleet.time.pass_time(1.0)
    assert len(fleet.acquire(target=TARGET)) == 1


def test_a_result_is_of_now_at_the_latest(fleet: Fleet) -> None:
    entry = fleet.put(1)
    now = fleet.time.steady
    fleet.pool.report([Report(UseResult(Outcome.SUCCESS, now + 50.0), entry.key)])
    health = fleet.pool.health_of(entry.key)
    assert health is not None
    assert health.overall.last_result == now


def test_a_use_began_with_its_lease_at_the_earliest(fleet: Fleet) -> None:
    """Given a trial that says to have taken longer than the proxy has rested."""
    entry = fleet.put(1)
    report(fleet, entry.key, Outcome.CONNECT_ERROR)
    fleet.time.pass_time(1.2 * PROXY_REST)
    [trial] = fleet.acquire()
    result = UseResult(Outcome.SUCCESS, fleet.time.steady, latency=10 * PROXY_REST)
    fleet.pool.release([Release(trial.id, result)])
    assert overall(fleet, entry.key) is Breaker.CLOSED


def test_a_rest_at_another_target_does_not_say_when_the_next_comes_free(fleet: Fleet) -> None:
    entry = fleet.put(1)
    fleet.acquire(duration=3600.0)
    report(fleet, entry.key, Outcome.BLOCKED, "news.example")
    assert fleet.answer(target=TARGET).retry_after == pytest.approx(3600.0)


def test_a_proxy_that_rests_beyond_its_lease_comes_free_after_its_rest(fleet: Fleet) -> None:
    entry = fleet.put(1)
    fleet.acquire(target=TARGET, duration=30.0)
    report(fleet, entry.key, Outcome.BLOCKED, TARGET)
    again = fleet.answer(target=TARGET).retry_after
    assert again is not None
    assert again > 30.0


def test_a_rest_of_who_had_the_slot_before_says_nothing(fleet: Fleet) -> None:
    entry = fleet.put(1)
    report(fleet, entry.key, Outcome.BLOCKED, TARGET)
    fleet.manager.delete(entry.key)
    fleet.put(2)
    fleet.acquire(duration=36_000.0)
    assert fleet.answer(target=TARGET).retry_after == pytest.approx(36_000.0)


def test_a_trial_goes_on_after_a_kill(fleet: Fleet) -> None:
    entry = fleet.put(1)
    fleet.pool._max_leases = 3
    fleet.settings["max_leases"] = 3
    report(fleet, entry.key, Outcome.BLOCKED, TARGET)
    fleet.time.pass_time(1.2 * PAIR_REST)
    [trial] = fleet.acquire(target=TARGET)
    fleet.pool.maintain()
    fleet.crash()
    assert fleet.acquire(target=TARGET) == []
    fleet.pool.release([Release(trial.id)])
    assert len(fleet.acquire(target=TARGET)) == 1


def test_what_was_known_goes_with_the_entry(fleet: Fleet) -> None:
    entry = fleet.put(1)
    report(fleet, entry.key, Outcome.BLOCKED, TARGET)
    fleet.pool.maintain()
    fleet.manager.delete(entry.key)
    fleet.put(1)
    assert len(fleet.acquire(target=TARGET)) == 1
    fleet.pool.maintain()
    fleet.crash()
    health = fleet.pool.health_of(entry.key)
    assert health is not None
    assert health.overall.last_outcome == 0
    assert all(one.breaker is Breaker.CLOSED for one in health.targets)


def test_results_by_lease_and_by_key_and_of_what_is_not_known(fleet: Fleet) -> None:
    entry = fleet.put(1)
    [lease] = fleet.acquire(target=TARGET)
    result = UseResult(Outcome.SUCCESS, fleet.time.steady, latency=0.5)
    by_lease, by_key, nobody, unknown = fleet.pool.report(
        [
            Report(result, lease_id=lease.id),
            Report(result, entry.key),
            Report(result, "nobody"),
            Report(result, lease_id="unknown"),
        ]
    )
    assert isinstance(by_lease, HealthEffect)
    assert isinstance(by_key, HealthEffect)
    assert by_lease.found
    assert by_key.found
    assert isinstance(nobody, HealthEffect)
    assert not nobody.found
    assert isinstance(unknown, LeaseNotFoundError)
    health = fleet.pool.health_of(entry.key)
    assert health is not None
    assert health.overall.successes == 2.0
    [at] = health.targets
    assert (at.target, at.successes) == (TARGET, 1.0)
    assert fleet.pool.renew([lease.id], 60.0) != [None]


def test_targets_are_listed_by_name(fleet: Fleet) -> None:
    entry = fleet.put(1)
    for name in ("c.example", "a.example", "b.example"):
        report(fleet, entry.key, Outcome.BLOCKED, name)
    first, more = fleet.pool.targets("", 2)
    assert ([one.target for one in first], more) == (["a.example", "b.example"], True)
    [last], more = fleet.pool.targets("b.example", 2)
    assert (last.target, last.resting, last.failures, more) == ("c.example", 1, 1.0, False)
