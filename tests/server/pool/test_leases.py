"""A lease is the right to use a proxy until a moment, and is never given twice."""

from __future__ import annotations

import itertools
import random
import threading
from pathlib import Path

import pytest

from proxystash_server.cache import CacheTierType, CacheUnavailableError, EntryFilter, HealthStatus
from proxystash_server.cache.tiers.jsonl.log import LogFile
from proxystash_server.pool import lending
from proxystash_server.pool.health import Outcome
from proxystash_server.pool.records import GRACE_AFTER_RESTART
from proxystash_server.pool.requests import (
    AcquireRequest,
    Answer,
    PoolFullError,
    PoolLoadingError,
    Release,
    Report,
    SelectionPolicy,
    Shortage,
    UseResult,
)
from tests.server.pool.conftest import Fleet
from tests.torture.faults import Faults


def test_a_lease_has_the_entry_with_its_credentials(fleet: Fleet) -> None:
    entry = fleet.put(1, username="user", password="pass")
    [granted] = fleet.answer(holder="worker", target="shop.example", duration=20.0).granted
    assert granted.lease.key == granted.entry.key == entry.key
    assert granted.entry.password is not None
    assert granted.entry.password.get_secret_value() == "pass"
    assert granted.lease.expires_at - granted.lease.acquired_at == 20.0
    assert (granted.lease.holder, granted.lease.target) == ("worker", "shop.example")


def test_no_proxy_has_more_leases_than_it_may(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, max_leases=3)
    for number in range(4):
        fleet.put(number)
    leases = [lease for _ in range(20) for lease in fleet.acquire()]
    assert len(leases) == 12
    assert {len([one for one in leases if one.key == key]) for key in {one.key for one in leases}} == {3}
    assert fleet.answer().shortage is Shortage.LEASED_OUT
    fleet.close()


def test_a_request_may_lower_the_limit_and_not_raise_it(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, max_leases=2)
    fleet.put(1)
    assert len(fleet.acquire(max_leases=1)) == 1
    assert fleet.answer(max_leases=1).shortage is Shortage.EXCLUDED
    assert len(fleet.acquire(max_leases=9)) == 1
    assert fleet.acquire(max_leases=9) == []
    fleet.close()


def test_an_entry_may_say_how_many_leases_of_it_there_may_be(fleet: Fleet) -> None:
    entry = fleet.put(1, max_leases=3)
    other = fleet.put(2)
    keys = [lease.key for _ in range(9) for lease in fleet.acquire()]
    assert sorted(keys) == sorted([entry.key] * 3 + [other.key])
    health = fleet.pool.health_of(entry.key)
    assert health is not None
    assert (health.leases, health.max_leases) == (3, 3)
    assert fleet.answer(max_leases=2).shortage is Shortage.LEASED_OUT


def test_a_put_raises_the_limit_for_who_waits_and_lowers_it_for_who_comes(fleet: Fleet) -> None:
    fleet.put(1, max_leases=1)
    [first] = fleet.acquire()
    waiting = fleet.wait()
    fleet.put(1, max_leases=2)
    fleet.pool.run_due()
    [second] = waiting.leases
    fleet.put(1)
    assert fleet.pool.renew([first.id, second.id], 60.0) == [fleet.time.steady + 60.0] * 2
    fleet.pool.release([Release(first.id)])
    assert fleet.acquire() == []
    fleet.pool.release([Release(second.id)])
    assert len(fleet.acquire(count=2)) == 1


def test_a_put_that_lowers_the_limit_offers_the_proxy_to_nobody(fleet: Fleet) -> None:
    """Also where the same put makes it one that somebody waits for."""
    fleet.put(1, max_leases=2)
    fleet.acquire()
    waiting = fleet.wait(wanted=EntryFilter(source="list"))
    fleet.put(1, max_leases=1, source="list")
    fleet.pool.run_due()
    assert waiting.waits


def test_the_limit_of_an_entry_holds_after_a_restart_and_not_for_the_next_in_its_slot(fleet: Fleet) -> None:
    entry = fleet.put(1, max_leases=2)
    fleet.acquire()
    fleet.crash()
    assert [lease.key for _ in range(3) for lease in fleet.acquire()] == [entry.key]
    fleet.manager.delete(entry.key)
    fleet.put(2)
    assert [len(fleet.acquire()) for _ in range(2)] == [1, 0]


