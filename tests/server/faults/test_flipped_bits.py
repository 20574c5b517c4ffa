"""One flipped bit, anywhere in a file of a store: the server starts, and loses nothing in silence.

`--every-bit` flips each bit of the first 16 KiB of each file, for which it takes hours; without it, some.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from pydantic import SecretStr

from proxystash_server.cache import (
    CacheManager,
    CacheUnavailableError,
    CredentialEncryptor,
    EncryptionKeyError,
    EntryFilter,
    L2BackendType,
    TierState,
)
from proxystash_server.cache.entry.credentials import is_damaged_check, make_joint_check, with_checksum
from proxystash_server.cache.stopped.check import check_store
from proxystash_server.cache.stopped.repair import repair_store
from tests.server.cache.stash import Stash
from tests.server.cache.support import PASSWORD, SWITCHED_OFF, USERNAME, content_of, contents, put

KEYS = [f"key-{number:02}" for number in range(12)]
SWEPT_BYTES = 16 * 1024
FLIPS = 24
L3 = "l3/proxystash.db"
FILES = {L2BackendType.JSONL: "l2/entries.jsonl", L2BackendType.SQLITE: "l2/l2.db"}
Shape = dict[str, object]
WITHOUT_L2: Shape = {"l2_config": SWITCHED_OFF}
WITHOUT_L3: Shape = {"l3_config": SWITCHED_OFF}
CASES = [
    pytest.param(L2BackendType.JSONL, L3, {}, id="l3 below jsonl"),
    pytest.param(L2BackendType.SQLITE, L3, {}, id="l3 below sqlite"),
    pytest.param(L2BackendType.JSONL, L3, WITHOUT_L2, id="l3 alone"),
    pytest.param(L2BackendType.JSONL, "l2/entries.jsonl", {}, id="jsonl"),
    pytest.param(L2BackendType.JSONL, "l2/meta.json", {}, id="meta.json"),
    pytest.param(L2BackendType.SQLITE, "l2/l2.db", {}, id="l2 in sqlite"),
    pytest.param(L2BackendType.JSONL, "l2/entries.jsonl", WITHOUT_L3, id="jsonl alone"),
    pytest.param(L2BackendType.JSONL, "l2/meta.json", WITHOUT_L3, id="meta.json alone"),
    pytest.param(L2BackendType.SQLITE, "l2/l2.db", WITHOUT_L3, id="l2 in sqlite alone"),
]


@pytest.fixture
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(getattr(request, "param", L2BackendType.JSONL))


def fill(stash: Stash, shape: Shape) -> dict[str, tuple[str, int]]:
    """A closed store, half of whose entries have credentials; what it holds."""
    stash.validated = False
    manager = stash.open(**shape)
    put(manager, *KEYS[::2], source="plain", labels={"filler": "x" * 60})
    put(manager, *KEYS[1::2], source="sealed", username=USERNAME, password=PASSWORD)
    content = content_of(manager)
    stash.close()
    return content


def flipped(directory: Path, file: str, target: Path, *, every_bit: bool) -> Iterator[int]:
    """Each time, a copy of a store with one bit of a file flipped; the bit."""
    sound = (directory / file).read_bytes()
    bits = min(len(sound), SWEPT_BYTES) * 8
    for bit in range(bits) if every_bit else range(bits // FLIPS // 3, bits, bits // FLIPS + 1):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(directory, target)
        data = bytearray(sound)
        data[bit // 8] ^= 1 << bit % 8
        (target / file).write_bytes(data)
        yield bit


def get(manager: CacheManager, key: str) -> tuple[str, int] | None:
    try:
        entry = manager.get(key)
    except CacheUnavailableError:
        # The tier has just turned out to be damaged, and there is no other.
        return None
    return None if entry is None else (entry.source, entry.failure_count)


def held(manager: CacheManager) -> dict[str, tuple[str, int]]:
    found = {key: get(manager, key) for key in KEYS}
    return {key: content for key, content in found.items() if content is not None}


@pytest.mark.timeout(0)
@pytest.mark.parametrize(("l2_backend", "file", "shape"), CASES, indirect=["l2_backend"])
def test_a_server_starts_on_the_rest_and_loses_nothing_in_silence(
    stash: Stash, file: str, shape: Shape, request: pytest.FixtureRequest
) -> None:
    expected = fill(stash, shape)
    sound, copy = stash.directory, stash.directory.with_name("copy")
    failed: list[str] = []
    for bit in flipped(sound, file, copy, every_bit=request.config.getoption("--every-bit")):
        stash.directory = copy
        try:
            manager = stash.open(l1_config=SWITCHED_OFF, **shape)
            assert held(manager).items() <= expected.items(), "another entry than was put"
            for _ in range(2):
                stash.recover(manager)
            left = held(manager)
            statistics = manager.get_statistics()
            damaged = sum(tier.evictions_corruption for tier in (statistics.l2_stats, statistics.l3_stats))
            assert left == expected or damaged, "lost in silence"
            assert left.items() <= expected.items(), "another entry than was put"
            # One record is all that a bit is part of, but for the end of a line, without which two are one.
            most = 0 if not shape else 1 + file.endswith(".jsonl")
            assert len(left) >= len(expected) - most, "more was lost than was damaged"
            assert {tier.state for tier in statistics.tiers} <= {TierState.ACTIVE, TierState.DISABLED}
            put(manager, "later", source="later")
            assert content_of(manager) == {**left, "later": ("later", 0)}
        except Exception as error:  # noqa: BLE001 -- tell of every bit
            failed.append(f"bit {bit}: {type(error).__name__} {str(error)[:150]}")
        stash.close()
    stash.directory = sound
    assert not failed, "\n".join(failed)


@pytest.mark.timeout(0)
@pytest.mark.parametrize(("l2_backend", "file", "shape"), CASES, indirect=["l2_backend"])
def test_check_and_repair_answer(
    stash: Stash, file: str, shape: Shape, request: pytest.FixtureRequest
) -> None:
    fill(stash, shape)
    config, copy = stash.config(**shape), stash.directory.with_name("copy")
    sound, stash.directory = stash.directory, copy
    config = stash.config(**shape)
    failed: list[str] = []
    for bit in flipped(sound, file, copy, every_bit=request.config.getoption("--every-bit")):
        try:
            check_store(config)
            repair_store(config)
            assert check_store(config).faults == []
        except Exception as error:  # noqa: BLE001 -- tell of every bit
            failed.append(f"bit {bit}: {type(error).__name__} {str(error)[:150]}")
    stash.directory = sound
    assert not failed, "\n".join(failed)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("l2_backend", L2BackendType, indirect=True)
def test_the_log_of_a_killed_l3_costs_nothing_that_l2_has(
    stash: Stash, request: pytest.FixtureRequest
) -> None:
    stash.validated = False
    manager = stash.open()
    put(manager, *KEYS, source="plain")
    expected = content_of(manager)
    stash.kill()
    killed, copy = stash.directory, stash.directory.with_name("copy")
    for bit in flipped(killed, f"{L3}-wal", copy, every_bit=request.config.getoption("--every-bit")):
        stash.directory = copy
        manager = stash.open(l1_config=SWITCHED_OFF)
        stash.recover(manager)
        assert held(manager) == expected, bit
        manager.close()
    stash.directory = killed


@pytest.mark.timeout(0)
@pytest.mark.parametrize("copied", [False, True], ids=["in the log alone", "in the file too"])
def test_what_a_damaged_log_of_a_killed_l3_costs_is_told(
    stash: Stash, copied: bool, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    stash.validated = False
    manager = stash.open(**WITHOUT_L2)
    for key in KEYS:
        put(manager, key, source="plain")
    expected = held(manager)
    if copied:
        with closing(sqlite3.connect(stash.directory / L3)) as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
    stash.kill()
    killed, copy = stash.directory, stash.directory.with_name("copy")
    silent: list[int] = []
    costly = 0
    for bit in flipped(killed, f"{L3}-wal", copy, every_bit=request.config.getoption("--every-bit")):
        stash.directory = copy
        caplog.clear()
        report = check_store(stash.config(**WITHOUT_L2))
        damaged_log = (copy / f"{L3}-wal").read_bytes()
        manager = stash.open(l1_config=SWITCHED_OFF, **WITHOUT_L2)
        lost = held(manager) != expected
        costly += lost
        told = [vars(record) for record in caplog.records if hasattr(record, "lost_pages")]
        counted = manager.get_statistics().l3_stats.evictions_corruption
        if lost and not (report.counts["damaged_log"] and report.faults and counted and told):
            silent.append(bit)
        if told:
            [record] = told
            assert Path(record["kept_as"]).read_bytes() == damaged_log, bit
            assert bool(record["lost_pages"]) == bool(counted) == bool(report.faults), bit
        put(manager, "later", source="later")
        manager.close()
        assert check_store(stash.config(**WITHOUT_L2)).faults == []
    stash.directory = killed
    assert silent == []
    # With all of it in the file, the file is as good as the log was.
    assert bool(costly) != copied


def test_a_damaged_key_file_is_refused_and_changes_nothing(
    stash: Stash, request: pytest.FixtureRequest
) -> None:
    expected = fill(stash, {})
    sound, copy = stash.directory, stash.directory.with_name("copy")
    refused = 0
    for bit in flipped(sound, "secret.key", copy, every_bit=request.config.getoption("--every-bit")):
        stash.directory = copy
        before = contents(copy)
        try:
            manager = stash.open(l1_config=SWITCHED_OFF)
        except EncryptionKeyError:
            refused += 1
            assert contents(copy) == before, bit
        else:
            # Not all of its bits are part of the key.
            assert held(manager) == expected, bit
            manager.close()
    assert refused
    stash.directory = sound


# -- the token that tells which key a store was sealed under


def set_key_check(stash: Stash, value: bytes) -> None:
    with closing(sqlite3.connect(stash.directory / L3)) as connection, connection:
        connection.execute("UPDATE meta SET value = ? WHERE name = 'key_check'", (value,))


def key_check(stash: Stash) -> bytes:
    with closing(sqlite3.connect(stash.directory / L3)) as connection:
        [(value,)] = connection.execute("SELECT value FROM meta WHERE name = 'key_check'").fetchall()
    return bytes(value)


def test_every_flipped_bit_of_a_token_is_told_from_another_key() -> None:
    for check in (CredentialEncryptor().make_check(), make_joint_check([CredentialEncryptor().key] * 2)):
        assert not is_damaged_check(check)
        for bit in range(len(check) * 8):
            data = bytearray(check)
            data[bit // 8] ^= 1 << bit % 8
            assert is_damaged_check(bytes(data)), bit


@pytest.mark.parametrize("check", [None, b"damaged"], ids=["missing", "damaged"])
def test_without_a_sound_token_credentials_tell_a_wrong_key(stash: Stash, check: bytes | None) -> None:
    expected = fill(stash, WITHOUT_L2)
    if check is None:
        with closing(sqlite3.connect(stash.directory / L3)) as connection, connection:
            connection.execute("DELETE FROM meta WHERE name = 'key_check'")
    else:
        set_key_check(stash, check)
    wrong = SecretStr(CredentialEncryptor().key.decode())
    with pytest.raises(EncryptionKeyError):
        stash.open(**WITHOUT_L2, encryption_key=wrong)
    assert content_of(stash.open(**WITHOUT_L2)) == expected
    stash.close()
    assert not is_damaged_check(key_check(stash))


def test_a_wrong_key_is_refused_and_changes_nothing(stash: Stash) -> None:
    fill(stash, {})
    before = contents(stash.directory)
    with pytest.raises(EncryptionKeyError):
        stash.open(encryption_key=SecretStr(CredentialEncryptor().key.decode()))
    assert contents(stash.directory) == before


def test_a_token_of_before_is_taken_and_gets_its_checksum(stash: Stash) -> None:
    expected = fill(stash, WITHOUT_L2)
    check = key_check(stash)
    bare = check[:-11]
    assert with_checksum(bare) == check
    set_key_check(stash, bare)
    wrong = SecretStr(CredentialEncryptor().key.decode())
    with pytest.raises(EncryptionKeyError):
        stash.open(**WITHOUT_L2, encryption_key=wrong)
    assert content_of(stash.open(**WITHOUT_L2)) == expected
    stash.close()
    assert key_check(stash) == check


# -- JSON that is nested too deeply


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    "file", ["l2/meta.json", "l2/entries.jsonl", "l2/set-aside.jsonl", "missed-changes.jsonl"]
)
def test_json_that_is_nested_too_deeply_is_damage(stash: Stash, file: str) -> None:
    expected = fill(stash, {})
    (stash.directory / file).write_bytes(DEEP + b"\n")
    check_store(stash.config())
    manager = stash.open()
    assert held(manager) == expected
    stash.close()
    repair_store(stash.config())
    assert check_store(stash.config()).faults == []


def test_a_column_of_json_that_is_nested_too_deeply_costs_its_row(stash: Stash) -> None:
    from proxystash_server.cache.tiers.sqlite.record import COLUMNS, CONTENT_LENGTH, checksum

    fill(stash, WITHOUT_L2)
    with closing(sqlite3.connect(stash.directory / L3)) as connection, connection:
        connection.execute("UPDATE entries SET labels = ? WHERE key = ?", (DEEP.decode(), KEYS[0]))
        row = connection.execute(f"SELECT {COLUMNS} FROM entries WHERE key = ?", KEYS[:1]).fetchone()
        connection.execute(
            "UPDATE entries SET checksum = ? WHERE key = ?", (checksum(row[:CONTENT_LENGTH]), KEYS[0])
        )
    manager = stash.open(l1_config=SWITCHED_OFF, **WITHOUT_L2)
    assert held(manager).keys() == {*KEYS[1:]}
    assert manager.get_statistics().l3_stats.evictions_corruption == 1


# -- what larger sweeps found


@pytest.mark.parametrize("change", ["version = version + 1", "access_count = NULL"])
def test_a_row_damaged_in_l3_does_not_cost_the_copy_in_l2(stash: Stash, change: str) -> None:
    expected = fill(stash, {})
    with closing(sqlite3.connect(stash.directory / L3)) as connection:
        [(text,)] = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'entries'").fetchall()
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(
            "UPDATE sqlite_schema SET sql = ? WHERE name = 'entries'", (text.replace(" NOT NULL", ""),)
        )
        connection.commit()
    with closing(sqlite3.connect(stash.directory / L3)) as connection, connection:
        connection.execute(f"UPDATE entries SET {change} WHERE key = ?", (KEYS[-1],))
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_schema SET sql = ? WHERE name = 'entries'", (text,))
    manager = stash.open(l1_config=SWITCHED_OFF)
    assert held(manager) == expected
    assert {tier.state for tier in manager.get_statistics().tiers} == {TierState.ACTIVE, TierState.DISABLED}


def flip(path: Path, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_a_text_that_is_none_and_that_no_checksum_covers_is_made_anew(stash: Stash) -> None:
    expected = fill(stash, WITHOUT_L2)
    data = (stash.directory / L3).read_bytes()
    scheme = data.index(b"httpgAAAA", data.rindex(b"key-03http"))
    flip(stash.directory / L3, scheme, 7)
    manager = stash.open(l1_config=SWITCHED_OFF, **WITHOUT_L2)
    assert held(manager) == expected
    assert len(manager.list_entries("", 100, EntryFilter(schemes=frozenset({"http"})))) == len(KEYS)
    stash.close()
    assert check_store(stash.config(**WITHOUT_L2)).faults == []


def test_uses_that_are_text_which_is_none_cost_their_row(stash: Stash) -> None:
    expected = fill(stash, WITHOUT_L2)
    with closing(sqlite3.connect(stash.directory / L3)) as connection, connection:
        connection.execute("UPDATE entries SET access_count = CAST(x'F4' AS TEXT) WHERE key = ?", KEYS[:1])
        # So that the file is rebuilt.
        connection.execute("DROP INDEX entries_by_expiry")
    manager = stash.open(l1_config=SWITCHED_OFF, **WITHOUT_L2)
    assert held(manager) == {key: content for key, content in expected.items() if key != KEYS[0]}
    assert manager.get_statistics().l3_stats.evictions_corruption == 2


def test_what_was_set_aside_before_is_kept_once(stash: Stash) -> None:
    """Also where the file is read with its own first page and with that of a new one."""
    fill(stash, WITHOUT_L2)
    with closing(sqlite3.connect(stash.directory / L3)) as connection, connection:
        connection.execute("INSERT INTO set_aside (reason, record) VALUES ('a reason', 'a record')")
    # The encoding, which SQLite takes for UTF-8 as well.
    flip(stash.directory / L3, 59, 2)
    stash.open(**WITHOUT_L2)
    stash.close()
    with closing(sqlite3.connect(stash.directory / L3)) as connection:
        rows = connection.execute("SELECT reason, record FROM set_aside").fetchall()
    assert rows == [("a reason", "a record")]
