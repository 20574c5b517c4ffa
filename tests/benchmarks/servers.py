"""The servers that are measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import grpc
from google.protobuf.message import Message

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from proxystash.v1 import pool_service_pb2_grpc as pool_grpc
from tests.benchmarks.processes import running
from tests.benchmarks.tools import ROOT
from tests.support.server import running_server

# The server's default; the no-op server has as many.
THREADS = 8


@dataclass(frozen=True)
class Server:
    """A server under load."""

    target: str
    pid: int
    stub: pb_grpc.CacheServiceStub
    pool: pool_grpc.PoolServiceStub

    def l1_hits(self) -> int:
        """Lookups that memory has answered so far."""
        statistics = self.stub.GetStats(pb.GetStatsRequest()).statistics
        return next(tier.hits for tier in statistics.tiers if tier.tier == pb.TIER_L1)

    def entries(self) -> int:
        """Entries stored."""
        return self.stub.GetStats(pb.GetStatsRequest()).statistics.entries


@contextmanager
def proxystash(data_dir: Path, *flags: str) -> Iterator[Server]:
    """Our server, as its users start it, with default settings but for `flags`."""
    with (
        running_server(data_dir, *flags) as process,
        _stubs(process.target) as stubs,
    ):
        yield Server(process.target, process.process.pid, *stubs)


@contextmanager
def noop(
    folder: Path, answers: Mapping[str, Message], pool: Literal["stock", "ours"] = "stock"
) -> Iterator[Server]:
    """The no-op server, with the answers that ours has given, in grpcio's usual threads or in ours."""
    folder.mkdir(exist_ok=True)
    for method, answer in answers.items():
        (folder / method).write_bytes(answer.SerializeToString())
    command = [sys.executable, "-m", "tests.benchmarks.noop_server", str(THREADS), str(folder), pool]
    with running(command, stdout=subprocess.PIPE, stderr=None, cwd=ROOT) as process:
        assert process.stdout is not None
        target = process.stdout.readline().strip()
        with _stubs(target) as stubs:
            yield Server(target, process.pid, *stubs)


@contextmanager
def _stubs(target: str) -> Iterator[tuple[pb_grpc.CacheServiceStub, pool_grpc.PoolServiceStub]]:
    with grpc.insecure_channel(target) as channel:
        grpc.channel_ready_future(channel).result(timeout=30)
        yield pb_grpc.CacheServiceStub(channel), pool_grpc.PoolServiceStub(channel)
