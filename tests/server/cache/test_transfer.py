"""Entries from files and into files."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from proxystash_server.cache import CacheManager, EntryFilter, HealthStatus
from proxystash_server.cache.entry.entry import wall_clock
from tests.server.cache.stash import Stash
from tests.server.cache.support import PASSWORD, SWITCHED_OFF, USERNAME, nothing_writable, put, run_in_threads
from tests.server.cache.tier_contract import MONITORING

ANY = EntryFilter()
SECOND_US = 1_000_000


@pytest.fixture
def manager(stash: Stash) -> CacheManager:
    # Whether a record of a file has expired is judged by the wall clock.
    stash.clock.now_us = wall_clock()
    return stash.open(per_source_ttl={"shop": 120})


def test_an_export_is_read_back_as_it_was(manager: CacheManager, tmp_path: Path, stash: Stash) -> None:
    put(
        manager,
        "a",
        username=USERNAME,
        password=PASSWORD,
        source="shop",
        health_status=HealthStatus.DEGRADED,
        failure_count=2,
        health_monitoring=MONITORING,
        labels={"country": "DE", "ü": "\\ \" '"},
        ttl_us=1_500_001 * 60,
    )
    put(manager, "b", "c")
    exported = manager.list_entries("", 10, ANY)
    path = str(tmp_path / "proxies.jsonl")
    assert manager.export_to_file(path, include_credentials=True) == {"exported": 3, "failed": 0}
    manager.clear()
    result = manager.warm_from_file(path)
    assert (result["loaded"], result["skipped"], result["failed"], result["rejected"]) == (3, 0, 0, [])
    assert manager.list_entries("", 10, ANY) == exported


def test_an_export_without_credentials_erases_none_of_those_that_are_stored(
    manager: CacheManager, tmp_path: Path
) -> None:
    put(manager, "a", username=USERNAME, password=PASSWORD)
    put(manager, "b")
    before = manager.list_entries("", 10, ANY)
    path = tmp_path / "proxies.jsonl"
    manager.export_to_file(str(path))
    assert path.read_text().count('"credentials_omitted":true') == 1

    assert manager.warm_from_file(str(path))["loaded"] == 2

    assert manager.list_entries("", 10, ANY) == before


def test_an_export_without_credentials_has_none(manager: CacheManager, tmp_path: Path) -> None:
    put(manager, "a", username=USERNAME, password=PASSWORD)
    path = tmp_path / "proxies.jsonl"
    manager.export_to_file(str(path))
    text = path.read_text()
    assert PASSWORD not in text
    assert USERNAME not in text
    assert "**" not in text


def test_an_export_is_its_owners_alone_and_replaces_an_earlier_one(
    manager: CacheManager, tmp_path: Path
) -> None:
    put(manager, "a", "b")
    path = tmp_path / "proxies.jsonl"
    path.write_text("an earlier one")
    path.chmod(0o644)
    manager.export_to_file(str(path), include_credentials=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b"]
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["proxies.jsonl"]


def test_an_export_writes_through_no_link_and_takes_over_no_mode(
    manager: CacheManager, tmp_path: Path
) -> None:
    put(manager, "a")
    path, others = tmp_path / "proxies.jsonl", tmp_path / "others"
    others.write_text("somebody else's")
    for name in ("proxies.jsonl", "proxies.jsonl.partial"):
        (tmp_path / name).symlink_to(others)
    manager.export_to_file(str(path), include_credentials=True)
    assert others.read_text() == "somebody else's"
    assert not path.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    (tmp_path / "proxies.jsonl.partial").unlink()
    (tmp_path / "proxies.jsonl.partial").write_text("left by an earlier version")
    (tmp_path / "proxies.jsonl.partial").chmod(0o666)
    manager.export_to_file(str(path), include_credentials=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_exports_to_one_place_at_the_same_time_are_each_whole(manager: CacheManager, tmp_path: Path) -> None:
    put(manager, *[f"key-{number}" for number in range(100)])
    path = tmp_path / "proxies.jsonl"
    results = run_in_threads(*[lambda: manager.export_to_file(str(path))["exported"]] * 8)
    assert results == [100] * 8
    assert len(path.read_text().splitlines()) == 100
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["proxies.jsonl"]


def test_an_export_that_fails_leaves_the_earlier_one(
    manager: CacheManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(manager, "a")
    path = tmp_path / "proxies.jsonl"
    path.write_text("an earlier one")

    def full(*_args: object, **_options: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("proxystash_server.cache.transfer.entry_to_json", full)
    with pytest.raises(OSError, match="No space"):
        manager.export_to_file(str(path))
    assert path.read_text() == "an earlier one"
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["proxies.jsonl"]


def test_an_export_into_nowhere_is_an_error(manager: CacheManager, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        manager.export_to_file(str(tmp_path / "nowhere" / "proxies.jsonl"))


def test_expired_entries_are_not_exported(manager: CacheManager, tmp_path: Path, stash: Stash) -> None:
    put(manager, "old", ttl_us=10 * SECOND_US)
    put(manager, "young")
    stash.clock.advance(10)
    path = tmp_path / "proxies.jsonl"
    assert manager.export_to_file(str(path))["exported"] == 1


def test_more_entries_than_fit_into_one_batch_go_out_and_come_in(
    manager: CacheManager, tmp_path: Path
) -> None:
    path = tmp_path / "many.txt"
    path.write_text("".join(f"192.0.{n // 250}.{n % 250}:8080\n" for n in range(1200)))
    assert manager.warm_from_file(str(path))["loaded"] == 1200
    assert manager.get_statistics().entries == 1200
    assert manager.export_to_file(str(tmp_path / "many.jsonl"))["exported"] == 1200


FORMATS: dict[str, str] = {
    "proxies.txt": "# SOCKS5 Proxies (1)\n192.0.2.1:1080\nhttp://192.0.2.2:80\n192.0.2.3:81:jane:secret\n",
    "proxies.csv": (
        "protocol,ip,port,username,password\nsocks5,192.0.2.1,1080,,\nhttp,192.0.2.2,80,,\n"
        "socks5,192.0.2.3,81,jane,secret\n"
    ),
    "proxies.json": json.dumps(
        [
            {"proxy_url": "socks5://192.0.2.1:1080"},
            {"protocol": "http", "ip": "192.0.2.2", "port": 80},
            {"url": "socks5://jane:secret@192.0.2.3:81"},
        ]
    ),
    "rich.json": json.dumps(
        {
            "generated_at": "2026-01-01T00:00:00+00:00",
            "proxies": [
                {"ip": "192.0.2.1", "port": 1080, "protocol": "socks5", "country_code": None},
                {"ip": "192.0.2.2", "port": 80, "protocol": "http", "country_code": ""},
                {
                    "ip": "192.0.2.3",
                    "port": 81,
                    "protocol": "socks5",
                    "username": "jane",
                    "password": "secret",
                    "last_checked": "2026-01-01T00:00:00",
                },
            ],
        }
    ),
    "proxies.jsonl": (
        '{"proxy_url": "socks5://192.0.2.1:1080"}\n\n{"proxy": "http://192.0.2.2:80"}\n'
        '{"proxy_url": "socks5://192.0.2.3:81", "username": "jane", "password": "secret"}\n'
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_read(manager: CacheManager, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(FORMATS[name])
    result = manager.warm_from_file(str(path))
    assert (result["loaded"], result["skipped"], result["failed"]) == (3, 0, 0), result["rejected"]
    entries = {entry.proxy_url: entry for entry in manager.list_entries("", 10, ANY)}
    assert sorted(entries) == ["http://192.0.2.2:80", "socks5://192.0.2.1:1080", "socks5://192.0.2.3:81"]
    with_credentials = entries["socks5://192.0.2.3:81"]
    assert with_credentials.username is not None
    assert with_credentials.password is not None
    assert with_credentials.username.get_secret_value() == "jane"
    assert with_credentials.password.get_secret_value() == "secret"
    for url, entry in entries.items():
        username = None if entry.username is None else entry.username.get_secret_value()
        assert entry.key == manager.new_entry(url, username=username).key
        assert entry.ttl_seconds == 3600
        assert entry.fetch_time_us == manager._clock()


def test_what_a_record_says_of_itself_is_taken_over(manager: CacheManager, tmp_path: Path) -> None:
    path = tmp_path / "proxies.jsonl"
    path.write_text(
        json.dumps(
            {
                "proxy_url": "http://192.0.2.1:1",
                "key": "its-own",
                "source": "shop",
                "health_status": "degraded",
                "failure_count": 2,
                "country_code": "DE",
                "labels": {"speed": "fast"},
            }
        )
    )
    manager.warm_from_file(str(path))
    [entry] = manager.list_entries("", 10, ANY)
    assert (entry.key, entry.source, entry.ttl_seconds) == ("its-own", "shop", 120)
    assert (entry.health_status, entry.failure_count) == (HealthStatus.DEGRADED, 2)
    assert entry.labels == {"country": "DE", "speed": "fast"}


def test_what_cannot_be_loaded_is_told_record_by_record(manager: CacheManager, tmp_path: Path) -> None:
    path = tmp_path / "proxies.jsonl"
    path.write_text(
        '{"proxy_url": "http://192.0.2.1:1"}\n'
        f'{{"proxy_url": "http://u:{PASSWORD}@192.0.2.1:99999"}}\n'
        '{"proxy_url": "http://192.0.2.1:1"}\n'
        "{broken\n"
        '{"proxy_url": "http://192.0.2.2:1", "expires_at": "2001-01-01T00:00:00Z"}\n'
        '{"proxy_url": "http://192.0.2.3:1", "ttl_seconds": 999999999}\n'
        f'{{"proxy_url": "http://192.0.2.4:1", "source": "{"s" * 200}"}}\n'
        '{"proxy_url": "http://192.0.2.5:1"}\n'
    )
    result = manager.warm_from_file(str(path))
    assert (result["loaded"], result["skipped"], result["failed"]) == (2, 5, 1)
    places = [(rejected["where"], rejected["kind"]) for rejected in result["rejected"]]
    assert ("line 2", "skipped") in places
    assert ("line 3", "skipped") in places
    assert ("line 4", "failed") in places
    assert ("line 5", "skipped") in places
    assert len(result["rejected"]) == 6
    assert all(rejected["reason"] for rejected in result["rejected"])
    assert PASSWORD not in json.dumps(result)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("missing.txt", lambda path: None),
        ("broken.json", lambda path: path.write_text("{")),
        ("neither.json", lambda path: path.write_text("42")),
        ("binary.txt", lambda path: path.write_bytes(b"\x00\x01")),
        ("headless.csv", lambda path: path.write_text("a,b\n1,2\n")),
    ],
)
def test_a_file_that_cannot_be_read_as_a_whole_is_one_failure(
    manager: CacheManager, tmp_path: Path, name: str, write: Callable[[Path], object]
) -> None:
    write(tmp_path / name)
    result = manager.warm_from_file(str(tmp_path / name))
    assert (result["loaded"], result["skipped"], result["failed"]) == (0, 0, 1)
    [rejected] = result["rejected"]
    assert name in rejected["where"]


def test_a_ttl_may_be_given_for_all_records_and_counts_from_now(
    manager: CacheManager, tmp_path: Path
) -> None:
    path = tmp_path / "proxies.jsonl"
    path.write_text(
        '{"proxy_url": "http://192.0.2.1:1", "ttl_seconds": 5, "source": "shop"}\n'
        '{"proxy_url": "http://192.0.2.2:1"}\n'
    )
    manager.warm_from_file(str(path), ttl_override=600)
    for entry in manager.list_entries("", 10, ANY):
        assert entry.ttl_seconds == 600
        assert entry.fetch_time_us == manager._clock()


def test_loading_a_file_again_replaces_and_keeps_counting_failures(
    manager: CacheManager, tmp_path: Path
) -> None:
    path = tmp_path / "proxies.txt"
    path.write_text("192.0.2.1:1\n")
    manager.warm_from_file(str(path))
    [entry] = manager.list_entries("", 10, ANY)
    manager.invalidate_by_health(entry.key)
    manager.warm_from_file(str(path))
    [entry] = manager.list_entries("", 10, ANY)
    assert entry.failure_count == 1


def test_what_no_tier_could_take_has_failed(stash: Stash, tmp_path: Path) -> None:
    manager = stash.open(l1_config=SWITCHED_OFF)
    path = tmp_path / "proxies.txt"
    path.write_text("192.0.2.1:1\n192.0.2.2:1\n")
    with nothing_writable(manager):
        result = manager.warm_from_file(str(path))
    assert (result["loaded"], result["failed"]) == (0, 2)
    stash.recover(manager)
