"""What every disk tier promises beyond what every tier does.

A backend's test module derives a class from this one and says how to make its tier, and how to do to its
files what no tier does.
"""

from __future__ import annotations

import logging
import os
import stat
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from cryptography.fernet import Fernet

from proxystash_server.cache import (
    DiskTier,
    CacheEntry,
    CacheTierConfig,
    CredentialEncryptor,
    HealthMonitoring,
    StoreFormatError,
)
from proxystash_server.cache.coherence.uses import Access
from proxystash_server.cache.errors import TierError
from proxystash_server.cache.tiers.base import Held, Write
from tests.server.cache.invariants import check_files, check_tier
from tests.server.cache.support import (
    PASSWORD,
    START_US,
    USERNAME,
    FakeClock,
    bounded,
    content_of_tier,
    contents,
    fingerprint,
    keys_of,
    page,
    run_in_threads,
    stored,
)
from tests.server.cache.tier_contract import ANY, AWKWARD_KEYS, UNBOUNDED, TierContract, everything_set, put

MakeDiskTier = Callable[..., DiskTier]

Tier = TypeVar("Tier", bound=DiskTier)

ENCRYPTOR = CredentialEncryptor(Fernet.generate_key())


class DiskTierContract(TierContract):
    """Run by every backend on disk."""

    @abstractmethod
    def build(
        self, directory: Path, config: CacheTierConfig, encryptor: CredentialEncryptor, **options: Any
    ) -> DiskTier:
        """A tier of this backend in a directory, not opened."""

    @abstractmethod
    def pretend_newer_format(self, directory: Path) -> None:
        """Make a closed store say that a later release has written it."""

    @abstractmethod
    def damage(self, directory: Path, key: str) -> None:
        """Damage what a store, open or not, has of an entry whose source is `sound`."""

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        return tmp_path / "store"

    @pytest.fixture
    def corruptions(self) -> list[tuple[object, ...]]:
        """What the tiers have reported as corrupt."""
        return []

    @pytest.fixture
    def make(
        self, directory: Path, clock: FakeClock, corruptions: list[tuple[object, ...]]
    ) -> Iterator[MakeDiskTier]:
        """Opens a tier on the directory, after closing the one that was open before."""
        opened: list[DiskTier] = []

        def make(
            config: CacheTierConfig = UNBOUNDED,
            *,
            encryptor: CredentialEncryptor = ENCRYPTOR,
            directory: Path = directory,
            **options: Any,
        ) -> DiskTier:
            for tier in opened:
                tier.close()
            tier = self.build(
                directory,
                config,
                encryptor,
                clock=clock,
                on_corruption=lambda tier, _key, reason: corruptions.append((tier, reason)),
                **options,
            )
            tier.open()
            opened.append(tier)
            return tier

        yield make
        for tier in opened:
            tier.close()

    # -- what outlives the process

    def test_a_reopened_tier_holds_what_was_put(self, make: MakeDiskTier) -> None:
        entries = [everything_set(), *(stored(key, version=2) for key in AWKWARD_KEYS)]
        put(make(), *entries)
        tier = make()
        assert sorted(tier.keys()) == sorted(["full", *AWKWARD_KEYS])
        for entry in entries:
            assert tier.get(entry.key) == entry
        check_tier(tier)

    def test_a_reopened_tier_holds_only_the_latest_of_a_key(self, make: MakeDiskTier) -> None:
        tier = make()
        put(tier, stored("replaced", version=1), stored("deleted", version=2), stored("again", version=3))
        put(tier, stored("replaced", version=4, source="later"))
        tier.delete("deleted")
        tier.delete("again")
        put(tier, stored("again", version=5, source="later"))
        tier = make()
        assert sorted(tier.keys()) == ["again", "replaced"]
        assert tier.get("again") == stored("again", source="later")
        assert tier.get("replaced") == stored("replaced", source="later")

    def test_a_reopened_tier_is_as_empty_as_it_was_cleared(self, make: MakeDiskTier) -> None:
        tier = make()
        put(tier, *(stored(f"key-{number}") for number in range(20)))
        tier.clear()
        put(tier, stored("key-3", version=2))
        tier = make()
        assert tier.keys() == ["key-3"]
        assert tier.size() == 1

    def test_closing_and_opening_over_and_over_changes_nothing(self, make: MakeDiskTier) -> None:
        put(make(), everything_set(), stored("key-1"))
        for _ in range(4):
            tier = make()
            assert tier.get("full") == everything_set()
            assert tier.size() == 2

    def test_close_is_idempotent_and_open_works_after_it(self, make: MakeDiskTier) -> None:
        tier = make()
        put(tier, stored("key-1"))
        tier.close()
        tier.close()
        tier.open()
        assert tier.get("key-1") == stored("key-1")
        assert tier.size() == 1

    def test_a_closed_tier_fails_instead_of_answering_that_it_holds_nothing(self, make: MakeDiskTier) -> None:
        tier = make()
        put(tier, stored("key-1"))
        tier.close()
        with pytest.raises(TierError):
            tier.get("key-1")
        with pytest.raises(TierError):
            tier.apply([Write("key-1", None)])
        with pytest.raises(TierError):
            tier.note(cache_id="somebody")

    def test_a_write_is_in_the_files_when_it_returns(self, make: MakeDiskTier, tmp_path: Path) -> None:
        tier = make()
        copies = []
        for number in range(5):
            put(tier, stored(f"key-{number}", version=number + 1))
            copies.append(tmp_path / f"copy-{number}")
            copy_files(tmp_path / "store", copies[-1])
        for number, copy in enumerate(copies):
            assert sorted(make(directory=copy).keys()) == [f"key-{n}" for n in range(number + 1)]

    # -- one commit for many

    def test_apply_makes_all_changes_in_order_and_says_what_each_found(self, make: MakeDiskTier) -> None:
        tier = make()
        put(tier, stored("a", version=1), stored("b", version=2))
        applied = tier.apply([
            Write("a", stored("a", version=3, source="new"), 3),
            Write("b", None, 4),
            Write("c", stored("c", version=5), 5),
            Write("d", None, 6),
            Write("c", stored("c", version=7, source="last"), 7),
        ])  # fmt: skip
        assert [one.existed for one in applied] == [True, True, False, False, True]
        for one in as_is_and_reopened(tier, make):
            assert one.get("a") == stored("a", source="new")
            assert one.get("c") == stored("c", source="last")
            assert sorted(one.keys()) == ["a", "c"]

    def test_apply_says_which_keys_had_to_make_room(self, make: MakeDiskTier) -> None:
        tier = make(bounded(2, "fifo"))
        put(tier, stored("a"), stored("b"))
        applied = tier.apply([Write("b", stored("b")), Write("c", stored("c")), Write("d", stored("d"))])
        assert [one.evicted for one in applied] == [(), ("a",), ("b",)]

    def test_nothing_to_do_is_nothing_done(self, make: MakeDiskTier, directory: Path) -> None:
        tier = make()
        put(tier, stored("key-1"))
        before = contents(directory)
        assert tier.apply([]) == []
        tier.note_uses([])
        assert tier.trim() == []
        assert contents(directory).keys() == before.keys()
        assert make().get("key-1") == stored("key-1")

    def test_writers_that_come_together_are_all_committed(self, make: MakeDiskTier) -> None:
        tier = make()

        def write(writer: int) -> None:
            for number in range(20):
                tier.apply([Write(f"{writer}-{number}", stored(f"{writer}-{number}"))])

        run_in_threads(*(partial(write, writer) for writer in range(8)))
        tier = make()
        assert sorted(tier.keys()) == sorted(f"{w}-{n}" for w in range(8) for n in range(20))
        check_tier(tier)

    def test_text_comes_back_as_it_was_whatever_has_to_be_escaped_in_it(self, make: MakeDiskTier) -> None:
        tier = make()
        text = "".join(map(chr, (*range(0x20, 0x7F), 0xA0, 0x2028, 0xFFFD, 0x1F600))) + '\\u0041","seq":1'
        entry = stored("key", source=text, labels={text[:60]: text, 'a":"b': ',"backlog":true'})
        put(tier, entry)
        for one in as_is_and_reopened(tier, make):
            assert one.get("key") == entry

    # -- uses

    def test_uses_are_stored(self, make: MakeDiskTier) -> None:
        tier = make()
        put(tier, everything_set(version=3))
        tier.note_uses([Access("full", 3, 9, START_US + 77, False)])
        used = everything_set().model_copy(update={"access_count": 9, "evicted_from_l1": False})
        for one in as_is_and_reopened(tier, make):
            entry = one.get("full")
            assert entry is not None
            assert (entry.access_count, entry.last_accessed_us) == (9, START_US + 77)
            assert not entry.evicted_from_l1
            assert entry.model_copy(update={"last_accessed": used.last_accessed}) == used
            assert entry.version == 3

    @pytest.mark.parametrize("uses", [2, 49, 51, 250, 401])
    def test_many_uses_are_stored_each(self, make: MakeDiskTier, uses: int) -> None:
        tier = make()
        tier.apply([Write(f"key-{n}", stored(f"key-{n}", version=n + 1)) for n in range(uses + 1)])
        tier.note_uses([Access(f"key-{n}", n + 1, n + 5, START_US + n, n % 2 == 0) for n in range(uses)])
        assert tier.get(f"key-{uses}") == stored(f"key-{uses}")
        for n in range(uses):
            entry = tier.get(f"key-{n}")
            assert entry is not None
            facts = (entry.access_count, entry.last_accessed_us, entry.evicted_from_l1)
            assert facts == (n + 5, START_US + n, n % 2 == 0)

    def test_uses_told_together_count_in_their_order(self, make: MakeDiskTier) -> None:
        tier = make(bounded(100, "lru"))
        keys = [f"key-{n}" for n in range(100)]
        tier.apply([Write(key, stored(key, version=1)) for key in keys])
        tier.note_uses([Access(key, 1, 1, START_US + 1, False) for key in keys[::-1]])
        for one in as_is_and_reopened(tier, lambda: make(bounded(100, "lru"))):
            applied = one.apply([Write(f"{id(one)}-{n}", stored(f"{id(one)}-{n}")) for n in range(3)])
            evicted = [key for write in applied for key in write.evicted]
            assert evicted == [keys.pop() for _ in range(3)]

    def test_a_use_of_an_earlier_version_is_ignored(self, make: MakeDiskTier) -> None:
        tier = make()
        put(tier, stored("key-1", version=1), stored("key-1", version=2))
        tier.note_uses([Access("key-1", 1, 50, START_US + 1, True)])
        for one in as_is_and_reopened(tier, make):
            assert one.get("key-1") == stored("key-1")

    def test_a_use_brings_nothing_back(self, make: MakeDiskTier) -> None:
        tier = make()
        put(tier, stored("key-1", version=1))
        tier.delete("key-1")
        tier.note_uses([Access("key-1", 1, 1, START_US, False), Access("never", 1, 1, START_US, False)])
        for one in as_is_and_reopened(tier, make):
            assert one.keys() == []
            assert one.size() == 0

    def test_a_replacement_after_a_use_has_its_own_counts(self, make: MakeDiskTier) -> None:
        tier = make()
        put(tier, stored("key-1", version=1))
        tier.note_uses([Access("key-1", 1, 5, START_US + 1, True)])
        put(tier, stored("key-1", version=2))
        for one in as_is_and_reopened(tier, make):
            assert one.get("key-1") == stored("key-1")

    # -- versions

    def test_the_last_version_is_the_greatest_of_any_change(self, make: MakeDiskTier) -> None:
        tier = make()
        assert tier.last_version == 0
        put(tier, stored("a", version=5), stored("b", version=3))
        for one in as_is_and_reopened(tier, make):
            assert one.last_version == 5
        tier = make()
        tier.apply([Write("a", None, 9), Write("b", stored("b", version=8), 8)])
        for one in as_is_and_reopened(tier, make):
            assert one.last_version == 9

    def test_a_clear_is_a_change_with_a_version(self, make: MakeDiskTier) -> None:
        tier = make()
        put(tier, stored("a", version=3))
        tier.clear(9)
        assert tier.last_version == 9
        for one in as_is_and_reopened(tier, make):
            assert one.keys() == []

    # -- notes

    def test_a_store_keeps_the_name_it_got_when_it_was_made(self, make: MakeDiskTier, tmp_path: Path) -> None:
        name = make().notes["id"]
        assert name
        assert make().notes["id"] == name
        assert make(directory=tmp_path / "another").notes["id"] not in {"", name}

    def test_a_new_store_is_incomplete_until_somebody_knows_better(self, make: MakeDiskTier) -> None:
        tier = make()
        for one in as_is_and_reopened(tier, make):
            assert one.notes["incomplete"]
        make().note(incomplete=None)
        for one in as_is_and_reopened(make(), make):
            assert "incomplete" not in one.notes

    def test_notes_outlive_everything_else(self, make: MakeDiskTier) -> None:
        tier = make()
        assert tier.notes.get("cache_id") is None
        tier.note(cache_id="first", alone=1, inherited='{"ü": 1}')
        tier.note(cache_id="second", alone=None, never_noted=None)
        put(tier, stored("key-1"))
        tier.clear()
        tier.probe()
        tier.maintain()
        for one in as_is_and_reopened(tier, make):
            assert (one.notes["cache_id"], one.notes["inherited"]) == ("second", '{"ü": 1}')
            assert not {"alone", "never_noted"} & one.notes.keys()

    def test_a_note_is_in_the_files_when_it_was_made(
        self, make: MakeDiskTier, directory: Path, tmp_path: Path
    ) -> None:
        tier = make()
        tier.note(cache_id="somebody", incomplete=None)
        copy_files(directory, tmp_path / "killed")
        notes = make(directory=tmp_path / "killed").notes
        assert notes["cache_id"] == "somebody"
        assert "incomplete" not in notes

    def test_notes_of_several_threads_are_all_kept(self, make: MakeDiskTier) -> None:
        tier = make()

        def note(writer: int) -> None:
            for number in range(20):
                tier.note(**{f"note_{writer}": number, f"dropped_{writer}": number})
                tier.note(**{f"dropped_{writer}": None})

        run_in_threads(*(partial(note, writer) for writer in range(4)))
        for one in as_is_and_reopened(tier, make):
            names = {name for name in one.notes if name.startswith(("note_", "dropped_"))}
            assert names == {f"note_{writer}" for writer in range(4)}
            assert {one.notes[name] for name in names} == {19}

    # -- damage

    def test_a_damaged_record_is_reported_once_and_leaves_the_store_incomplete(
        self, make: MakeDiskTier, directory: Path, corruptions: list[tuple[object, ...]]
    ) -> None:
        tier = make()
        tier.note(incomplete=None)
        put(tier, stored("a", source="sound"), stored("b", source="sound"))
        self.damage(directory, "a")
        assert [tier.get("a"), tier.get("a")] == [None, None]
        assert len(corruptions) == 1
        assert tier.notes["incomplete"]
        for one in as_is_and_reopened(tier, make):
            assert one.keys() == ["b"]
            assert one.size() == 1
            assert one.get("b") == stored("b", source="sound")
            check_tier(one)
        assert len(corruptions) == 1

    def test_a_store_that_is_found_damaged_when_it_is_opened_is_incomplete(
        self, make: MakeDiskTier, directory: Path, corruptions: list[tuple[object, ...]]
    ) -> None:
        tier = make()
        tier.note(incomplete=None)
        put(tier, stored("a", source="sound"), stored("b", source="sound"))
        tier.close()
        self.damage(directory, "a")
        tier = make()
        assert tier.get("a") is None
        assert len(corruptions) == 1
        assert tier.notes["incomplete"]

    # -- seals

    def test_a_seal_holds_until_it_is_broken(self, make: MakeDiskTier) -> None:
        tier = make()
        put(tier, stored("key-1", version=4))
        assert tier.break_seal() is None
        tier.seal(5)
        tier.close()
        tier = make()
        assert tier.break_seal() == 5
        assert tier.break_seal() is None
        assert make().break_seal() is None

    def test_a_seal_outlives_a_run_that_does_not_break_it(self, make: MakeDiskTier) -> None:
        put(make(), *(stored(f"key-{number}") for number in range(30)))
        make().seal(0)
        for _ in range(3):
            make().get("key-1")
        assert make().break_seal() == 0

    def test_of_several_seals_the_last_counts(self, make: MakeDiskTier) -> None:
        tier = make()
        tier.seal(5)
        put(tier, stored("key-1", version=6))
        tier.seal(6)
        assert make().break_seal() == 6

    def test_the_seal_of_a_store_that_was_killed_after_it_was_broken_stays_so(
        self, make: MakeDiskTier, directory: Path, tmp_path: Path
    ) -> None:
        make().seal(5)
        tier = make()
        assert tier.break_seal() == 5
        copy_files(directory, tmp_path / "at once")
        put(tier, stored("key-1", version=6))
        copy_files(directory, tmp_path / "after a change")
        for copy in ("at once", "after a change"):
            assert make(directory=tmp_path / copy).break_seal() is None

    # -- capacity

    def test_trim_evicts_what_a_smaller_capacity_has_no_room_for(self, make: MakeDiskTier) -> None:
        put(make(), *(stored(f"key-{number}", version=number + 1) for number in range(10)))
        tier = make(bounded(4, "fifo"))
        assert sorted(tier.trim()) == [f"key-{number}" for number in range(6)]
        assert tier.trim() == []
        for one in as_is_and_reopened(tier, partial(make, bounded(4, "fifo"))):
            assert sorted(one.keys()) == [f"key-{number}" for number in range(6, 10)]
            check_tier(one)

    def test_a_tier_knows_for_how_many_new_keys_it_has_room(self, make: MakeDiskTier) -> None:
        tier = make(bounded(3))
        put(tier, stored("a"))
        for one in as_is_and_reopened(tier, partial(make, bounded(3))):
            assert [one.has_room_for(number) for number in range(4)] == [True, True, True, False]
        assert make().has_room_for(10**9)

    # -- privacy

    def test_no_credential_is_readable_in_any_file(self, make: MakeDiskTier, directory: Path) -> None:
        tier = make()
        put(tier, everything_set(), stored("b", username=USERNAME, password=PASSWORD))
        put(tier, everything_set(version=2))
        tier.note_uses([Access("full", 2, 9, START_US, False)])
        tier.maintain()
        for files in (contents(directory), self._contents_after_closing(tier, directory)):
            assert files
            for name, content in files.items():
                assert USERNAME.encode() not in content, name
                assert PASSWORD.encode() not in content, name
                assert ENCRYPTOR.key not in content, name

    def test_a_credential_quoted_by_a_health_error_is_not_readable_either(
        self, make: MakeDiskTier, directory: Path
    ) -> None:
        error = f"ProxyError: cannot connect to http://{USERNAME}:{PASSWORD}@192.0.2.1:8080"
        tier = make()
        put(tier, stored("key-1", health_monitoring=HealthMonitoring(last_health_error=error)))
        for name, content in contents(directory).items():
            assert PASSWORD.encode() not in content, name

    def _contents_after_closing(self, tier: DiskTier, directory: Path) -> dict[str, bytes]:
        tier.close()
        return contents(directory)

    def test_credentials_of_any_kind_come_back_as_they_were(self, make: MakeDiskTier) -> None:
        pairs = [
            (None, None),
            ("user", None),
            (None, "secret"),
            ("ü:😀 %\"'", " p:@/\\ "),
            ("x" * 1024, "y" * 1024),
        ]
        tier = make()
        for number, (username, password) in enumerate(pairs):
            put(tier, stored(f"key-{number}", username=username, password=password))
        for one in as_is_and_reopened(tier, make):
            for number, (username, password) in enumerate(pairs):
                assert one.get(f"key-{number}") == stored(
                    f"key-{number}", username=username, password=password
                )

    def test_what_an_earlier_key_sealed_is_opened_by_it(self, make: MakeDiskTier) -> None:
        put(make(), everything_set())
        newer = CredentialEncryptor(Fernet.generate_key(), [ENCRYPTOR.key])
        assert make(encryptor=newer).get("full") == everything_set()

    def test_every_file_is_its_owners_alone(self, make: MakeDiskTier, directory: Path) -> None:
        earlier = os.umask(0)
        try:
            tier = make()
            put(tier, everything_set())
            tier.clear()
            put(tier, everything_set())
            tier.maintain()
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
        finally:
            os.umask(earlier)
        assert modes
        assert set(modes.values()) == {0o600}, modes

    def test_a_store_lets_its_key_be_checked_before_it_is_opened(
        self, make: MakeDiskTier, directory: Path
    ) -> None:
        assert self.build(directory, UNBOUNDED, ENCRYPTOR).stored_key_check() is None
        assert not directory.exists()
        put(make(), everything_set())
        make().close()
        before = fingerprint(directory)
        check = self.build(directory, UNBOUNDED, ENCRYPTOR).stored_key_check()
        assert check is not None
        assert ENCRYPTOR.passes_check(check)
        assert not CredentialEncryptor().passes_check(check)
        assert fingerprint(directory) == before

    # -- format

    def test_a_store_of_a_newer_format_is_refused_and_left_alone(
        self, make: MakeDiskTier, directory: Path
    ) -> None:
        put(make(), everything_set())
        make().close()
        self.pretend_newer_format(directory)
        before = contents(directory)
        with pytest.raises(StoreFormatError, match=r"[Uu]se a newer release") as refusal:
            make()
        assert str(directory) in str(refusal.value)
        assert contents(directory) == before

    # -- upkeep

    def test_probing_leaves_the_entries_alone(self, make: MakeDiskTier) -> None:
        tier = make()
        put(tier, everything_set())
        tier.probe()
        for one in as_is_and_reopened(tier, make):
            assert one.get("full") == everything_set()
            assert one.keys() == ["full"]

    def test_a_probe_of_a_closed_store_fails(self, make: MakeDiskTier) -> None:
        tier = make()
        tier.close()
        with pytest.raises(TierError):
            tier.probe()

    def test_maintaining_leaves_everything_as_it_was(self, make: MakeDiskTier, directory: Path) -> None:
        tier = make()
        put(tier, everything_set(), *(stored(f"key-{number}") for number in range(20)))
        tier.delete("key-5")
        for _ in range(3):
            tier.maintain()
        for one in as_is_and_reopened(tier, make):
            assert one.size() == 20
            assert one.get("full") == everything_set()
        make().close()
        check_files(directory)

    def test_nothing_sound_is_ever_reported_as_corrupt(
        self, make: MakeDiskTier, corruptions: list[tuple[object, ...]]
    ) -> None:
        tier = make()
        put(tier, everything_set(), *(stored(key) for key in AWKWARD_KEYS))
        tier.note_uses([Access("full", 1, 8, START_US, True)])
        tier.delete("a")
        tier = make()
        tier.maintain()
        assert len(keys_of(page(tier, "", 100, ANY, START_US))) == len(AWKWARD_KEYS)
        assert corruptions == []

    def test_the_log_carries_no_credential(
        self, make: MakeDiskTier, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.DEBUG):
            tier = make()
            put(tier, everything_set())
            make().get("full")
        assert PASSWORD not in caplog.text


def as_is_and_reopened(tier: Tier, make: Callable[[], Tier]) -> Iterator[Tier]:
    """The tier as it is, and then as the next run finds it: what holds of the one must hold of the other."""
    yield tier
    yield make()


def copy_files(source: Path, target: Path) -> None:
    target.mkdir()
    for name, content in contents(source).items():
        (target / name).write_bytes(content)
