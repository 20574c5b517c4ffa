"""What every disk tier promises beyond what every tier does.

A backend's test module derives a class from this one and says how to make its tier, and how to age its files.
"""

from __future__ import annotations

import logging
import os
import stat
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cryptography.fernet import Fernet

from proxystash_server.cache import (
    CacheTierConfig,
    CredentialEncryptor,
    DurableTier,
    HealthMonitoring,
    StoreFormatError,
)
from proxystash_server.cache.access_log import Access
from proxystash_server.cache.errors import TierError
from proxystash_server.cache.tiers.base import EVERYTHING, Write
from tests.server.cache.invariants import check_files, check_tier
from tests.server.cache.support import (
    PASSWORD,
    START_US,
    USERNAME,
    FakeClock,
    bounded,
    contents,
    fingerprint,
    keys_of,
    run_in_threads,
    stored,
)
from tests.server.cache.tier_contract import ANY, AWKWARD_KEYS, UNBOUNDED, TierContract, everything_set, put

MakeDurableTier = Callable[..., DurableTier]

Tier = TypeVar("Tier", bound=DurableTier)

ENCRYPTOR = CredentialEncryptor(Fernet.generate_key())


class DurableTierContract(TierContract):
    """Run by every backend on disk."""

    @abstractmethod
    def build(
        self, directory: Path, config: CacheTierConfig, encryptor: CredentialEncryptor, **options: Any
    ) -> DurableTier:
        """A tier of this backend in a directory, not opened."""

    @abstractmethod
    def pretend_newer_format(self, directory: Path) -> None:
        """Make a closed store say that a later release has written it."""

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
    ) -> Iterator[MakeDurableTier]:
        """Opens a tier on the directory, after closing the one that was open before."""
        opened: list[DurableTier] = []

        def make(
            config: CacheTierConfig = UNBOUNDED,
            *,
            encryptor: CredentialEncryptor = ENCRYPTOR,
            directory: Path = directory,
            **options: Any,
        ) -> DurableTier:
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

    def test_a_reopened_tier_holds_what_was_put(self, make: MakeDurableTier) -> None:
        entries = [everything_set(), *(stored(key, version=2) for key in AWKWARD_KEYS)]
        put(make(), *entries)
        tier = make()
        assert sorted(tier.keys()) == sorted(["full", *AWKWARD_KEYS])
        for entry in entries:
            assert tier.get(entry.key) == entry
        check_tier(tier)

    def test_a_reopened_tier_holds_only_the_latest_of_a_key(self, make: MakeDurableTier) -> None:
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

    def test_a_reopened_tier_is_as_empty_as_it_was_cleared(self, make: MakeDurableTier) -> None:
        tier = make()
        put(tier, *(stored(f"key-{number}") for number in range(20)))
        tier.clear()
        put(tier, stored("key-3", version=2))
        tier = make()
        assert tier.keys() == ["key-3"]
        assert tier.size() == 1

    def test_closing_and_opening_over_and_over_changes_nothing(self, make: MakeDurableTier) -> None:
        put(make(), everything_set(), stored("key-1"))
        for _ in range(4):
            tier = make()
            assert tier.get("full") == everything_set()
            assert tier.size() == 2

    def test_close_is_idempotent_and_open_works_after_it(self, make: MakeDurableTier) -> None:
        tier = make()
        put(tier, stored("key-1"))
        tier.close()
        tier.close()
        tier.open()
        assert tier.get("key-1") == stored("key-1")
        assert tier.size() == 1

    def test_a_closed_tier_fails_instead_of_answering_that_it_holds_nothing(
        self, make: MakeDurableTier
    ) -> None:
        tier = make()
        put(tier, stored("key-1"))
        tier.close()
        with pytest.raises(TierError):
            tier.get("key-1")
        with pytest.raises(TierError):
            tier.versions(["key-1"])
        with pytest.raises(TierError):
            tier.apply([Write("key-1", None)])

    def test_a_write_is_in_the_files_when_it_returns(self, make: MakeDurableTier, tmp_path: Path) -> None:
        tier = make()
        copies = []
        for number in range(5):
            put(tier, stored(f"key-{number}", version=number + 1))
            copies.append(tmp_path / f"copy-{number}")
            _copy_files(tmp_path / "store", copies[-1])
        for number, copy in enumerate(copies):
            assert sorted(make(directory=copy).keys()) == [f"key-{n}" for n in range(number + 1)]

    # -- one commit for many

    def test_apply_makes_all_changes_in_order_and_says_what_each_found(self, make: MakeDurableTier) -> None:
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

    def test_apply_says_which_keys_had_to_make_room(self, make: MakeDurableTier) -> None:
        tier = make(bounded(2, "fifo"))
        put(tier, stored("a"), stored("b"))
        applied = tier.apply([Write("b", stored("b")), Write("c", stored("c")), Write("d", stored("d"))])
        assert [one.evicted for one in applied] == [(), ("a",), ("b",)]

    def test_nothing_to_do_is_nothing_done(self, make: MakeDurableTier, directory: Path) -> None:
        tier = make()
        put(tier, stored("key-1"))
        before = contents(directory)
        assert tier.apply([]) == []
        tier.touch([])
        tier.extend_backlog({})
        tier.settle([])
        assert tier.trim() == []
        tier.clear_before(0)
        assert contents(directory).keys() == before.keys()
        assert make().get("key-1") == stored("key-1")

    def test_writers_that_come_together_are_all_committed(self, make: MakeDurableTier) -> None:
        tier = make()

        def write(writer: int) -> None:
            for number in range(20):
                tier.apply([Write(f"{writer}-{number}", stored(f"{writer}-{number}"))])

        run_in_threads(*(partial(write, writer) for writer in range(8)))
        tier = make()
        assert sorted(tier.keys()) == sorted(f"{w}-{n}" for w in range(8) for n in range(20))
        check_tier(tier)

    def test_text_comes_back_as_it_was_whatever_has_to_be_escaped_in_it(self, make: MakeDurableTier) -> None:
        tier = make()
        text = "".join(map(chr, (*range(0x20, 0x7F), 0xA0, 0x2028, 0xFFFD, 0x1F600))) + '\\u0041","seq":1'
        entry = stored("key", source=text, labels={text[:60]: text, 'a":"b': ',"backlog":true'})
        put(tier, entry)
        for one in as_is_and_reopened(tier, make):
            assert one.get("key") == entry

    # -- versions and uses

    def test_versions_are_those_of_the_latest_writes(self, make: MakeDurableTier) -> None:
        tier = make()
        put(tier, stored("a", version=1), stored("b", version=2**62), stored("a", version=3))
        for one in as_is_and_reopened(tier, make):
            assert one.versions(["a", "b", "c"]) == {"a": 3, "b": 2**62}
            assert one.versions([]) == {}

    def test_versions_of_more_keys_than_fit_into_one_query(self, make: MakeDurableTier) -> None:
        tier = make()
        tier.apply([Write(f"key-{n}", stored(f"key-{n}", version=n + 1)) for n in range(1200)])
        assert tier.versions(tier.keys()) == {f"key-{n}": n + 1 for n in range(1200)}

    def test_an_entry_is_the_same_to_who_is_about_to_change_it(self, make: MakeDurableTier) -> None:
        tier = make()
        put(tier, stored("key-1", failure_count=2, username=USERNAME))
        for _ in range(2):
            assert tier.get_to_change("key-1") == tier.get("key-1") is not None
            assert tier.get_to_change("nothing") is None
            put(tier, stored("key-1", source="after"))
        tier.close()
        with pytest.raises(TierError):
            tier.get_to_change("key-1")

    def test_entries_that_have_failed_are_found_among_others(self, make: MakeDurableTier) -> None:
        tier = make()
        for key, failures in (("key-1", 0), ("key-2", 2), ("key-3", 1)):
            put(tier, stored(key, failure_count=failures, username=USERNAME))
        found = tier.failed_of(["key-1", "key-2", "nothing"])
        assert found == {"key-2": tier.get("key-2")}
        assert found["key-2"].failure_count == 2
        assert tier.failed_of(["key-3"]) == {"key-3": tier.get("key-3")}
        assert tier.failed_of(["key-1"]) == tier.failed_of(["nothing"]) == {}

    def test_a_touch_stores_how_an_entry_was_used(self, make: MakeDurableTier) -> None:
        tier = make()
        put(tier, everything_set(version=3))
        tier.touch([Access("full", 3, 9, START_US + 77, False)])
        used = everything_set().model_copy(update={"access_count": 9, "evicted_from_l1": False})
        for one in as_is_and_reopened(tier, make):
            entry = one.get("full")
            assert entry is not None
            assert (entry.access_count, entry.last_accessed_us) == (9, START_US + 77)
            assert not entry.evicted_from_l1
            assert entry.model_copy(update={"last_accessed": used.last_accessed}) == used
            assert one.versions(["full"]) == {"full": 3}

    @pytest.mark.parametrize("uses", [2, 49, 51, 250, 401])
    def test_a_touch_of_many_stores_each(self, make: MakeDurableTier, uses: int) -> None:
        tier = make()
        tier.apply([Write(f"key-{n}", stored(f"key-{n}", version=n + 1)) for n in range(uses + 1)])
        tier.touch([Access(f"key-{n}", n + 1, n + 5, START_US + n, n % 2 == 0) for n in range(uses)])
        assert tier.get(f"key-{uses}") == stored(f"key-{uses}")
        for n in range(uses):
            entry = tier.get(f"key-{n}")
            assert entry is not None
            facts = (entry.access_count, entry.last_accessed_us, entry.evicted_from_l1)
            assert facts == (n + 5, START_US + n, n % 2 == 0)

    def test_uses_in_one_touch_count_in_their_order(self, make: MakeDurableTier) -> None:
        tier = make(bounded(100, "lru"))
        keys = [f"key-{n}" for n in range(100)]
        tier.apply([Write(key, stored(key, version=1)) for key in keys])
        tier.touch([Access(key, 1, 1, START_US + 1, False) for key in keys[::-1]])
        for one in as_is_and_reopened(tier, lambda: make(bounded(100, "lru"))):
            applied = one.apply([Write(f"{id(one)}-{n}", stored(f"{id(one)}-{n}")) for n in range(3)])
            evicted = [key for write in applied for key in write.evicted]
            assert evicted == [keys.pop() for _ in range(3)]

    def test_a_touch_of_an_earlier_version_is_ignored(self, make: MakeDurableTier) -> None:
        tier = make()
        put(tier, stored("key-1", version=1), stored("key-1", version=2))
        tier.touch([Access("key-1", 1, 50, START_US + 1, True)])
        for one in as_is_and_reopened(tier, make):
            assert one.get("key-1") == stored("key-1")

    def test_a_touch_brings_nothing_back(self, make: MakeDurableTier) -> None:
        tier = make()
        put(tier, stored("key-1", version=1))
        tier.delete("key-1")
        tier.touch([Access("key-1", 1, 1, START_US, False), Access("never", 1, 1, START_US, False)])
        for one in as_is_and_reopened(tier, make):
            assert one.keys() == []
            assert one.size() == 0

    def test_a_replacement_after_a_touch_has_its_own_counts(self, make: MakeDurableTier) -> None:
        tier = make()
        put(tier, stored("key-1", version=1))
        tier.touch([Access("key-1", 1, 5, START_US + 1, True)])
        put(tier, stored("key-1", version=2))
        for one in as_is_and_reopened(tier, make):
            assert one.get("key-1") == stored("key-1")

    # -- the partner's backlog

    def test_a_write_for_the_backlog_marks_its_key_in_the_same_step(self, make: MakeDurableTier) -> None:
        tier = make()
        put(tier, stored("b", version=1))
        tier.apply([
            Write("a", stored("a", version=10), 10, for_backlog=True),
            Write("b", None, 11, for_backlog=True),
            Write("never-held", None, 12, for_backlog=True),
            Write("c", stored("c", version=13), 13),
        ])  # fmt: skip
        for one in as_is_and_reopened(tier, make):
            assert one.backlog() == {"a": 10, "b": 11, "never-held": 12}
            assert sorted(one.keys()) == ["a", "c"]

    def test_of_several_marks_for_a_key_the_latest_counts(self, make: MakeDurableTier) -> None:
        tier = make()
        tier.extend_backlog({"a": 5, "b": 5, EVERYTHING: 7})
        tier.extend_backlog({"a": 4, "b": 6})
        tier.apply([Write("c", stored("c", version=9), 9, for_backlog=True)])
        tier.extend_backlog({"c": 8})
        for one in as_is_and_reopened(tier, make):
            assert one.backlog() == {"a": 5, "b": 6, "c": 9, EVERYTHING: 7}

    def test_settled_marks_are_gone_for_good(self, make: MakeDurableTier) -> None:
        tier = make()
        tier.extend_backlog({"a": 1, "b": 2, EVERYTHING: 3})
        tier.settle(["a", EVERYTHING, "never-marked"])
        for one in as_is_and_reopened(tier, make):
            assert one.backlog() == {"b": 2}

    def test_a_mark_made_after_settling_counts(self, make: MakeDurableTier) -> None:
        tier = make()
        tier.extend_backlog({"a": 5})
        tier.settle(["a"])
        tier.extend_backlog({"a": 4})
        for one in as_is_and_reopened(tier, make):
            assert one.backlog() == {"a": 4}

    def test_marks_outlive_deletes_replacements_clears_and_evictions(self, make: MakeDurableTier) -> None:
        tier = make(bounded(2))
        tier.apply([Write(key, stored(key, version=3), 3, for_backlog=True) for key in ("a", "b")])
        tier.delete("a")
        put(tier, stored("b", version=4))
        tier.clear()
        put(tier, stored("c"), stored("d"), stored("e"))
        for one in as_is_and_reopened(tier, make):
            assert one.backlog() == {"a": 3, "b": 3}

    def test_clear_before_removes_what_earlier_writes_stored(self, make: MakeDurableTier) -> None:
        tier = make()
        put(tier, *(stored(f"key-{number}", version=number) for number in range(1, 6)))
        tier.clear_before(3)
        for one in as_is_and_reopened(tier, make):
            assert sorted(one.keys()) == ["key-3", "key-4", "key-5"]
            assert one.size() == 3

    # -- names

    def test_a_store_keeps_the_name_it_got_when_it_was_made(
        self, make: MakeDurableTier, tmp_path: Path
    ) -> None:
        name = make().store_id
        assert name
        assert make().store_id == name
        assert make(directory=tmp_path / "another").store_id not in {"", name}

    def test_a_store_remembers_its_partner_and_the_run_they_last_worked_together_in(
        self, make: MakeDurableTier
    ) -> None:
        tier = make()
        assert (tier.partner_id, tier.session) == ("", "")
        tier.set_partner("somebody", "the first run")
        tier.set_partner("somebody", "the second run")
        put(tier, stored("key-1"))
        tier.clear()
        for one in as_is_and_reopened(tier, make):
            assert (one.partner_id, one.session) == ("somebody", "the second run")

    # -- capacity

    def test_trim_evicts_what_a_smaller_capacity_has_no_room_for(self, make: MakeDurableTier) -> None:
        put(make(), *(stored(f"key-{number}", version=number + 1) for number in range(10)))
        tier = make(bounded(4, "fifo"))
        assert sorted(tier.trim()) == [f"key-{number}" for number in range(6)]
        assert tier.trim() == []
        for one in as_is_and_reopened(tier, partial(make, bounded(4, "fifo"))):
            assert sorted(one.keys()) == [f"key-{number}" for number in range(6, 10)]
            check_tier(one)

    def test_what_the_partner_has_missed_is_evicted_last(self, make: MakeDurableTier) -> None:
        tier = make(bounded(3, "fifo"))
        tier.apply([Write("only-here", stored("only-here", version=1), 1, for_backlog=True)])
        put(tier, stored("b"), stored("c"), stored("d"))
        assert sorted(tier.keys()) == ["c", "d", "only-here"]

    def test_a_tier_full_of_what_the_partner_has_missed_still_keeps_to_its_capacity(
        self, make: MakeDurableTier
    ) -> None:
        tier = make(bounded(2, "fifo"))
        tier.apply([Write(key, stored(key, version=1), 1, for_backlog=True) for key in ("a", "b", "c")])
        assert sorted(tier.keys()) == ["b", "c"]

    def test_a_tier_knows_for_how_many_new_keys_it_has_room(self, make: MakeDurableTier) -> None:
        tier = make(bounded(3))
        put(tier, stored("a"))
        for one in as_is_and_reopened(tier, partial(make, bounded(3))):
            assert [one.has_room_for(number) for number in range(4)] == [True, True, True, False]
        assert make().has_room_for(10**9)

    # -- privacy

    def test_no_credential_is_readable_in_any_file(self, make: MakeDurableTier, directory: Path) -> None:
        tier = make()
        put(tier, everything_set(), stored("b", username=USERNAME, password=PASSWORD))
        put(tier, everything_set(version=2))
        tier.touch([Access("full", 2, 9, START_US, False)])
        tier.maintain()
        for files in (contents(directory), self._contents_after_closing(tier, directory)):
            assert files
            for name, content in files.items():
                assert USERNAME.encode() not in content, name
                assert PASSWORD.encode() not in content, name
                assert ENCRYPTOR.key not in content, name

    def test_a_credential_quoted_by_a_health_error_is_not_readable_either(
        self, make: MakeDurableTier, directory: Path
    ) -> None:
        error = f"ProxyError: cannot connect to http://{USERNAME}:{PASSWORD}@192.0.2.1:8080"
        tier = make()
        put(tier, stored("key-1", health_monitoring=HealthMonitoring(last_health_error=error)))
        for name, content in contents(directory).items():
            assert PASSWORD.encode() not in content, name

    def _contents_after_closing(self, tier: DurableTier, directory: Path) -> dict[str, bytes]:
        tier.close()
        return contents(directory)

    def test_credentials_of_any_kind_come_back_as_they_were(self, make: MakeDurableTier) -> None:
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

    def test_what_an_earlier_key_sealed_is_opened_by_it(self, make: MakeDurableTier) -> None:
        put(make(), everything_set())
        newer = CredentialEncryptor(Fernet.generate_key(), [ENCRYPTOR.key])
        assert make(encryptor=newer).get("full") == everything_set()

    def test_every_file_is_its_owners_alone(self, make: MakeDurableTier, directory: Path) -> None:
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
        self, make: MakeDurableTier, directory: Path
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
        self, make: MakeDurableTier, directory: Path
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

    def test_probing_leaves_the_entries_alone(self, make: MakeDurableTier) -> None:
        tier = make()
        put(tier, everything_set())
        tier.probe()
        for one in as_is_and_reopened(tier, make):
            assert one.get("full") == everything_set()
            assert one.keys() == ["full"]

    def test_a_probe_of_a_closed_store_fails(self, make: MakeDurableTier) -> None:
        tier = make()
        tier.close()
        with pytest.raises(TierError):
            tier.probe()

    def test_maintaining_leaves_everything_as_it_was(self, make: MakeDurableTier, directory: Path) -> None:
        tier = make()
        put(tier, everything_set(), *(stored(f"key-{number}") for number in range(20)))
        tier.extend_backlog({"marked": 3})
        tier.delete("key-5")
        for _ in range(3):
            tier.maintain()
        for one in as_is_and_reopened(tier, make):
            assert one.size() == 20
            assert one.get("full") == everything_set()
            assert one.backlog() == {"marked": 3}
        make().close()
        check_files(directory)

    def test_nothing_sound_is_ever_reported_as_corrupt(
        self, make: MakeDurableTier, corruptions: list[tuple[object, ...]]
    ) -> None:
        tier = make()
        put(tier, everything_set(), *(stored(key) for key in AWKWARD_KEYS))
        tier.touch([Access("full", 1, 8, START_US, True)])
        tier.delete("a")
        tier = make()
        tier.maintain()
        assert len(keys_of(tier.page("", 100, ANY, START_US))) == len(AWKWARD_KEYS)
        assert corruptions == []

    def test_the_log_carries_no_credential(
        self, make: MakeDurableTier, caplog: pytest.LogCaptureFixture
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


def _copy_files(source: Path, target: Path) -> None:
    target.mkdir()
    for name, content in contents(source).items():
        (target / name).write_bytes(content)
