"""What other pools have stored is read with all that they say of a proxy."""

from __future__ import annotations

import gzip
import io
import json
import socket
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from proxystash import CacheEntry, HealthMonitoring, HealthStatus, ProxyFileError, Rejected
from proxystash.importing.pools import Pool, read_pool
from tests.clients.python.reading import Write

from .writers import made_up, proxy_pool_hash, proxypool_scores, running_redis, write_scylla

SECRET = "s3cr3t"
CHECKED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def read(pool: Pool, place: str | Path, **how: Any) -> list[CacheEntry | Rejected]:
    return [*read_pool(pool, str(place), str(place), **how)]


def read_document(pool: Pool, document: object, **how: Any) -> list[CacheEntry | Rejected]:
    """What a dump becomes."""
    return [*read_pool(pool, io.BytesIO(json.dumps(document).encode()), "the dump", **how)]


def refusal(pool: Pool, place: str | Path, **how: Any) -> str:
    with pytest.raises(ProxyFileError) as caught:
        read(pool, place, **how)
    assert SECRET not in str(caught.value)
    return str(caught.value)


# --- jhao104/proxy_pool


def test_what_proxy_pool_says_of_a_proxy_is_taken_over() -> None:
    about = {
        "proxy": "192.0.2.1:80", "https": True, "fail_count": 2, "region": "中国 北京", "anonymous": "elite",
        "source": "freeProxy01/freeProxy02", "check_count": 7, "last_status": False,
        "last_time": "2026-01-02 03:04:05",
    }  # fmt: skip
    [entry] = read_document(Pool.PROXY_POOL, {"192.0.2.1:80": json.dumps(about)})

    assert entry == CacheEntry(
        "http://192.0.2.1:80",
        entry.key if isinstance(entry, CacheEntry) else "",
        source="freeProxy01/freeProxy02",
        failure_count=2,
        health_status=HealthStatus.UNHEALTHY,
        health_monitoring=HealthMonitoring(last_health_check=CHECKED, total_health_checks=7),
        labels={"https": "true", "anonymous": "elite", "region": "中国 北京"},
    )


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ({"last_status": True}, "healthy"),
        ({"last_status": 1}, "healthy"),
        ({"last_status": False}, "unhealthy"),
        ({"last_status": 0}, "unhealthy"),
        ({"last_status": ""}, "unknown"),
        ({}, "unknown"),
        (1, "unknown"),
        ("1", "unknown"),
        ('{"last_status": true}', "healthy"),
    ],
)
def test_what_its_versions_store_is_read(value: object, status: str) -> None:
    [entry] = read_document(Pool.PROXY_POOL, {"192.0.2.1:80": value})

    assert isinstance(entry, CacheEntry)
    assert (entry.proxy_url, entry.health_status, entry.source) == (
        "http://192.0.2.1:80",
        status,
        "proxy_pool",
    )


@pytest.mark.parametrize(
    ("field", "value", "kind", "reason"),
    [
        ("192.0.2.1:80", "{", "failed", "what is stored of it is not JSON"),
        ("192.0.2.1:80", "[" * 100_000, "failed", "what is stored of it is not JSON"),
        ("192.0.2.1:80", "[]", "failed", "what is stored of it is no JSON object"),
        ("192.0.2.1:80", None, "failed", "what is stored of it is no JSON object"),
        ("192.0.2.1", {}, "skipped", "the proxy URL has no port"),
        ("x", {"proxy": ["192.0.2.1:80"]}, "skipped", "proxy is not text"),
        ("192.0.2.1:0", {}, "skipped", "the port is not a number from 1 to 65535"),
    ],
)
def test_what_is_damaged_costs_itself(field: str, value: object, kind: str, reason: str) -> None:
    first, second = read_document(Pool.PROXY_POOL, {field: value, "192.0.2.2:80": {}})

    assert first == Rejected("record 1", reason, kind)  # type: ignore[arg-type]  # one of the two
    assert isinstance(second, CacheEntry)


