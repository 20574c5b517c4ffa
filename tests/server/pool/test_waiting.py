"""Who waits holds no thread, and is served in the order of coming."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from proxystash_server.cache import CacheClosedError, CacheConfig, CacheManager, EntryFilter, Lookups
from proxystash_server.pool import waiting as waiting_module
from proxystash_server.pool.health import Outcome
from proxystash_server.pool.pool import Pool
from proxystash_server.pool.requests import (
    AcquireRequest,
    Answer,
    PoolFullError,
    Release,
    Report,
    Shortage,
    UseResult,
)
from tests.server.pool.conftest import Fleet, Waiting


def test_first_come_first_served(fleet: Fleet) -> None:
    fleet.put(1)
    [held] = fleet.acquire()
    calls = [fleet.wait() for _ in range(3)]
    assert all(call.waits for call in calls)
    for call in calls:
        fleet.pool.release([Release(held.id)])
        # Whoever comes now does not overtake them.
        assert fleet.acquire() == []
        fleet.pool.run_due()
        [held] = call.leases
    assert fleet.pool.statistics().waiting == 0


def test_who_cannot_use_what_comes_free_does_not_hold_up_those_behind(fleet: Fleet) -> None:
    entry = fleet.put(1)
    [held] = fleet.acquire()
    picky = fleet.wait(exclude_keys=frozenset({entry.key}))
    other = fleet.wait(wanted=EntryFilter(source="other"))
    last = fleet.wait()
    fleet.pool.release([Release(held.id)])
    fleet.pool.run_due()
    assert (picky.waits, other.waits, len(last.leases)) == (True, True, 1)


@pytest.mark.parametrize("how", ["put", "expiry", "rest", "pair", "health"])
def test_whatever_comes_free_is_offered(fleet: Fleet, how: str) -> None:
    entry = fleet.put(1, source="first")
    fields: dict[str, object] = {"target": "shop.example"}
    if how == "put":
        fields["wanted"] = EntryFilter(source="second")
    elif how == "expiry":
        fleet.acquire(duration=30.0)
    else:
        outcome = Outcome.CONNECT_ERROR if how == "rest" else Outcome.BLOCKED
        if how == "health":
            fleet.manager.invalidate_by_health(entry.key)
        else:
            fleet.pool.report(
                [Report(UseResult(outcome, fleet.time.steady, target="shop.example"), entry.key)]
            )
    call = fleet.wait(**fields, **({"wait": 3600.0} if how != "expiry" else {}))
    fleet.pool.run_due()
    assert call.waits
    if how == "put":
        fleet.put(2, source="second")
    else:
        fleet.time.pass_time(30.0 if how == "expiry" else 1.2 * 600.0)
    fleet.pool.run_due()
    assert len(call.leases) == 1


def test_time_up_says_why(fleet: Fleet) -> None:
    fleet.put(1)
    fleet.acquire(duration=100.0)
    call = fleet.wait(wait=20.0)
    fleet.time.pass_time(19.9)
    fleet.pool.run_due()
    assert call.waits
    fleet.time.pass_time(0.2)
    fleet.pool.run_due()
    [answer] = call.answers
    assert isinstance(answer, Answer)
    assert (answer.granted, answer.shortage) == ([], Shortage.LEASED_OUT)
    assert answer.retry_after == pytest.approx(79.9)


def test_who_has_gone_is_not_served(fleet: Fleet) -> None:
    fleet.put(1)
    [held] = fleet.acquire()
    gone, next_call = fleet.wait(), fleet.wait()
    fleet.pool.cancel(gone.ticket, gone.deliver)  # type: ignore[arg-type]
    fleet.pool.release([Release(held.id)])
    fleet.pool.run_due()
    assert gone.answers == []
    assert len(next_call.leases) == 1


def test_who_goes_between_grant_and_answer_holds_nothing(fleet: Fleet) -> None:
    fleet.put(1)
    [held] = fleet.acquire()
    gone, next_call = fleet.wait(), fleet.wait()
    gone.is_there = False
    fleet.pool.release([Release(held.id)])
    fleet.pool.run_due()
    assert len(next_call.leases) == 1
    assert fleet.pool.statistics().leases == 1


def test_two_calls_with_one_request_id_get_the_same(fleet: Fleet) -> None:
    fleet.put(1)
    [held] = fleet.acquire()
    first, second = fleet.wait(request_id="one"), fleet.wait(request_id="one")
    fleet.pool.cancel(first.ticket, first.deliver)  # type: ignore[arg-type]
    third = fleet.wait(request_id="one")
    fleet.pool.release([Release(held.id)])
    fleet.pool.run_due()
    assert second.leases == third.leases
    assert fleet.pool.statistics().leases == 1


def test_an_entry_that_is_gone_when_it_is_lent_has_the_call_wait_on(fleet: Fleet) -> None:
    fleet.put(1, ttl_us=10_000_000)
    [held] = fleet.acquire()
    call = fleet.wait()
    fleet.time.pass_time(11.0)
    fleet.pool.release([Release(held.id)])
    fleet.pool.run_due()
    assert call.waits
    fleet.put(2)
    fleet.pool.run_due()
    assert len(call.leases) == 1


def test_a_wait_for_several_ends_with_the_first(fleet: Fleet) -> None:
    for number in range(3):
        fleet.put(number)
    held = fleet.acquire(count=3)
    call = fleet.wait(count=2)
    fleet.pool.release([Release(lease.id) for lease in held])
    fleet.pool.run_due()
    assert 1 <= len(call.leases) <= 2


def test_a_reuse_delay_is_waited_for(fleet: Fleet) -> None:
    fleet.put(1)
    [lease] = fleet.acquire(target="checker")
    fleet.pool.release([Release(lease.id)])
    call = fleet.wait(target="checker", reuse_delay=30.0)
    for _ in range(29):
        fleet.time.pass_time(1.0)
        fleet.pool.run_due()
    assert call.waits
    for _ in range(3):
        fleet.time.pass_time(1.0)
        fleet.pool.run_due()
    assert len(call.leases) == 1


def test_who_was_served_has_nothing_to_do_with_the_end_of_its_wait(fleet: Fleet) -> None:
    fleet.put(1)
    [held] = fleet.acquire()
    call = fleet.wait(wait=5.0)
    fleet.pool.release([Release(held.id)])
    fleet.pool.run_due()
    fleet.time.pass_time(6.0)
    fleet.pool.run_due()
    [lease] = call.leases
    assert fleet.pool.renew([lease.id], 60.0) != [None]
    assert fleet.pool.statistics().shortages == 0


def test_a_failure_of_one_answer_is_that_call_s_alone(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.put(1)
    fleet.put(2)
    held = fleet.acquire(count=2)
    calls = [fleet.wait(), fleet.wait()]
    fleet.pool.release([Release(lease.id) for lease in held])
    lookup_many = fleet.manager.lookup_many

    def failing(keys: Sequence[str]) -> Lookups:
        monkeypatch.setattr(fleet.manager, "lookup_many", lookup_many)
        raise RuntimeError("a fault")

    monkeypatch.setattr(fleet.manager, "lookup_many", failing)
    fleet.pool.run_due()
    assert [str(answer) for answer in calls[0].answers] == ["a fault"]
    assert len(calls[1].leases) == 1
    assert fleet.pool.statistics().leases == 1


def test_a_reuse_delay_is_waited_for_again_after_what_was_served_has_gone(fleet: Fleet) -> None:
    """Given a call that is served with a proxy which goes before it is answered."""
    fleet.put(1)
    [lease] = fleet.acquire(target="checker")
    fleet.pool.release([Release(lease.id)])
    call = fleet.wait(target="checker", reuse_delay=30.0)
    gone = fleet.put(2)
    fleet.manager.delete(gone.key)
    fleet.time.pass_time(20.0)
    fleet.pool.run_due()
    assert call.waits
    for _ in range(12):
        fleet.time.pass_time(1.0)
        fleet.pool.run_due()
    assert [one.key for one in call.leases] == [lease.key]


def test_those_who_wait_are_bounded(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxystash_server.pool.lending.MAX_WAITING", 3)
    assert waiting_module.MAX_WAITING == 10_000
    for _ in range(3):
        fleet.wait()
    with pytest.raises(PoolFullError):
        fleet.wait()


def test_closing_answers_everybody(fleet: Fleet) -> None:
    call = fleet.wait()
    fleet.pool.close()
    [answer] = call.answers
    assert isinstance(answer, CacheClosedError)
    with pytest.raises(CacheClosedError):
        fleet.wait()


def test_a_target_that_is_waited_for_is_not_forgotten(fleet: Fleet) -> None:
    call = fleet.wait(target="kept.example")
    for number in range(1100):
        fleet.acquire(target=f"t{number}.example")
    fleet.put(1)
    fleet.pool.run_due()
    assert len(call.leases) == 1


def test_a_thousand_calls_wait_without_a_thread_and_all_are_served(tmp_path: Path) -> None:
    config = CacheConfig(l2_cache_dir=tmp_path / "l2", l3_database_path=tmp_path / "l3" / "proxystash.db")
    with CacheManager(config, background=False) as manager, Pool(manager, tmp_path / "pool") as pool:
        manager.put_many([manager.new_entry(f"http://192.0.2.{number}:80") for number in range(20)])
        _wait_until(lambda: not pool.statistics().loading)
        before = threading.active_count()
        calls = [Waiting(pool, AcquireRequest(wait=60.0)) for _ in range(1000)]
        assert threading.active_count() == before
        chance = random.Random(1)
        served: set[int] = set()

        def returned() -> bool:
            for place, call in enumerate(calls):
                if call.answers and place not in served:
                    served.add(place)
                    [lease] = call.leases
                    if chance.random() < 0.9:
                        pool.release([Release(lease.id)])
                    else:
                        pool.report([Report(UseResult(Outcome.SUCCESS, pool.now()), lease_id=lease.id)])
                        pool.release([Release(lease.id)])
            return len(served) == 1000

        _wait_until(returned)
        assert pool.statistics().leases == 0


def _wait_until(done: object, seconds: float = 60.0) -> None:
    assert callable(done)
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.002)
