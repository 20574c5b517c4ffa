"""The key file while a cache runs: what is sealed must not outlive its key."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from proxystash_server.cache import CacheManager
from tests.server.cache.stash import Stash
from tests.server.cache.support import PASSWORD, USERNAME, put


@pytest.fixture
def manager(stash: Stash) -> CacheManager:
    manager = stash.open()
    put(manager, "a", username=USERNAME, password=PASSWORD)
    return manager


@pytest.fixture
def path(stash: Stash, manager: CacheManager) -> Path:
    return stash.directory / "secret.key"


def opens_its_seals(manager: CacheManager) -> bool:
    entry = manager.get("a")
    return entry is not None and entry.password is not None and entry.password.get_secret_value() == PASSWORD


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [str(record.__dict__["reason"]) for record in caplog.records if record.levelno == logging.CRITICAL]


@pytest.mark.parametrize("left", [None, 0, 1, 20, 43], ids=str)
def test_a_key_file_that_was_removed_or_cut_short_is_written_again(
    stash: Stash, manager: CacheManager, path: Path, left: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    key = path.read_bytes()
    if left is None:
        path.unlink()
    else:
        path.write_bytes(key[:left])
    manager.maintain()
    assert path.read_bytes() == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "is written again" in caplog.text
    assert key.decode().strip() not in caplog.text
    assert opens_its_seals(stash.reopen())


def test_one_that_is_removed_in_the_last_moment_is_there_after_the_end(
    stash: Stash, manager: CacheManager, path: Path
) -> None:
    key = path.read_bytes()
    path.unlink()
    manager.close()
    assert path.read_bytes() == key
    assert opens_its_seals(stash.reopen())


def test_another_key_in_it_is_left_to_its_operator_who_is_told_once(
    stash: Stash, manager: CacheManager, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key, other = path.read_bytes(), Fernet.generate_key()
    for _ in range(2):
        path.write_bytes(other)
        manager.maintain()
        manager.maintain()
        assert path.read_bytes() == other
        path.write_bytes(key)
        manager.maintain()
    assert complaints(caplog) == ["it holds another key than the one that is in use"] * 2
    assert other.decode() not in caplog.text


def test_the_keys_of_an_unfinished_rotation_are_left_alone(
    stash: Stash, manager: CacheManager, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = Fernet.generate_key() + b"\n" + path.read_bytes()
    path.write_bytes(both)
    manager.maintain()
    assert path.read_bytes() == both
    assert complaints(caplog) == []
    # A server would not start with the first of them alone.
    path.write_bytes(both.splitlines()[1])


def test_one_that_cannot_be_written_again_is_told_once_and_stops_nothing(
    stash: Stash, manager: CacheManager, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = path.read_bytes()
    path.unlink()
    path.mkdir()
    for _ in range(2):
        manager.maintain()
    put(manager, "b")
    assert opens_its_seals(manager)
    assert complaints(caplog) == [f"{path} cannot be read: Is a directory"]
    path.rmdir()
    manager.maintain()
    assert path.read_bytes() == key


def test_a_key_from_elsewhere_is_written_nowhere(stash: Stash) -> None:
    manager = stash.open(encryption_key=Fernet.generate_key().decode())
    put(manager, "a", username=USERNAME, password=PASSWORD)
    manager.maintain()
    manager.close()
    assert not (stash.directory / "secret.key").exists()