# --- Python3WebSpider/ProxyPool


def test_a_score_tells_whether_a_proxy_has_worked() -> None:
    best, new, with_credentials = read_document(
        Pool.PROXYPOOL, {"192.0.2.1:80": 100, "192.0.2.2:80": 10, "ann:pw@192.0.2.3:80": 99.5}
    )

    assert isinstance(best, CacheEntry)
    assert isinstance(new, CacheEntry)
    assert isinstance(with_credentials, CacheEntry)
    assert (best.health_status, best.labels, best.source) == ("healthy", {"score": "100"}, "proxypool")
    assert (new.health_status, new.labels) == ("unknown", {"score": "10"})
    assert (with_credentials.username, with_credentials.password) == ("ann", "pw")
    assert with_credentials.labels == {"score": "99.5"}


def test_what_has_no_score_is_damaged() -> None:
    outcomes = read_document(
        Pool.PROXYPOOL, [["192.0.2.1:80", "x"], ["192.0.2.2:80"], ["192.0.2.3:80", None], ["192.0.2.4:80", 1]]
    )

    assert outcomes[:3] == [Rejected(f"record {n}", "it has no score", "failed") for n in (1, 2, 3)]
    assert isinstance(outcomes[3], CacheEntry)


# --- dumps


@pytest.mark.parametrize(
    "document",
    [
        {"192.0.2.1:80": 100, "192.0.2.2:80": 10},
        {"proxies:universal": {"192.0.2.1:80": 100, "192.0.2.2:80": 10}, "other": {"192.0.2.3:80": 1}},
        [{"other": "x"}, {"proxies:universal": {"192.0.2.1:80": "100", "192.0.2.2:80": "10"}}],
        {"proxies:universal": [["192.0.2.1:80", 100], ["192.0.2.2:80", 10]]},
        [["192.0.2.1:80", 100.0], ["192.0.2.2:80", 10.0]],
        ["192.0.2.1:80", "100", "192.0.2.2:80", "10"],
        [
            {"db": 0, "key": "other", "type": "string", "value": "x"},
            {"db": 0, "key": "proxies:universal", "type": "zset",
             "value": [["192.0.2.1:80", "100"], ["192.0.2.2:80", "10"]]},
        ],
    ],
)  # fmt: skip
def test_a_dump_is_read_in_each_shape_that_tools_write(document: object) -> None:
    outcomes = read_document(Pool.PROXYPOOL, document)

    assert [getattr(entry, "proxy_url", entry) for entry in outcomes] == [
        "http://192.0.2.1:80", "http://192.0.2.2:80",
    ]  # fmt: skip
    assert [entry.labels for entry in outcomes if isinstance(entry, CacheEntry)] == [
        {"score": "100"}, {"score": "10"},
    ]  # fmt: skip


def test_an_array_that_ends_in_the_middle_says_so() -> None:
    whole, cut = read_document(Pool.PROXYPOOL, ["192.0.2.1:80", "100", "192.0.2.2:80"])

    assert isinstance(whole, CacheEntry)
    assert cut == Rejected("record 2", "it has no score", "failed")


def test_a_dump_may_be_lines_of_objects_and_packed(write: Write) -> None:
    lines = "".join(
        json.dumps({"db": number, "key": "mine", "value": {f"192.0.2.{number}:80": "1"}}) + "\n"
        for number in (1, 2)
    )
    outcomes = read(Pool.PROXY_POOL, write("dump.json.gz", gzip.compress(lines.encode())), key="mine")

    assert [getattr(entry, "proxy_url", entry) for entry in outcomes] == [
        "http://192.0.2.1:80", "http://192.0.2.2:80",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not JSON: Expecting property name enclosed in double quotes at line 1, column 2"),
        ('{"a": 1}\nx\n', "is neither JSON nor JSON Lines: see line 2"),
        ("[" * 100_000, "is nested too deeply"),
        ("1", "holds no hash of Redis under the key"),
        ("[1, 2]", "holds no hash of Redis under the key"),
    ],
)
def test_what_is_no_dump_is_refused(write: Write, content: str, reason: str) -> None:
    path = write("dump.json", content)

    assert refusal(Pool.PROXY_POOL, path) == f"{path} {reason}"


