"""What is damaged is told of and costs itself alone."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from proxystash_server.proxywhirl_import.stores import SourceError
from tests.server.proxywhirl_import.support import (
    L2_DATABASE,
    L3_DATABASE,
    SHARDS,
    Target,
    copy_of,
    edit,
    reasons,
)

PAGE = 4096


@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param(lambda line: line[: len(line) // 2], id="torn"),
        pytest.param(lambda line: line.replace(b'"source"', b'"sour\xffe"'), id="not UTF-8"),
        pytest.param(lambda line: b"\0" * len(line), id="zeroed"),
        pytest.param(lambda line: b"[" * 100_000, id="nested without end"),
        pytest.param(lambda line: b'"a text"', id="no object"),
    ],
)
def test_a_damaged_line_is_told_of_and_skipped(damaged: object, target: Target, tmp_path: Path) -> None:
    assert callable(damaged)
    shard = copy_of(SHARDS / "shard_10.jsonl", tmp_path)
    lines = shard.read_bytes().splitlines()
    shard.write_bytes(b"\n".join([lines[0], damaged(lines[1]), *lines[2:]]) + b"\n")

    report = target.take(shard)

    (file,) = report.files
    assert file.read == len(lines)
    (failed,) = (reason for reason in file.reasons if reason.kind == "failed")
    assert (failed.text, failed.count, failed.first) == ("the line is damaged", 1, "line 2")
    assert report.imported == len(target.entries()) == len(lines) - 1 - file.count("skipped")
    assert not report.complete


@pytest.mark.parametrize(
    ("fields", "kind", "reason"),
    [
        ({"proxy_url": None}, "failed", "proxy_url is missing"),
        ({"proxy_url": 7}, "failed", "proxy_url is no text"),
        ({"fetch_time": "yesterday"}, "failed", "fetch_time is no time"),
        ({"fetch_time": None}, "failed", "fetch_time is missing"),
        ({"expires_at": 1e300}, "failed", "expires_at is no time"),
        ({"last_accessed": True}, "failed", "last_accessed is no time"),
        ({"access_count": -1}, "failed", "access_count is no count"),
        ({"access_count": "many"}, "failed", "access_count is no count"),
        ({"access_count": 2**63}, "failed", "access_count is no count"),
        ({"total_health_checks": 1.5}, "failed", "total_health_checks is no count"),
        ({"source": "\ud800"}, "failed", "source is not valid Unicode"),
        ({"username_encrypted": "not hexadecimal"}, "failed", "username_encrypted is damaged"),
        ({"password_encrypted": 7}, "failed", "password_encrypted is damaged"),
        (
            {"health_status": "fine"},
            "skipped",
            "health_status is none of unknown, healthy, degraded, unhealthy, dead",
        ),
        (
            {"source": "s" * 129},
            "skipped",
            "invalid source: source has 129 characters; at most 128 are allowed",
        ),
    ],
)
def test_a_field_that_is_no_good_is_named(
    fields: dict[str, object], kind: str, reason: str, target: Target, tmp_path: Path
) -> None:
    record = _record_of("http://plain.example.com:8080")
    other = {"proxy_url": "http://good.example.com:80"}
    shard = tmp_path / "shard_02.jsonl"
    shard.write_text(json.dumps(record | fields) + "\n" + json.dumps(record | other) + "\n")

    report = target.take(shard)

    assert reasons(report) == {(kind, reason): 1}
    assert list(target.entries()) == ["good.example.com:80"]
    assert report.complete is (kind == "skipped")


def test_a_count_that_is_too_great_for_us_is_the_greatest(target: Target, tmp_path: Path) -> None:
    counts = {
        "health_status": "unhealthy",
        "failure_count": 2**31,
        "access_count": 2**63 - 1,
        "total_health_checks": 2**40,
    }
    shard = tmp_path / "shard_02.jsonl"
    shard.write_text(json.dumps(_record_of("http://plain.example.com:8080") | counts) + "\n")

    assert reasons(target.take(shard)) == {}

    [entry] = target.entries().values()
    assert (entry.failure_count, entry.access_count, entry.total_health_checks) == (2**31 - 1, 2**58, 2**40)


def test_times_without_a_zone_are_utc(target: Target, tmp_path: Path) -> None:
    record = _record_of("http://plain.example.com:8080")
    aware = record["fetch_time"]
    shard = tmp_path / "shard_02.jsonl"
    naive = aware.removesuffix("+00:00")
    shard.write_text(json.dumps(record | {"fetch_time": naive, "last_health_check": naive}) + "\n")

    target.take(shard)

    (entry,) = target.entries().values()
    assert entry.fetch_time.isoformat() == aware
    assert entry.last_health_check is not None
    assert entry.last_health_check.isoformat() == aware


def test_a_damaged_row_is_told_of_and_skipped(target: Target, tmp_path: Path) -> None:
    database = copy_of(L3_DATABASE, tmp_path)
    edit(database, "UPDATE cache_entries SET fetch_time = 'garbage' WHERE proxy_url LIKE '%//login%'")
    edit(
        database,
        "UPDATE cache_entries SET source = CAST(x'66ff' AS TEXT) WHERE proxy_url LIKE '%//failing%'",
    )

    report = target.take(database)

    told = reasons(report)
    assert told["failed", "fetch_time is no time"] == 1
    assert told["failed", "source is not valid Unicode"] == 1
    stored = target.entries()
    assert "plain.example.com:8080" in stored
    assert not {"alice@login.example.com:8080", "failing.example.com:8080"} & stored.keys()
    assert not report.complete


@pytest.mark.parametrize(
    ("database", "table"), [(L2_DATABASE, "l2_cache"), (L3_DATABASE, "cache_entries")], ids=["L2", "L3"]
)
def test_a_smashed_page_costs_its_rows_and_each_is_counted(
    database: Path, table: str, target: Target, tmp_path: Path
) -> None:
    copy = copy_of(database, tmp_path)
    _add_rows(copy, table, 100)
    _smash(copy, b"http://added-50.example.com:80")

    report = target.take(copy)

    (file,) = report.files
    assert file.error is None
    assert file.read == 131
    (damaged,) = (reason for reason in file.reasons if reason.kind == "failed")
    assert damaged.text == "the row is damaged"
    assert 1 <= damaged.count < 40
    stored = target.entries()
    assert "added-50.example.com:80" not in stored
    # Both what comes before the page and what comes after it.
    assert {
        "olga@older-key.example.com:8080",
        "added-1.example.com:80",
        "added-99.example.com:80",
    } <= stored.keys()
    assert len(stored) == file.imported
    assert not report.complete


def test_where_the_index_is_gone_as_well_the_file_is_said_to_be_damaged(
    target: Target, tmp_path: Path
) -> None:
    copy = copy_of(L3_DATABASE, tmp_path)
    _smash(copy, b"http://filler-5.example.com:8080")
    _smash(copy, b"gw-1", kind=0x0A)

    report = target.take(copy)

    (file,) = report.files
    assert file.error is not None
    assert "cache_entries" in file.error
    assert file.imported == len(target.entries()) > 0
    assert not report.complete


@pytest.mark.parametrize("damage", ["header", "cut off", "empty"])
def test_a_database_that_cannot_be_read_does_not_keep_the_others_from_being_imported(
    damage: str, target: Target, tmp_path: Path
) -> None:
    copy = copy_of(L2_DATABASE, tmp_path)
    content = copy.read_bytes()
    copy.write_bytes(
        {"header": b"\xff" * 100 + content[100:], "cut off": content[:2000], "empty": b""}[damage]
    )

    report = target.take(tmp_path, SHARDS)

    damaged = next(file for file in report.files if file.path == copy)
    assert damaged.error is not None
    assert damaged.imported == 0
    assert report.imported == len(target.entries()) > 20
    assert not report.complete


def test_a_named_file_that_is_no_store_is_an_error(target: Target, tmp_path: Path) -> None:
    text = tmp_path / "proxies.txt"
    text.write_text("http://plain.example.com:8080\n" * 100)

    report = target.take(text)

    assert report.files[0].error == "it is no database, or a damaged one"
    assert not report.complete


def test_entries_that_the_last_tier_does_not_take_have_failed(target: Target) -> None:
    """Given an L3 that cannot be opened, entries that only L1 and L2 hold are not called imported."""
    target.directory.mkdir()
    (target.directory / "l3").write_text("a file where a directory should be")

    report = target.take(L2_DATABASE)

    assert report.imported == 0
    assert reasons(report)["failed", "l3 could not store it; the log says why"] > 20
    assert not report.complete


def test_entries_for_which_a_bounded_tier_has_no_room_are_told_of(target: Target) -> None:
    bounded: dict[str, Any] = {"l3_config": {"max_entries": 5}}

    report = target.take(L3_DATABASE, **bounded)

    stored = target.entries(**bounded)
    assert len(stored) == report.imported == 5
    assert report.evicted == reasons(report)["skipped", "by its settings the cache has no room for it"] > 10
    assert not report.complete
    # The most recently used one is kept.
    assert "plain.example.com:8080" in stored


def test_entries_that_more_recently_used_ones_of_ours_leave_no_room_for_are_told_of(target: Target) -> None:
    bounded: dict[str, Any] = {"l3_config": {"max_entries": 5}}
    with target.manager(**bounded) as manager:
        ours = [manager.new_entry(f"http://ours-{number}.example.com:80") for number in range(4)]
        manager.put_many(ours)

    report = target.take(L3_DATABASE, **bounded)

    stored = target.entries(**bounded)
    assert len(stored) == 5
    assert report.imported == len([name for name in stored if "ours" not in name])
    assert not report.complete


def test_a_cache_that_would_keep_nothing_is_refused(target: Target) -> None:
    with pytest.raises(SourceError, match="neither l2 nor l3 is enabled"):
        target.take(L3_DATABASE, l2_config={"enabled": False}, l3_config={"enabled": False})


def _record_of(url: str) -> dict[str, Any]:
    """What the shards have of a proxy."""
    lines = (line for shard in SHARDS.iterdir() for line in shard.read_text().splitlines())
    return next(record for record in map(json.loads, lines) if record["proxy_url"] == url)


def _add_rows(database: Path, table: str, count: int) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        rows = connection.execute(f"SELECT * FROM {table} WHERE proxy_url LIKE 'http://plain%'").fetchall()
        for number in range(count):
            row = (f"added-{number}", f"http://added-{number}.example.com:80", *rows[0][2:])
            connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)


def _smash(database: Path, marker: bytes, *, kind: int = 0x0D) -> None:
    """Overwrite the page with `marker` in it: a leaf of a table (0x0D) or of an index (0x0A)."""
    content = bytearray(database.read_bytes())
    for start in range(0, len(content), PAGE):
        if content[start] == kind and marker in content[start : start + PAGE]:
            content[start : start + PAGE] = b"\xff" * PAGE
            database.write_bytes(content)
            return
    raise AssertionError(f"no page of kind {kind:#x} holds {marker!r}")
