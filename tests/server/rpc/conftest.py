"""A real cache behind a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from proxystash_server.cache import CacheConfig, CacheManager
from proxystash_server.rpc.server import RpcServer
from tests.support.rpc import open_channel, serving


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[CacheManager]:
    config = CacheConfig(
        l2_cache_dir=tmp_path / "l2",
        l3_database_path=tmp_path / "l3" / "proxystash.db",
        encryption_key_file=tmp_path / "secret.key",
        per_source_ttl={"short-lived": 60},
    )
    with CacheManager(config, background=False) as manager:
        yield manager


@pytest.fixture
def server(manager: CacheManager) -> Iterator[RpcServer]:
    with serving(manager) as server:
        yield server


@pytest.fixture
def channel(server: RpcServer) -> Iterator[grpc.Channel]:
    with open_channel(server.address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> pb_grpc.CacheServiceStub:
    return pb_grpc.CacheServiceStub(channel)