def test_a_dump_that_is_missing_is_refused(tmp_path: Path) -> None:
    assert refusal(Pool.PROXYPOOL, tmp_path / "x").endswith("x: No such file or directory")


# --- a running Redis


@pytest.mark.parametrize("pool", [Pool.PROXY_POOL, Pool.PROXYPOOL])
def test_a_running_redis_gives_what_its_dump_gives(tmp_path: Path, pool: Pool) -> None:
    proxies = made_up(3_000)
    content: Any = proxy_pool_hash(proxies) if pool is Pool.PROXY_POOL else proxypool_scores(proxies)
    with running_redis(tmp_path) as (url, connection):
        if pool is Pool.PROXY_POOL:
            connection.hset("use_proxy", mapping=content)
        else:
            connection.zadd("proxies:universal", content)
        live = read(pool, url)
    dumped = read_document(pool, content)

    assert len(live) == 3_000
    assert sorted(live, key=lambda entry: getattr(entry, "key", "")) == sorted(
        dumped, key=lambda entry: getattr(entry, "key", "")
    )
    healthy = [entry for entry in live if getattr(entry, "health_status", "") == "healthy"]
    assert len(healthy) == sum(made.works is True for made in proxies)


def test_an_old_redis_is_read_too(tmp_path: Path) -> None:
    with running_redis(tmp_path, old=True) as (url, connection):
        connection.zadd("proxies:universal", {"192.0.2.1:80": 1})

        assert len(read(Pool.PROXYPOOL, url)) == 1


def test_a_key_that_is_missing_or_another_pools_says_so(tmp_path: Path) -> None:
    with running_redis(tmp_path) as (url, connection):
        connection.zadd("use_proxy", {"192.0.2.1:80": 1})
        connection.hset("proxies:universal", "192.0.2.1:80", "1")
        connection.set("text", "x")

        assert refusal(Pool.PROXY_POOL, url, key="none") == (
            "Redis has no key 'none' in this database; --key says another"
        )
        assert refusal(Pool.PROXY_POOL, url) == (
            "'use_proxy' is a sorted set; Python3WebSpider/ProxyPool has one, and here it should be a hash"
        )
        assert refusal(Pool.PROXYPOOL, url) == (
            "'proxies:universal' is a hash; jhao104/proxy_pool has one, and here it should be a sorted set"
        )
        assert refusal(Pool.PROXYPOOL, url, key="text") == (
            "'text' is a string, and here it should be a sorted set"
        )


def test_what_is_not_utf_8_costs_itself(tmp_path: Path) -> None:
    with running_redis(tmp_path) as (url, connection):
        connection.zadd("proxies:universal", {b"\xff.example:80": 1, b"192.0.2.1:80": 2})
        outcomes = read(Pool.PROXYPOOL, url)

    [rejected] = [outcome for outcome in outcomes if isinstance(outcome, Rejected)]
    assert (rejected.reason, rejected.kind) == ("not UTF-8", "failed")
    assert len(outcomes) == 2


