"""Made-up proxies, and other pools' stores of them, written in the formats that their documentation shows."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.clients.python.waiting import wait_until

_CHECKED = "2026-01-02 03:04:05"


@dataclass(frozen=True)
class Made:
    """A made-up proxy, and whether it has been tried, and worked."""

    host: str
    port: int
    works: bool | None
    country: str

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def made_up(count: int) -> list[Made]:
    """So many different proxies, with documentation addresses."""
    chance = random.Random(7)
    return [
        Made(
            f"198.51.100.{number % 250 + 1}",
            1024 + number // 250,
            chance.choice((True, False, None)),
            chance.choice(("DE", "US", "BR")),
        )
        for number in range(count)
    ]


def proxy_pool_hash(proxies: Sequence[Made]) -> dict[str, str]:
    """The hash `use_proxy` of jhao104/proxy_pool."""
    return {
        made.address: json.dumps(
            {
                "proxy": made.address,
                "https": bool(number % 2),
                "fail_count": 1 if made.works is False else 0,
                "region": "",
                "anonymous": "",
                "source": "freeProxy01/freeProxy02",
                "check_count": 0 if made.works is None else 3,
                "last_status": "" if made.works is None else made.works,
                "last_time": "" if made.works is None else _CHECKED,
            },
            ensure_ascii=False,
        )
        for number, made in enumerate(proxies)
    }


def proxypool_scores(proxies: Sequence[Made]) -> dict[str, float]:
    """The sorted set `proxies:universal` of Python3WebSpider/ProxyPool."""
    scores = {True: 100.0, False: 7.0, None: 10.0}
    return {made.address: scores[made.works] for made in proxies}


def write_scylla(path: Path, proxies: Sequence[Made]) -> None:
    """The database of scylla 1.1, as SQLite shows its schema."""
    database = sqlite3.connect(path)
    with database:
        database.execute(
            'CREATE TABLE "proxy_ips" ("id" INTEGER NOT NULL PRIMARY KEY, "ip" VARCHAR(255) NOT NULL, '
            '"port" INTEGER NOT NULL, "is_valid" INTEGER NOT NULL, "created_at" DATETIME NOT NULL, '
            '"updated_at" DATETIME NOT NULL, "latency" REAL NOT NULL, "stability" REAL NOT NULL, '
            '"is_anonymous" INTEGER NOT NULL, "is_https" INTEGER NOT NULL, "attempts" INTEGER NOT NULL, '
            '"https_attempts" INTEGER NOT NULL, "location" VARCHAR(255), "organization" VARCHAR(255), '
            '"region" VARCHAR(255), "country" VARCHAR(255), "city" VARCHAR(255))'
        )
        database.executemany(
            "INSERT INTO proxy_ips VALUES "
            "(NULL, ?, ?, ?, ?, ?, 120.0, 0.5, 1, 0, ?, 0, NULL, NULL, NULL, ?, NULL)",
            [
                (
                    made.host, made.port, made.works is True, _CHECKED, _CHECKED,
                    0 if made.works is None else 4, made.country,
                )
                for made in proxies
            ],
        )  # fmt: skip
    database.close()


@contextmanager
def running_redis(
    folder: Path, password: str | None = None, *, old: bool = False
) -> Iterator[tuple[str, redis.Redis]]:
    """A Redis that keeps nothing, its URL without the password, and a connection to it.

    An old one knows no HELLO, as none did before version 6.
    """
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    socket = folder / "redis.sock"
    command: list[Any] = [
        program, "--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no", "--dir", folder,
        *(["--requirepass", password] if password else []),
        *(["--rename-command", "HELLO", ""] if old else []),
    ]  # fmt: skip
    url = f"unix://{socket}?db=0"
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process,
        redis.Redis.from_url(url, password=password, protocol=2) as connection,
    ):
        try:
            wait_until(lambda: process.poll() is not None or _answers(connection))
            yield url, connection
        finally:
            process.terminate()


def _answers(connection: redis.Redis) -> bool:
    try:
        return bool(connection.ping())
    except redis.exceptions.ConnectionError:
        return False
