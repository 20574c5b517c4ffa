"""A fault of one disk tier: the tier is skipped, the log tells it once, and it heals with its cause."""

from __future__ import annotations

import logging
import os

import pytest

from proxystash_server.cache import (
    CacheManager,
    CacheTierType,
    L2BackendType,
    StoreFormatError,
    TierState,
)
from tests.server.cache.stash import Stash
from tests.server.cache.support import SWITCHED_OFF, check_disk_tiers, content_of, stored_in
from tests.server.faults.kinds import FAULTS, Fault, Site
from tests.server.faults.machine import Mounts, fill, make_room

L1, L2, L3 = CacheTierType
# Enough that a write needs new space on the disk.
BULK = {f"filler-{number}": "x" * 250 for number in range(16)}
SHAPES: dict[str, dict[str, object]] = {"with L1": {}, "without L1": {"l1_config": SWITCHED_OFF}}

SITES = {
    "l2-jsonl": (L2, L2BackendType.JSONL),
    "l2-sqlite": (L2, L2BackendType.SQLITE),
    "l3": (L3, L2BackendType.JSONL),
}
CASES = [
    pytest.param(site, fault, id=f"{fault}, {site}")
    for fault, kind in FAULTS.items()
    for site in SITES
    if (L2BackendType.SQLITE if site == "l3" else SITES[site][1]) in kind.backends
]


class Run:
    """A cache, and what it must hold."""

    def __init__(self, manager: CacheManager) -> None:
        self.manager = manager
        self.expected: dict[str, tuple[str, int]] = {}

    def put(self, key: str, source: str) -> None:
        entry = self.manager.new_entry("http://192.0.2.1:1", key=key, source=source, labels=BULK)
        assert self.manager.put(key, entry), f"no tier took {key}"
        self.expected[key] = (source, self.expected.get(key, ("", 0))[1])

    def delete(self, key: str) -> None:
        assert self.manager.delete(key)
        del self.expected[key]

    def fail(self, key: str) -> None:
        source, failures = self.expected[key]
        assert self.manager.invalidate_by_health(key).failure_count == failures + 1
        self.expected[key] = (source, failures + 1)

    def check_gets(self) -> None:
        for key, expected in self.expected.items():
            entry = self.manager.get(key)
            assert entry is not None, key
            assert (entry.source, entry.failure_count) == expected

    def check(self) -> None:
        self.check_gets()
        for key in ("deleted before", "deleted"):
            assert self.manager.get(key) is None
        assert content_of(self.manager) == self.expected
        assert self.manager.get_statistics().entries == len(self.expected)

    def check_tiers(self) -> None:
        self.check()
        # What L2 holds of it, it has refilled from use.
        check_disk_tiers(self.manager, self.expected)

    def begin(self) -> None:
        for key in ("kept", "replaced", "deleted before", "deleted", "failing"):
            self.put(key, "before")
        self.delete("deleted before")

    def go_on(self) -> None:
        """Every kind of change, and enough of them for the tier to be skipped."""
        self.put("replaced", "meanwhile")
        self.delete("deleted")
        self.fail("failing")
        for number in range(8):
            self.put(f"new-{number}", "meanwhile")
            self.check_gets()
        # What a cache on disk need not notice at once, is noticed within a second.
        self.manager.maintain()


@pytest.fixture
def site_name() -> str:
    return "l2-jsonl"


@pytest.fixture
def l2_backend(site_name: str) -> L2BackendType:
    return SITES[site_name][1]


@pytest.fixture
def fault(
    stash: Stash, mounts: Mounts, monkeypatch: pytest.MonkeyPatch, site_name: str, fault_name: str
) -> Fault:
    return FAULTS[fault_name](Site(stash, mounts, monkeypatch, *SITES[site_name]))


