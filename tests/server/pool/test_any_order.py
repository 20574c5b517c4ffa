"""In whatever order things happen, what is counted is right, and nobody waits for what is there."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proxystash_server.cache import EntryFilter, HealthStatus
from proxystash_server.pool import health
from proxystash_server.pool.health import Outcome
from proxystash_server.pool.requests import (
    Lease,
    PoolError,
    Release,
    Report,
    SelectionPolicy,
    SessionRequest,
    UseResult,
)
from tests.server.pool.conftest import Fleet, Waiting
from tests.server.pool.invariants import check_invariants

TARGETS = [f"{letter}.example" for letter in "abcdef"]
PROXIES = 8


class Users:
    """What those do who use a pool, with everything left to chance."""

    def __init__(self, fleet: Fleet, chance: random.Random) -> None:
        self.fleet = fleet
        self.chance = chance
        self.leases: list[Lease] = []
        self.calls: list[Waiting] = []
        self.steps: list[Callable[[], object]] = [
            self.put, self.put, self.delete, self.acquire, self.acquire, self.acquire, self.wait, self.wait,
            self.release, self.release, self.release, self.report, self.report, self.renew, self.cancel,
            self.go, self.end_session, self.fail, self.expire, self.crash, self.pass_time, self.pass_time,
        ]  # fmt: skip

    def step(self) -> None:
        self.chance.choice(self.steps)()

    def key(self) -> str:
        return self.fleet.manager.new_entry(f"http://192.0.2.{self.chance.randrange(PROXIES)}:8080").key

    def put(self) -> None:
        choice = self.chance.choice
        self.fleet.put(
            self.chance.randrange(PROXIES),
            source=choice(["one", "two"]),
            ttl_us=choice([5, 600, 86_400]) * 1_000_000,
            health_status=choice(list(HealthStatus)),
            max_leases=choice([0, 0, 0, 1, 2]),
        )

    def delete(self) -> None:
        if self.chance.random() < 0.05:
            self.fleet.manager.clear()
        self.fleet.manager.delete(self.key())

    def sometimes(self, share: float) -> bool:
        return self.chance.random() < share

    def request(self) -> dict[str, Any]:
        choice, sometimes = self.chance.choice, self.sometimes
        fields: dict[str, Any] = {
            "target": choice(["", *TARGETS]),
            "policy": choice(list(SelectionPolicy)),
            "duration": choice([1.0, 5.0, 60.0]),
            "reuse_delay": choice([1.0, 10.0]) if sometimes(0.2) else 0.0,
            "max_leases": sometimes(0.2),
        }
        if sometimes(0.3):
            fields["wanted"] = EntryFilter(source=choice(["one", "two"]))
        if sometimes(0.2):
            fields |= {"holder": choice("xy"), "exclude_held": sometimes(0.7)}
        if sometimes(0.2):
            fields["exclude_keys"] = frozenset({self.key()})
        if sometimes(0.3):
            fields["request_id"] = choice("xyz")
        if sometimes(0.3):
            idle, age = choice([5.0, 600.0]), choice([None, 3.0, 30.0])
            fields["session"] = SessionRequest(choice("xy"), idle, age, strict=sometimes(0.3))
        else:
            fields["count"] = choice([1, 1, 2, 4])
        return fields

    def acquire(self) -> None:
        try:
            self.leases += self.fleet.acquire(**self.request())
        except PoolError:
            pass

    def wait(self) -> None:
        try:
            self.calls.append(self.fleet.wait(**self.request() | {"wait": self.chance.choice([1.0, 20.0])}))
        except PoolError:
            pass

    def result(self) -> UseResult:
        outcome = self.chance.choice(list(Outcome))
        waits = outcome in (Outcome.BLOCKED, Outcome.RATE_LIMITED) and self.chance.random() < 0.5
        return UseResult(
            outcome,
            self.fleet.time.steady - self.chance.choice([0.0, 0.0, 3.0]),
            self.chance.choice([None, 0.5]),
            self.chance.choice([None, *TARGETS]),
            self.chance.choice([1, 3]),
            2000.0 if waits else 0.0,
        )

    def release(self) -> None:
        if self.leases:
            result = self.result() if self.chance.random() < 0.6 else None
            release = Release(self.chance.choice(self.leases).id, result, self.chance.random() < 0.2)
            self.fleet.pool.release([release] * self.chance.choice([1, 1, 2]))

    def report(self) -> None:
        lease_id = self.chance.choice(self.leases).id if self.leases else ""
        self.fleet.pool.report([Report(self.result(), self.key()), Report(self.result(), lease_id=lease_id)])

    def renew(self) -> None:
        if self.leases:
            self.fleet.pool.renew([self.chance.choice(self.leases).id], self.chance.choice([1.0, 60.0]))

    def cancel(self) -> None:
        """A client hangs up, and the pool is told."""
        if self.calls and (call := self.chance.choice(self.calls)).waits:
            self.fleet.pool.cancel(call.ticket, call.deliver)  # type: ignore[arg-type]  # it waits

    def go(self) -> None:
        """A client hangs up, and the pool finds out when it answers."""
        if self.calls:
            self.chance.choice(self.calls).is_there = False

    def end_session(self) -> None:
        self.fleet.pool.end_session(self.chance.choice("xy"), self.chance.choice(["", *TARGETS]))

    def fail(self) -> None:
        self.fleet.manager.invalidate_by_health(self.key())

    def expire(self) -> None:
        self.fleet.manager.cleanup_expired()

    def crash(self) -> None:
        if self.chance.random() < 0.3:
            self.fleet.manager.cleanup_expired()
            self.fleet.pool.run_due()
            self.fleet.pool.maintain()
            before, sessions = self.held(), self.fleet.pool.statistics().sessions
            self.fleet.crash()
            self.calls = []
            assert self.held() == before
            assert self.fleet.pool.statistics().sessions <= sessions

    def held(self) -> list[tuple[str, str, str, str]]:
        return [(one.id, one.key, one.target, one.session_id) for one in self.fleet.pool._leases]

    def pass_time(self) -> None:
        self.fleet.time.pass_time(self.chance.choice([0.5, 1.0, 3.0, 30.0, 200.0, 1000.0]))


@pytest.mark.parametrize("seed", range(40))
def test_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chance = random.Random(seed)
    if seed % 2:
        # So that some are forgotten.
        monkeypatch.setattr(health, "MAX_TARGETS", 4)
        monkeypatch.setattr(health, "MAX_TARGETS_OF_A_PROXY", 3)
        monkeypatch.setattr(health, "MAX_PAIRS", 20)
    fleet = Fleet(tmp_path, max_leases=chance.choice([1, 1, 2, 3]))
    users = Users(fleet, chance)
    for _ in range(300):
        users.step()
        if chance.random() < 0.7:
            fleet.pool.run_due()
            check_invariants(fleet)
        assert all(len(call.answers) <= 1 for call in users.calls)
    # Of those who wait some are served, and hold what they got for a while.
    for _ in range(2):
        fleet.time.pass_time(100_000.0)
        fleet.pool.run_due()
        check_invariants(fleet)
    statistics = fleet.pool.statistics()
    assert (statistics.leases, statistics.waiting, statistics.sessions) == (0, 0, 0)
    fleet.close()
