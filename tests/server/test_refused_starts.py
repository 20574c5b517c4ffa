"""Starts that are refused: they say why, and have changed nothing."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from proxystash_server.cache import CacheConfig, CacheManager
from proxystash_server.cache.tiers.jsonl.line import encode_body, finish_line
from proxystash_server.pool.pool import Pool
from tests.server.cache.support import PASSWORD, USERNAME, fingerprint, put
from tests.support.server import start_and_fail

KEY = "PROXYSTASH_ENCRYPTION_KEY"


def start(data: Path, env: dict[str, str] | None = None) -> str:
    code, output = start_and_fail("--data-dir", str(data), "--listen", "127.0.0.1:0", env=env)
    assert code == 1
    assert "Traceback" not in output
    return output


def everything(directory: Path) -> dict[str, object]:
    """All files with their contents, the lock among them, and all directories."""
    names = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.suffix != ".db-shm"}
    return {**dict.fromkeys(names), **fingerprint(directory)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory that has been used."""
    data = tmp_path / "data"
    config = CacheConfig(
        l2_cache_dir=data / "l2",
        l3_database_path=data / "l3" / "proxystash.db",
        encryption_key_file=data / "secret.key",
        ban_seconds=60,
    )
    with (
        CacheManager(config, background=False) as manager,
        Pool(manager, data / "pool", background=False),
    ):
        put(manager, "a", "b", username=USERNAME, password=PASSWORD)
        manager.invalidate_by_health("b")
    return data


def set_newer(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    record = json.loads(lines[0])
    record.pop("crc")
    sequence = record.pop("seq")
    path.write_bytes(finish_line(encode_body({**record, "version": 99}), sequence) + b"".join(lines[1:]))


def set_newer_meta(path: Path) -> None:
    meta = json.loads(path.read_bytes())
    meta.pop("crc", None)
    meta.pop("seq", None)
    path.write_bytes(json.dumps({**meta, "version": 99}).encode())


def set_newer_database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("ALTER TABLE entries RENAME TO things")
    connection.execute("PRAGMA user_version = 99")
    connection.commit()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


def make_journal(path: Path) -> None:
    record = {"op": "header", "format": "proxystash-missed-changes", "version": 99, "key_check": "x"}
    path.write_bytes(finish_line(encode_body(record), 0))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no key": (lambda data: (data / "secret.key").unlink(), "secret.key is missing"),
    "an empty key file": (lambda data: os.truncate(data / "secret.key", 0), "is empty"),
    "a key file cut short": (lambda data: os.truncate(data / "secret.key", 20), "malformed"),
    "a loose key file": (lambda data: (data / "secret.key").chmod(0o644), "may be read by others"),
    "another key": (
        lambda data: (data / "secret.key").write_bytes(Fernet.generate_key()),
        "is not the one that",
    ),
    "a newer journal": (lambda data: make_journal(data / "missed-changes.jsonl"), "has format"),
    "newer failures": (lambda data: set_newer(data / "failures.jsonl"), "has format"),
    "a newer L2": (lambda data: set_newer_meta(data / "l2" / "meta.json"), "has format"),
    "a newer L3": (lambda data: set_newer_database(data / "l3" / "proxystash.db"), "has format"),
    "newer leases": (lambda data: set_newer(data / "pool" / "leases.jsonl"), "has format"),
    "newer evidence": (lambda data: set_newer(data / "pool" / "evidence.jsonl"), "has format"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_on_a_store_that_must_not_be_opened(data: Path, fault: str) -> None:
    do_damage, reason = FAULTS[fault]
    do_damage(data)
    before = everything(data)
    assert reason in start(data)
    assert everything(data) == before


@pytest.mark.parametrize("fault", ["a newer journal", "newer failures", "a newer L3", "newer leases"])
def test_beside_a_store_that_is_not_there_yet(data: Path, tmp_path: Path, fault: str) -> None:
    """Then no key is made either, nor anything else."""
    do_damage, _ = FAULTS[fault]
    do_damage(data)
    named = {"journal": "missed-changes.jsonl", "failures": "failures.jsonl", "L3": "l3/proxystash.db"}
    name = named.get(fault.rsplit(maxsplit=1)[-1], "pool/leases.jsonl")
    alone = tmp_path / "alone"
    (alone / name).parent.mkdir(parents=True)
    (data / name).rename(alone / name)
    before = everything(alone)
    start(alone)
    assert everything(alone) == before


def test_where_nothing_is_yet(tmp_path: Path) -> None:
    assert "malformed" in start(tmp_path / "a" / "data", {KEY: "no key"})
    assert list(tmp_path.iterdir()) == []
