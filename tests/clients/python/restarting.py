"""A server that is stopped or killed and takes up its data again, behind one address."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.server import ServerProcess, running_server

from .relay import Relay


@contextmanager
def restarting_server(tmp_path: Path, relay: Relay) -> Iterator[Callable[[bool], ServerProcess]]:
    """Makes a server on the same data take the place of the one before, which was stopped or killed."""
    servers: list[tuple[ServerProcess, Any]] = []

    def restart(killed: bool) -> ServerProcess:
        relay.upstream = None
        if servers:
            server, context = servers.pop()
            if killed:
                server.kill()
            else:
                server.stop()
            context.__exit__(None, None, None)
        context = running_server(tmp_path)
        servers.append((context.__enter__(), context))
        relay.upstream = servers[0][0].target
        return servers[0][0]

    try:
        yield restart
    finally:
        for _, context in servers:
            context.__exit__(None, None, None)
