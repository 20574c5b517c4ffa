"""JSONL files that are cut off anywhere, or in which any bit has flipped, cost the damaged lines alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from proxystash_server.cache import CacheManager, CacheTierConfig, CacheTierType, EntryFilter, JsonlCacheTier
from proxystash_server.cache.coherence.uses import Use
from proxystash_server.cache.entry.credentials import CredentialEncryptor
from proxystash_server.cache.tiers.base import Write
from tests.server.cache.stash import Stash
from tests.server.cache.support import SWITCHED_OFF, FakeClock, content_of, content_of_tier, guards_of, stored

FILE = "entries.jsonl"
A, B, C, D = "abcd"


@dataclass(frozen=True)
class Seen:
    """What a reader can tell about an entry."""

    source: str
    version: int
    password: str
    uses: int


@dataclass(frozen=True)
class Line:
    """A line of the file: where it is, and what it does."""

    start: int
    stop: int
    key: str = ""
    puts: Seen | None = None
    deletes: bool = False
    uses: int = 0
    used_version: int = 0


class Store:
    """A JSONL tier, and the meaning of each line of its file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / FILE
        self.set_aside = directory / "set-aside.jsonl"
        self.reasons: list[str] = []
        self.tier = JsonlCacheTier(
            CacheTierConfig(),
            CacheTierType.L2,
            directory,
            CredentialEncryptor(Fernet.generate_key()),
            clock=FakeClock(),
            on_corruption=lambda _tier, _key, reason: self.reasons.append(reason),
        )
        self.tier.open()
        self.lines = [Line(0, self.file.stat().st_size)]
        self.put(A, 1)
        self.put(B, 2)
        self.put(A, 3)
        self.note_uses(B, 2, 5)
        self.put(C, 4)
        self.delete(C)
        self.put(D, 5)
        self.probe()
        self.note_uses(A, 3, 9)
        self.put(B, 8)
        self.tier.close()
        self.data = self.file.read_bytes()
        assert self.lines[-1].stop == len(self.data)

    @staticmethod
    def seen(key: str, version: int) -> Seen:
        return Seen(f"put {version} of {key}", version, f"secret-{version}", 0)

    @staticmethod
    def entry(key: str, seen: Seen):  # type: ignore[no-untyped-def]
        return stored(key, version=seen.version, source=seen.source, username="user", password=seen.password)

    def _note(self, **meaning: object) -> None:
        line = Line(self.lines[-1].stop, self.file.stat().st_size)
        self.lines.append(replace(line, **meaning))  # type: ignore[arg-type]  # fields of Line

    def put(self, key: str, version: int) -> None:
        seen = self.seen(key, version)
        self.tier.apply([Write(key, self.entry(key, seen), version)])
        self._note(key=key, puts=seen)

    def delete(self, key: str) -> None:
        self.tier.apply([Write(key, None, 100)])
        self._note(key=key, deletes=True)

    def note_uses(self, key: str, version: int, uses: int) -> None:
        entry = self.tier.get(key)
        assert entry is not None
        self.tier.note_uses([Use(key, version, uses, entry.last_accessed_us, False)])
        self._note(key=key, uses=uses, used_version=version)

    def probe(self) -> None:
        self.tier.probe()
        self._note()

    def expected(self, lines: list[Line]) -> dict[str, Seen]:
        """What is held if these lines are all that can be read."""
        held: dict[str, Seen] = {}
        for line in lines:
            if line.puts is not None:
                held[line.key] = line.puts
            elif line.deletes:
                held.pop(line.key, None)
            elif line.uses and line.key in held and held[line.key].version == line.used_version:
                held[line.key] = replace(held[line.key], uses=line.uses)
        return held

    def load(self, data: bytes) -> dict[str, Seen]:
        """What the tier holds when it is opened on `data`; counts and keeps what is damaged."""
        self.reasons.clear()
        self.set_aside.unlink(missing_ok=True)
        self.file.write_bytes(data)
        self.tier.open()
        try:
            held = {}
            for key in self.tier.keys():  # noqa: SIM118 -- no dict
                entry = self.tier.get(key)
                assert entry is not None
                assert entry.key == key
                assert entry.password is not None
                password = entry.password.get_secret_value()
                held[key] = Seen(entry.source, entry.version, password, entry.access_count)
            assert self.tier.size() == len(held)
            return held
        finally:
            self.tier.close()

    def kept(self) -> list[str]:
        """The damaged lines as they are kept for the operator."""
        if not self.set_aside.exists():
            return []
        return [json.loads(line)["line"] for line in self.set_aside.read_bytes().splitlines()]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_a_file_cut_off_anywhere_holds_what_its_whole_lines_say(store: Store) -> None:
    boundaries = {0} | {line.stop for line in store.lines}
    for end in range(len(store.data) + 1):
        held = store.load(store.data[:end])
        whole = [line for line in store.lines if line.stop <= end]
        assert held == store.expected(whole), f"cut off at byte {end}"
        torn = store.data[whole[-1].stop if whole else 0 : end]
        assert store.kept() == ([torn.decode()] if end not in boundaries else [])
        assert len(store.reasons) == len(store.kept())


