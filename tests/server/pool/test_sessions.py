"""A session keeps to one proxy from call to call, and holds no lease."""

from __future__ import annotations

from typing import Any

import pytest

from proxystash_server.cache import EntryFilter, HealthStatus
from proxystash_server.pool import lending
from proxystash_server.pool.health import Outcome
from proxystash_server.pool.requests import (
    Lease,
    PoolFullError,
    Release,
    Report,
    SessionLostError,
    SessionRequest,
    Shortage,
    UseResult,
)
from tests.server.pool.conftest import Fleet

SESSION = SessionRequest("account-1")
STRICT = SessionRequest("account-1", strict=True)


def use(fleet: Fleet, session: SessionRequest = SESSION, **fields: Any) -> Lease:
    """Borrow for a session, and give back."""
    [lease] = fleet.acquire(session=session, **fields)
    fleet.pool.release([Release(lease.id)])
    return lease


def test_a_session_gets_the_same_proxy_and_takes_up_no_room(fleet: Fleet) -> None:
    for number in range(10):
        fleet.put(number)
    first = use(fleet)
    assert fleet.pool.statistics().leases == 0
    assert {use(fleet).key for _ in range(20)} == {first.key}
    assert not first.moved
    assert {use(fleet, SessionRequest(f"other-{number}")).key for number in range(30)} != {first.key}


def test_sessions_of_different_targets_are_different(fleet: Fleet) -> None:
    for number in range(30):
        fleet.put(number)
    keys = {use(fleet, target=f"t{number}.example").key for number in range(10)}
    assert len(keys) > 1


def test_it_is_forgotten_after_the_idle_timeout_and_kept_by_use(fleet: Fleet) -> None:
    for number in range(50):
        fleet.put(number)
    session = SessionRequest("account-1", idle_timeout=100.0)
    first = use(fleet, session)
    for _ in range(5):
        fleet.time.pass_time(90.0)
        assert use(fleet, session).key == first.key
    [lease] = fleet.acquire(session=session)
    fleet.time.pass_time(50.0)
    fleet.pool.renew([lease.id], 60.0)
    fleet.pool.release([Release(lease.id)])
    fleet.time.pass_time(90.0)
    fleet.pool.run_due()
    assert fleet.pool.statistics().sessions == 1
    fleet.time.pass_time(20.0)
    fleet.pool.run_due()
    assert fleet.pool.statistics().sessions == 0
    assert not use(fleet, session).moved


def test_it_is_chosen_anew_when_it_is_too_old(fleet: Fleet) -> None:
    for number in range(50):
        fleet.put(number)
    session = SessionRequest("account-1", idle_timeout=1000.0, max_age=120.0)
    first = use(fleet, session)
    fleet.time.pass_time(110.0)
    assert use(fleet, session).key == first.key
    fleet.time.pass_time(20.0)
    again = use(fleet, session)
    assert again.moved
    assert use(fleet, session).key == again.key


@pytest.mark.parametrize("how", ["deleted", "rests", "rests there", "does not match", "excluded"])
def test_it_moves_where_its_proxy_will_not_do_and_a_strict_one_is_lost(fleet: Fleet, how: str) -> None:
    for number in range(3):
        fleet.put(number)
    first = use(fleet, target="shop.example")
    fields: dict[str, Any] = {"target": "shop.example"}
    if how == "deleted":
        fleet.manager.delete(first.key)
    elif how == "excluded":
        fields["exclude_keys"] = frozenset({first.key})
    elif how == "does not match":
        fields["wanted"] = EntryFilter(source="new")
        fleet.put(9, source="new")
    else:
        outcome = Outcome.CONNECT_ERROR if how == "rests" else Outcome.BLOCKED
        fleet.pool.report([Report(UseResult(outcome, fleet.time.steady, target="shop.example"), first.key)])
    with pytest.raises(SessionLostError):
        fleet.acquire(session=STRICT, **fields)
    moved = use(fleet, **fields)
    assert (moved.moved, moved.key != first.key) == (True, True)
    again = use(fleet, **fields)
    assert (again.moved, again.key) == (False, moved.key)


def test_it_waits_for_its_proxy_while_somebody_else_has_it(fleet: Fleet) -> None:
    fleet.put(1)
    use(fleet)
    [other] = fleet.acquire()
    fleet.put(2)
    answer = fleet.answer(session=SESSION)
    assert (answer.granted, answer.shortage) == ([], Shortage.LEASED_OUT)
    call = fleet.wait(session=SESSION)
    assert call.waits
    fleet.pool.release([Release(other.id)])
    fleet.pool.run_due()
    [lease] = call.leases
    assert (lease.key, lease.moved) == (other.key, False)


def test_a_session_that_waits_moves_when_its_proxy_comes_to_rest(fleet: Fleet) -> None:
    fleet.put(1)
    use(fleet)
    [other] = fleet.acquire()
    spare = fleet.put(2)
    call, strict = fleet.wait(session=SESSION), fleet.wait(session=STRICT)
    fleet.pool.release([Release(other.id, UseResult(Outcome.CONNECT_ERROR, fleet.time.steady))])
    fleet.pool.run_due()
    [lease] = call.leases
    assert (lease.key, lease.moved) == (spare.key, True)
    # The session has moved by then, and the other call waits for where it is now.
    assert strict.waits