def test_several_are_all_different_and_a_shortage_says_why_there_are_not_more(fleet: Fleet) -> None:
    for number in range(5):
        fleet.put(number)
    answer = fleet.answer(count=3)
    assert len({granted.lease.key for granted in answer.granted}) == 3
    assert answer.shortage is Shortage.NONE
    answer = fleet.answer(count=3)
    assert len(answer.granted) == 2
    assert answer.shortage is Shortage.LEASED_OUT


def test_a_filter_narrows_the_choice_and_dead_ones_are_lent_by_name_alone(fleet: Fleet) -> None:
    german = fleet.put(1, labels={"country": "DE"})
    fleet.put(2, labels={"country": "FR"})
    dead = fleet.put(3, labels={"country": "DE"}, health_status=HealthStatus.DEAD)
    wanted = EntryFilter(labels={"country": "DE"})
    assert [lease.key for lease in fleet.acquire(wanted=wanted, count=9)] == [german.key]
    by_name = EntryFilter(health_statuses=frozenset({HealthStatus.DEAD}))
    assert [lease.key for lease in fleet.acquire(wanted=by_name)] == [dead.key]
    assert fleet.answer(wanted=EntryFilter(source="nobody")).shortage is Shortage.NO_MATCH


def test_an_expired_lease_frees_its_proxy_and_says_nothing_of_it(fleet: Fleet) -> None:
    entry = fleet.put(1)
    [lease] = fleet.acquire(duration=10.0)
    assert fleet.answer().retry_after == pytest.approx(10.0)
    fleet.time.pass_time(10.0)
    [again] = fleet.acquire()
    assert (again.key, again.id != lease.id) == (entry.key, True)
    assert fleet.pool.renew([lease.id], 60.0) == [None]
    health = fleet.pool.health_of(entry.key)
    assert health is not None
    assert (health.overall.failures, health.leases) == (0.0, 1)


def test_renewing_counts_from_now(fleet: Fleet) -> None:
    fleet.put(1)
    [lease] = fleet.acquire(duration=10.0)
    fleet.time.pass_time(8.0)
    [end] = fleet.pool.renew([lease.id, "unknown"], 30.0)[:1]
    assert end == fleet.time.steady + 30.0
    fleet.time.pass_time(29.0)
    assert fleet.acquire() == []
    fleet.time.pass_time(1.0)
    assert len(fleet.acquire()) == 1


def test_a_late_release_never_touches_the_next_holder(fleet: Fleet) -> None:
    fleet.put(1)
    [lease] = fleet.acquire(duration=10.0)
    fleet.time.pass_time(11.0)
    [next_lease] = fleet.acquire()
    [released] = fleet.pool.release([Release(lease.id)])
    assert not released.released
    assert fleet.pool.renew([next_lease.id], 60.0) != [None]


def test_the_result_of_a_release_counts_once_also_where_expiry_came_first(fleet: Fleet) -> None:
    entry = fleet.put(1)
    [lease] = fleet.acquire(duration=10.0)
    fleet.time.pass_time(11.0)
    release = Release(lease.id, UseResult(Outcome.SUCCESS, fleet.time.steady))
    [first] = fleet.pool.release([release])
    [second] = fleet.pool.release([release])
    assert (first.released, first.effect is not None) == (False, True)
    assert (second.released, second.effect) == (False, None)
    health = fleet.pool.health_of(entry.key)
    assert health is not None
    assert health.overall.successes == 1.0


def test_the_result_of_a_release_counts_where_the_entry_was_put_anew_meanwhile(fleet: Fleet) -> None:
    entry = fleet.put(1)
    [lease] = fleet.acquire()
    fleet.manager.delete(entry.key)
    fleet.put(1)
    result = UseResult(Outcome.SUCCESS, fleet.time.steady)
    [released] = fleet.pool.release([Release(lease.id, result)])
    assert (released.released, released.effect is not None and released.effect.found) == (False, True)


def test_a_renewal_survives_a_kill(fleet: Fleet) -> None:
    fleet.put(1)
    [lease] = fleet.acquire(duration=20.0)
    [end] = fleet.pool.renew([lease.id], 600.0)
    [held] = fleet.crash().leases(0, 10)[0]
    assert (held.id, held.duration) == (lease.id, 600.0)
    assert held.expires_at == pytest.approx(end)


