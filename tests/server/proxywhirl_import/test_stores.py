"""Each kind of store that proxywhirl 0.3.3 writes is read, and what it says of an entry is kept."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from proxystash.models import HealthMonitoring, HealthStatus
from proxystash.proxies import SCHEMES, cache_key
from proxystash_server.proxywhirl_import.stores import SourceError, find_stores
from tests.server.proxywhirl_import.support import (
    FIXTURES,
    GENERATED,
    KILLED,
    L2_DATABASE,
    L3_DATABASE,
    SHARDS,
    Target,
    copy_of,
    edit,
    reasons,
    secret,
    snapshot,
)

YEAR = timedelta(days=365)

each_store = pytest.mark.parametrize("source", [SHARDS, L2_DATABASE, L3_DATABASE], ids=lambda path: path.name)


@each_store
def test_every_usable_entry_is_imported_and_the_others_are_told_of(source: Path, target: Target) -> None:
    report = target.take(source)

    stored = target.entries()
    assert len(stored) == report.imported
    assert {name for name in stored if "filler" not in name and "newer" not in name} - {
        # Which of the two stores has its live copy differs.
        "replaced.example.com:8080"
    } == {
        "olga@older-key.example.com:8080",
        "plain.example.com:8080",
        "192.0.2.7:1080",
        "[2001:db8::7]:3128",
        "alice@login.example.com:8080",
        "token-username@username-only.example.com:8080",
        "carol@userinfo.example.com:8080",
        "account-1@gateway.example.com:7777",
        "account-2@gateway.example.com:7777",
        "dead.example.com:3128",
        "failing.example.com:8080",
    }
    told = reasons(report)
    expired = told.pop(("skipped", "expired"))
    assert expired == (1 if "replaced.example.com:8080" in stored else 2)
    assert told == {
        ("skipped", "no key that was given opens its credentials"): 2,
        ("skipped", "invalid proxy_url: the proxy URL has no port"): 1,
        ("skipped", f"invalid proxy_url: the scheme of the proxy URL is none of {', '.join(SCHEMES)}"): 1,
        ("skipped", "invalid ttl: ttl must be between 1 second and 10 years"): 1,
        ("skipped", "duplicate: another copy is newer, or the same"): 1,
    }
    assert report.complete


@each_store
def test_an_entry_keeps_what_proxywhirl_knew_of_it(source: Path, target: Target) -> None:
    target.take(source)

    stored = target.entries()
    plain = stored["plain.example.com:8080"]
    assert plain.source == "webshare"
    assert plain.fetch_time == GENERATED - timedelta(hours=1)
    assert plain.expires_at == GENERATED - timedelta(hours=1) + 9 * YEAR
    assert plain.health_status is HealthStatus.HEALTHY
    assert plain.access_count == 3
    assert timedelta(0) < plain.last_accessed - GENERATED < timedelta(minutes=10)
    assert stored["192.0.2.7:1080"].proxy_url == "socks5://192.0.2.7:1080"
    assert stored["192.0.2.7:1080"].health_status is HealthStatus.DEGRADED
    failing = stored["failing.example.com:8080"]
    assert (failing.health_status, failing.failure_count) == (HealthStatus.UNHEALTHY, 2)
    dead = stored["dead.example.com:3128"]
    assert (dead.health_status, dead.failure_count) == (HealthStatus.DEAD, 7)


@each_store
def test_credentials_are_opened_and_the_key_is_derived_from_url_and_username(
    source: Path, target: Target
) -> None:
    target.take(source)

    stored = target.entries()
    for name, url, password in (
        ("alice@login.example.com:8080", "http://login.example.com:8080", "current-password"),
        ("olga@older-key.example.com:8080", "http://older-key.example.com:8080", "previous-password"),
        ("account-1@gateway.example.com:7777", "http://gateway.example.com:7777", "gateway-password-1"),
        ("account-2@gateway.example.com:7777", "http://gateway.example.com:7777", "gateway-password-2"),
        ("token-username@username-only.example.com:8080", "http://username-only.example.com:8080", None),
    ):
        entry = stored[name]
        assert entry.proxy_url == url
        assert secret(entry.password) == password
        assert entry.key == cache_key(url, name.partition("@")[0])
    assert stored["plain.example.com:8080"].key == cache_key("http://plain.example.com:8080")


@each_store
def test_userinfo_that_stood_in_the_url_is_split_off(source: Path, target: Target) -> None:
    target.take(source)

    entry = target.entries()["carol@userinfo.example.com:8080"]
    assert entry.proxy_url == "http://userinfo.example.com:8080"
    assert secret(entry.password) == "in@url"
    assert entry.key == cache_key("http://userinfo.example.com:8080", "carol")


@pytest.mark.parametrize("source", [SHARDS, L3_DATABASE], ids=lambda path: path.name)
def test_health_monitoring_is_kept_where_the_store_has_it(source: Path, target: Target) -> None:
    target.take(source)

    stored = target.entries()
    assert stored["dead.example.com:3128"].health_monitoring == HealthMonitoring(
        last_health_check=GENERATED - timedelta(minutes=5),
        consecutive_health_failures=4,
        recovery_attempt=2,
        next_check_time=GENERATED + timedelta(minutes=5),
        last_health_error="407 from http://***@dead.example.com:3128",
        total_health_checks=40,
        total_health_check_failures=9,
    )
    assert stored["plain.example.com:8080"].health_monitoring is None


def test_a_long_health_error_is_cut_and_shows_no_part_of_a_credential(target: Target, tmp_path: Path) -> None:
    database = copy_of(L3_DATABASE, tmp_path)
    error = "x" * 1000 + " http://mallory:" + "leaked" * 10 + "@dead.example.com:3128"
    edit(
        database,
        "UPDATE cache_entries SET last_health_error = ? WHERE proxy_url LIKE '%//dead%'",
        error,
    )

    target.take(database)

    monitoring = target.entries()["dead.example.com:3128"].health_monitoring
    assert monitoring is not None
    assert monitoring.last_health_error == ("x" * 1000 + " http://***@dead.example.com:3128")[:1024]


def test_entries_that_are_only_in_the_write_ahead_log_are_imported(target: Target) -> None:
    """A killed program leaves its L2 database without even a table, and everything in the log beside it."""
    report = target.take(KILLED)

    assert report.imported == 1
    assert secret(target.entries()["alice@logged.example.com:8080"].password) == "current-password"


def test_a_transaction_that_was_cut_off_is_undone(target: Target, tmp_path: Path) -> None:
    """A database with a hot journal holds pages of a change that never was."""
    running = copy_of(L3_DATABASE, tmp_path / "running")
    left = tmp_path / "left"
    left.mkdir()
    with closing(sqlite3.connect(running)) as connection:
        # More than the cache holds, so that pages reach the file before the commit that never comes.
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("UPDATE cache_entries SET source = ?", ("never-committed" * 500,))
        for name in ("proxywhirl.db", "proxywhirl.db-journal"):
            shutil.copyfile(running.with_name(name), left / name)
    assert b"never-committed" in (left / "proxywhirl.db").read_bytes()

    report = target.take(left)

    assert report.complete
    stored = target.entries()
    assert len(stored) > 20
    assert {entry.source for entry in stored.values()} == {"fixture", "filler", "webshare"}


def test_the_source_stays_as_it_is(target: Target, tmp_path: Path) -> None:
    """Not a byte, a time or a new file: not even where SQLite would tidy up, if it were let."""
    source = tmp_path / "source"
    shutil.copytree(FIXTURES, source)
    before = snapshot(source)

    assert target.take(source).imported == 24

    assert snapshot(source) == before


def test_a_source_that_must_not_be_written_can_be_imported(target: Target, tmp_path: Path) -> None:
    source = copy_of(KILLED, tmp_path)
    for path in (*source.rglob("*"), source):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert target.take(source).imported == 1
    finally:
        for path in (source, *source.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_directory_is_searched_for_stores_of_any_name_at_any_depth(tmp_path: Path) -> None:
    deep = tmp_path / "app" / ".cache"
    shard = copy_of(SHARDS / "shard_00.jsonl", deep / "proxies")
    renamed = deep / "db" / "pool.sqlite"
    copy_of(L3_DATABASE, deep / "db").rename(renamed)
    (deep / "notes.jsonl").write_text("{}\n")
    (deep / "README").write_text("SQLite format 4")

    assert {store.path for store in find_stores([tmp_path])} == {shard, renamed}


def test_a_file_that_is_named_twice_is_read_once(target: Target, tmp_path: Path) -> None:
    database = copy_of(L3_DATABASE, tmp_path / "source")
    (tmp_path / "link.db").symlink_to(database)

    report = target.take(database.parent, tmp_path / "link.db", database)

    assert [file.path for file in report.files] == [database]


def test_databases_of_other_programs_in_a_directory_are_passed_over(target: Target, tmp_path: Path) -> None:
    shutil.copyfile(L3_DATABASE, tmp_path / "proxywhirl.db")
    with closing(sqlite3.connect(tmp_path / "cookies.sqlite")) as connection, connection:
        connection.execute("CREATE TABLE cookies (name TEXT)")

    report = target.take(tmp_path)

    assert [file.path.name for file in report.files] == ["proxywhirl.db"]
    assert report.complete


@pytest.mark.parametrize("make", ["missing", "empty"])
def test_a_source_without_a_store_is_refused(make: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    if make == "empty":
        source.mkdir()
    with pytest.raises(SourceError, match="source"):
        find_stores([source])


def test_a_directory_with_nothing_but_other_databases_is_refused(target: Target, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "cookies.sqlite")) as connection, connection:
        connection.execute("CREATE TABLE cookies (name TEXT)")
    with pytest.raises(SourceError, match=r"cookies\.sqlite"):
        target.take(tmp_path)
    assert not target.directory.exists()