@pytest.mark.parametrize("outcome", [Outcome.CONNECT_ERROR, Outcome.BLOCKED])
def test_a_session_that_waits_moves_also_where_its_proxy_is_no_less_healthy_than_before(
    fleet: Fleet, outcome: Outcome
) -> None:
    fields = {"session": SESSION, "target": "shop.example"}
    fleet.put(1, health_status=HealthStatus.UNHEALTHY)
    use(fleet, target="shop.example")
    [other] = fleet.acquire(target="shop.example")
    spare = fleet.put(2)
    call = fleet.wait(**fields)
    fleet.pool.release([Release(other.id, UseResult(outcome, fleet.time.steady))])
    fleet.pool.run_due()
    assert [(one.key, one.moved) for one in call.leases] == [(spare.key, True)]


def test_ending_a_session_has_the_next_call_choose_anew(fleet: Fleet) -> None:
    for number in range(50):
        fleet.put(number)
    use(fleet)
    assert fleet.pool.end_session("account-1", "")
    assert not fleet.pool.end_session("account-1", "")
    assert not use(fleet, STRICT).moved
    [lease] = fleet.acquire(session=SESSION)
    fleet.pool.release([Release(lease.id, end_session=True)])
    assert fleet.pool.statistics().sessions == 0


def test_sessions_survive_a_kill(fleet: Fleet) -> None:
    for number in range(50):
        fleet.put(number)
    first = use(fleet, SessionRequest("account-1", idle_timeout=600.0))
    use(fleet, SessionRequest("account-2"))
    fleet.pool.end_session("account-2", "")
    fleet.time.pass_time(300.0)
    fleet.crash()
    assert fleet.pool.statistics().sessions == 1
    assert use(fleet).key == first.key
    fleet.time.pass_time(700.0)
    assert fleet.crash().statistics().sessions == 0


def test_calls_of_one_session_that_wait_get_one_proxy(fleet: Fleet) -> None:
    """Also where none of them had a proxy yet when they began to wait."""
    fleet.put(1)
    [held] = fleet.acquire()
    first, second = fleet.wait(session=SESSION), fleet.wait(session=STRICT)
    fleet.pool.release([Release(held.id)])
    fleet.pool.run_due()
    [lease] = first.leases
    fleet.put(2)
    fleet.pool.run_due()
    assert second.waits
    fleet.pool.release([Release(lease.id)])
    fleet.pool.run_due()
    assert [(one.key, one.moved) for one in second.leases] == [(lease.key, False)]


def test_a_session_waits_out_a_reuse_delay_at_its_own_proxy(fleet: Fleet) -> None:
    for number in range(5):
        fleet.put(number)
    first = use(fleet)
    call = fleet.wait(session=STRICT, reuse_delay=10.0)
    for _ in range(9):
        fleet.time.pass_time(1.0)
        fleet.pool.run_due()
        assert call.waits
    fleet.time.pass_time(2.0)
    fleet.pool.run_due()
    assert [(one.key, one.moved) for one in call.leases] == [(first.key, False)]


def test_a_session_whose_proxy_goes_as_it_is_served_moves(fleet: Fleet) -> None:
    first = fleet.put(1)
    use(fleet)
    [other] = fleet.acquire()
    spare = fleet.put(2)
    call = fleet.wait(session=SESSION)
    fleet.pool.release([Release(other.id)])
    # It is reserved by now, and not answered.
    fleet.manager.delete(first.key)
    fleet.pool.run_due()
    assert [(one.key, one.moved) for one in call.leases] == [(spare.key, True)]


def test_a_session_that_has_ended_already_is_no_fault_of_a_release(fleet: Fleet) -> None:
    for number in range(3):
        fleet.put(number)
    [first] = fleet.acquire(session=SESSION)
    other = fleet.acquire(count=1)[0]
    fleet.pool.end_session("account-1", "")
    releases = [Release(one.id, end_session=True) for one in (first, first, other)]
    assert [one.released for one in fleet.pool.release(releases)] == [True, False, True]
    assert fleet.pool.statistics().leases == 0


def test_after_a_boot_with_an_earlier_clock_a_session_gets_no_older_than_it_was_to(fleet: Fleet) -> None:
    for number in range(50):
        fleet.put(number)
    session = SessionRequest("account-1", idle_timeout=1000.0, max_age=120.0)
    use(fleet, session)
    fleet.time.reboot()
    fleet.time.step(-7200.0)
    fleet.crash()
    fleet.time.pass_time(130.0)
    assert use(fleet, session).moved


def test_sessions_are_bounded(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "MAX_SESSIONS", 2)
    fleet.put(1)
    for number in range(2):
        use(fleet, SessionRequest(f"account-{number}"))
    use(fleet, SessionRequest("account-0"))
    with pytest.raises(PoolFullError):
        fleet.acquire(session=SessionRequest("account-2"))
