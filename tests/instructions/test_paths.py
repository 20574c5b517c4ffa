"""Each path does what its name says; counted by the cache itself, not by callgrind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from proxystash.v1 import cache_service_pb2 as pb
from proxystash_server.cache import CacheEntry, CacheManager, CacheStatistics, CacheTierType
from tests.instructions.callgrind import environment_for
from tests.instructions.comparison import BASELINE, Baseline
from tests.instructions.paths import BATCH, PATHS, Work
from tests.instructions.store import RESIDENT, Store
from tests.support.scripts import ROOT, run

OPERATIONS = 3
EVERYWHERE = ["l1", "l2", "l3"]

# What one operation adds to the statistics.
HIT_IN_L1 = {"hits": 1, "l1.hits": 1}
NEW_ENTRY = {"entries": 1, "l1.entries": 1, "l2.entries": 1, "l3.entries": 1}
NOTHING: dict[str, int] = {}


def times(factor: int, changes: Mapping[str, int]) -> dict[str, int]:
    return {name: factor * change for name, change in changes.items()}


ADDED: dict[str, dict[str, int]] = {
    "get in L1": HIT_IN_L1,
    "get in L2": {"hits": 1, "l1.misses": 1, "l2.hits": 1, "promotions": 1, "l1.entries": 1},
    "get in L3": {
        "hits": 1,
        "l1.misses": 1,
        "l2.misses": 1,
        "l3.hits": 1,
        "promotions": 2,
        "l1.entries": 1,
        "l2.entries": 1,
    },
    "get, a miss": {"misses": 1, "l1.misses": 1, "l2.misses": 1, "l3.misses": 1},
    "lookup_many of 100 in L1": times(BATCH, HIT_IN_L1),
    "list_entries, a page of 100": NOTHING,
    "get_statistics": NOTHING,
    "new_entry": NOTHING,
    "put, new": NEW_ENTRY,
    "put, new, with credentials": NEW_ENTRY,
    "put, new, into full L1 and L2": {
        "entries": 1,
        "l3.entries": 1,
        "l1.evictions_capacity": 1,
        "l2.evictions_capacity": 1,
        "demotions": 2,
    },
    "put, a replacement": NOTHING,
    "put_many of 100, new": times(BATCH, NEW_ENTRY),
    "delete": {"removals": 1, **times(-1, NEW_ENTRY)},
    "invalidate_by_health": NOTHING,
    "rpc Get in L1": HIT_IN_L1,
    "rpc Get in L1, the first": HIT_IN_L1,
    "rpc BatchGet of 100 in L1": times(BATCH, HIT_IN_L1),
    "rpc Put, new": NEW_ENTRY,
    "rpc BatchPut of 100, new": times(BATCH, NEW_ENTRY),
    "rpc GetStats": NOTHING,
}


def counts(statistics: CacheStatistics) -> dict[str, int]:
    """The counts in a snapshot, by name."""
    found = {
        name: getattr(statistics, name)
        for name in ("hits", "misses", "entries", "promotions", "demotions", "removals")
    }
    for tier, facts in zip(CacheTierType, statistics.tiers, strict=True):
        found.update(
            (f"{tier}.{name}", value)
            for name, value in facts.model_dump(round_trip=True).items()
            # How long a log is shows nothing of what was done.
            if type(value) is int and name != "log_bytes"
        )
    return found


def prepared(name: str, directory: Path) -> tuple[CacheManager, Work]:
    path = PATHS[name]
    store = Store(directory, path.bounded)
    return store.manager, path.prepare(store, OPERATIONS)


@pytest.mark.parametrize("name", PATHS)
def test_an_operation_adds_to_the_statistics_what_the_name_of_its_path_says(
    name: str, tmp_path: Path
) -> None:
    manager, work = prepared(name, tmp_path)
    with manager:
        before = counts(manager.get_statistics())

        results = work.run()

        after = counts(manager.get_statistics())
    added = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert added == times(OPERATIONS, ADDED[name])
    assert len(results) == OPERATIONS


def test_the_resident_entries_are_in_every_tier(tmp_path: Path) -> None:
    with Store(tmp_path).manager as manager:
        assert [tier.entries for tier in manager.get_statistics().tiers] == [RESIDENT] * 3


def _stored(response: pb.PutResponse | pb.BatchPutResult) -> bool:
    stored = response.stored if isinstance(response, pb.BatchPutResult) else response
    return len(stored.stored_in) == len(EVERYWHERE)


# What shows in an operation's result that it did what it was to do, where the statistics do not.
PROOFS: dict[str, Callable[[Any], bool]] = {
    "get in L1": lambda entry: entry.access_count == 2,
    "lookup_many of 100 in L1": lambda lookups: len(lookups.entries) == BATCH,
    "list_entries, a page of 100": lambda entries: len(entries) == BATCH,
    "get_statistics": lambda statistics: statistics.entries == RESIDENT,
    "new_entry": lambda entry: entry.labels["country"] == "DE",
    "put, new": lambda stored: stored is True,
    "put, a replacement": lambda stored: stored is True,
    "delete": lambda held: held is True,
    "invalidate_by_health": lambda done: done.failure_count == 1 and not done.evicted,
    "rpc Get in L1": lambda answer: pb.GetResponse.FromString(answer).entry.access_count == 2,
    "rpc Get in L1, the first": lambda answer: pb.GetResponse.FromString(answer).entry.access_count == 1,
    "rpc BatchGet of 100 in L1": lambda answer: (
        len({result.entry.key for result in pb.BatchGetResponse.FromString(answer).results}) == BATCH
    ),
    "rpc Put, new": lambda answer: _stored(pb.PutResponse.FromString(answer)),
    "rpc BatchPut of 100, new": lambda answer: (
        list(map(_stored, pb.BatchPutResponse.FromString(answer).results)) == [True] * BATCH
    ),
    "rpc GetStats": lambda answer: pb.GetStatsResponse.FromString(answer).statistics.entries == RESIDENT,
}


@pytest.mark.parametrize("name", PROOFS)
def test_an_operation_returns_what_the_name_of_its_path_says(name: str, tmp_path: Path) -> None:
    manager, work = prepared(name, tmp_path)
    with manager:
        results = work.run()

    assert all(map(PROOFS[name], results))


def test_credentials_are_sealed_where_the_name_says_so(tmp_path: Path) -> None:
    manager, work = prepared("put, new, with credentials", tmp_path)
    with manager:
        work.run()
        entries = [entry for entry in work.arguments if isinstance(entry, CacheEntry)]
        stored = [manager.l3_tier.get(entry.key) for entry in entries]

    assert len(stored) == OPERATIONS
    assert all(entry is not None and entry.sealed and entry.password for entry in stored)


def test_every_path_has_a_baseline_and_every_baseline_a_path() -> None:
    assert BASELINE.exists()
    assert list(Baseline.read().instructions) == list(PATHS)


def test_the_measured_process_runs_each_path_in_a_process_of_its_own() -> None:
    names = ["get in L1", "get, a miss", "rpc GetStats"]

    done = subprocess.run(
        [sys.executable, "-m", "tests.instructions.measured", "2", *names],
        cwd=ROOT,
        env=environment_for(ROOT),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )

    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert {run["path"]: run["operations"] for run in runs} == {name: PATHS[name].repeats for name in names}
    assert len({run["pid"] for run in runs}) == len(names)


def test_a_path_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys; from tests.instructions import measured, paths\n"
        "paths.PATHS['get in L1'].prepare.__code__ = (lambda store, wanted: 1 / 0).__code__\n"
        "sys.exit(measured.main(1, ['get in L1']))"
    )

    done = run(sys.executable, "-c", program, cwd=ROOT, env=environment_for(ROOT))

    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert done.stdout == ""


def test_without_valgrind_the_command_says_what_to_install(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for folder in os.get_exec_path():
        for program in Path(folder).iterdir() if Path(folder).is_dir() else ():
            if program.name != "valgrind" and not (tools / program.name).is_symlink():
                (tools / program.name).symlink_to(program)

    done = run(ROOT / "scripts/instructions", env={"PATH": str(tools)})

    assert done.returncode == 3
    assert "apt-get install valgrind" in done.stderr
    assert done.stdout == ""
