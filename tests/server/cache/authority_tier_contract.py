"""What every tier promises that may decide what the cache holds, beyond what every disk tier does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from proxystash_server.cache import AuthorityTier, CacheEntry
from proxystash_server.cache.coherence.uses import Use
from proxystash_server.cache.errors import TierError
from proxystash_server.cache.tiers.base import Held, Read, Write
from tests.server.cache.disk_tier_contract import DiskTierContract
from tests.server.cache.invariants import check_tier
from tests.server.cache.store_contract import as_is_and_reopened, copy_files
from tests.server.cache.support import START_US, bounded, content_of_tier, contents, run_in_threads, stored
from tests.server.cache.tier_contract import everything_set, put

MakeAuthorityTier = Callable[..., AuthorityTier]


def nothing(_held: object, _read: object) -> list[Write]:
    """The decision to change nothing."""
    return []


def lasting_contents(directory: Path) -> dict[str, bytes]:
    """Every file with its bytes, but for the memory that SQLite's connections share, in which they lock."""
    return {name: content for name, content in contents(directory).items() if not name.endswith("-shm")}


class AuthorityTierContract(DiskTierContract):
    """Run by every backend that may be the authority."""

    # -- versions

    def test_versions_are_those_of_the_latest_writes(self, make: MakeAuthorityTier) -> None:
        tier = make()
        put(tier, stored("a", version=1), stored("b", version=2**62), stored("a", version=3))
        for one in as_is_and_reopened(tier, make):
            assert one.versions(["a", "b", "c"]) == {"a": 3, "b": 2**62}
            assert one.versions([]) == {}

    def test_versions_of_more_keys_than_fit_into_one_query(self, make: MakeAuthorityTier) -> None:
        tier = make()
        tier.apply([Write(f"key-{n}", stored(f"key-{n}", version=n + 1)) for n in range(1200)])
        assert tier.versions(tier.keys()) == {f"key-{n}": n + 1 for n in range(1200)}

    def test_a_use_is_no_new_version(self, make: MakeAuthorityTier) -> None:
        tier = make()
        put(tier, stored("a", version=3))
        tier.note_uses([Use("a", 3, 1, START_US, False)])
        for one in as_is_and_reopened(tier, make):
            assert one.versions(["a"]) == {"a": 3}

    # -- a clear made up for

    def test_clear_before_removes_what_earlier_changes_stored(self, make: MakeAuthorityTier) -> None:
        tier = make()
        put(tier, *(stored(f"key-{number}", version=number) for number in range(1, 6)))
        tier.clear_before(3)
        for one in as_is_and_reopened(tier, make):
            assert sorted(one.keys()) == ["key-3", "key-4", "key-5"]
            assert one.size() == 3
            check_tier(one)

    def test_clear_before_is_a_change_with_a_version(self, make: MakeAuthorityTier) -> None:
        tier = make()
        put(tier, stored("a", version=3))
        tier.clear_before(9)
        for one in as_is_and_reopened(tier, make):
            assert one.last_version == 9
        tier = make()
        # Also where there is nothing left to remove.
        tier.clear_before(12)
        assert tier.last_version == 12

    def test_clear_before_leaves_alone_what_a_later_change_stores_meanwhile(
        self, make: MakeAuthorityTier
    ) -> None:
        tier = make()
        keys = [f"key-{number}" for number in range(100)]
        for round_ in range(5):
            first = 1000 * round_
            tier.apply([Write(key, stored(key, version=first + 1), first + 1) for key in keys])

            def replace(version: int = first + 10) -> None:
                for key in keys:
                    tier.apply([Write(key, stored(key, version=version), version)])

            def clear(version: int = first + 10) -> None:
                tier.clear_before(version)

            run_in_threads(replace, clear)
            assert tier.versions(keys) == dict.fromkeys(keys, first + 10)
        check_tier(tier)

    # -- decisions

    def test_a_decision_sees_what_is_held_and_is_made_as_it_says(self, make: MakeAuthorityTier) -> None:
        tier = make()
        put(tier, stored("kept", version=1), stored("replaced", version=2), stored("removed", version=3))
        put(tier, everything_set("failed", version=4), stored("not asked for", version=5))
        seen: list[dict[str, tuple[int, bool]]] = []

        def decide(held: Mapping[str, Held], read: Read) -> list[Write]:
            seen.append({key: (one.version, one.has_failed) for key, one in held.items()})
            assert read("failed") == everything_set("failed")
            assert read("new") is None
            return [
                Write("replaced", stored("replaced", version=6, source="after"), 6),
                Write("removed", None, 7),
                Write("new", stored("new", version=8), 8),
                Write("never held", None, 8),
            ]

        writes, applied = tier.commit(["kept", "replaced", "removed", "failed", "new", "never held"], decide)
        assert seen == [
            {"kept": (1, False), "replaced": (2, False), "removed": (3, False), "failed": (4, True)}
        ]
        assert [write.key for write in writes] == ["replaced", "removed", "new", "never held"]
        assert [one.existed for one in applied] == [True, True, False, False]
        for one in as_is_and_reopened(tier, make):
            assert sorted(one.keys()) == ["failed", "kept", "new", "not asked for", "replaced"]
            assert one.get("replaced") == stored("replaced", source="after")
            assert one.get("kept") == stored("kept")
            assert one.last_version == 8
            check_tier(one)

    @pytest.mark.parametrize("keys", [["a"], ["a", "b"]])
    def test_a_decision_reads_an_entry_as_it_was_used_since(
        self, make: MakeAuthorityTier, keys: list[str]
    ) -> None:
        tier = make()
        put(tier, stored("a", version=3))
        tier.note_uses([Use("a", 3, 7, START_US + 9, True)])

        def decide(held: Mapping[str, Held], read: Read) -> list[Write]:
            assert held["a"].version == 3
            assert read("a") == stored(
                "a", access_count=7, last_accessed_us=START_US + 9, evicted_from_l1=True
            )
            return []

        tier.commit(keys, decide)

    @pytest.mark.parametrize("keys", [[], ["a"], ["a", "nothing"]])
    def test_where_nothing_is_decided_nothing_is_written(
        self, make: MakeAuthorityTier, directory: Path, keys: list[str]
    ) -> None:
        tier = make()
        put(tier, stored("a", failure_count=1), stored("b"))
        before = lasting_contents(directory)

        def decide(_held: Mapping[str, Held], read: Read) -> list[Write]:
            for key in keys:
                read(key)
            return []

        assert tier.commit(keys, decide) == ([], [])
        assert lasting_contents(directory) == before

    @pytest.mark.parametrize("keys", [["a"], ["a", "b"]])
    def test_a_decision_that_fails_changes_nothing(self, make: MakeAuthorityTier, keys: list[str]) -> None:
        tier = make()
        put(tier, stored("a", version=1))

        def decide(_held: object, _read: object) -> NoReturn:
            raise ArithmeticError("no decision")

        with pytest.raises(ArithmeticError):
            tier.commit(keys, decide)
        for one in as_is_and_reopened(tier, make):
            assert content_of_tier(one) == {"a": ("", 0)}
            # And nothing is held that the next decision would wait for.
            one.commit(keys, nothing)

    def test_a_decision_says_which_keys_had_to_make_room(self, make: MakeAuthorityTier) -> None:
        tier = make(bounded(2, "fifo"))
        put(tier, stored("a"), stored("b"))
        wanted = [Write(key, stored(key)) for key in ("b", "c", "d")]
        _, applied = tier.commit(["b", "c", "d"], lambda _held, _read: wanted)
        assert [one.evicted for one in applied] == [(), ("a",), ("b",)]
        assert sorted(tier.keys()) == ["c", "d"]
        check_tier(tier)

    def test_a_decision_is_in_the_files_when_it_returns(
        self, make: MakeAuthorityTier, directory: Path, tmp_path: Path
    ) -> None:
        tier = make()
        put(tier, stored("b"))
        wanted = [Write("a", stored("a", version=2), 2), Write("b", None, 3)]
        tier.commit(["a", "b"], lambda _held, _read: wanted)
        copy_files(directory, tmp_path / "killed")
        assert make(directory=tmp_path / "killed").keys() == ["a"]

    def test_a_closed_store_takes_no_decision(self, make: MakeAuthorityTier) -> None:
        tier = make()
        put(tier, stored("a"))
        tier.close()
        with pytest.raises(TierError):
            tier.commit(["a"], nothing)
        with pytest.raises(TierError):
            tier.versions(["a"])
        with pytest.raises(TierError):
            tier.clear_before(5)

    def test_a_store_is_busy_while_it_is_decided(self, make: MakeAuthorityTier) -> None:
        tier = make()
        seen = [tier.busy]

        def decide(_held: object, _read: object) -> Sequence[Write]:
            seen.append(tier.busy)
            return []

        tier.commit(["a"], decide)
        assert [*seen, tier.busy] == [False, True, False]

    def test_nothing_changes_the_keys_between_what_a_decision_sees_and_what_it_makes(
        self, make: MakeAuthorityTier
    ) -> None:
        tier = make()
        put(tier, stored("a", version=1), stored("b", version=1))

        def count_on(held: Mapping[str, Held], read: Read) -> list[Write]:
            writes = []
            for key in ("a", "b"):
                entry = read(key)
                assert entry is not None
                assert held[key].version == entry.version == entry.failure_count + 1
                assert held[key].has_failed == (entry.failure_count > 0)
                version = entry.version + 1
                following = stored(key, version=version, failure_count=entry.failure_count + 1)
                writes.append(Write(key, following, version))
            return writes

        def decide() -> None:
            for _ in range(25):
                tier.commit(["a", "b"], count_on)

        def change_something_else() -> None:
            for number in range(50):
                tier.apply([Write("c", stored("c", version=number + 1))])
                entry = tier.get("a")
                assert entry is not None
                tier.note_uses([Use("a", entry.version, 1, START_US, False)])

        run_in_threads(*[decide] * 6, change_something_else)
        for one in as_is_and_reopened(tier, make):
            assert content_of_tier(one) == {"a": ("", 150), "b": ("", 150), "c": ("", 0)}

    # -- damage met by a decision

    @pytest.mark.parametrize("decided", ["put", "delete", "nothing"])
    @pytest.mark.parametrize("keys", [["a"], ["a", "b"]])
    def test_a_damaged_record_that_a_decision_reads_counts_as_not_held(
        self,
        make: MakeAuthorityTier,
        directory: Path,
        corruptions: list[tuple[object, ...]],
        keys: list[str],
        decided: str,
    ) -> None:
        tier = make(bounded(2))
        put(tier, stored("a", source="sound", failure_count=1), stored("b", source="sound"))
        tier.note(incomplete=None)
        self.damage(directory, "a")
        wanted = {
            "put": [Write("a", stored("a", version=5, source="after"), 5)],
            "delete": [Write("a", None, 5)],
            "nothing": [],
        }[decided]
        read_twice: list[CacheEntry | None] = []

        def decide(_held: object, read: Read) -> list[Write]:
            read_twice.extend([read("a"), read("a")])
            return wanted

        _, applied = tier.commit(keys, decide)
        assert read_twice == [None, None]
        assert [one.existed for one in applied] == [False] * len(wanted)
        assert [one.evicted for one in applied] == [()] * len(wanted)
        assert len(corruptions) == 1
        assert tier.notes["incomplete"]
        tier.maintain()
        expected = {"b": ("sound", 0)} | ({"a": ("after", 0)} if decided == "put" else {})
        for one in as_is_and_reopened(tier, lambda: make(bounded(2))):
            assert content_of_tier(one) == expected
            check_tier(one)
        assert len(corruptions) == 1

    def test_a_damaged_record_is_reported_once_also_where_the_decision_fails(
        self, make: MakeAuthorityTier, directory: Path, corruptions: list[tuple[object, ...]]
    ) -> None:
        tier = make()
        put(tier, stored("a", source="sound"), stored("b", source="sound"))
        self.damage(directory, "a")

        def decide(_held: object, read: Read) -> NoReturn:
            assert read("a") is None
            raise ArithmeticError("no decision")

        with pytest.raises(ArithmeticError):
            tier.commit(["a"], decide)
        assert tier.get("a") is None
        tier.maintain()
        for one in as_is_and_reopened(tier, make):
            assert content_of_tier(one) == {"b": ("sound", 0)}
        assert len(corruptions) == 1
