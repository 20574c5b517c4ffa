"""A write-ahead log that a killed process has left: what damage to it costs is told, and nothing else is."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from pydantic import SecretStr

from proxystash_server.cache import CacheTierType, CredentialEncryptor, EncryptionKeyError, SQLiteCacheTier
from proxystash_server.cache.errors import TierError
from proxystash_server.cache.tiers.base import Write
from tests.server.cache.stash import Stash
from tests.server.cache.store_contract import ENCRYPTOR
from tests.server.cache.support import PASSWORD, SWITCHED_OFF, USERNAME, contents, put, stored
from tests.server.cache.tier_contract import UNBOUNDED

NAME, LOG, INDEX = "store.db", "store.db-wal", "store.db-shm"
FRAME_BYTES = 24 + 2048
ALONE = {"l1_config": SWITCHED_OFF, "l2_config": SWITCHED_OFF}


class Killed:
    """A store in use, and copies of its files, which are what a kill at that moment leaves."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "store"
        self.tier = SQLiteCacheTier(UNBOUNDED, CacheTierType.L3, self.directory / NAME, ENCRYPTOR)
        self.tier.open()

    def put(self, *numbers: int) -> None:
        for number in numbers:
            self.tier.apply([Write(f"{number:05}", stored(f"{number:05}"))])

    def kill(self, name: str = "killed") -> Path:
        target = self.directory.with_name(name)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.directory, target)
        return target

    def checkpoint(self, mode: str) -> None:
        with closing(sqlite3.connect(self.directory / NAME)) as connection:
            connection.execute(f"PRAGMA wal_checkpoint({mode})")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Killed]:
    store = Killed(tmp_path)
    yield store
    store.tier.close()


def opened(directory: Path) -> tuple[list[str], list[str]]:
    """The keys that the next process finds, and the damage that it tells."""
    told: list[str] = []
    tier = SQLiteCacheTier(
        UNBOUNDED,
        CacheTierType.L3,
        directory / NAME,
        ENCRYPTOR,
        on_corruption=lambda _tier, _key, reason: told.append(reason),
    )
    with suppress(TierError):
        # As every start does. Where nothing is left, there is none.
        tier.stored_key_check()
    tier.open()
    keys = sorted(tier.keys())
    tier.close()
    return keys, told


