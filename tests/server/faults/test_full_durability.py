"""`durability = "full"`: what is acknowledged was synced before, and `process` leaves that to the kernel."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from proxystash_server.cache import CacheManager, CacheTierType, L2BackendType
from tests.server.cache.stash import Stash
from tests.server.cache.support import SWITCHED_OFF, broken, content_of, fail_until_skipped, put, stored_in
from tests.server.faults.machine import file_of

L1, L2, L3 = CacheTierType


class Call(NamedTuple):
    """A system call that concerns a file, or an acknowledgement between them."""

    name: str
    path: str = ""
    other: str = ""


ACKNOWLEDGED = Call("acknowledged")


def check_order(calls: Iterable[Call], watched: Callable[[str], bool]) -> None:
    """Assert that at each acknowledgement nothing is left to be synced.

    A file that was written is synced afterwards; one that is renamed was synced before, and its directory is
    afterwards.
    """
    written: set[str] = set()
    renamed_in: set[str] = set()
    for call in calls:
        if call.name == "write" and watched(call.path):
            written.add(call.path)
        elif call.name == "sync":
            written.discard(call.path)
            renamed_in.discard(call.path)
        elif call.name == "rename":
            assert call.path not in written, f"{call.path} was renamed before it was synced"
            written.discard(call.other)
            renamed_in.add(str(Path(call.other).parent))
        elif call is ACKNOWLEDGED:
            assert not written, f"acknowledged before {written} were synced"
            assert not renamed_in, f"acknowledged before the renames in {renamed_in} were synced"


class Recorder:
    """Notes the writes, syncs and renames of this process, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Call] = []
        for name, kind in (("pwrite", "write"), ("write", "write"), ("fsync", "sync"), ("fdatasync", "sync")):
            monkeypatch.setattr(os, name, self._on_descriptor(kind, getattr(os, name)))
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._on_paths(getattr(os, name)))

    def _on_descriptor(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(descriptor: int, *arguments: Any) -> Any:
            result = function(descriptor, *arguments)
            self.calls.append(Call(kind, str(file_of(descriptor))))
            return result

        return recorded

    def _on_paths(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(path: Any, other: Any, **options: Any) -> Any:
            result = function(path, other, **options)
            self.calls.append(Call("rename", str(path), str(other)))
            return result

        return recorded

    def acknowledge(self) -> None:
        self.calls.append(ACKNOWLEDGED)

    def named(self, name: str) -> list[Call]:
        return [call for call in self.calls if call.name == name]


def is_l2_file(path: str) -> bool:
    return "entries.jsonl" in path


def is_journal(path: str) -> bool:
    return path.endswith("missed-changes.jsonl")


CHANGES: dict[str, Callable[[CacheManager], object]] = {
    "put": lambda manager: put(manager, "new"),
    "replacement": lambda manager: put(manager, "a", source="changed"),
    "batch": lambda manager: manager.put_many(
        [manager.new_entry("http://192.0.2.1:1", key=f"many-{number}") for number in range(30)]
    ),
    "delete": lambda manager: manager.delete("b"),
    "failure": lambda manager: manager.invalidate_by_health("c"),
    "eviction by health": lambda manager: [manager.invalidate_by_health("c") for _ in range(3)],
    "clear": lambda manager: manager.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_jsonl_that_decides_syncs_each_change_before_it_is_acknowledged(
    stash: Stash, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    manager = stash.open(durability="full", l3_config=SWITCHED_OFF)
    put(manager, "a", "b", "c", "d")
    recorder = Recorder(monkeypatch)
    CHANGES[change](manager)
    recorder.acknowledge()
    made = [*recorder.named("write"), *recorder.named("rename")]
    assert any(is_l2_file(call.path) for call in made)
    check_order(recorder.calls, is_l2_file)


@pytest.mark.parametrize("change", CHANGES)
def test_what_l3_misses_is_synced_in_the_journal_before_it_is_acknowledged(
    stash: Stash, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    manager = stash.open(durability="full")
    put(manager, "a", "b", "c", "d")
    with broken(manager.l3_tier):
        fail_until_skipped(manager, manager.l3_tier)
        recorder = Recorder(monkeypatch)
        CHANGES[change](manager)
        recorder.acknowledge()
    assert any(is_journal(call.path) for call in recorder.named("write"))
    check_order([call for call in recorder.calls if "/l2/" not in call.path], is_journal)
    # Its name too, since the file has just been made.
    assert Call("sync", str(stash.directory)) in recorder.calls


def test_a_cache_on_disk_is_not_synced_since_it_starts_empty_after_a_power_cut(
    stash: Stash, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = stash.open(durability="full")
    recorder = Recorder(monkeypatch)
    for change in ("put", "batch", "delete"):
        CHANGES[change](manager)
    assert any(is_l2_file(call.path) for call in recorder.named("write"))
    assert not any(is_l2_file(call.path) for call in recorder.named("sync"))


def test_a_new_jsonl_store_is_synced_before_its_first_acknowledgement(
    stash: Stash, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    manager = stash.open(durability="full", l3_config=SWITCHED_OFF)
    put(manager, "a")
    recorder.acknowledge()
    file = str(stash.directory / "l2" / "entries.jsonl")
    check_order(recorder.calls, lambda path: path == file)
    # The names of the files are synced too, after there was a file of that name.
    created = recorder.calls.index(Call("write", file))
    assert Call("sync", str(stash.directory / "l2")) in recorder.calls[created:]


def test_a_compaction_syncs_the_new_file_before_the_rename_and_the_directory_after_it(
    stash: Stash, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = stash.open(durability="full", l3_config=SWITCHED_OFF)
    bulk = {f"label-{number}": "x" * 250 for number in range(32)}
    for number in range(200):
        put(manager, "a", source=str(number), labels=bulk)
    recorder = Recorder(monkeypatch)
    manager.maintain()
    recorder.acknowledge()
    [renamed] = recorder.named("rename")
    assert renamed.path == renamed.other + ".compacting"
    place = recorder.calls.index(renamed)
    assert Call("write", renamed.path) in recorder.calls[:place]
    assert recorder.calls[place - 1] == Call("sync", renamed.path)
    assert recorder.calls[place + 1] == Call("sync", str(stash.directory / "l2"))
    assert content_of(stash.reopen_after_kill(l3_config=SWITCHED_OFF)) == {"a": ("199", 0)}


def test_with_process_nothing_waits_for_the_medium(stash: Stash, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = stash.open(durability="process")
    put(manager, "a", "b", "c", "d")
    recorder = Recorder(monkeypatch)
    for change in CHANGES.values():
        change(manager)
    assert recorder.named("write")
    assert recorder.named("sync") == []


def test_what_could_not_be_synced_is_not_said_to_be_stored(
    stash: Stash, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = stash.open(durability="full", l3_config=SWITCHED_OFF)
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if is_l2_file(str(file_of(descriptor))) or is_journal(str(file_of(descriptor))):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        assert stored_in(manager, "a", manager.new_entry("http://192.0.2.1:1", key="a")) == (L1,)
    stash.recover(manager)
    assert stored_in(manager, "a", manager.new_entry("http://192.0.2.1:1", key="a")) == (L1, L2)


@pytest.mark.parametrize(("durability", "level"), [("process", 1), ("full", 2)])
@pytest.mark.parametrize("l2_backend", L2BackendType)
def test_the_databases_are_told_how_durable_to_be(stash: Stash, durability: str, level: int) -> None:
    manager = stash.open(durability=durability)
    put(manager, "a")
    for tier, expected in ((manager.l2_tier, 1), (manager.l3_tier, level)):
        if tier.backend == "sqlite":
            writer = tier._database._writer  # type: ignore[attr-defined]  # no part of the interface
            assert writer.execute("PRAGMA synchronous").fetchone() == (expected,)
            assert writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    manager = stash.reopen(durability=durability, l3_config=SWITCHED_OFF)
    if manager.l2_tier.backend == "sqlite":
        # Now it decides.
        writer = manager.l2_tier._database._writer  # type: ignore[attr-defined]  # as above
        assert writer.execute("PRAGMA synchronous").fetchone() == (level,)


# -- seen from outside, since SQLite's calls do not pass through Python

TRACED = textwrap.dedent("""
    import os, sys
    from proxystash_server.cache import CacheManager, CacheConfig

    directory, backend, durability = sys.argv[1:]
    manager = CacheManager(CacheConfig(
        l2_backend=backend,
        l2_cache_dir=directory + "/l2",
        l3_database_path=directory + "/l3/proxystash.db",
        encryption_key_file=directory + "/secret.key",
        durability=durability,
    ), background=False)
    def acknowledge(what):
        os.write(1, b"acknowledged " + what + b"\\n")
    for number in range(10):
        key = f"key-{number}"
        manager.put(key, manager.new_entry("http://u:p@192.0.2.1:1", key=key))
        acknowledge(b"put")
    manager.put("key-1", manager.new_entry("http://192.0.2.1:1", key="key-1"))
    acknowledge(b"replacement")
    manager.delete("key-2")
    acknowledge(b"delete")
    manager.invalidate_by_health("key-3")
    acknowledge(b"failure")
    manager.clear()
    acknowledge(b"clear")
    os.write(1, b"done\\n")
""")
TRACED_CALLS = "pwrite64,write,fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat"
ON_DESCRIPTOR = re.compile(
    r"(?P<name>pwrite64|write|fsync|fdatasync)\(\d+<(?P<path>[^>]*)>(, \"(?P<text>[^\"]*))?"
)
ON_PATHS = re.compile(
    r"(?P<name>rename|mkdir)\w*\([^\"]*\"(?P<path>[^\"]*)\"(, [^\"]*\"(?P<other>[^\"]*)\")?.* = 0$"
)


def trace(directory: Path, backend: L2BackendType, durability: str) -> list[Call]:
    """What the kernel is asked to do to the files of a new cache while that is changed."""
    if shutil.which("strace") is None:
        pytest.skip("there is no strace")
    output = directory.with_name("trace")
    strace = ["strace", "-f", "-y", "-o", str(output), "-e", f"trace={TRACED_CALLS}"]
    result = subprocess.run(
        [*strace, sys.executable, "-c", TRACED, str(directory), backend.value, durability],
        capture_output=True,
        text=True,
        check=False,
    )
    if "ptrace" in result.stderr and not result.stdout:
        pytest.skip(f"strace may not trace here: {result.stderr.strip()}")
    assert result.stdout.endswith("done\n"), result.stderr
    calls: list[Call] = []
    for line in output.read_text().splitlines():
        if (match := ON_PATHS.search(line)) is not None:
            calls.append(Call(match["name"], match["path"], match["other"] or ""))
        elif (match := ON_DESCRIPTOR.search(line)) is None:
            continue
        elif "sync" in match["name"]:
            calls.append(Call("sync", match["path"]))
        elif (match["text"] or "").startswith("acknowledged"):
            calls.append(ACKNOWLEDGED)
        elif (match["text"] or "").startswith("done"):
            break
        else:
            calls.append(Call("write", match["path"]))
    assert calls.count(ACKNOWLEDGED) == 14
    return calls


def is_log(path: str) -> bool:
    return path.endswith("proxystash.db-wal")


@pytest.mark.parametrize("l2_backend", L2BackendType)
def test_the_kernel_is_asked_to_sync_before_each_acknowledgement(
    tmp_path: Path, l2_backend: L2BackendType
) -> None:
    calls = trace(tmp_path / "data", l2_backend, "full")
    changes = calls[calls.index(ACKNOWLEDGED) :]
    assert any(is_log(call.path) for call in changes if call.name == "write")
    check_order([call for call in changes if "/l2/" not in call.path], is_log)
    # From the start on, whatever replaces a file outside L2 is whole before.
    check_order([call for call in calls if "/l2/" not in call.path], lambda path: path.endswith(".new"))


@pytest.mark.parametrize("l2_backend", L2BackendType)
def test_the_names_of_new_directories_are_synced_before_the_first_acknowledgement(
    tmp_path: Path, l2_backend: L2BackendType
) -> None:
    """A file that is synced is lost all the same if its directory has no name after a power cut."""
    calls = trace(tmp_path / "data", l2_backend, "full")
    start = calls[: calls.index(ACKNOWLEDGED)]
    made = [call for call in start if call.name == "mkdir" and call.path.startswith(str(tmp_path))]
    assert {Path(call.path).name for call in made} >= {"data", "l2", "l3"}
    unsynced = {
        call.path
        for call in made
        if Call("sync", str(Path(call.path).parent)) not in start[start.index(call) :]
    }
    # L2 is a cache, and may be lost as a whole.
    assert unsynced <= {str(tmp_path / "data" / "l2")}


@pytest.mark.parametrize("l2_backend", L2BackendType)
def test_the_kernel_is_not_asked_to_sync_with_process(tmp_path: Path, l2_backend: L2BackendType) -> None:
    calls = trace(tmp_path / "data", l2_backend, "process")
    changes = calls[calls.index(ACKNOWLEDGED) :]
    assert any(is_log(call.path) for call in changes if call.name == "write")
    assert [call for call in changes if call.name == "sync"] == []
