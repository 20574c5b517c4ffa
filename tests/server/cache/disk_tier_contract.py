"""What every disk tier promises of its entries, beyond what every tier does."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import pytest

from proxystash_server.cache.coherence.uses import Use
from proxystash_server.cache.errors import TierError
from proxystash_server.cache.tiers.base import Write
from tests.server.cache.invariants import check_files, check_tier
from tests.server.cache.store_contract import MakeDiskTier, StoreContract, as_is_and_reopened, copy_files
from tests.server.cache.support import (
    PASSWORD,
    START_US,
    bounded,
    contents,
    keys_of,
    page,
    run_in_threads,
    stored,
)
from tests.server.cache.tier_contract import ANY, AWKWARD_KEYS, everything_set, put


class DiskTierContract(StoreContract):
    """Run by every backend on disk."""

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
        tier.note_uses([Use("full", 3, 9, START_US + 77, False)])
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
        tier.note_uses([Use(f"key-{n}", n + 1, n + 5, START_US + n, n % 2 == 0) for n in range(uses)])
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
        tier.note_uses([Use(key, 1, 1, START_US + 1, False) for key in keys[::-1]])
        for one in as_is_and_reopened(tier, lambda: make(bounded(100, "lru"))):
            applied = one.apply([Write(f"{id(one)}-{n}", stored(f"{id(one)}-{n}")) for n in range(3)])
            evicted = [key for write in applied for key in write.evicted]
            assert evicted == [keys.pop() for _ in range(3)]

    def test_a_use_of_an_earlier_version_is_ignored(self, make: MakeDiskTier) -> None:
        tier = make()
        put(tier, stored("key-1", version=1), stored("key-1", version=2))
        tier.note_uses([Use("key-1", 1, 50, START_US + 1, True)])
        for one in as_is_and_reopened(tier, make):
            assert one.get("key-1") == stored("key-1")

    def test_a_use_brings_nothing_back(self, make: MakeDiskTier) -> None:
        tier = make()
        put(tier, stored("key-1", version=1))
        tier.delete("key-1")
        tier.note_uses([Use("key-1", 1, 1, START_US, False), Use("never", 1, 1, START_US, False)])
        for one in as_is_and_reopened(tier, make):
            assert one.keys() == []
            assert one.size() == 0

    def test_a_replacement_after_a_use_has_its_own_counts(self, make: MakeDiskTier) -> None:
        tier = make()
        put(tier, stored("key-1", version=1))
        tier.note_uses([Use("key-1", 1, 5, START_US + 1, True)])
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
        tier.note_uses([Use("full", 1, 8, START_US, True)])
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
