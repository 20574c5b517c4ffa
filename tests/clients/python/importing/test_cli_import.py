"""The command import, as a process against a real server."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from proxystash import CacheEntry, Client
from tests.clients.python.commands import Commands

from .writers import Made, made_up, proxy_pool_hash, proxypool_scores, running_redis, write_scylla

SECRET = "s3cr3t"
COUNT = 2_500


@pytest.fixture
def run(target: str) -> Commands:
    return Commands(target)


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target, timeout=60) as client:
        yield client


def write_proxy_pool(path: Path, proxies: list[Made]) -> None:
    path.write_text(json.dumps(proxy_pool_hash(proxies)))


def write_proxypool(path: Path, proxies: list[Made]) -> None:
    path.write_text(json.dumps([[member, score] for member, score in proxypool_scores(proxies).items()]))


def write_rotating_proxies(path: Path, proxies: list[Made]) -> None:
    path.write_text("".join(f"{made.address}\n" for made in proxies))


@pytest.mark.parametrize(
    ("pool", "write", "tried"),
    [
        ("proxy_pool", write_proxy_pool, True),
        ("jhao104/proxy_pool", write_proxy_pool, True),
        ("Python3WebSpider/ProxyPool", write_proxypool, None),
        ("scrapy-rotating-proxies", write_rotating_proxies, False),
        ("scylla", write_scylla, True),
    ],
)
def test_everything_that_a_pool_holds_is_loaded(
    run: Commands,
    client: Client,
    tmp_path: Path,
    pool: str,
    write: Callable[[Path, list[Made]], None],
    tried: bool | None,
) -> None:
    """Given whether the pool's records tell what has worked: all, the best alone, or none."""
    proxies = made_up(COUNT)
    write(tmp_path / "store", proxies)

    outcome = run("import", pool, str(tmp_path / "store"), "--json")

    assert (outcome.code, outcome.err) == (0, "")
    counts = {"loaded": COUNT, "kept": 0, "skipped": 0, "failed": 0}
    assert outcome.json == {**counts, "rejected": [], "notices": []}
    entries = {entry.proxy_url: entry for entry in client.list()}
    assert set(entries) == {f"http://{made.address}" for made in proxies}
    worked = Counter(made.works for made in proxies)
    statuses = Counter(entry.health_status.value for entry in entries.values())
    assert statuses["healthy"] == (0 if tried is False else worked[True])
    assert statuses["unhealthy"] == (worked[False] if tried else 0)


def test_a_running_redis_is_read(run: Commands, client: Client, tmp_path: Path) -> None:
    fields: dict[Any, Any] = {**proxy_pool_hash(made_up(9)), "192.0.2.1": "{", "192.0.2.2:80": "1"}
    with running_redis(tmp_path, SECRET) as (url, connection):
        connection.hset("mine", mapping=fields)

        refused = run("import", "proxy_pool", f"{url}&password=wrong")
        outcome = run("import", "proxy_pool", url, "--key", "mine", env={"REDISCLI_AUTH": SECRET})

    assert (refused.code, refused.err) == (2, "proxystash: Redis refuses the username or password\n")
    assert outcome.code == 1
    assert outcome.out.startswith("loaded 10, skipped 0, failed 1 in ")
    assert "what is stored of it is not JSON" in outcome.out
    assert SECRET not in outcome.out + outcome.err + refused.out
    assert len([*client.list()]) == 10


def test_standard_input_and_the_options_of_warm_are_taken(run: Commands, client: Client) -> None:
    client.put(CacheEntry("socks5://192.0.2.1:80", labels={"mine": "1"}))

    outcome = run(
        "import", "proxypool", "-", "--scheme", "socks5", "--source", "old", "--ttl", "1h",
        stdin='{"192.0.2.1:80": 100}',
    )  # fmt: skip

    assert outcome.code == 0
    [entry] = client.list()
    assert (entry.proxy_url, entry.source, entry.labels) == (
        "socks5://192.0.2.1:80", "old", {"mine": "1", "score": "100"},
    )  # fmt: skip
    assert entry.ttl is not None
    assert entry.ttl.total_seconds() == 3600


def test_importing_again_does_no_harm(run: Commands, client: Client, tmp_path: Path) -> None:
    write_scylla(tmp_path / "s.db", made_up(20))

    for _ in range(2):
        assert run("import", "scylla", str(tmp_path / "s.db")).code == 0
    assert len([*client.list()]) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["haproxy", "x"], "the pools are proxy_pool, proxypool, scrapy-rotating-proxies, scylla"),
        (["scylla", "-"], "SQLite reads files, not standard input"),
        (["scylla", "x", "--key", "y"], "scylla keeps nothing in Redis"),
        (["proxypool", "missing.json"], "cannot read missing.json: No such file or directory"),
        (
            ["proxypool", f"redis://:{SECRET}@127.0.0.1:1/0", "--timeout", "0.5"],
            "there is no connection to Redis",
        ),
        (["proxypool"], "Missing argument"),
    ],
)
def test_what_cannot_be_read_is_one_line(run: Commands, arguments: list[str], message: str) -> None:
    outcome = run("import", *arguments)

    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1
    assert message in outcome.err
    assert SECRET not in outcome.err


def test_files_need_no_redis_client_and_a_url_says_that_it_does(run: Commands, tmp_path: Path) -> None:
    (tmp_path / "redis.py").write_text("raise ModuleNotFoundError('no redis here', name='redis')\n")
    env = {"PYTHONPATH": str(tmp_path)}

    assert run("import", "proxypool", "-", stdin='{"192.0.2.1:80": 1}', env=env).code == 0
    outcome = run("import", "proxypool", "redis://127.0.0.1:1/0", env=env)
    assert (outcome.code, outcome.err) == (
        2, "proxystash: Redis is read with redis-py; install proxystash[redis]\n",
    )  # fmt: skip
