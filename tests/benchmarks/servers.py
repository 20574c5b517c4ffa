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
        _stub(process.target) as stub,
    ):
        yield Server(process.target, process.process.pid, stub)


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
        with _stub(target) as stub:
            yield Server(target, process.pid, stub)


@contextmanager
def _stub(target: str) -> Iterator[pb_grpc.CacheServiceStub]:
    with grpc.insecure_channel(target) as channel:
        grpc.channel_ready_future(channel).result(timeout=30)
        yield pb_grpc.CacheServiceStub(channel)
