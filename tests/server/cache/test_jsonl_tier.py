"""The JSONL backend."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from proxystash_server.cache import (
    AuthorityTier,
    CacheTierConfig,
    CacheTierType,
    CredentialEncryptor,
    Durability,
    JsonlCacheTier,
    StoreFormatError,
)
from proxystash_server.cache.coherence.uses import Use
from proxystash_server.cache.errors import TierError
from proxystash_server.cache.tiers.base import Write
from proxystash_server.cache.tiers.jsonl.index import FORMAT, Slot
from proxystash_server.cache.tiers.jsonl.line import encode_body, finish_line
from proxystash_server.cache.tiers.jsonl.log import LogFile
from tests.server.cache.authority_tier_contract import AuthorityTierContract
from tests.server.cache.invariants import check_files, check_line, check_tier
from tests.server.cache.store_contract import ENCRYPTOR, as_is_and_reopened
from tests.server.cache.support import (
    PASSWORD,
    START_US,
    FakeClock,
    bounded,
    contents,
    flip_byte,
    keys_of,
    page,
    run_in_threads,
    stored,
)
from tests.server.cache.tier_contract import ANY, UNBOUNDED, everything_set, put

FILE = "entries.jsonl"
Make = Callable[..., JsonlCacheTier]


class TestJsonlTier(AuthorityTierContract):
    def build(
        self, directory: Path, config: CacheTierConfig, encryptor: CredentialEncryptor, **options: Any
    ) -> AuthorityTier:
        return JsonlCacheTier(config, CacheTierType.L2, directory, encryptor, **options)

    def pretend_newer_format(self, directory: Path) -> None:
        meta = json.loads((directory / "meta.json").read_bytes())
        del meta["seq"], meta["crc"]
        (directory / "meta.json").write_bytes(finish_line(encode_body({**meta, "version": 1000}), 0))

    def damage(self, directory: Path, key: str) -> None:
        path = directory / FILE
        content = path.read_bytes()
        place = content.index(b'"sound"', content.index(f'"op":"put","key":"{key}"'.encode()))
        # In place: the tier may have the file open.
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b'"s0und"')


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def corruptions() -> list[str]:
    return []


@pytest.fixture
def make(directory: Path, clock: FakeClock, corruptions: list[str]) -> Iterator[Make]:
    """Opens a tier on the directory, after closing the one that was open before."""
    opened: list[JsonlCacheTier] = []

    def make(
        config: CacheTierConfig = UNBOUNDED, *, directory: Path = directory, **options: Any
    ) -> JsonlCacheTier:
        for tier in opened:
            tier.close()
        tier = JsonlCacheTier(
            config,
            CacheTierType.L2,
            directory,
            ENCRYPTOR,
            clock=clock,
            on_corruption=lambda _tier, _key, reason: corruptions.append(reason),
            **options,
        )
        tier.open()
        opened.append(tier)
        return tier

    yield make
    for tier in opened:
        tier.close()


def set_aside(directory: Path) -> list[dict[str, Any]]:
    path = directory / "set-aside.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def make_garbage(tier: JsonlCacheTier, key: str, *, count: int = 2500, first_version: int = 1000) -> None:
    """Replace one entry so often that the file is worth compacting."""
    tier.apply([
        Write(key, stored(key, version=first_version + number, source="x" * 100, labels={"n": "y" * 200}))
        for number in range(count)
    ])  # fmt: skip


# -- lines


def test_the_file_is_json_lines_that_anyone_can_read(make: Make, directory: Path) -> None:
    tier = make()
    put(tier, everything_set(), *(stored(f"key-{number}") for number in range(20)))
    tier.delete("key-3")
    tier.note_uses([Use("key-4", 1, 2, START_US, False)])
    content = (directory / FILE).read_bytes()
    assert content.endswith(b"\n")
    records = []
    for line in content.splitlines():
        check_line(line)
        records.append(json.loads(line))
    puts = {record["key"]: record for record in records if record["op"] == "put"}
    assert puts["full"]["proxy_url"] == "socks5://[2001:db8::1]:1080"
    assert puts["full"]["labels"]["country"] == "DE"
    assert puts["full"]["health_status"] == "degraded"
    assert len(puts) == 21


CHANGES: dict[str, Callable[[JsonlCacheTier], object]] = {
    "put": lambda tier: tier.put("new", stored("new")),
    "replacement": lambda tier: tier.put("key-1", stored("key-1", version=2)),
    "delete": lambda tier: tier.delete("key-1"),
    "note_uses": lambda tier: tier.note_uses([Use("key-1", 1, 1, START_US, False)]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_appends_one_line_to_one_file_and_rewrites_nothing(
    make: Make, directory: Path, change: str
) -> None:
    tier = make()
    put(tier, *(stored(f"key-{number}") for number in range(30)))
    before = contents(directory)
    inodes = {path.name: path.stat().st_ino for path in directory.iterdir()}
    CHANGES[change](tier)
    after = contents(directory)
    assert after.keys() == before.keys()
    assert {path.name: path.stat().st_ino for path in directory.iterdir()} == inodes
    changed = [name for name in after if after[name] != before[name]]
    assert len(changed) == 1
    added = after[changed[0]].removeprefix(before[changed[0]])
    assert added != after[changed[0]]
    assert added.count(b"\n") == 1
    assert added.endswith(b"\n")


def test_changes_that_change_nothing_write_nothing(make: Make, directory: Path) -> None:
    tier = make()
    put(tier, stored("key-1", version=2))
    before = contents(directory)
    tier.delete("nothing")
    tier.note_uses([Use("key-1", 1, 1, START_US, False), Use("nothing", 1, 1, START_US, False)])
    assert contents(directory) == before


@pytest.mark.parametrize(("durability", "synced"), [(Durability.PROCESS, False), (Durability.FULL, True)])
def test_full_durability_syncs_what_a_put_appended_before_it_returns(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch, durability: Durability, synced: bool
) -> None:
    tier = make(durability=durability)
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    put(tier, stored("key-1"))
    assert sizes == ([(directory / FILE).stat().st_size] if synced else [])


# -- compaction


def test_compaction_keeps_the_content_and_gives_the_room_back(make: Make, directory: Path) -> None:
    tier = make()
    put(tier, everything_set(), *(stored(f"key-{number}", version=number + 1) for number in range(50)))
    tier.note_uses([Use("full", 1, 44, START_US + 9, True)])
    for key in ("key-1", "full-not", "key-2"):
        make_garbage(tier, key)
    before = {key: tier.get(key) for key in tier.keys()}  # noqa: SIM118 -- no dict
    grown = (directory / FILE).stat().st_size
    tier.maintain()
    assert (directory / FILE).stat().st_size < grown / 4
    for one in as_is_and_reopened(tier, make):
        assert {key: one.get(key) for key in one.keys()} == before  # noqa: SIM118 -- no dict
        assert one.versions(["key-7"]) == {"key-7": 8}
        check_tier(one)
    make().close()
    check_files(directory)


def test_a_compacted_store_takes_further_changes(make: Make) -> None:
    tier = make()
    put(tier, stored("other"))
    make_garbage(tier, "key-1")
    tier.maintain()
    put(tier, stored("key-1", version=5000, source="after"))
    make_garbage(tier, "key-1", first_version=6000)
    put(tier, stored("key-1", version=9000, source="last"))
    tier.maintain()
    for one in as_is_and_reopened(tier, make):
        assert one.get("key-1") == stored("key-1", source="last")
        assert sorted(one.keys()) == ["key-1", "other"]


def test_what_is_not_worth_it_is_not_compacted(make: Make, directory: Path) -> None:
    tier = make()
    put(tier, *(stored("key-1", version=number + 1) for number in range(20)))
    before = contents(directory)
    tier.maintain()
    assert contents(directory) == before


def test_a_deleted_key_stays_deleted_through_compaction(make: Make) -> None:
    tier = make()
    put(tier, stored("key-1", version=1))
    make_garbage(tier, "key-1")
    tier.delete("key-1")
    tier.maintain()
    for one in as_is_and_reopened(tier, make):
        assert one.keys() == []


def test_reads_and_writes_go_on_during_compactions(make: Make) -> None:
    tier = make()
    keys = [f"key-{number}" for number in range(40)]
    put(tier, *(stored(key, source=key) for key in keys))
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            for key in keys:
                entry = tier.get(key)
                assert entry is not None
                assert entry.source == key

    def write() -> None:
        try:
            for number in range(6):
                make_garbage(tier, f"garbage-{number}", count=300)
                put(tier, *(stored(key, version=number + 2, source=key) for key in keys))
        finally:
            done.set()

    def compact() -> None:
        while not done.is_set():
            tier._needs_compaction = True
            tier.maintain()

    run_in_threads(read, write, compact)
    for one in as_is_and_reopened(tier, make):
        assert one.size() == 46
        assert one.versions(keys) == dict.fromkeys(keys, 7)
        check_tier(one)


def test_what_is_appended_while_a_compaction_copies_is_kept(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = make()
    put(tier, stored("key-1", version=1), stored("key-2", version=2))
    tier._needs_compaction = True
    read, once = LogFile.read, threading.Lock()

    def read_and_interfere(self: LogFile, offset: int, length: int) -> bytes:
        line = read(self, offset, length)
        if b'"key-1"' in line and once.acquire(blocking=False):
            put(tier, stored("key-1", version=3, source="meanwhile"), stored("key-3", version=4))
            tier.note_uses([Use("key-2", 2, 9, START_US + 1, True)])
        return line

    monkeypatch.setattr(LogFile, "read", read_and_interfere)
    tier.maintain()
    assert once.locked(), "nothing was copied"
    for one in as_is_and_reopened(tier, make):
        assert one.get("key-1") == stored("key-1", source="meanwhile")
        assert one.get("key-3") == stored("key-3")
        used = one.get("key-2")
        assert used is not None
        assert used.access_count == 9
        check_tier(one)


def test_a_clear_during_a_compaction_is_final(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = make()
    put(tier, stored("key-1"))
    tier._needs_compaction = True
    read = LogFile.read

    def read_and_clear(self: LogFile, offset: int, length: int) -> bytes:
        line = read(self, offset, length)
        if b'"key-1"' in line:
            monkeypatch.setattr(LogFile, "read", read)
            tier.clear()
        return line

    monkeypatch.setattr(LogFile, "read", read_and_clear)
    tier.maintain()
    for one in as_is_and_reopened(tier, make):
        assert one.keys() == []
        check_tier(one)


def test_what_an_interrupted_compaction_left_behind_is_no_obstacle(make: Make, directory: Path) -> None:
    tier = make()
    put(tier, stored("other"))
    make_garbage(tier, "key-1")
    path = directory / FILE
    path.with_name(path.name + ".compacting").write_bytes(b"half of a lin")
    path.with_name(path.name + ".new").write_bytes(b"half of a lin")
    tier = make()
    tier.maintain()
    assert path.stat().st_size < 10_000
    assert sorted(make().keys()) == ["key-1", "other"]


# -- damage


def test_a_torn_last_line_costs_itself_alone(make: Make, directory: Path, corruptions: list[str]) -> None:
    tier = make()
    put(tier, stored("key-1", version=1))
    put(tier, stored("key-1", version=2, source="torn"))
    tier.close()
    path = directory / FILE
    path.write_bytes(path.read_bytes()[:-20])
    tier = make()
    assert tier.get("key-1") == stored("key-1")
    assert len(corruptions) == 1
    assert "torn" in set_aside(directory)[0]["line"]
    put(tier, stored("key-1", version=3, source="next"))
    corruptions.clear()
    assert make().get("key-1") == stored("key-1", source="next")
    assert corruptions == []


def test_whichever_byte_is_flipped_only_its_line_is_lost_and_no_wrong_entry_is_served(
    make: Make, directory: Path, tmp_path: Path, corruptions: list[str]
) -> None:
    tier = make()
    keys = [f"key-{number}" for number in range(24)]
    put(tier, *(stored(key, source=key, username="u", password=PASSWORD) for key in keys))
    tier.close()
    whole = contents(directory)
    for place in range(0, len(whole[FILE]), 19):
        corruptions.clear()
        damaged = tmp_path / f"damaged-{place}"
        damaged.mkdir()
        for name, content in whole.items():
            (damaged / name).write_bytes(content)
        flip_byte(damaged / FILE, place)
        lost: set[str] = set()
        for _ in ("at first", "after a restart"):
            tier = make(directory=damaged)
            lost = set(keys) - set(tier.keys())
            # The first line is no entry's; a flipped newline joins two lines into one that cannot be trusted.
            assert len(lost) <= 2, place
            for key in set(keys) - lost:
                entry = tier.get(key)
                assert entry is not None, place
                assert entry.source == key, place
            check_tier(tier)
        assert max(1, len(lost) - 1) <= len(corruptions) <= 2, place
        assert len(set_aside(damaged)) == len(corruptions), place


def test_a_line_damaged_while_the_tier_is_open_is_set_aside_at_the_next_get(
    make: Make, directory: Path, corruptions: list[str]
) -> None:
    tier = make()
    put(tier, stored("key-1", source="sound"), stored("key-2"))
    path = directory / FILE
    # In place: the tier has the file open.
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(b"sound"))
        file.write(b"s0und")
    assert tier.get("key-1") is None
    assert len(corruptions) == 1
    assert tier.size() == 1
    assert "s0und" in set_aside(directory)[0]["line"]
    assert tier.get("key-1") is None
    assert len(corruptions) == 1
    assert tier.get("key-2") == stored("key-2")
    assert make().keys() == ["key-2"]


def test_a_line_in_the_place_of_another_is_not_served_for_it(
    make: Make, directory: Path, corruptions: list[str]
) -> None:
    tier = make()
    put(tier, *(stored(f"key-{number}") for number in range(10, 99)))
    path = directory / FILE
    *front, first, second = path.read_bytes().splitlines(keepends=True)
    assert len(first) == len(second)
    with path.open("r+b") as file:
        file.write(b"".join([*front, second, first]))
    for line in (first, second):
        assert tier.get(json.loads(line)["key"]) is None
    assert len(corruptions) == 2


def test_a_line_found_damaged_by_a_compaction_is_set_aside(
    make: Make, directory: Path, corruptions: list[str]
) -> None:
    tier = make()
    put(tier, stored("key-1", source="sound"), stored("key-2"))
    path = directory / FILE
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(b"sound"))
        file.write(b"s0und")
    tier._needs_compaction = True
    tier.maintain()
    assert len(corruptions) == 1
    for one in as_is_and_reopened(tier, make):
        assert one.keys() == ["key-2"]
        check_tier(one)
    assert len(set_aside(directory)) == 1


def test_a_damaged_first_line_costs_no_entry(make: Make, directory: Path, corruptions: list[str]) -> None:
    put(make(), stored("key-1"))
    make().close()
    flip_byte((directory / FILE), 3)
    assert make().get("key-1") == stored("key-1")
    assert len(corruptions) == 1
    corruptions.clear()
    assert make().get("key-1") == stored("key-1")
    assert corruptions == []


def test_a_credential_that_cannot_be_opened_is_a_corrupt_record(
    make: Make, directory: Path, corruptions: list[str]
) -> None:
    tier = make()
    put(tier, stored("sound", username="u", password="p"))
    foreign = CredentialEncryptor().seal(everything_set().username, everything_set().password)
    entry = everything_set()
    entry.content.sealed = foreign
    put(tier, entry)
    assert tier.get("full") is None
    assert len(corruptions) == 1
    assert tier.get("sound") == stored("sound", username="u", password="p")
    for report in set_aside(directory):
        assert PASSWORD not in json.dumps(report)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"{}", b"\xff\xfe", b'{"version": "x"}'])
def test_a_damaged_meta_file_costs_no_entry(
    make: Make, directory: Path, corruptions: list[str], content: bytes
) -> None:
    put(make(), everything_set(), stored("key-1"))
    make().close()
    (directory / "meta.json").write_bytes(content)
    for _ in ("at first", "after a restart"):
        tier = make()
        assert tier.get("full") == everything_set()
        assert tier.size() == 2
        assert tier.notes["id"]
    assert len(corruptions) == 1


def test_a_missing_file_leaves_an_empty_store(make: Make, directory: Path) -> None:
    put(make(), stored("key-1"), stored("key-2"))
    make().close()
    (directory / FILE).unlink()
    tier = make()
    assert tier.keys() == []
    put(tier, stored("key-1", version=2))
    assert "key-1" in make()


def test_a_file_of_a_newer_format_is_refused(make: Make, directory: Path) -> None:
    put(make(), stored("key-1"))
    make().close()
    newer = {"op": "header", "format": FORMAT, "version": 1000}
    (directory / FILE).write_bytes(finish_line(encode_body(newer), 0))
    with pytest.raises(StoreFormatError, match="newer release"):
        make()


# -- faults of the file system


class Disk:
    """Lets the files of a tier take so many more writes, and then none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, writes_left: int, *, torn: bool = False) -> None:
        self._write = LogFile.write
        self._monkeypatch = monkeypatch
        self.writes_left = writes_left
        self.torn = torn
        disk = self

        def write(segment: LogFile, data: bytes, offset: int) -> None:
            if disk.writes_left <= 0:
                if disk.torn:
                    disk._write(segment, data[: len(data) // 2], offset)
                raise OSError(28, "No space left on device")
            disk.writes_left -= 1
            disk._write(segment, data, offset)

        monkeypatch.setattr(LogFile, "write", write)

    def mend(self) -> None:
        self._monkeypatch.setattr(LogFile, "write", self._write)


@pytest.mark.parametrize("torn", [False, True])
def test_a_full_disk_fails_the_put_and_leaves_a_sound_store(
    make: Make, monkeypatch: pytest.MonkeyPatch, corruptions: list[str], torn: bool
) -> None:
    tier = make()
    put(tier, stored("key-1", version=1))
    disk = Disk(monkeypatch, 0, torn=torn)
    with pytest.raises(TierError, match="No space left"):
        put(tier, stored("key-1", version=2, source="lost"))
    assert tier.get("key-1") == stored("key-1")
    disk.mend()
    put(tier, stored("key-2", version=3))
    for one in as_is_and_reopened(tier, make):
        assert one.get("key-1") == stored("key-1")
        assert one.size() == 2
        check_tier(one)
    assert corruptions == []


def test_a_disk_that_can_not_even_cut_off_a_torn_line_is_recovered_by_the_next_append(
    make: Make, monkeypatch: pytest.MonkeyPatch, corruptions: list[str]
) -> None:
    tier = make()
    put(tier, stored("key-1", version=1))
    disk = Disk(monkeypatch, 0, torn=True)
    truncate = LogFile.truncate

    def cannot_truncate(self: LogFile, size: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(LogFile, "truncate", cannot_truncate)
    with pytest.raises(TierError):
        put(tier, stored("key-1", version=2))
    disk.mend()
    monkeypatch.setattr(LogFile, "truncate", truncate)
    put(tier, stored("key-1", version=3, source="after"))
    assert make().get("key-1") == stored("key-1", source="after")
    assert corruptions == []


def test_a_clear_that_fails_has_changed_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = make()
    put(tier, *(stored(f"key-{number}") for number in range(30)))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", mock.Mock(side_effect=OSError(5, "Input/output error")))
        with pytest.raises(TierError, match="Input/output"):
            tier.clear()
    for one in as_is_and_reopened(tier, make):
        assert one.size() == 30
        check_tier(one)


@pytest.mark.parametrize("change", ["clear", "compaction"])
def test_the_last_version_outlives_the_line_that_said_it(make: Make, change: str) -> None:
    tier = make()
    put(tier, stored("key-1", version=1), stored("key-2", version=2))
    tier.apply([Write("key-2", None, 7)])
    if change == "clear":
        tier.clear(8)
    else:
        tier._needs_compaction = True
        tier.maintain()
    for one in as_is_and_reopened(tier, make):
        assert one.last_version == (8 if change == "clear" else 7)


def test_a_page_passes_over_damaged_lines_and_is_full_without_them(make: Make, directory: Path) -> None:
    tier = make()
    put(tier, *(stored(f"key-{number}", source=f"sound-{number}") for number in range(6)))
    path = directory / FILE
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(b"sound-1"))
        file.write(b"damaged")
    assert keys_of(page(tier, "", 3, ANY, START_US)) == ["key-0", "key-2", "key-3"]


def test_an_open_file_is_let_go_of_when_nothing_reads_it_any_more(make: Make) -> None:
    tier = make()
    put(tier, stored("key-1"))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(5):
        make_garbage(tier, "key-1", first_version=1000 * (number + 1))
        tier.maintain()
        tier.clear()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_a_bounded_tier_with_an_old_store_of_more_entries_is_over_capacity_only_until_it_is_trimmed(
    make: Make,
) -> None:
    put(make(), *(stored(f"key-{number}", version=number + 1) for number in range(10)))
    tier = make(bounded(3, "fifo"))
    put(tier, stored("new", version=50))
    assert sorted(tier.keys()) == ["key-8", "key-9", "new"]


def test_a_key_that_is_replaced_never_leaves_the_index(make: Make) -> None:
    """A lookup that misses takes no lock, and may come at any moment."""
    left: list[str] = []

    class Watched(dict[str, Slot]):
        def pop(self, key: str, *default: Any) -> Any:
            left.append(key)
            return super().pop(key, *default)

        def __delitem__(self, key: str) -> None:
            left.append(key)
            super().__delitem__(key)

    tier = make()
    put(tier, stored("key-1"), stored("key-2"))
    assert isinstance(tier, JsonlCacheTier)
    tier._index.slots = Watched(tier._index.slots)
    put(tier, stored("key-1", source="after"))
    assert left == []
    tier.delete("key-2")
    assert left == ["key-2"]
    assert tier.keys() == ["key-1"]


# -- seals


@pytest.mark.parametrize("damage", ["cut off between two lines", "one line more", "a flipped bit", "lost"])
def test_a_seal_is_not_believed_of_files_that_are_not_as_they_were(
    make: Make, directory: Path, damage: str
) -> None:
    tier = make()
    put(tier, *(stored(f"key-{number}") for number in range(30)))
    tier.seal(7)
    tier.close()
    path = directory / FILE
    content = path.read_bytes()
    if damage == "cut off between two lines":
        path.write_bytes(b"".join(content.splitlines(keepends=True)[:-1]))
    elif damage == "one line more":
        path.write_bytes(content + content.splitlines(keepends=True)[-1])
    elif damage == "a flipped bit":
        path.write_bytes(content[:-30] + bytes([content[-30] ^ 1]) + content[-29:])
    else:
        path.unlink()
    assert make().break_seal() is None


# -- an earlier format


def test_what_format_1_noted_for_the_other_tier_is_inherited_once(make: Make, directory: Path) -> None:
    """Marks stood in lines of their own, and in those of the changes that the other tier had missed."""
    put(make(), stored("a", version=10), stored("b", version=11))
    make().close()
    first_shard, second_shard = directory / "shard-0.jsonl", directory / "shard-1.jsonl"
    header, a, b = (directory / FILE).read_bytes().splitlines(keepends=True)
    (directory / FILE).unlink()
    marked = finish_line(encode_body({"op": "backlog", "keys": {"c": 12, "settled": 3, "": 9}}), 100)
    settled = finish_line(encode_body({"op": "settle", "keys": ["settled"]}), 101)
    removed = finish_line(b'{"op":"delete","key":"b","version":13,"backlog":true', 102)
    first_shard.write_bytes(header + a + marked + settled)
    second_shard.write_bytes(header + b + removed)
    meta = json.loads((directory / "meta.json").read_bytes())
    old = {"format": meta["format"], "version": 1, "key_check": meta["key_check"]}
    old |= {"store_id": "the store", "partner_id": "the partner", "session": "the session"}
    (directory / "meta.json").write_text(json.dumps(old))
    for _ in range(2):
        tier = make()
        assert tier.keys() == ["a"]
        assert (tier.notes["id"], tier.notes["partner"]) == ("the store", "the partner")
        assert json.loads(str(tier.notes["inherited"])) == {"c": 12, "": 9, "b": 13}
        assert tier.break_seal() is None
    assert sorted(path.name for path in directory.iterdir()) == [FILE, "meta.json"]
    make().note(inherited=None, partner=None)
    assert "inherited" not in make().notes
