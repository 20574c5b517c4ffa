"""What every disk tier promises of the files that it keeps its entries in: notes, seals, privacy, format.

A backend's test module derives a class from this one and says how to make its tier, and how to do to its
files what no tier does.
"""

from __future__ import annotations

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
    DiskTier,
    HealthMonitoring,
    StoreFormatError,
)
from proxystash_server.cache.coherence.uses import Use
from tests.server.cache.invariants import check_tier
from tests.server.cache.support import (
    PASSWORD,
    START_US,
    USERNAME,
    FakeClock,
    contents,
    fingerprint,
    run_in_threads,
    stored,
)
from tests.server.cache.tier_contract import UNBOUNDED, TierContract, everything_set, put

MakeDiskTier = Callable[..., DiskTier]

Tier = TypeVar("Tier", bound=DiskTier)

ENCRYPTOR = CredentialEncryptor(Fernet.generate_key())


class StoreContract(TierContract):
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
        tier.maintain()
        for one in as_is_and_reopened(tier, make):
            assert one.notes["incomplete"]
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

    # -- privacy

    def test_no_credential_is_readable_in_any_file(self, make: MakeDiskTier, directory: Path) -> None:
        tier = make()
        put(tier, everything_set(), stored("b", username=USERNAME, password=PASSWORD))
        put(tier, everything_set(version=2))
        tier.note_uses([Use("full", 2, 9, START_US, False)])
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


def as_is_and_reopened(tier: Tier, make: Callable[[], Tier]) -> Iterator[Tier]:
    """The tier as it is, and then as the next run finds it: what holds of the one must hold of the other."""
    yield tier
    yield make()


def copy_files(source: Path, target: Path) -> None:
    target.mkdir()
    for name, content in contents(source).items():
        (target / name).write_bytes(content)
