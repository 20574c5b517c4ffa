"""Clients of a real server that is killed again and again, and whether all they saw can be explained."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final

import proxystash
from proxystash_server.cache import L2BackendType
from tests.support.scripts import run
from tests.support.server import ServerProcess, running_server
from tests.torture.borrowers import LIMITS, RpcLender, check_recorded, record_leases
from tests.torture.histories import record
from tests.torture.lease_histories import LeaseOperation
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


class KilledServer:
    """A server that is killed and started again, with the same data and address, while clients use it."""

    def __init__(self, target: str, most: int) -> None:
        self.target = target
        self.serving = threading.Event()
        self.serving.set()
        self.ended = threading.Event()
        self._most = most
        self._count = 0

    def goes_on(self) -> bool:
        """Whether a client is to go on; counts what it does."""
        self._count += 1
        return not self.ended.is_set() and self._count < self._most

    @property
    def is_done(self) -> bool:
        """Whether clients have done as much as they are to do."""
        return self._count >= self._most

    def wait(self) -> None:
        """Wait until it serves again."""
        self.serving.wait(_SERVER_SECONDS)


@contextmanager
def killed_server(
    tally: Tally,
    l2_backend: L2BackendType,
    seed: int,
    seconds: float,
    most: int,
    prepare: Callable[[str], object] = lambda _target: None,
) -> Iterator[KilledServer]:
    """Kill a server again and again for so long, or until clients have done so much; then check its store.

    `prepare` is called with its address before the first kill.
    """
    chance = random.Random(seed)
    # Small enough that entries come from every tier.
    options = ["--l1-max-entries=2", "--l2-max-entries=3", f"--l2-backend={l2_backend}", "--log-level=info"]

    with ExitStack() as stack:
        directory = stack.enter_context(temporary_directory())
        server: ServerProcess = stack.enter_context(running_server(directory / "data", *options))
        killed = KilledServer(server.target, most)
        prepare(killed.target)
        until = time.monotonic() + seconds

        def kill_and_restart() -> None:
            nonlocal server
            try:
                while time.monotonic() < until and not killed.is_done:
                    killed.ended.wait(chance.uniform(0.05, _LONGEST_LIFE))
                    killed.serving.clear()
                    server.kill()
                    tally.add("kills")
                    server = stack.enter_context(
                        running_server(directory / "data", *options, f"--listen={killed.target}")
                    )
                    killed.serving.set()
            finally:
                killed.ended.set()
                killed.serving.set()

        killer = threading.Thread(target=kill_and_restart, name="killer")
        killer.start()
        try:
            yield killed
        finally:
            killed.ended.set()
            killer.join()
        server.kill()
        checked = run(
            sys.executable,
            *("-m", "proxystash_server", "check", directory / "data"),
            env={"PROXYSTASH_L2_BACKEND": l2_backend},
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr


def record_under_kills(
    tally: Tally, l2_backend: L2BackendType, seed: int, seconds: float, *, most: int = 20_000
) -> list[Operation]:
    """What clients saw of a server that was killed and started again.

    Goes on for so long, and ends earlier when there have been as many operations as `most`.
    """
    with killed_server(tally, l2_backend, seed, seconds, most) as server, ExitStack() as connections:

        def connect() -> _Connection:
            connection = _Connection(server.target)
            connections.callback(connection.close)
            return connection

        history = record(connect, seed, server.goes_on, after_refusal=server.wait)
    tally.add("operations", len(history))
    return history


def check_leases_under_kills(
    tally: Tally, l2_backend: L2BackendType, seed: int, seconds: float, *, most: int = 20_000
) -> list[LeaseOperation]:
    """Record what borrowers saw of such a server, and check it; raises BreachError."""

    def put_all(target: str) -> None:
        with proxystash.Client(target, timeout=60) as client:
            for key, limit in LIMITS.items():
                client.put(proxystash.CacheEntry(f"http://{key}.example:80", key=key, max_leases=limit))

    with (
        killed_server(tally, l2_backend, seed, seconds, most, put_all) as server,
        ExitStack() as connections,
    ):

        def connect(holder: str) -> RpcLender:
            return connections.enter_context(RpcLender(server.target, holder))

        history = record_leases(connect, seed, server.goes_on, after_refusal=server.wait)
    return check_recorded(tally, history, f"with {l2_backend}, seed {seed}")


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
