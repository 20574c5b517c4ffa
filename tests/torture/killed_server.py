"""Clients of a real server that is killed again and again, and whether all they saw can be explained."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

import proxystash
from proxystash_server.cache import L2BackendType
from tests.support.scripts import run
from tests.support.server import ServerProcess, running_server
from tests.torture.histories import record
from tests.torture.linearizability import Operation, check_history
from tests.torture.stores import RpcDriver, temporary_directory
from tests.torture.tally import BreachError, Tally

_TTL_SECONDS: Final = 24 * 3600
_SERVER_SECONDS: Final = 60
_LONGEST_LIFE: Final = 1.5


class _Connection:
    """A client as a register."""

    def __init__(self, target: str) -> None:
        self._driver = RpcDriver(proxystash.Client(target, retry=None, timeout=5))

    def put(self, keys: Sequence[str], value: str) -> None:
        self._driver.put(keys, value, ttl_seconds=_TTL_SECONDS)

    def delete(self, key: str) -> None:
        self._driver.delete(key)

    def get(self, keys: Sequence[str]) -> list[str | None]:
        return [None if seen is None else seen.tag for seen in self._driver.get(keys)]

    def close(self) -> None:
        self._driver.client.close()


def record_under_kills(
    tally: Tally, l2_backend: L2BackendType, seed: int, seconds: float, *, most: int = 20_000
) -> list[Operation]:
    """What clients saw of a server that was killed and started again, with the same data and address.

    Goes on for so long, and ends earlier when there have been as many operations as `most`.
    """
    chance = random.Random(seed)
    serving = threading.Event()
    serving.set()
    ended = threading.Event()
    connections: list[_Connection] = []
    # Small enough that entries come from every tier.
    options = ["--l1-max-entries=2", "--l2-max-entries=3", f"--l2-backend={l2_backend}", "--log-level=info"]
    until = time.monotonic() + seconds
    count = 0

    with ExitStack() as stack:
        directory = stack.enter_context(temporary_directory())
        server: ServerProcess = stack.enter_context(running_server(directory / "data", *options))
        target = server.target

        def connect() -> _Connection:
            connection = _Connection(target)
            connections.append(connection)
            return connection

        def goes_on() -> bool:
            nonlocal count
            count += 1
            return not ended.is_set() and count < most

        def kill_and_restart() -> None:
            nonlocal server
            try:
                while time.monotonic() < until and count < most:
                    ended.wait(chance.uniform(0.05, _LONGEST_LIFE))
                    serving.clear()
                    server.kill()
                    tally.add("kills")
                    server = stack.enter_context(
                        running_server(directory / "data", *options, f"--listen={target}")
                    )
                    serving.set()
            finally:
                ended.set()
                serving.set()

        killer = threading.Thread(target=kill_and_restart, name="killer")
        killer.start()
        try:
            history = record(connect, seed, goes_on, after_refusal=lambda: serving.wait(_SERVER_SECONDS))
        finally:
            ended.set()
            killer.join()
            for connection in connections:
                connection.close()
        server.kill()
        checked = run(
            sys.executable,
            *("-m", "proxystash_server", "check", directory / "data"),
            env={"PROXYSTASH_L2_BACKEND": l2_backend},
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr
    tally.add("operations", len(history))
    return history


def check_under_kills(tally: Tally, l2_backend: L2BackendType, seed: int, seconds: float) -> list[Operation]:
    """Record a history and check it; raises BreachError."""
    history = record_under_kills(tally, l2_backend, seed, seconds)
    try:
        check_history(history)
    except BreachError as error:
        tally.add(error.kind)
        error.add_note(f"with {l2_backend}, seed {seed}")
        raise
    return history
