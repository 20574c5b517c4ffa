"""The file in which stands what the authority has missed: synced, on a full disk, and rewritten."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from proxystash_server.cache.coherence import missed as missed_module
from proxystash_server.cache.coherence.missed import MissedChanges
from proxystash_server.cache.errors import TierError
from proxystash_server.cache.tiers.base import Write
from proxystash_server.cache.tiers.jsonl.log import LogFile
from tests.server.cache.journal import (
    CHANGES,
    OpenJournal,
    as_is_and_reopened,
    delete,
    opening_journals,
    outcome_of,
    put,
    told,
    write_changes,
)
from tests.server.cache.support import run_in_threads


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "missed-changes.jsonl"


@pytest.fixture
def open_journal(path: Path) -> Iterator[OpenJournal]:
    with opening_journals(path) as open_journal:
        yield open_journal


# -- faults of the file system


class Disk:
    """Takes no more writes. If it is `torn`, each leaves the greater part of what it should have written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, torn: bool) -> None:
        self._monkeypatch = monkeypatch
        pwrite = os.pwrite

        def pwrite_in_part(descriptor: int, data: bytes, offset: int) -> int:
            if torn and len(data) > 1:
                return pwrite(descriptor, data[: len(data) // 2], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwrite", pwrite_in_part)

    def keep_what_was_written(self) -> None:
        """From now on, what a failed write has left cannot be cut off."""

        def fail(_log: LogFile, _size: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        self._monkeypatch.setattr(LogFile, "truncate", fail)

    def mend(self) -> None:
        self._monkeypatch.undo()


def fail_to_change(missed: MissedChanges, change: Write | int) -> None:
    with pytest.raises(TierError, match="OSError"):
        write_changes(missed, [change])


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("change", [put("b", 8, source="lost"), delete("c", 8), put("new", 8), 8])
@pytest.mark.parametrize("before", [CHANGES, ()])
def test_an_append_that_finds_no_room_changes_nothing_and_the_next_one_works(
    open_journal: OpenJournal,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: Sequence[Write | int],
    change: Write | int,
    torn: bool,
) -> None:
    missed = open_journal()
    write_changes(missed, before)
    on_disk = path.read_bytes() if before else b""
    held = {key: missed.holds(key) for key in ("a", "b", "c", "new")}
    version = missed.last_version
    disk = Disk(monkeypatch, torn=torn)
    for _ in range(2):
        fail_to_change(missed, change)
        assert path.read_bytes() == on_disk
        assert told(missed) == outcome_of(before)
        assert {key: missed.holds(key) for key in held} == held
        assert missed.last_version == version
    disk.mend()
    write_changes(missed, [put("after", 9)])
    for one in as_is_and_reopened(missed, open_journal):
        assert told(one) == outcome_of([*before, put("after", 9)])


@pytest.mark.parametrize("before", [CHANGES, ()])
def test_what_a_failed_append_has_left_is_taken_away_by_the_next_one(
    open_journal: OpenJournal, path: Path, monkeypatch: pytest.MonkeyPatch, before: Sequence[Write | int]
) -> None:
    missed = open_journal()
    write_changes(missed, before)
    disk = Disk(monkeypatch, torn=True)
    disk.keep_what_was_written()
    fail_to_change(missed, put("new", 8))
    # A part of it may be in the file: what comes after it has to stand there too.
    assert missed.holds("new")
    assert not missed.covers("new") or missed.cleared_at
    disk.mend()
    write_changes(missed, [put("after", 9)])
    for one in as_is_and_reopened(missed, open_journal):
        assert told(one) == outcome_of([*before, put("after", 9)])


def test_a_directory_that_cannot_be_made_is_a_fault_that_passes(
    open_journal: OpenJournal, path: Path
) -> None:
    missed = open_journal()
    path.parent.write_text("a file where the directory should be")
    with pytest.raises(TierError):
        missed.append([put("a", 1)])
    assert told(missed) == (0, {})
    assert not missed.is_in_use
    path.parent.unlink()
    missed.append([put("a", 2)])
    assert told(open_journal()) == (0, {"a": (2, "")})


def test_a_journal_that_was_removed_takes_nothing_more_and_the_next_one_does(
    open_journal: OpenJournal, path: Path
) -> None:
    missed = open_journal()
    missed.append([put("a", 1, source="before")])
    path.unlink()
    with pytest.raises(TierError, match="removed"):
        missed.append([put("b", 2)])
    assert told(missed) == (0, {"a": (1, "before")})
    missed.append([put("c", 3)])
    assert told(missed) == (0, {"a": (1, "before"), "c": (3, "")})
    assert told(open_journal())[1]["c"] == (3, "")


class Synced:
    """What was synced: the sizes of files at that moment, and None for a directory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[int | None] = []
        monkeypatch.setattr(os, "fsync", self._fsync)

    def _fsync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        self.seen.append(None if stat.S_ISDIR(status.st_mode) else status.st_size)

    def take(self) -> list[int | None]:
        seen, self.seen = self.seen, []
        return seen


def test_with_sync_a_change_is_on_the_medium_when_it_returns(
    open_journal: OpenJournal, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = Synced(monkeypatch)
    missed = open_journal(sync=True)
    missed.append([put("a", 1), put("b", 2)])
    # The names of the new directory and of the file, and then what is in it.
    assert synced.take() == [None, None, path.stat().st_size]
    missed.append([delete("a", 3)])
    assert synced.take() == [path.stat().st_size]
    missed.append_clear(4)
    assert synced.take() == [path.stat().st_size]
    missed.cleared()
    missed.finish()
    assert synced.take() == [None]


def test_without_sync_nothing_waits_for_the_medium(
    open_journal: OpenJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = Synced(monkeypatch)
    missed = open_journal()
    write_changes(missed)
    missed.cleared()
    missed.mark_applied(missed.keys())
    missed.finish()
    assert synced.take() == []


def test_a_change_is_in_the_file_when_it_returns(
    open_journal: OpenJournal, path: Path, tmp_path: Path
) -> None:
    missed = open_journal()
    copies = []
    for number in range(len(CHANGES)):
        write_changes(missed, CHANGES[number : number + 1])
        copies.append(tmp_path / f"copy-{number}.jsonl")
        copies[-1].write_bytes(path.read_bytes())
    for number, copy in enumerate(copies, 1):
        assert told(open_journal(copy)) == outcome_of(CHANGES[:number])


# -- rewriting

WORTH_REWRITING = 32 * 1024


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(missed_module, "_WORTH_REWRITING", WORTH_REWRITING)


@pytest.mark.usefixtures("small")
def test_a_journal_is_rewritten_at_four_times_what_counts_while_others_read_it(
    open_journal: OpenJournal, path: Path
) -> None:
    missed = open_journal()
    missed.append([put("gone", 1)])
    missed.append_clear(2)
    keys = [f"key-{number}" for number in range(40)]
    missed.append([put(key, 3, source=f"{key}:3") for key in keys])
    missed.append([delete("deleted", 4)])
    live = path.stat().st_size
    sizes: list[int] = []
    last = 3000

    def write() -> None:
        for version in range(10, last + 1):
            key = keys[version % len(keys)]
            missed.append([put(key, version, source=f"{key}:{version}")])
            sizes.append(path.stat().st_size)

    def read() -> None:
        while missed.last_version < last:
            for key in keys:
                entry = missed.read(key)
                assert entry is not None
                assert entry.source == f"{key}:{entry.version}"
            assert missed.covers("anything")

    run_in_threads(write, read, read)
    assert max(sizes) < max(WORTH_REWRITING, 5 * live)
    rewritten = [before for before, after in pairwise(sizes) if after < before]
    assert len(rewritten) >= 5
    assert min(rewritten) > 3 * live
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o077 == 0
    for one in as_is_and_reopened(missed, open_journal):
        cleared_at, changes = told(one)
        assert cleared_at == 2
        assert changes.pop("deleted") == (4, None)
        assert changes == {key: (version, f"{key}:{version}") for key, (version, _) in changes.items()}
        assert sorted(changes) == sorted(keys)
        assert {version for version, _ in changes.values()} == set(range(last - 39, last + 1))


@pytest.mark.usefixtures("small")
def test_a_journal_most_of_which_counts_is_not_rewritten(open_journal: OpenJournal, path: Path) -> None:
    missed = open_journal()
    inode = 0
    for number in range(300):
        missed.append([put(f"key-{number}", number + 1)])
        inode = inode or path.stat().st_ino
    assert path.stat().st_size > WORTH_REWRITING
    assert path.stat().st_ino == inode


def grow(missed: MissedChanges, path: Path, first_version: int) -> bool:
    """Change one key until the journal has become smaller, or has long been worth it; whether it has."""
    for version in range(first_version, first_version + 400):
        before = path.stat().st_size
        missed.append([put("often", version)])
        if path.stat().st_size < before:
            return True
    return False


@pytest.mark.usefixtures("small")
def test_a_rewriting_keeps_what_counts_if_memory_loses_a_later_change(
    open_journal: OpenJournal, path: Path
) -> None:
    missed = open_journal()
    missed.append([put("a", 1), put("applied", 2)])
    missed.mark_applied(["applied"])
    missed.note_unsaved([put("a", 3)])
    assert grow(missed, path, 10)
    assert missed.unsaved_keys() == ["a"]
    assert missed.covers("a")
    assert not missed.covers("applied")
    assert missed.holds("applied")
    missed.mark_applied(["a"])
    assert missed.holds("a")
    reopened = open_journal()
    assert reopened.covers("a")
    assert reopened.version_of("a") == 1
    assert reopened.covers("applied")


@pytest.mark.usefixtures("small")
def test_with_sync_a_rewritten_journal_is_on_the_medium_before_it_takes_its_place(
    open_journal: OpenJournal, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missed = open_journal(sync=True)
    missed.append([put("a", 1)])
    synced = Synced(monkeypatch)
    assert grow(missed, path, 10)
    # The last append, the whole of the new file, and its name.
    *_, appended, rewritten, name = synced.take()
    assert appended is not None
    assert appended > WORTH_REWRITING
    assert (rewritten, name) == (path.stat().st_size, None)


@pytest.mark.usefixtures("small")
def test_a_rewriting_that_fails_costs_nothing_and_is_made_up_for(
    open_journal: OpenJournal, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missed = open_journal()
    missed.append([put("a", 1)])

    def cannot_replace(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(missed_module, "replace_file", cannot_replace)
        assert not grow(missed, path, 10)
    assert path.stat().st_size > WORTH_REWRITING
    missed.append([put("b", 1000)])
    assert path.stat().st_size < WORTH_REWRITING
    for one in as_is_and_reopened(missed, open_journal):
        assert {key: version for key, (version, _) in told(one)[1].items()} == {
            "a": 1,
            "often": 409,
            "b": 1000,
        }


@pytest.mark.usefixtures("small")
def test_a_rewriting_keeps_what_was_damaged(open_journal: OpenJournal, path: Path) -> None:
    open_journal().append([put("a", 1, source="sound"), put("b", 2)])
    path.write_bytes(path.read_bytes().replace(b"sound", b"s0und"))
    missed = open_journal(damaged=1)
    assert grow(missed, path, 10)
    kept = path.with_name(f"{path.name}.damaged-1")
    assert b"s0und" in kept.read_bytes()
    missed.mark_applied(missed.keys())
    missed.finish()
    assert list(path.parent.iterdir()) == [kept]
