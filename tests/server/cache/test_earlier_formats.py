"""A data directory as the releases before format 3 left it, stopped or killed, opens with nothing lost."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

from proxystash_server.cache import CacheManager, L2BackendType, TierState
from tests.server.cache.format_2.generate import KEY
from tests.server.cache.stash import Stash
from tests.server.cache.support import (
    check_disk_tiers,
    content_of,
    make_reachable,
    make_unreachable,
    put,
)
from tests.server.cache_tools.steps import stepping

ARCHIVES = Path(__file__).parent / "format_2"
EVERYDAY = {f"key-{number}": ("before", int(number == 3)) for number in range(8)} | {"replaced": ("after", 0)}
MEANWHILE = {f"meanwhile-{number}": ("meanwhile", 0) for number in range(4)}
CASES = {
    "stopped": EVERYDAY,
    "killed": EVERYDAY,
    # What one tier has missed, the other has noted.
    "l2-away": {**EVERYDAY, **MEANWHILE},
    "l3-away": {**EVERYDAY, **MEANWHILE},
    "l3-away-and-cleared": {"replaced": ("after", 0)},
    # L2 has gone on alone, and decides.
    "l3-off": EVERYDAY,
}


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, stash: Stash, l2_backend: L2BackendType) -> str:
    """Puts the archive of a case where the data directory is to be."""
    stash.directory.mkdir()
    with tarfile.open(ARCHIVES / f"{l2_backend}-{request.param}.tar.gz") as archive:
        archive.extractall(stash.directory, filter="data")
    for path in stash.directory.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return str(request.param)


def open_cache(stash: Stash) -> CacheManager:
    return stash.open(encryption_key=KEY)


def check_everything(manager: CacheManager, expected: dict[str, tuple[str, int]]) -> None:
    assert content_of(manager) == expected
    for key, (source, _) in expected.items():
        entry = manager.get(key)
        assert entry is not None
        assert entry.source == source
        assert entry.password is not None
        assert entry.password.get_secret_value() == "secret"
    assert manager.get("deleted") is None
    assert manager.get_statistics().entries == len(expected)
    check_disk_tiers(manager, expected)


def test_it_opens_with_all_that_it_has_and_stays_so(stash: Stash, case: str) -> None:
    check_everything(open_cache(stash), CASES[case])
    check_everything(stash.reopen_after_kill(encryption_key=KEY), CASES[case])
    manager = stash.reopen(encryption_key=KEY)
    put(manager, "later", source="later")
    assert content_of(manager) == {**CASES[case], "later": ("later", 0)}
    for tier in (manager.l2_tier, manager.l3_tier):
        assert not {"inherited", "partner", "partner_id"} & tier.notes.keys()


def test_its_first_start_may_be_killed_at_any_step(stash: Stash, case: str) -> None:
    killed: list[Path] = []

    def copy(_step: str) -> None:
        killed.append(stash.directory.with_name(f"killed-{len(killed)}"))
        shutil.copytree(stash.directory, killed[-1])

    with stepping(copy):
        open_cache(stash)
    stash.close()
    assert len(killed) > 5
    first = stash.directory
    for stash.directory in killed:
        manager = open_cache(stash)
        assert content_of(manager) == CASES[case], stash.directory.name
        assert manager.get("deleted") is None
        check_disk_tiers(manager, CASES[case])
        stash.close()
    stash.directory = first


def test_its_first_start_without_l3_waits_for_it(stash: Stash, case: str) -> None:
    hidden = make_unreachable(stash.directory / "l3")
    manager = open_cache(stash)
    assert manager.get_statistics().l3_stats.state is TierState.DEGRADED
    make_reachable(stash.directory / "l3", hidden)
    stash.recover(manager)
    manager.maintain()
    check_everything(manager, CASES[case])