def test_put_keeps_a_lease_and_delete_eviction_and_clear_end_it(fleet: Fleet) -> None:
    for number in range(4):
        fleet.put(number)
    leases = fleet.acquire(count=4)
    fleet.put(0)
    for lease in leases:
        assert fleet.pool.renew([lease.id], 60.0) != [None]
    fleet.manager.delete(leases[0].key)
    for _ in range(3):
        fleet.manager.invalidate_by_health(leases[1].key)
    assert fleet.pool.renew([lease.id for lease in leases[:2]], 60.0) == [None, None]
    assert fleet.pool.renew([leases[2].id], 60.0) != [None]
    fleet.manager.clear()
    assert fleet.pool.renew([lease.id for lease in leases], 60.0) == [None] * 4
    assert fleet.pool.statistics().leases == 0
    assert fleet.answer().shortage is Shortage.NO_MATCH


def test_any_number_of_entries_that_have_expired_unnoticed_hide_none_that_is_free(fleet: Fleet) -> None:
    """As where a whole list has expired, and the cleaner has not come yet."""
    kept = fleet.put(1)
    for number in range(2, 52):
        fleet.put(number, ttl_us=5_000_000)
    fleet.time.pass_time(6.0)
    assert [lease.key for lease in fleet.acquire()] == [kept.key]


def test_an_entry_that_has_expired_unnoticed_is_not_lent(fleet: Fleet) -> None:
    fleet.put(1, ttl_us=5_000_000)
    kept = fleet.put(2)
    fleet.time.pass_time(6.0)
    assert [lease.key for lease in fleet.acquire(count=2)] == [kept.key]
    assert fleet.pool.statistics().leases == 1


