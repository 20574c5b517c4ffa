"""Tiers switched off and on, backends changed, stores lost and brought back: nothing is resurrected."""

from __future__ import annotations

import shutil
import time
from typing import Any

import pytest

from proxystash_server.cache import L2BackendType
from tests.server.cache.stash import Stash
from tests.server.cache.support import (
    SWITCHED_OFF,
    bounded,
    break_tier,
    check_disk_tiers,
    content_of,
    content_of_tier,
    fail_until_skipped,
    make_reachable,
    make_unreachable,
    put,
    repair_tier,
)

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "both": {},
    "l2 off": {"l2_config": SWITCHED_OFF},
    "l3 off": {"l3_config": SWITCHED_OFF},
    "jsonl": {"l2_backend": L2BackendType.JSONL},
    "sqlite": {"l2_backend": L2BackendType.SQLITE},
}


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


@pytest.mark.parametrize(
    "runs",
    [
        ["both", "l2 off", "both"],
        ["both", "l3 off", "both"],
        ["l2 off", "both", "l2 off", "both"],
        ["l3 off", "both", "l3 off", "both"],
        ["l3 off", "l3 off", "both"],
        ["both", "l2 off", "l2 off", "both"],
        ["jsonl", "sqlite", "jsonl"],
        ["sqlite", "jsonl", "sqlite"],
        ["jsonl", "sqlite", "sqlite", "jsonl"],
        ["jsonl", "l2 off", "sqlite", "jsonl"],
    ],
    ids=" → ".join,
)
@pytest.mark.parametrize("abruptly", [False, True], ids=["closed", "killed"])
def test_each_run_goes_on_where_the_last_one_ended(stash: Stash, runs: list[str], abruptly: bool) -> None:
    """As long as one store goes through from run to run, it is as if nothing had been switched."""
    expected: dict[str, tuple[str, int]] = {}
    reopen = stash.reopen_after_kill if abruptly else stash.reopen
    stash.directory.mkdir()
    for number, run in enumerate(runs):
        manager = reopen(**CONFIGURATIONS[run])
        assert content_of(manager) == expected, f"at the start of run {number}"
        put(manager, "replaced each time", f"of run {number}", "deleted next time", source=run)
        expected |= {
            "replaced each time": (run, 0),
            f"of run {number}": (run, 0),
            "deleted next time": (run, 0),
        }
        if number % 2:
            assert manager.delete("deleted next time")
            del expected["deleted next time"]
            manager.invalidate_by_health("of run 0")
            if "of run 0" in expected:
                expected["of run 0"] = (expected["of run 0"][0], expected["of run 0"][1] + 1)
        assert content_of(manager) == expected
        for tier in (manager.l2_tier, manager.l3_tier):
            if tier.enabled:
                assert content_of_tier(tier).items() <= expected.items()


@pytest.mark.parametrize("away", ["l2", "l3"])
def test_what_was_deleted_while_a_tier_was_off_does_not_come_back_with_it(stash: Stash, away: str) -> None:
    put(stash.open(), "deleted", "replaced", "kept", source="before")
    manager = stash.reopen(**{f"{away}_config": SWITCHED_OFF})
    manager.delete("deleted")
    put(manager, "replaced", source="after")
    manager = stash.reopen()
    expected = {"replaced": ("after", 0), "kept": ("before", 0)}
    assert content_of(manager) == expected
    assert manager.get("deleted") is None
    assert content_of_tier(manager.l3_tier) == expected
    assert content_of_tier(manager.l2_tier).items() <= expected.items()


@pytest.mark.parametrize("away", ["l2", "l3"])
def test_what_was_cleared_while_a_tier_was_off_does_not_come_back_with_it(stash: Stash, away: str) -> None:
    put(stash.open(), "a", "b")
    manager = stash.reopen(**{f"{away}_config": SWITCHED_OFF})
    assert manager.clear() == 2
    manager = stash.reopen()
    assert content_of(manager) == {}
    assert (manager.get("a"), manager.get("b")) == (None, None)
    assert manager.get_statistics().entries == 0


@pytest.mark.parametrize("away", ["l2", "l3"])
def test_a_tier_that_worked_alone_but_opened_late_is_known_to_have_gone_on_alone(
    stash: Stash, away: str
) -> None:
    """Its partner is switched off, and the tier itself is out of reach when the run begins."""
    put(stash.open(), "deleted", "replaced", source="before")
    stash.close()
    alone = "l3" if away == "l2" else "l2"
    path = stash.directory / alone
    hidden = make_unreachable(path)
    manager = stash.open(**{f"{away}_config": SWITCHED_OFF})
    make_reachable(path, hidden)
    stash.recover(manager)
    manager.delete("deleted")
    put(manager, "replaced", source="after")
    manager = stash.reopen()
    assert content_of(manager) == {"replaced": ("after", 0)}
    assert manager.get("deleted") is None
    got = manager.get("replaced")
    assert got is not None
    assert got.source == "after"