def states_of(manager: CacheManager) -> dict[CacheTierType, TierState]:
    statistics = manager.get_statistics()
    return dict(zip(CacheTierType, [tier.state for tier in statistics.tiers], strict=True))


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """What the log said that an operator would look at, and about which tier."""
    return [
        (record.message, str(vars(record).get("tier")))
        for record in caplog.records
        if record.levelno >= logging.WARNING or record.message.startswith("tier ")
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("site_name", "fault_name"), CASES)
def test_a_fault_costs_one_tier_for_as_long_as_it_lasts(
    stash: Stash, fault: Fault, shape: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    faulty = fault.site.tier
    with fault:
        manager = stash.open(**SHAPES[shape])
        run = Run(manager)
        run.begin()
        fault.begin()
        run.go_on()
        degraded = {L1: states_of(manager)[L1], L2: TierState.ACTIVE, L3: TierState.ACTIVE}
        degraded[faulty] = TierState.DEGRADED
        assert states_of(manager) == degraded
        errors = [tier.errors for tier in manager.get_statistics().tiers]
        run.put("kept", "meanwhile")
        run.check()
        assert [tier.errors for tier in manager.get_statistics().tiers] == errors
        if fault.lasts:
            for _ in range(3):
                stash.recover(manager)
                assert states_of(manager) == degraded
                run.check()
        assert told(caplog) == [("tier degraded", faulty)]
        fault.end()
        stash.recover(manager)
        assert set(states_of(manager).values()) - {TierState.DISABLED} == {TierState.ACTIVE}
        manager.maintain()
        # What L3 has lost is refilled at once, L2 from use.
        run.check_tiers()
        assert [line for line in told(caplog) if line[0] not in fault.also_told] == [
            ("tier degraded", faulty),
            ("tier recovered", faulty),
        ]
        run.manager = stash.reopen_after_kill(**SHAPES[shape])
        run.check()
        run.check_tiers()


@pytest.mark.parametrize(("site_name", "fault_name"), CASES)
def test_a_cache_that_is_restarted_during_a_fault_starts_without_the_tier(
    stash: Stash, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    faulty = fault.site.tier
    with fault:
        run = Run(stash.open())
        run.begin()
        fault.begin()
        run.go_on()
        caplog.clear()
        caplog.set_level(logging.DEBUG)
        if fault.is_refused:
            with pytest.raises(StoreFormatError, match="move it away"):
                stash.reopen()
            fault.end()
        manager = run.manager = stash.reopen()
        starts_without = fault.lasts and not fault.is_refused
        if fault.may_let_start:
            starts_without = states_of(manager)[faulty] is TierState.DEGRADED
        assert (states_of(manager)[faulty] is TierState.DEGRADED) == starts_without
        run.put("replaced", "after the restart")
        run.put("later", "after the restart")
        run.delete("kept")
        assert manager.get("kept") is None
        run.check()
        if starts_without:
            assert told(caplog) == [("tier degraded", faulty)]
        if fault.lasts and not fault.is_refused:
            fault.end()
            stash.recover(manager)
            assert manager.get("kept") is None
        manager.maintain()
        assert set(states_of(manager).values()) == {TierState.ACTIVE}
        run.check_tiers()


def test_a_compaction_that_finds_no_room_takes_none_from_the_writers(
    stash: Stash, mounts: Mounts, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    mounts.add(stash.directory / "l2", "size=4m")
    manager = stash.open()
    run = Run(manager)
    # Mostly garbage in the end.
    keys = [str(number) for number in range(80)]
    for source in ("first", "second", "third", "fourth", "fifth", "sixth"):
        for key in keys:
            run.put(key, source)
    file = stash.directory / "l2" / "entries.jsonl"
    before = file.stat().st_size
    fill(stash.directory / "l2")
    os.truncate(stash.directory / "l2" / "filler", (stash.directory / "l2" / "filler").stat().st_size - 65536)
    manager.maintain()
    assert file.stat().st_size == before, "there was room"
    entry = manager.new_entry("http://192.0.2.1:1", key="new", source="meanwhile", labels=BULK)
    assert stored_in(manager, "new", entry) == (L1, L2, L3)
    run.expected["new"] = ("meanwhile", 0)
    make_room(stash.directory / "l2")
    stash.recover(manager)
    assert file.stat().st_size < before / 2
    assert sorted(path.name for path in file.parent.iterdir()) == ["entries.jsonl", "meta.json"]
    for key in ("deleted before", "deleted"):
        assert manager.get(key) is None
    run.check_tiers()
    run.manager = stash.reopen_after_kill()
    run.check_tiers()