def test_a_password_is_taken_from_the_url_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_redis(tmp_path, SECRET) as (url, connection):
        connection.zadd("proxies:universal", {"192.0.2.1:80": 1})

        assert refusal(Pool.PROXYPOOL, url) == "Redis refuses the username or password"
        assert refusal(Pool.PROXYPOOL, f"{url}&password=no") == "Redis refuses the username or password"
        assert len(read(Pool.PROXYPOOL, f"{url}&password={SECRET}")) == 1
        monkeypatch.setenv("REDISCLI_AUTH", SECRET)
        assert len(read(Pool.PROXYPOOL, url)) == 1


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (f"redis://ann:{SECRET}@127.0.0.1:1/0", "there is no connection to Redis"),
        (
            f"redis://ann:{SECRET}@127.0.0.1:port/0",
            "the URL of Redis is malformed: write redis://host:port/db",
        ),
        (f"redis://127.0.0.1:1/0?{SECRET}=1", "the URL of Redis is malformed: write redis://host:port/db"),
        ("unix:///none.sock", "there is no connection to Redis"),
    ],
)
def test_a_redis_that_cannot_be_reached_is_one_line(url: str, reason: str) -> None:
    assert refusal(Pool.PROXYPOOL, url, timeout=1.0) == reason


def test_a_redis_that_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        assert refusal(Pool.PROXYPOOL, url, timeout=0.1) == "Redis does not answer within 0.1 s"


# --- scylla


def test_what_scylla_says_of_a_proxy_is_taken_over(tmp_path: Path) -> None:
    proxies = made_up(2_500)
    write_scylla(tmp_path / "scylla.db", proxies)

    outcomes = read(Pool.SCYLLA, tmp_path / "scylla.db")

    statuses = {True: "healthy", False: "unhealthy", None: "unknown"}
    assert len(outcomes) == 2_500
    for made, entry in zip(proxies, outcomes, strict=True):
        assert isinstance(entry, CacheEntry)
        assert entry.proxy_url == f"http://{made.address}"
        assert entry.health_status == statuses[made.works]
        assert entry.source == "scylla"
        assert entry.labels == {
            "https": "false", "anonymous": "true", "latency_ms": "120", "stability": "0.5",
            "country": made.country,
        }  # fmt: skip
        assert entry.health_monitoring == (
            None if made.works is None else HealthMonitoring(last_health_check=CHECKED, total_health_checks=4)
        )


def test_an_early_scylla_has_fewer_columns(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "s.db") as database:
        database.execute("CREATE TABLE proxy_ips (id INTEGER PRIMARY KEY, ip, port, is_valid)")
        database.executemany(
            "INSERT INTO proxy_ips VALUES (?, ?, ?, ?)",
            [
                (-5, "192.0.2.1", 80, 1),
                (1, "192.0.2.2", "81", 0), (2, "192.0.2.3", "x", 1), (3, None, 80, 1),
                (4, b"\xff", 80, 1), (5, "192.0.2.1", 80, 1),
            ],
        )  # fmt: skip
    database.close()

    outcomes = read(Pool.SCYLLA, tmp_path / "s.db")

    assert [
        entry.proxy_url if isinstance(entry, CacheEntry) else (entry.where, entry.reason, entry.kind)
        for entry in outcomes
    ] == [
        "http://192.0.2.1:80",
        "http://192.0.2.2:81",
        ("row 2", "port is not a whole number", "skipped"),
        ("row 3", "no proxy_url, and no host and port instead", "skipped"),
        ("row 4", "ip is not text", "skipped"),
        ("row 5", "duplicate of row -5", "skipped"),
    ]


def test_a_damaged_database_gives_what_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "scylla.db"
    write_scylla(path, made_up(5_000))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2 // 4096 * 4096
    data[middle : middle + 8192] = b"\xff" * 8192
    path.write_bytes(data)

    outcomes = read(Pool.SCYLLA, path)

    *entries, last = outcomes
    assert len(entries) >= 1_000
    assert all(isinstance(entry, CacheEntry) for entry in entries)
    assert isinstance(last, Rejected)
    assert last.kind == "failed"
    assert last.reason.startswith("nothing can be read from here on: ")