def names(*numbers: int) -> list[str]:
    return [f"{number:05}" for number in numbers]


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def raise_full(*_arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def committed_frames(directory: Path) -> int:
    [frames] = struct.unpack("=I", (directory / INDEX).read_bytes()[16:20])
    return int(frames)


# -- what must be told


def test_no_bit_of_the_header_or_of_the_last_frame_is_lost_in_silence(store: Killed) -> None:
    store.put(*range(3))
    last = 32 + (committed_frames(store.directory) - 1) * FRAME_BYTES
    in_headers = [*range(32 * 8), *range(last * 8, (last + 24) * 8)]
    in_page = range((last + 24) * 8, (last + FRAME_BYTES) * 8, 997)
    for bit in [*in_headers, *in_page]:
        directory = store.kill()
        flip(directory / LOG, bit)
        damaged = (directory / LOG).read_bytes()
        _, told = opened(directory)
        assert len(told) == 1, bit
        assert (directory / f"{NAME}.damaged-1-wal").read_bytes() == damaged


def test_a_refused_start_leaves_it_to_the_next_one(stash: Stash) -> None:
    stash.validated = False
    put(stash.open(**ALONE), "first", "second", username=USERNAME, password=PASSWORD)
    stash.kill()
    path = stash.directory / "l3" / "proxystash.db-wal"
    flip(path, (path.stat().st_size - 100) * 8)
    before = contents(stash.directory)
    with pytest.raises(EncryptionKeyError):
        stash.open(**ALONE, encryption_key=SecretStr(CredentialEncryptor().key.decode()))
    assert contents(stash.directory) == before
    assert stash.open(**ALONE).get_statistics().l3_stats.evictions_corruption == 1


def test_a_log_that_was_copied_into_the_file_is_not_needed(store: Killed) -> None:
    store.put(*range(20))
    store.checkpoint("PASSIVE")
    directory = store.kill()
    flip(directory / LOG, (32 + 12 * FRAME_BYTES + 100) * 8)
    assert opened(directory) == (names(*range(20)), [])
    assert (directory / f"{NAME}.damaged-1-wal").exists()


def test_of_a_log_that_was_copied_in_part_what_is_lost_is_told(store: Killed) -> None:
    store.put(*range(20))
    with closing(sqlite3.connect(store.directory / NAME, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM entries").fetchone()
        store.put(*range(20, 30))
        store.checkpoint("PASSIVE")
        directory = store.kill()
    flip(directory / LOG, (32 + 12 * FRAME_BYTES + 100) * 8)
    keys, told = opened(directory)
    assert {*keys} < {*names(*range(30))}
    # From the beginning of the transaction that it was part of.
    [pages] = [int(word) for word in told[0].split() if word.isdigit()]
    assert 118 <= pages < 118 + 10
    assert committed_frames(store.directory) == 130


def test_what_cannot_be_kept_is_told(
    store: Killed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(*range(3))
    directory = store.kill()
    flip(directory / LOG, (directory / LOG).stat().st_size * 8 - 1)
    monkeypatch.setattr(shutil, "copyfileobj", raise_full)
    assert len(opened(directory)[1]) == 1
    [record] = [record for record in caplog.records if hasattr(record, "kept_as")]
    assert vars(record)["kept_as"] == f"not kept: {os.strerror(errno.ENOSPC)}"
    assert not list(directory.glob("*.damaged-*"))


# -- what must not


def test_pages_that_were_never_committed_are_not_lost(store: Killed) -> None:
    store.put(1)
    with closing(sqlite3.connect(store.directory / NAME, isolation_level=None)) as writer:
        writer.execute("PRAGMA cache_size = 5")
        size = (store.directory / LOG).stat().st_size
        writer.execute("BEGIN IMMEDIATE")
        for number in range(100):
            writer.execute("INSERT INTO set_aside (record) VALUES (?)", (f"{number}" * 1000,))
        assert (store.directory / LOG).stat().st_size > size
        directory = store.kill()
    assert opened(directory) == (names(1), [])


@pytest.mark.parametrize("mode", ["PASSIVE", "FULL", "RESTART", "TRUNCATE"])
def test_a_log_that_starts_over_is_not_damaged(store: Killed, mode: str) -> None:
    store.put(*range(20))
    stale = (store.directory / INDEX).read_bytes()
    store.checkpoint(mode)
    assert opened(store.kill()) == (names(*range(20)), [])
    store.put(20)
    assert opened(store.kill()) == (names(*range(21)), [])
    # As after a power cut: the index of before, whose frames are still behind those of the new log.
    directory = store.kill()
    (directory / INDEX).write_bytes(stale)
    assert opened(directory) == (names(*range(21)), [])


def test_an_older_copy_is_not_damaged(store: Killed) -> None:
    store.put(*range(3))
    older = store.kill("older")
    store.put(*range(3, 6))
    directory = store.kill()
    for name in (NAME, LOG):
        (directory / name).write_bytes((older / name).read_bytes())
    assert opened(directory) == (names(*range(3)), [])


@pytest.mark.parametrize("index", [None, b"", b"\0" * 3, b"\0" * 32768, b"\xff" * 32768])
def test_without_an_index_nothing_is_said(store: Killed, index: bytes | None) -> None:
    store.put(*range(3))
    directory = store.kill()
    if index is None:
        (directory / INDEX).unlink()
    else:
        (directory / INDEX).write_bytes(index)
    assert opened(directory) == (names(*range(3)), [])


def test_an_index_that_was_being_written_says_nothing(store: Killed) -> None:
    store.put(*range(3))
    for bit in range(96 * 8):
        directory = store.kill()
        flip(directory / INDEX, bit)
        assert opened(directory) == (names(*range(3)), []), bit


def test_without_a_log_nothing_is_said(store: Killed) -> None:
    store.put(*range(3))
    store.checkpoint("PASSIVE")
    directory = store.kill()
    (directory / LOG).unlink()
    assert opened(directory) == (names(*range(3)), [])