def test_a_torn_last_line_does_not_damage_the_next_one(store: Store) -> None:
    for end in range(store.lines[-1].start + 1, len(store.data), 7):
        store.load(store.data[:end])
        store.tier.open()
        store.tier.apply([Write(C, store.entry(C, store.seen(C, 10)), 10)])
        store.tier.close()
        after = store.load(store.file.read_bytes())
        assert after == {**store.expected(store.lines[:-1]), C: store.seen(C, 10)}
        assert store.reasons == []


def flips(store: Store) -> Iterator[tuple[int, int]]:
    """One bit of each byte, another one from byte to byte; every bit at the end of each line."""
    for offset in range(len(store.data)):
        every = b"\n" in store.data[offset : offset + 6]
        yield from ((offset, bit) for bit in (range(8) if every else [offset * 5 % 8]))


def test_a_flipped_bit_costs_its_line_alone(store: Store) -> None:
    for offset, bit in flips(store):
        data = bytearray(store.data)
        data[offset] ^= 1 << bit
        # A newline that is none any more joins two lines.
        hit = {number for number, line in enumerate(store.lines) if line.start <= offset < line.stop}
        hit |= {number + 1 for number in hit if store.data[offset] == 0x0A}
        sound = [line for number, line in enumerate(store.lines) if number not in hit]
        assert store.load(bytes(data)) == store.expected(sound), f"bit {bit} of byte {offset}"
        assert 1 <= len(store.reasons) == len(store.kept()) <= 2


def test_damage_is_counted_once_and_not_at_the_next_start_again(store: Store) -> None:
    for number, line in enumerate(store.lines):
        data = bytearray(store.data)
        data[line.start + 20] ^= 1
        held = store.load(bytes(data))
        assert len(store.reasons) == 1
        assert store.load(store.file.read_bytes()) == held, f"line {number}"
        assert store.reasons == []


# -- below a manager


def write_history(manager: CacheManager) -> dict[str, tuple[str, int]]:
    """A few versions, a delete and a failure; what is held in the end."""

    def put(key: str, source: str) -> None:
        entry = manager.new_entry("http://u:p@192.0.2.1:1", key=key, source=source)
        assert manager.put(key, entry)

    for key in (A, B, C, D):
        put(key, "first")
    put(A, "second")
    manager.delete(C)
    manager.invalidate_by_health(D)
    put(B, "second")
    manager.get(A)
    manager.maintain()
    return {A: ("second", 0), B: ("second", 0), D: ("first", 1)}


def damages(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Cuts and flips all over a file, all its line ends among them."""
    ends = [place for place, byte in enumerate(data) if byte == 0x0A]
    for end in sorted({*range(0, len(data), 61), *ends, *(end + 1 for end in ends)} - {len(data)}):
        yield f"cut off at byte {end}", data[:end]
    for offset in sorted({*range(0, len(data), 47), *ends}):
        flipped = bytearray(data)
        flipped[offset] ^= 1 << offset % 8
        yield f"bit {offset % 8} of byte {offset}", bytes(flipped)


def test_a_damaged_l2_ends_up_agreeing_with_l3_and_nothing_is_lost(stash: Stash) -> None:
    expected = write_history(stash.open())
    stash.close()
    sound = stash.directory
    data = (sound / "l2" / FILE).read_bytes()
    for number, (damage, damaged) in enumerate(damages(data)):
        stash.directory = sound.with_name(f"damaged-{number}")
        shutil.copytree(sound, stash.directory)
        (stash.directory / "l2" / FILE).write_bytes(damaged)
        manager = stash.open(l1_config=SWITCHED_OFF)
        for key in (A, B, C, D):
            entry = manager.get(key)
            found = None if entry is None else (entry.source, entry.failure_count)
            assert found == expected.get(key), f"{damage}: {key}"
        manager.maintain()
        assert content_of(manager) == expected
        for guard in guards_of(manager):
            assert content_of_tier(guard.tier) == expected, f"{damage}: {guard.name}"
        stash.close()
        shutil.rmtree(stash.directory)
    stash.directory = sound


def test_without_l3_what_is_readable_is_served_and_the_rest_is_counted_and_kept(stash: Stash) -> None:
    shape = {"l1_config": SWITCHED_OFF, "l3_config": SWITCHED_OFF}
    write_history(stash.open(**shape))
    stash.close()
    sound = stash.directory
    data = (sound / "l2" / FILE).read_bytes()
    ever_put = {("first", 0), ("second", 0), ("first", 1)}
    for number, (damage, damaged) in enumerate(damages(data)):
        stash.directory = sound.with_name(f"damaged-{number}")
        shutil.copytree(sound, stash.directory)
        (stash.directory / "l2" / FILE).write_bytes(damaged)
        manager = stash.open(**shape)
        held = content_of(manager)
        assert set(held.values()) <= ever_put, damage
        counted = manager.get_statistics().l2_stats.evictions_corruption
        at_a_line_end = damaged == data[: len(damaged)] and (not damaged or damaged.endswith(b"\n"))
        assert (counted == 0) == at_a_line_end, damage
        aside = stash.directory / "l2" / "set-aside.jsonl"
        assert counted == (len(aside.read_bytes().splitlines()) if aside.exists() else 0)
        assert manager.get_statistics().entries == len(manager.list_entries("", 100, EntryFilter()))
        stash.close()
        shutil.rmtree(stash.directory)
    stash.directory = sound