def test_no_lease_is_left_where_no_tier_answers(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.put(1)

    def unavailable(_keys: object) -> None:
        raise CacheUnavailableError("away")

    with monkeypatch.context() as context:
        context.setattr(fleet.manager, "lookup_many", unavailable)
        with pytest.raises(CacheUnavailableError):
            fleet.acquire()
    assert len(fleet.acquire()) == 1


@pytest.mark.parametrize("policy", SelectionPolicy)
def test_every_policy_finds_what_there_is(fleet: Fleet, policy: SelectionPolicy) -> None:
    keys = {fleet.put(number).key for number in range(30)}
    assert {lease.key for _ in range(30) for lease in fleet.acquire(policy=policy)} == keys
    assert fleet.acquire(policy=policy) == []


def test_least_recently_used_goes_round(fleet: Fleet) -> None:
    keys = [fleet.put(number).key for number in range(6)]
    order = []
    for _ in range(18):
        [lease] = fleet.acquire(policy=SelectionPolicy.LEAST_RECENTLY_USED)
        fleet.pool.release([Release(lease.id)])
        fleet.time.pass_time(0.5)
        order.append(lease.key)
    assert sorted(order[:6]) == sorted(keys)
    assert order[:6] == order[6:12] == order[12:]


def test_the_default_prefers_what_has_worked_and_wears_nobody_out(fleet: Fleet) -> None:
    keys = [fleet.put(number).key for number in range(10)]
    for key in keys[:5]:
        fleet.pool.report([Report(UseResult(Outcome.SUCCESS, fleet.time.steady, count=20), key)])
        fleet.pool.report(
            [Report(UseResult(Outcome.TIMEOUT, fleet.time.steady, count=1), key) for key in keys[5:]]
        )
        fleet.pool.report([Report(UseResult(Outcome.TARGET_ERROR, 0.0), key) for key in keys])
        fleet.time.pass_time(3600)
    for key in keys[:5]:
        fleet.pool.report([Report(UseResult(Outcome.SUCCESS, fleet.time.steady, count=20), key)])
    chosen = []
    for _ in range(300):
        [lease] = fleet.acquire()
        fleet.pool.release([Release(lease.id)])
        chosen.append(lease.key)
    good = sum(key in keys[:5] for key in chosen)
    assert good > 240
    assert max(map(chosen.count, keys)) < 300 * 3 / 5


def test_reuse_delay_excluded_keys_and_what_a_holder_holds(fleet: Fleet) -> None:
    first, second = fleet.put(1), fleet.put(2)
    [lease] = fleet.acquire(target="shop.example", exclude_keys=frozenset({second.key}))
    assert lease.key == first.key
    fleet.pool.release([Release(lease.id)])
    [lease] = fleet.acquire(target="shop.example", reuse_delay=60.0)
    assert lease.key == second.key
    fleet.pool.release([Release(lease.id)])
    answer = fleet.answer(target="shop.example", reuse_delay=60.0)
    assert (answer.granted, answer.shortage) == ([], Shortage.EXCLUDED)
    assert len(fleet.acquire(target="news.example", reuse_delay=60.0, count=2)) == 2
    fleet.time.pass_time(61.0)
    assert len(fleet.acquire(target="shop.example", reuse_delay=60.0, count=2)) == 2


def test_a_holder_gets_none_that_it_holds(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, max_leases=5)
    for number in range(3):
        fleet.put(number)
    keys = [lease.key for _ in range(5) for lease in fleet.acquire(holder="worker", exclude_held=True)]
    assert len(keys) == len(set(keys)) == 3
    assert len(fleet.acquire(holder="other", exclude_held=True, count=3)) == 3
    fleet.close()


def test_the_same_request_id_gets_the_same_leases_while_they_are_held(fleet: Fleet) -> None:
    for number in range(4):
        fleet.put(number)
    first = fleet.acquire(count=2, request_id="one")
    assert fleet.acquire(count=2, request_id="one") == first
    assert fleet.pool.statistics().granted == 2
    fleet.pool.release([Release(lease.id) for lease in first])
    assert fleet.acquire(count=2, request_id="one") != first


def test_an_answer_that_reached_nobody_ends_no_lease_of_a_repeated_call(fleet: Fleet) -> None:
    """Given a call whose client has gone, and the same again by its next connection."""
    fleet.put(1)
    lost, repeated = fleet.answer(request_id="one"), fleet.answer(request_id="one")
    assert [one.lease.id for one in lost.granted] == [one.lease.id for one in repeated.granted]
    fleet.pool.abandon(lost)
    assert fleet.pool.statistics().leases == 1
    fleet.pool.abandon(repeated)
    assert fleet.pool.statistics().leases == 0


def test_an_abandoned_answer_ends_no_lease_of_before_a_kill(fleet: Fleet) -> None:
    fleet.put(1)
    [lease] = fleet.acquire(request_id="one")
    fleet.crash()
    fleet.pool.abandon(fleet.answer(request_id="one"))
    assert fleet.pool.renew([lease.id], 60.0) != [None]


def test_leases_are_bounded(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "MAX_LEASES", 2)
    for number in range(4):
        fleet.put(number)
    assert len(fleet.acquire(count=2)) == 2
    with pytest.raises(PoolFullError):
        fleet.acquire()


def test_leases_survive_a_kill_with_their_ends(fleet: Fleet) -> None:
    for number in range(3):
        fleet.put(number)
    [long] = fleet.acquire(duration=600.0, holder="worker", target="shop.example", request_id="r")
    [short] = fleet.acquire(duration=20.0)
    [released] = fleet.acquire()
    fleet.pool.release([Release(released.id)])
    fleet.time.pass_time(15.0)
    pool = fleet.crash()
    held, _ = pool.leases(0, 10)
    assert [one.id for one in held] == [long.id, short.id]
    assert held[0].expires_at == pytest.approx(long.expires_at)
    assert (held[0].holder, held[0].target) == ("worker", "shop.example")
    # Whoever holds the other has a moment to renew it.
    assert held[1].expires_at == pytest.approx(fleet.time.steady + GRACE_AFTER_RESTART)
    assert [lease.id for lease in fleet.acquire(request_id="r")] == [long.id]
    assert [lease.key for lease in fleet.acquire(count=3)] == [released.key]


@pytest.mark.parametrize("step", [-7200.0, 7200.0])
def test_steps_of_the_wall_clock_give_no_lease_twice(fleet: Fleet, step: float) -> None:
    fleet.put(1)
    [lease] = fleet.acquire(duration=60.0)
    fleet.time.step(step)
    assert fleet.acquire() == []
    fleet.time.pass_time(30.0)
    fleet.crash()
    assert fleet.acquire() == []
    assert fleet.pool.renew([lease.id], 60.0) != [None]
    fleet.time.pass_time(60.0)
    assert len(fleet.acquire()) == 1


def test_after_another_boot_no_lease_lasts_longer_than_it_was_for(fleet: Fleet) -> None:
    """Given a wall clock that has gone back two hours while the machine was off."""
    fleet.put(1)
    [lease] = fleet.acquire(duration=60.0)
    fleet.time.reboot()
    fleet.time.step(-7200.0)
    fleet.crash()
    [held] = fleet.pool.leases(0, 10)[0]
    assert (held.id, held.expires_at - fleet.time.steady) == (lease.id, 60.0)


def test_what_was_lent_after_an_expiry_is_held_alone_after_a_kill(fleet: Fleet) -> None:
    fleet.put(1)
    [first] = fleet.acquire(duration=5.0)
    fleet.time.pass_time(6.0)
    [second] = fleet.acquire(duration=60.0)
    pool = fleet.crash()
    assert [lease.id for lease in pool.leases(0, 10)[0]] == [second.id]
    assert pool.renew([first.id], 60.0) == [None]


def test_how_long_calls_took_does_not_count_their_waiting(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a clock that goes on by a millisecond whenever it is looked at."""
    moment = itertools.count(step=1_000_000)
    monkeypatch.setattr("time.perf_counter_ns", lambda: next(moment))
    assert fleet.pool.statistics().acquire_latency.max_us == 0
    fleet.put(1)
    [lease] = fleet.acquire()
    assert 0 < fleet.pool.statistics().acquire_latency.max_us < 1_000_000
    waiting = fleet.wait()
    moment = itertools.count(10**15, 1_000_000)
    fleet.pool.release([Release(lease.id)])
    fleet.pool.run_due()
    assert waiting.leases
    assert 0 < fleet.pool.statistics().acquire_latency.max_us < 1_000_000


def test_leases_of_entries_that_have_gone_meanwhile_end_when_all_is_loaded(fleet: Fleet) -> None:
    entry = fleet.put(1)
    fleet.acquire()
    fleet.manager.unsubscribe(fleet.pool._on_changes)
    fleet.manager.delete(entry.key)
    assert fleet.open().statistics().leases == 0


def test_an_entry_that_cannot_be_read_for_a_while_keeps_its_leases_and_is_lent_again(
    tmp_path: Path,
) -> None:
    """Given a tier that is skipped, and an entry that it alone has: nobody takes it for one that is gone."""
    faults = Faults()
    with faults.installed():
        fleet = Fleet(tmp_path, max_leases=2)
        entry = fleet.put(1)
        [held] = fleet.acquire(target="shop.example")
        fleet.pool.report([Report(UseResult(Outcome.BLOCKED, fleet.time.steady), lease_id=held.id)])
        for tier in (fleet.manager.l1_tier, fleet.manager.l2_tier):
            tier.delete(entry.key)
        faults.take_down(CacheTierType.L3)
        for _ in range(3):
            with pytest.raises(CacheUnavailableError):
                fleet.answer()
        assert fleet.answer().shortage is Shortage.RESTING

        waiting = fleet.wait()
        faults.heal()
        fleet.time.pass_time(20.0)
        fleet.manager.maintain()
        fleet.pool.run_due()

        assert [lease.key for lease in waiting.leases] == [entry.key]
        assert fleet.pool.renew([held.id], 60.0) != [None]
        health = fleet.pool.health_of(entry.key)
        assert health is not None
        assert [standing.target for standing in health.targets] == ["shop.example"]
        fleet.close()


def test_a_start_while_a_tier_is_away_ends_no_lease_of_an_entry_that_it_has(tmp_path: Path) -> None:
    """Nor does it forget what was learned; what can be read is lent meanwhile."""
    faults = Faults()
    with faults.installed():
        fleet = Fleet(tmp_path)
        away, here = fleet.put(1), fleet.put(2)
        leases = fleet.acquire(count=2)
        [held] = [lease for lease in leases if lease.key == away.key]
        fleet.pool.report([Report(UseResult(Outcome.SUCCESS, fleet.time.steady), lease_id=held.id)])
        fleet.pool.release([Release(lease.id) for lease in leases if lease.key == here.key])
        fleet.pool.maintain()
        for tier in (fleet.manager.l1_tier, fleet.manager.l2_tier):
            tier.delete(away.key)
        faults.take_down(CacheTierType.L3)
        for _ in range(3):
            with pytest.raises(CacheUnavailableError):
                fleet.manager.get(away.key)

        for _ in range(2):
            with pytest.raises(CacheUnavailableError):
                fleet.crash()
        assert [lease.key for lease in fleet.acquire(duration=5.0)] == [here.key]
        with pytest.raises(PoolLoadingError):
            fleet.answer()
        assert fleet.pool.statistics().loading

        faults.heal()
        fleet.time.pass_time(20.0)
        fleet.manager.maintain()
        fleet.pool.load()
        assert fleet.pool.renew([held.id], 60.0) != [None]
        assert [lease.key for lease in fleet.acquire(count=2)] == [here.key]
        health = fleet.pool.health_of(away.key)
        assert health is not None
        assert health.overall.successes > 0
        fleet.close()


def test_a_full_disk_has_leases_held_in_memory(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.put(1)
    fleet.put(2)
    with monkeypatch.context() as context:

        def full(*_arguments: object) -> None:
            raise OSError(28, "No space left on device")

        context.setattr(LogFile, "append", full)
        [lease] = fleet.acquire()
    assert fleet.pool.statistics().journal_degraded
    assert fleet.pool.renew([lease.id], 60.0) != [None]
    fleet.pool.maintain()
    assert not fleet.pool.statistics().journal_degraded
    assert [one.id for one in fleet.crash().leases(0, 10)[0]] == [lease.id]


def test_nothing_is_said_of_what_is_not_loaded_yet(fleet: Fleet) -> None:
    fleet.pool._told = set()
    with pytest.raises(PoolLoadingError):
        fleet.acquire()


def test_changes_while_the_entries_are_loaded_win(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given an entry that is removed, and one that is replaced, after the page with both was read."""
    kept, removed = fleet.put(1, source="old"), fleet.put(2)
    scan = fleet.manager.scan_entries

    def scanning(*arguments: object) -> object:
        page = scan(*arguments)  # type: ignore[arg-type]
        fleet.manager.delete(removed.key)
        fleet.put(1, source="new")
        return page

    fleet.manager.unsubscribe(fleet.pool._on_changes)
    monkeypatch.setattr(fleet.manager, "scan_entries", scanning)
    fleet.open()
    assert fleet.answer(wanted=EntryFilter(source="old")).shortage is Shortage.NO_MATCH
    assert fleet.pool.health_of(removed.key) is None
    assert [lease.key for lease in fleet.acquire(count=5)] == [kept.key]


def test_leases_are_listed_oldest_first_in_pages(fleet: Fleet) -> None:
    for number in range(5):
        fleet.put(number)
    ids = [lease.id for lease in fleet.acquire(count=5, holder="worker", target="shop.example")]
    first, after = fleet.pool.leases(0, 3)
    assert after is not None
    second, end = fleet.pool.leases(after, 3)
    assert ([lease.id for lease in [*first, *second]], end) == (ids, None)
    assert len(fleet.pool.leases(0, 9, holder="worker")[0]) == 5
    assert fleet.pool.leases(0, 9, target="news.example") == ([], None)
    assert len(fleet.pool.leases(0, 9, key=first[0].key)[0]) == 1


def test_threads_never_hold_more_than_they_may_and_get_what_is_free(tmp_path: Path) -> None:
    """Given eight threads that borrow, renew, report and return, two leases for each of six proxies."""
    fleet = Fleet(tmp_path, max_leases=2)
    for number in range(6):
        fleet.put(number)
    holders: dict[str, int] = {}
    guard, errors = threading.Lock(), []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(150):
                answer = fleet.pool.acquire(AcquireRequest(target=chance.choice(["", "shop.example"])))
                assert isinstance(answer, Answer)
                for granted in answer.granted:
                    key = granted.lease.key
                    with guard:
                        holders[key] = holders.get(key, 0) + 1
                        assert holders[key] <= 2, "too many holders"
                    if chance.random() < 0.3:
                        assert fleet.pool.renew([granted.lease.id], 60.0) != [None]
                    with guard:
                        holders[key] -= 1
                    result = UseResult(Outcome.SUCCESS, fleet.time.steady) if chance.random() < 0.5 else None
                    [released] = fleet.pool.release([Release(granted.lease.id, result)])
                    assert released.released
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    statistics = fleet.pool.statistics()
    assert (statistics.leases, statistics.ready) == (0, 6)
    assert statistics.granted == statistics.released
    fleet.close()
