"""Files in predictable places: whoever put a link there does not have it written through, nor a mode kept."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from proxystash_server.cache import StoreError, StoreLock
from proxystash_server.cache.config import CacheTierConfig, CacheTierType
from proxystash_server.cache.entry.credentials import create_key_file
from proxystash_server.cache.ground.files import replace_file
from proxystash_server.cache.tiers.jsonl.directory import JsonlDirectory
from proxystash_server.cache.tiers.jsonl.log import LogFile
from proxystash_server.cache.tiers.sqlite.tier import SQLiteCacheTier
from tests.server.cache.store_contract import ENCRYPTOR
from tests.server.cache.test_store_lock import config_of

OTHERS = "somebody else's"


@pytest.fixture
def others(tmp_path: Path) -> Path:
    path = tmp_path / "others"
    path.write_text(OTHERS)
    return path


REPLACED: dict[str, Callable[[Path], object]] = {
    "meta.json": lambda path: replace_file(path, b"new", sync=False),
    "secret.key": lambda path: create_key_file(path, Fernet.generate_key()),
}


@pytest.mark.parametrize("write", REPLACED.values(), ids=REPLACED)
def test_what_is_written_beside_and_renamed_is_a_new_file(
    tmp_path: Path, others: Path, write: Callable[[Path], object]
) -> None:
    path = tmp_path / "data" / "file"
    path.parent.mkdir()
    path.with_name("file.new").symlink_to(others)
    write(path)
    assert others.read_text() == OTHERS
    path.unlink()
    path.with_name("file.new").write_text("left over")
    path.with_name("file.new").chmod(0o666)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def refuse_link(others: Path, link: Path, write: Callable[[], object]) -> None:
    """Assert that nothing is written through a link to a file that is there, nor to one that is not."""
    missing = others.with_name("missing")
    for target in (others, missing):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises((OSError, StoreError), match="symbolic links"):
            write()
    assert others.read_text() == OTHERS
    assert not missing.exists()


def test_a_log_is_no_link(tmp_path: Path, others: Path) -> None:
    link = tmp_path / "entries.jsonl"
    refuse_link(others, link, lambda: LogFile(link))


def test_damaged_lines_are_set_aside_into_no_link(tmp_path: Path, others: Path) -> None:
    directory = JsonlDirectory(tmp_path, sync=False)
    refuse_link(others, directory.set_aside_path, lambda: directory.set_aside("file", 0, b"x", "why", 0))


def test_the_lock_is_no_link(tmp_path: Path, others: Path) -> None:
    refuse_link(others, tmp_path / "lock", lambda: StoreLock(config_of(tmp_path), "x").__enter__())


def test_no_database_is_made_through_a_link(tmp_path: Path) -> None:
    """One that is there may be elsewhere, for its operator to choose."""
    (tmp_path / "l3.db").symlink_to(tmp_path / "missing")
    tier = SQLiteCacheTier(CacheTierConfig(), CacheTierType.L3, tmp_path / "l3.db", ENCRYPTOR)
    with pytest.raises(Exception, match="FileExistsError"):
        tier.open()
    assert not (tmp_path / "missing").exists()
