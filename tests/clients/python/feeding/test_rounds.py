"""When sources are read again, and what one costs the others; in simulated time, with files."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import pytest

from proxystash import ProxyFileError, UnavailableError
from proxystash.feeding.rounds import Feed, Round
from proxystash.feeding.sources import Source, parse_sources
from proxystash.loading import LoadReport
from proxystash.models import EntryError, PutResult

EVERY = timedelta(minutes=10)
BEGIN = datetime(2026, 1, 2, tzinfo=UTC)
LIFETIME = timedelta(days=1)


class Simulation:
    """Rounds in simulated time, until so many have ended."""

    def __init__(self, rounds: int) -> None:
        self.now = BEGIN
        self.left = rounds
        self.ended_rounds: list[tuple[Round, timedelta | None]] = []
        self.loads: list[tuple[str, datetime]] = []
        self.outcome: Callable[[str, LoadReport], None] = self.store
        self.lifetime = LIFETIME
        self._sleepers: list[tuple[datetime, asyncio.Future[None]]] = []

    # The observer of the feed.

    def begins(self, source: Source) -> None:
        pass

    def progresses(self, source: Source, part: float) -> None:
        pass

    def ended(self, result: Round, pause: timedelta | None) -> None:
        self.ended_rounds.append((result, pause))
        self.left -= 1
        if not self.left:
            raise EnoughError

    # What the feed is given.

    def store(self, name: str, report: LoadReport) -> None:
        report.add("line 1", PutResult("key", self.now + self.lifetime, ()))

    def load(
        self, source: Source, file: BinaryIO, on_progress: Callable[[float], None], report: LoadReport
    ) -> None:
        assert file.read() != b""
        self.loads.append((source.name, self.now))
        self.outcome(source.name, report)

    async def sleep(self, seconds: float) -> None:
        """Time passes when everybody sleeps, until the first has to wake."""
        woken = asyncio.get_running_loop().create_future()
        self._sleepers.append((self.now + timedelta(seconds=seconds), woken))
        if len(self._sleepers) == self.sources:
            self._sleepers.sort(key=lambda sleeper: sleeper[0])
            self.now, first = self._sleepers.pop(0)
            first.set_result(None)
        await woken

    def run(self, sources: list[Source], every: timedelta = EVERY) -> None:
        self.sources = len(sources)

        async def forever() -> None:
            await feed.forever(sources)

        with ThreadPoolExecutor(1) as executor:
            feed = Feed(
                every, 1000, self.load, lambda: None, executor, self,
                sleep=self.sleep, now=lambda: self.now, jitter=random.Random(1),
            )  # fmt: skip
            with pytest.raises(EnoughError):
                asyncio.run(forever())


class EnoughError(Exception):
    """Enough rounds have been seen."""


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "list.txt"
    path.write_text("192.0.2.1:80\n")
    return parse_sources([str(path)])[0]


def pauses(simulation: Simulation) -> list[float]:
    """The pauses after each round, in units of the usual one."""
    return [pause / EVERY for _, pause in simulation.ended_rounds if pause is not None]


def test_pauses_differ_by_a_tenth_at_most(source: Source) -> None:
    simulation = Simulation(200)
    simulation.run([source])

    assert all(0.9 <= pause <= 1.1 for pause in pauses(simulation))
    assert min(pauses(simulation)) < 0.92
    assert max(pauses(simulation)) > 1.08


def test_what_has_not_changed_is_loaded_when_half_its_life_is_over(source: Source) -> None:
    simulation = Simulation(300)
    simulation.run([source])

    times = [at for _, at in simulation.loads]
    assert len(times) > 2
    for earlier, later in pairwise(times):
        assert LIFETIME / 2 <= later - earlier <= LIFETIME / 2 + 1.1 * EVERY
    unchanged = [result for result, _ in simulation.ended_rounds if result.report is None]
    assert len(unchanged) == 300 - len(times)


def test_what_would_expire_before_the_next_round_but_one_is_loaded_each_time(source: Source) -> None:
    simulation = Simulation(20)
    simulation.lifetime = 2 * EVERY
    simulation.run([source])

    assert len(simulation.loads) == 20


def test_a_change_is_loaded_at_once(source: Source) -> None:
    simulation = Simulation(6)
    path = source.path
    assert path is not None

    def store_and_change(name: str, report: LoadReport) -> None:
        simulation.store(name, report)
        if len(simulation.loads) == 1:
            path.write_text("192.0.2.2:80\n192.0.2.3:80\n")

    simulation.outcome = store_and_change
    simulation.run([source])

    assert len(simulation.loads) == 2


def test_pauses_double_with_each_failure_up_to_a_limit_and_are_forgotten(source: Source) -> None:
    simulation = Simulation(9)

    def outcome(name: str, report: LoadReport) -> None:
        if len(simulation.loads) <= 7:
            raise ProxyFileError("no list")
        simulation.store(name, report)

    simulation.outcome = outcome
    simulation.run([source])

    factors = [1, 2, 4, 8, 16, 16, 16, 1, 1]
    assert all(
        0.9 <= pause / factor <= 1.1 for pause, factor in zip(pauses(simulation), factors, strict=True)
    )
    assert [result.failure for result, _ in simulation.ended_rounds] == ["no list"] * 7 + [""] * 2


def test_a_server_that_fails_is_not_the_sources_fault(source: Source) -> None:
    simulation = Simulation(9)

    def outcome(name: str, report: LoadReport) -> None:
        raise UnavailableError("no server", reason="", code="UNAVAILABLE")

    simulation.outcome = outcome
    simulation.run([source])

    assert all(pause <= 1.1 for pause in pauses(simulation))
    assert all(
        result.server_failed and result.failure == "no server" for result, _ in simulation.ended_rounds
    )


def test_what_the_server_could_not_store_is_loaded_again(source: Source) -> None:
    simulation = Simulation(4)

    def outcome(name: str, report: LoadReport) -> None:
        simulation.store(name, report)
        if len(simulation.loads) == 1:
            report.add("line 2", EntryError("RESOURCE_EXHAUSTED", "FULL", "there is no room"))

    simulation.outcome = outcome
    simulation.run([source])

    assert len(simulation.loads) == 2


def test_a_list_that_holds_nothing_usable_is_a_failure_that_says_why(source: Source) -> None:
    simulation = Simulation(2)

    def outcome(name: str, report: LoadReport) -> None:
        report.add("line 1", EntryError("INVALID_ARGUMENT", "INVALID_PROXY_URL", "no such host", "proxy_url"))

    simulation.outcome = outcome
    simulation.run([source])

    assert [result.failure for result, _ in simulation.ended_rounds] == [
        "nothing could be loaded; line 1: no such host"
    ] * 2


def test_one_source_that_fails_costs_the_others_nothing(source: Source, tmp_path: Path) -> None:
    missing = parse_sources([str(tmp_path / "missing.txt")])[0]
    simulation = Simulation(40)
    simulation.run([missing, source])

    failed = [result for result, _ in simulation.ended_rounds if result.source is missing]
    fine = [result for result, _ in simulation.ended_rounds if result.source is source]
    assert {result.failure for result in failed} == {"cannot be read: No such file or directory"}
    assert {result.failure for result in fine} == {""}
    # Every ten minutes, and after 10, 20, 40, 80 and then 160 minutes.
    assert len(failed) <= 6
    assert len(fine) == 40 - len(failed)
    assert len(simulation.loads) == 1
