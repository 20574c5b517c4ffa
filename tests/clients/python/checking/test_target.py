"""A target is asked once for all who doubt it, and waited for while it is down."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta

import pytest

from proxystash.checking.probe import Probe
from proxystash.checking.target import Target
from proxystash.pool_models import Outcome


class Site:
    """A site that works or not, and counts how often it was asked."""

    def __init__(self, *works: bool) -> None:
        self.works = [*works]
        self.asked = 0
        self.changes: list[str] = []

    async def direct(self) -> Probe:
        await asyncio.sleep(0)
        works = self.works[min(self.asked, len(self.works) - 1)]
        self.asked += 1
        return Probe(Outcome.SUCCESS if works else Outcome.TIMEOUT, timedelta(0), "" if works else "slow")


@pytest.mark.parametrize("works", [True, False])
def test_it_is_asked_once_for_all_who_doubt_it_at_a_time(works: bool) -> None:
    site = Site(works)

    async def run() -> None:
        target = Target(site.direct, site.changes.append)
        moment = time.monotonic()
        answers = await asyncio.gather(*(target.works_since(moment) for _ in range(20)))
        assert answers == [works] * 20
        assert site.asked == 1
        # Whoever begins to doubt it later has it asked again.
        assert await target.works_since(time.monotonic()) is works
        assert site.asked == 2

    asyncio.run(run())


def test_a_change_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxystash.checking.target._FIRST_PAUSE", 0.001)
    site = Site(True, False, False, False, True, True)

    async def run() -> None:
        target = Target(site.direct, site.changes.append)
        await target.wait()
        assert not await target.works_since(time.monotonic())
        await target.wait()
        await target.wait()
        assert await target.works_since(time.monotonic())

    asyncio.run(run())

    assert site.changes == ["slow", ""]
    assert site.asked == 6
