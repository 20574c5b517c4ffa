"""Servers for the tests of the client: a real one, and one that fails on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from proxystash import Client, RetryPolicy
from tests.support.server import ServerProcess, running_server

from .blocking import BlockingAsyncClient
from .fake_service import FakeService, serving
from .reading import Write

AnyClient = Client | BlockingAsyncClient
Connect = Callable[..., AnyClient]


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A real server for every test that leaves it running."""
    with running_server(tmp_path_factory.mktemp("data")) as server:
        yield server


@pytest.fixture
def target(shared_server: ServerProcess) -> str:
    """The address of a real server that holds nothing."""
    with Client(shared_server.target) as client:
        client.clear()
    return shared_server.target


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def fake_target(service: FakeService) -> Iterator[str]:
    """The address where `service` is served."""
    with serving(service) as target:
        yield target


@pytest.fixture
def _resumes_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost streams are resumed after next to no pause."""
    quick = RetryPolicy(initial=0.01, multiplier=1, maximum=0.01)
    monkeypatch.setattr("proxystash.streams._RESUME_POLICY", quick)
    monkeypatch.setattr("proxystash.near._WATCH_AGAIN", quick)


@pytest.fixture(params=[Client, BlockingAsyncClient], ids=["threads", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients of either kind, and closes them."""
    clients: list[AnyClient] = []

    def make(target: str, **settings: Any) -> AnyClient:
        client: AnyClient = request.param(target, **settings)
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file
