"""What was committed is there after a kill, whatever happens to the file in between."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from proxystash_server.cache import StoreError
from proxystash_server.cache.ground.killpoints import VARIABLE
from proxystash_server.cache.tiers.jsonl.log import LogFile
from proxystash_server.cache.tiers.jsonl.records import Record, RecordFormat
from proxystash_server.pool import journal as journal_module
from proxystash_server.pool.clocks import Timeline
from proxystash_server.pool.journal import Journal
from tests.server.pool.clocks import START_US, FakeClocks


class Owner:
    """A dictionary that is kept in a journal."""

    def __init__(self, path: Path, clocks: FakeClocks | None = None, *, sync: bool = False) -> None:
        self.lock = threading.Lock()
        self.state: dict[str, int] = {}
        self.journal = Journal(
            path, "test-state", (clocks or FakeClocks()).clocks(), self._snapshot, sync=sync
        )
        records, self.from_disk = self.journal.load()
        for record in records:
            self._apply(record)
        self.journal.start()

    def _apply(self, record: Record) -> None:
        if record["op"] == "set":
            self.state[record["name"]] = record["value"]
        else:
            self.state.pop(record["name"], None)

    def _snapshot(self) -> list[Record]:
        with self.lock:
            return [{"op": "set", "name": name, "value": value} for name, value in self.state.items()]

    def change(self, name: str, value: int | None) -> None:
        with self.lock:
            record: Record = {"op": "delete", "name": name}
            if value is not None:
                record = {"op": "set", "name": name, "value": value}
            self._apply(record)
            self.journal.record(record)
        self.journal.commit()


def _is_degraded(owner: Owner) -> bool:
    return owner.journal.is_degraded


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pool" / "state.jsonl"


def test_what_was_committed_is_there_without_an_orderly_end(path: Path) -> None:
    owner = Owner(path)
    owner.change("a", 1)
    owner.change("b", 2)
    owner.change("a", None)
    assert Owner(path).state == {"b": 2}


def test_a_torn_tail_costs_what_nobody_was_answered_for(path: Path) -> None:
    """Given the file cut at each byte of its last line."""
    owner = Owner(path)
    owner.change("a", 1)
    whole = path.read_bytes()
    owner.change("b", 2)
    longer = path.read_bytes()
    for end in range(len(whole), len(longer)):
        path.write_bytes(longer[:end])
        again = Owner(path)
        assert again.state == {"a": 1}
        again.change("c", 3)
        assert Owner(path).state == {"a": 1, "c": 3}


def test_a_damaged_line_costs_itself_and_the_file_is_kept_aside(path: Path) -> None:
    owner = Owner(path)
    for number in range(3):
        owner.change(f"n{number}", number)
    damaged = path.read_bytes().replace(b'"n1"', b'"nX"')
    path.write_bytes(damaged)
    assert Owner(path).state == {"n0": 0, "n2": 2}
    assert path.with_name("state.jsonl.damaged-1").read_bytes() == damaged


def test_a_later_format_is_refused_and_left_alone(path: Path) -> None:
    Owner(path).change("a", 1)
    later = RecordFormat("test-state", journal_module.FORMAT_VERSION + 1, "")
    path.write_bytes(later.header(timeline=Timeline(FakeClocks().clocks()).to_dict()))
    before = path.read_bytes()
    with pytest.raises(StoreError, match="Use a newer release"):
        Owner(path)
    assert path.read_bytes() == before


def test_it_is_written_anew_when_little_of_it_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_WORTH_REWRITING", 2000)
    owner = Owner(path)
    for number in range(100):
        owner.change("a", number)
        owner.journal.maintain()
        assert path.stat().st_size < 2200
    assert Owner(path).state == {"a": 99}


def test_changes_go_on_while_it_is_written_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a change after the snapshot was taken, and before the new file is in place."""
    owner = Owner(path)
    owner.change("a", 1)
    append = LogFile.append
    done = False

    def appending(self: LogFile, lines: bytes) -> int:
        nonlocal done
        if self.path.name.endswith(".new") and not done:
            done = True
            owner.change("b", 2)
            owner.change("a", None)
        return append(self, lines)

    monkeypatch.setattr(LogFile, "append", appending)
    owner.journal.start()
    assert done
    owner.change("c", 3)
    assert Owner(path).state == {"b": 2, "c": 3} == owner.state