def test_scylla_is_not_held_up_and_not_changed(tmp_path: Path) -> None:
    """Given an import that has begun and goes on."""
    path = tmp_path / "scylla.db"
    write_scylla(path, made_up(3_000))
    records = iter(read_pool(Pool.SCYLLA, path, str(path)))
    next(records)

    with sqlite3.connect(path, timeout=0) as database:
        database.execute("DELETE FROM proxy_ips WHERE id > 2500")
    database.close()

    assert len([*records]) == 2_499


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no database at all" * 100, "file is not a database"),
        (b"", "is no database of scylla: it has no table proxy_ips with ip and port"),
    ],
)
def test_what_is_no_database_of_scylla_is_refused(write: Write, content: bytes, reason: str) -> None:
    assert reason in refusal(Pool.SCYLLA, write("scylla.db", content))


def test_a_missing_or_locked_database_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxystash.importing.scylla._LOCK_SECONDS", 0)
    assert refusal(Pool.SCYLLA, tmp_path / "x.db").endswith("there is no such file")
    assert not (tmp_path / "x.db").exists()
    path = tmp_path / "scylla.db"
    write_scylla(path, made_up(1))
    with sqlite3.connect(path) as database:
        database.execute("BEGIN EXCLUSIVE")
        assert "database is locked" in refusal(Pool.SCYLLA, path)
    database.close()


# --- scrapy-rotating-proxies


def test_its_list_is_read_as_it_reads_it(write: Write) -> None:
    outcomes = read(
        Pool.ROTATING_PROXIES,
        write(
            "socks5.txt",
            "# SOCKS5 proxies\n 192.0.2.1:8000\n\nhttp://ann:pw@192.0.2.2:80\n"
            "socks5://192.0.2.3:1080\n192.0.2.4\n",
        ),
    )

    assert [
        entry.proxy_url if isinstance(entry, CacheEntry) else (entry.where, entry.reason)
        for entry in outcomes
    ] == [
        "http://192.0.2.1:8000",
        "http://192.0.2.2:80",
        "socks5://192.0.2.3:1080",
        ("line 6", "the proxy URL has no port"),
    ]
    [entry] = read(Pool.ROTATING_PROXIES, write("a.txt", "192.0.2.1:80"), scheme="socks4")
    assert isinstance(entry, CacheEntry)
    assert entry.proxy_url == "socks4://192.0.2.1:80"


@pytest.mark.parametrize(
    "value",
    ['["192.0.2.1:80", "# no", "", OTHER, "192.0.2.2:80"]', '("192.0.2.1:80", 7, "192.0.2.2:80")',
     '"192.0.2.1:80,,192.0.2.2:80"'],
)  # fmt: skip
def test_its_setting_is_read_and_not_run(write: Write, value: str) -> None:
    path = write("settings.py", f"raise SystemExit\nROTATING_PROXY_LIST: list[str] = {value}\n")

    outcomes = read(Pool.ROTATING_PROXIES, path)

    assert [entry.proxy_url for entry in outcomes if isinstance(entry, CacheEntry)] == [
        "http://192.0.2.1:80", "http://192.0.2.2:80",
    ]  # fmt: skip
    rejected = [entry for entry in outcomes if isinstance(entry, Rejected)]
    assert rejected == [Rejected("line 2", "not a text", "failed")] * (value[0] != '"')


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            "ROTATING_PROXY_LIST_PATH = 'x.txt'\n",
            "holds no proxies: ROTATING_PROXY_LIST_PATH names a file: import that",
        ),
        ("BOT_NAME = 'x'\n", "holds no proxies: it does not set ROTATING_PROXY_LIST"),
        (
            "ROTATING_PROXY_LIST = load()\n",
            "does not list the texts of ROTATING_PROXY_LIST: import a file of them",
        ),
        ("ROTATING_PROXY_LIST = [\n", "is no Python"),
    ],
)
def test_settings_without_a_list_say_what_to_do(write: Write, content: str, reason: str) -> None:
    path = write("settings.py", content)

    assert refusal(Pool.ROTATING_PROXIES, path) == f"{path} {reason}"


# --- any


def test_a_key_is_for_redis_alone(tmp_path: Path) -> None:
    assert refusal(Pool.SCYLLA, tmp_path, key="x") == "scylla keeps nothing in Redis, so it has no key"
