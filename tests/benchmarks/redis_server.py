"""A Redis that is as durable as it usually is: an append-only file, synced each second."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from tests.benchmarks.processes import running
from tests.benchmarks.tools import find_tool

_START_SECONDS = 20


@contextmanager
def redis_client(folder: Path) -> Iterator[Any]:
    """A client of a server of its own on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "--bind": "127.0.0.1",
        "--port": str(port),
        "--dir": str(folder),
        "--appendonly": "yes",
        "--appendfsync": "everysec",
        "--save": "",
    }
    command = [find_tool("redis-server"), *(word for pair in settings.items() for word in pair)]
    with running(command), redis.Redis(port=port, decode_responses=True) as client:
        give_up = time.monotonic() + _START_SECONDS
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.05)
        yield client