def test_what_was_noted_before_a_snapshot_is_committed_before_the_new_file_is_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a change that is noted, and not committed, when the journal begins to be written anew."""
    owner = Owner(path)
    owner.change("a", 1)
    snapshot, append = owner._snapshot, LogFile.append
    found: list[dict[str, int]] = []

    def snapshot_after_a_change() -> list[Record]:
        with owner.lock:
            owner.state["b"] = 2
            owner.journal.record({"op": "set", "name": "b", "value": 2})
        return snapshot()

    def appending(self: LogFile, lines: bytes) -> int:
        if self.path.name.endswith(".new") and not found:
            owner.journal.commit()
            # As a kill would leave it.
            copy = path.with_name("copy.jsonl")
            copy.write_bytes(path.read_bytes())
            found.append({})
            found[0] = Owner(copy).state
        return append(self, lines)

    monkeypatch.setattr(owner.journal, "_snapshot", snapshot_after_a_change)
    monkeypatch.setattr(LogFile, "append", appending)
    owner.journal.start()
    assert found == [{"a": 1, "b": 2}]
    assert Owner(path).state == {"a": 1, "b": 2}


def test_a_full_disk_stops_nobody_and_is_made_good(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owner = Owner(path)
    owner.change("a", 1)
    before = path.read_bytes()
    with monkeypatch.context() as context:

        def full(*_arguments: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        context.setattr(LogFile, "write", full)
        owner.change("b", 2)
        owner.change("a", None)
        assert _is_degraded(owner)
        owner.journal.maintain()
        assert _is_degraded(owner)
        assert path.read_bytes() == before
        assert not path.with_name(path.name + ".new").read_bytes()
    assert sum("cannot be written" in record.message for record in caplog.records) == 1
    owner.journal.maintain()
    assert not _is_degraded(owner)
    assert Owner(path).state == {"b": 2}


def test_a_file_that_was_removed_is_noticed(path: Path) -> None:
    owner = Owner(path)
    owner.change("a", 1)
    path.unlink()
    owner.change("b", 2)
    assert _is_degraded(owner)
    owner.journal.maintain()
    assert Owner(path).state == {"a": 1, "b": 2}


@pytest.mark.parametrize("sync", [True, False])
def test_it_waits_for_the_medium_if_that_is_wanted(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, sync: bool
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    owner = Owner(path, sync=sync)
    synced.clear()
    owner.change("a", 1)
    assert len(synced) == sync


def test_concurrent_changes_all_reach_the_file_in_their_order(path: Path) -> None:
    owner = Owner(path)

    def work(name: str) -> None:
        for number in range(200):
            owner.change(name, number)
            owner.change("shared", number)

    threads = [threading.Thread(target=work, args=(f"t{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        owner.journal.start()
    for thread in threads:
        thread.join()
    assert Owner(path).state == owner.state


def test_steady_times_survive_steps_of_the_wall_clock_within_a_boot() -> None:
    clocks = FakeClocks()
    before = Timeline(clocks.clocks())
    absolute = before.absolute(clocks.steady + 60)
    assert absolute == START_US + 60_000_000
    clocks.pass_time(10)
    clocks.step(3600)
    after = Timeline(clocks.clocks())
    assert after.reader_of(before.to_dict())(absolute) == pytest.approx(clocks.steady + 50)


def test_after_another_boot_the_wall_clock_counts() -> None:
    clocks = FakeClocks()
    before = Timeline(clocks.clocks())
    absolute = before.absolute(clocks.steady + 60)
    clocks.reboot(20)
    assert Timeline(clocks.clocks()).reader_of(before.to_dict())(absolute) == pytest.approx(
        clocks.steady + 40
    )


_CHILD = """
import sys
from pathlib import Path
from tests.server.pool.test_journal import Owner
owner = Owner(Path(sys.argv[1]))
number = max(owner.state.values(), default=0)
while True:
    number += 1
    owner.change("n", number)
    print(number, flush=True)
    if number % 5 == 0:
        owner.journal.start()
"""


@pytest.mark.parametrize(
    "point", ["pool.before_append", "pool.after_append", "pool.before_rename", "pool.after_rename"]
)
def test_a_kill_at_any_step_loses_nothing_acknowledged(path: Path, point: str) -> None:
    acknowledged = 0
    for arrival in (1, 2, 4):
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, str(path)],
            env={**os.environ, VARIABLE: f"{point}:{arrival}"},
            cwd=Path(__file__).resolve().parents[3],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert child.returncode == -9, child.stderr
        acknowledged = max([acknowledged, *map(int, child.stdout.split())])
        if path.exists():
            found = Owner(path).state.get("n", 0)
            assert found in (acknowledged, acknowledged + 1)
            acknowledged = found
        else:
            assert acknowledged == 0