@pytest.mark.parametrize("away", ["l2", "l3"])
def test_a_backlog_survives_a_run_in_which_its_tier_is_off(stash: Stash, away: str) -> None:
    manager = stash.open()
    put(manager, "deleted", "replaced", source="before")
    tier = manager.l2_tier if away == "l2" else manager.l3_tier
    break_tier(tier)
    fail_until_skipped(manager, tier)
    manager.delete("deleted")
    put(manager, "replaced", source="after")
    manager.close()
    repair_tier(tier)
    manager = stash.reopen(**{f"{away}_config": SWITCHED_OFF})
    assert content_of(manager) == {"replaced": ("after", 0)}
    manager = stash.reopen()
    assert content_of(manager) == {"replaced": ("after", 0)}
    assert manager.get("deleted") is None


# -- stores that are lost, and come back


def test_a_lost_l2_is_filled_again_from_l3(stash: Stash) -> None:
    put(stash.open(), "a", "b", source="before")
    stash.close()
    shutil.rmtree(stash.directory / "l2")
    manager = stash.open()
    assert content_of(manager) == {"a": ("before", 0), "b": ("before", 0)}
    assert manager.get("a") is not None
    assert "a" in manager.l2_tier


def test_a_lost_l3_is_filled_again_from_l2(stash: Stash) -> None:
    put(stash.open(), "a", "b", source="before")
    stash.close()
    shutil.rmtree(stash.directory / "l3")
    manager = stash.open()
    expected = {"a": ("before", 0), "b": ("before", 0)}
    assert content_of(manager) == expected
    assert content_of_tier(manager.l3_tier) == expected
    assert content_of(stash.reopen()) == expected


@pytest.mark.parametrize("name", ["l2", "l3"])
def test_an_old_copy_of_one_store_put_back_brings_nothing_back(stash: Stash, name: str) -> None:
    """An operator restores one of the two directories from last night's backup."""
    put(stash.open(), "deleted", "replaced", "kept", source="before")
    stash.close()
    shutil.copytree(stash.directory / name, stash.directory / "backup")
    manager = stash.open()
    manager.delete("deleted")
    put(manager, "replaced", source="after")
    stash.close()
    shutil.rmtree(stash.directory / name)
    (stash.directory / "backup").rename(stash.directory / name)
    manager = stash.open()
    seen = content_of(manager)
    if name == "l2":
        # L3 is the authority and knows better.
        assert seen == {"replaced": ("after", 0), "kept": ("before", 0)}
        assert manager.get("deleted") is None
    else:
        # The authority itself was set back: it is believed, except where L2 knows of something later.
        assert seen["replaced"] == ("after", 0)
        assert seen["kept"] == ("before", 0)
    for tier in (manager.l1_tier, manager.l2_tier, manager.l3_tier):
        for key in tier.keys():  # noqa: SIM118 -- no dict
            assert key in seen


def test_the_stores_of_two_caches_are_not_mixed_up(stash: Stash) -> None:
    """L2's directory of one data directory is put into another: L3 is the authority."""
    put(stash.open(), "mine", source="mine")
    stash.close()
    mine = stash.directory
    stash.directory = mine.with_name("another")
    shutil.copytree(mine, stash.directory, ignore=shutil.ignore_patterns("l2", "l3"))
    put(stash.open(), "theirs", "both", source="theirs")
    stash.close()
    shutil.rmtree(stash.directory / "l2")
    shutil.copytree(mine / "l2", stash.directory / "l2")
    manager = stash.open()
    assert content_of(manager) == {"theirs": ("theirs", 0), "both": ("theirs", 0)}
    assert manager.get("mine") is None


# -- the numbers of changes


@pytest.mark.parametrize("faulty", ["l2", "l3"])
def test_a_clock_that_was_set_back_between_two_runs_makes_no_change_look_old(
    stash: Stash, faulty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time_ns
    monkeypatch.setattr("time.time_ns", lambda: real() + 86_400_000_000_000)
    put(stash.open(), "deleted", "replaced", source="before")
    stash.close()
    monkeypatch.setattr("time.time_ns", real)
    manager = stash.open()
    tier = manager.l2_tier if faulty == "l2" else manager.l3_tier
    break_tier(tier)
    fail_until_skipped(manager, tier)
    manager.delete("deleted")
    put(manager, "replaced", source="after")
    repair_tier(tier)
    stash.recover(manager)
    expected = {"replaced": ("after", 0)}
    assert content_of(manager) == expected
    check_disk_tiers(manager, expected)
    assert content_of(stash.reopen()) == expected


def test_a_smaller_l2_after_a_restart_still_agrees_with_l3(stash: Stash) -> None:
    put(stash.open(), *(f"key-{number}" for number in range(10)))
    manager = stash.reopen(l2_config=bounded(3))
    assert manager.l2_tier.size() == 3
    assert len(content_of(manager)) == 10
