"""What a leaser keeps ready and has to release, on a fake clock and without a network."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from proxystash import (
    AcquireResult,
    CacheEntry,
    InvalidArgumentError,
    Lease,
    LeaseRelease,
    NoProxyError,
    Outcome,
    Shortage,
    UnavailableError,
    UseResult,
)
from proxystash._supplies import MAX_RELEASES, Supplies, Supply, Terms
from proxystash.v1 import pool_service_pb2 as pb

TERMS = Terms(ready=4, seconds=60.0, margin=15.0, wait=20.0, delay=0.2)
NOW = datetime(2026, 1, 1, tzinfo=UTC)
NOBODY = None


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def supplies(clock: Clock) -> Supplies[None]:
    return Supplies(TERMS, clock)


def opened(supplies: Supplies[None], target: str = "shop.example") -> Supply[None]:
    return supplies.open(target, pb.AcquireRequest(target=target), NOBODY)


def leases(*names: str) -> AcquireResult:
    return AcquireResult(
        tuple(Lease(name, f"key-{name}", CacheEntry("http://h:1"), NOW, NOW) for name in names)
    )


def asked(supplies: Supplies[None]) -> pb.AcquireRequest:
    """The one thing that is asked for now, as it was when it was asked for."""
    [(_, request)] = supplies.work().asking
    copy = pb.AcquireRequest()
    copy.CopyFrom(request)
    return copy


def taken(supply: Supply[None]) -> str | None:
    found = supply.take()
    return None if found is None else found[0].lease_id


def released(supplies: Supplies[None]) -> list[str]:
    """What is sent now, and arrives."""
    sent = [release.lease_id for release in supplies.work().releases]
    if sent:
        supplies.released()
    return sent


def test_as_many_are_asked_for_as_are_to_be_ready_and_as_wait(supplies: Supplies[None], clock: Clock) -> None:
    supply = opened(supplies)

    first = asked(supplies)
    assert (first.target, first.count, first.HasField("wait")) == ("shop.example", 4, False)
    assert supplies.work().asking == []
    supplies.answered(supply, leases("a"))
    supply.hurry(clock.now + 10)
    supply.hurry(clock.now + 5)
    second = asked(supplies)
    assert (second.count, second.HasField("wait")) == (5, False)
    supplies.answered(supply, AcquireResult((), Shortage.LEASED_OUT))
    third = asked(supplies)
    assert (third.count, third.wait.seconds) == (5, 10)
    assert first.request_id != second.request_id
    assert first.request_id


def test_what_is_ready_is_given_in_the_order_of_its_arrival(supplies: Supplies[None]) -> None:
    supply = opened(supplies)
    asked(supplies)
    supplies.answered(supply, leases("a", "b", "c", "d"))

    assert supplies.work().asking == []
    assert [taken(supply) for _ in range(5)] == ["a", "b", "c", "d", None]
    assert asked(supplies).count == 4


@pytest.mark.parametrize(("late", "given"), [(0.0, True), (44.9, True), (45.1, False), (500.0, False)])
def test_a_lease_that_ends_before_one_use_does_is_released_and_not_given(
    supplies: Supplies[None], clock: Clock, late: float, given: bool
) -> None:
    supply = opened(supplies)
    asked(supplies)
    supplies.answered(supply, leases("a"))
    clock.now += late

    found = supply.take()

    if found is not None:
        lease, term = found
        assert term.ends_at - clock.now >= TERMS.margin
        assert clock.now < term.renew_at < term.ends_at
        assert lease.lease_id == "a"
    assert (found is not None) is given
    supplies.work()
    clock.now += TERMS.delay
    assert released(supplies) == ([] if given else ["a"])


def test_a_lease_counts_from_when_it_was_first_asked_for(supplies: Supplies[None], clock: Clock) -> None:
    """Given an answer that was lost, then the repetition gets the lease of the first time, which is older."""
    supply = opened(supplies)
    first = asked(supplies)
    clock.now += 30
    supply.failed(UnavailableError("not now"))
    supply.take()
    clock.now += 2
    again = asked(supplies)
    assert again == first
    supplies.answered(supply, leases("a"))

    clock.now += 12
    assert supply.take() is not None
    supplies.answered(supply, leases("b"))
    clock.now += 2
    assert supply.take() is None


def test_while_the_server_is_away_it_is_asked_again_with_growing_pauses(
    supplies: Supplies[None], clock: Clock
) -> None:
    supply = opened(supplies)
    ids = set()
    pauses = []
    for _ in range(8):
        ids.add(asked(supplies).request_id)
        supply.failed(UnavailableError("not now"))
        assert supply.refusal is None
        pauses.append(supplies.work().next_at - clock.now)
        clock.now += pauses[-1]
    assert len(ids) == 1
    assert max(pauses) <= 2
    assert isinstance(supply.why_none(), UnavailableError)


def test_a_request_that_is_at_fault_is_not_made_again(supplies: Supplies[None], clock: Clock) -> None:
    supply = opened(supplies)
    asked(supplies)
    supply.failed(InvalidArgumentError("no such scheme", code="INVALID_ARGUMENT"))
    clock.now += 5

    assert supplies.work().asking == []
    assert isinstance(supply.refusal, InvalidArgumentError)
    assert supplies.get("shop.example") is None
    opened(supplies)
    assert asked(supplies).count == 4


def test_what_there_is_too_little_of_is_asked_for_now_and_then(
    supplies: Supplies[None], clock: Clock
) -> None:
    supply = opened(supplies)
    asked(supplies)
    supplies.answered(supply, AcquireResult((), Shortage.RESTING, timedelta(seconds=1)))

    assert supplies.work().asking == []
    assert supplies.work().next_at == clock.now + 1
    error = supply.why_none()
    assert isinstance(error, NoProxyError)
    assert error.shortage is Shortage.RESTING
    supply.hurry(clock.now + 10)
    assert asked(supplies).wait.seconds == 10


def test_what_nobody_has_come_for_in_long_is_given_back(supplies: Supplies[None], clock: Clock) -> None:
    supply = opened(supplies)
    asked(supplies)
    supplies.answered(supply, leases("a", "b", "c", "d"))
    clock.now += 40
    assert taken(supply) == "a"
    clock.now += 4
    request = asked(supplies)
    supplies.answered(supply, leases("e"))
    assert request.count == 1
    clock.now += 57

    work = supplies.work()
    clock.now += TERMS.delay
    assert work.asking == []
    assert released(supplies) == ["b", "c", "d", "e"]
    assert list(supplies) == []


# -- what is released


def test_releases_are_collected(supplies: Supplies[None], clock: Clock) -> None:
    assert supplies.release(LeaseRelease("a"))
    assert not supplies.release(LeaseRelease("b"))
    assert supplies.work().releases == []
    assert supplies.work().next_at == clock.now + TERMS.delay
    clock.now += TERMS.delay
    assert released(supplies) == ["a", "b"]
    assert released(supplies) == []


def test_as_many_as_a_request_may_have_go_at_once(supplies: Supplies[None]) -> None:
    told = [supplies.release(LeaseRelease(f"{number}")) for number in range(MAX_RELEASES + 1)]

    assert [place for place, due in enumerate(told) if due] == [0, MAX_RELEASES - 1]
    assert len(released(supplies)) == MAX_RELEASES
    assert released(supplies) == [f"{MAX_RELEASES}"]


def test_what_somebody_waits_for_is_not_held_back(supplies: Supplies[None], clock: Clock) -> None:
    supply = opened(supplies)
    supplies.release(LeaseRelease("a"))
    assert released(supplies) == []
    supply.hurry(clock.now + 10)
    assert released(supplies) == ["a"]


def test_what_did_not_arrive_is_sent_again_in_order(supplies: Supplies[None], clock: Clock) -> None:
    supplies.release(LeaseRelease("a"))
    clock.now += 1
    batch = supplies.work().releases
    supplies.release(LeaseRelease("b"))
    assert supplies.work().releases == []
    supplies.not_released(batch, UnavailableError("not now"))
    clock.now += 2
    assert released(supplies) == ["a", "b"]


def test_a_result_that_the_server_refuses_costs_only_itself(
    supplies: Supplies[None], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = UseResult(Outcome.SUCCESS), UseResult(Outcome.SUCCESS, retry_after=timedelta(days=9))
    for name, result in (("a", good), ("b", bad), ("c", good)):
        supplies.release(LeaseRelease(name, result))
    clock.now += 1
    error = InvalidArgumentError(
        "too long",
        code="INVALID_ARGUMENT",
        reason="INVALID_RETRY_AFTER",
        field="releases[1].result.retry_after",
    )

    supplies.not_released(supplies.work().releases, error)

    clock.now += 2
    assert [(one.lease_id, one.result) for one in supplies.work().releases] == [
        ("a", good),
        ("b", None),
        ("c", good),
    ]
    assert "INVALID_RETRY_AFTER" in caplog.text


def test_a_closed_leaser_gives_back_what_is_ready_and_what_still_arrives(supplies: Supplies[None]) -> None:
    supply, other = opened(supplies), opened(supplies, "news.example")
    supplies.work()
    supplies.answered(supply, leases("a", "b"))

    supplies.close()

    assert released(supplies) == ["a", "b"]
    supplies.answered(other, leases("c"))
    assert released(supplies) == ["c"]
    assert supplies.is_done
    assert supplies.work().asking == []


def test_what_may_have_been_granted_is_found_at_the_end_and_given_back(
    supplies: Supplies[None], clock: Clock
) -> None:
    supply = opened(supplies)
    supply.hurry(clock.now + 10)
    first = asked(supplies)
    supplies.close()
    supply.failed(UnavailableError("given up", code="CANCELLED"))

    assert not supplies.is_done
    clock.now += 1
    again = asked(supplies)
    assert (again.request_id, again.HasField("wait")) == (first.request_id, False)
    supplies.answered(supply, leases("a"))
    assert released(supplies) == ["a"]
    assert supplies.is_done
