"""Loads from native generators, which cost less than the server that they load."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.processes import running
from tests.benchmarks.tools import CONTRACTS, PROTOS, find_tool

PACKAGE: Final = "proxystash.v1"
_FINISHED: Final = re.compile(r"^finished in \S+, ([0-9.]+) req/s", re.MULTILINE)
_REQUESTS: Final = re.compile(r"^requests: .* (\d+) succeeded, (\d+) failed, (\d+) errored", re.MULTILINE)
_LONGEST_SECONDS: Final = 300


class LoadError(Exception):
    """A load did not do what it was asked for, so its figures mean nothing."""


@dataclass(frozen=True)
class Load:
    """What a generator measured: requests/s, and the latency in seconds that one request in 100 exceeds."""

    per_second: float
    p99: float = 0


def h2load(target: str, method: str, request: Path, requests: int, *, streams: int) -> Load:
    """The same request again and again, on one connection, with so many streams open at a time.

    h2load knows nothing of gRPC: it counts an answer with an error status as a success. The caller checks.
    """
    output = _run(h2load_command(target, method, request, "-n", str(requests), "-m", str(streams)))
    return read_h2load(output, requests)


def read_h2load(output: str, requests: int) -> Load:
    """What h2load printed; raises LoadError unless every request was answered."""
    finished, counts = _FINISHED.search(output), _REQUESTS.search(output)
    if finished is None or counts is None or (int(counts[1]), counts[2], counts[3]) != (requests, "0", "0"):
        raise LoadError(f"not all requests were answered:\n{output}")
    return Load(float(finished[1]))


def h2load_command(target: str, method: str, request: Path, *options: str) -> list[str]:
    """How h2load is called for a gRPC method; one connection unless `options` have another -c."""
    headers = ["-H", "content-type:application/grpc", "-H", "te:trailers"]
    url = f"http://{target}/{_full_name(method)}"
    return [find_tool("h2load"), "-c", "1", *headers, "-d", str(request), *options, url]


def ghz(target: str, method: str, requests: Path, count: int, *, concurrency: int) -> Load:
    """`count` requests, from the file in turn, on one connection; every answer must be OK."""
    output = _run(
        ghz_command(target, method, requests, "-n", str(count), "-c", str(concurrency), "-O", "json")
    )
    return read_ghz(output, count)


def read_ghz(output: str, requests: int) -> Load:
    """What ghz printed as JSON; raises LoadError unless every answer was OK."""
    report: dict[str, Any] = json.loads(output)
    if report["statusCodeDistribution"] != {"OK": requests}:
        raise LoadError(f"ghz: {report['statusCodeDistribution']} {report.get('errorDistribution')}")
    latencies = {point["percentage"]: point["latency"] / 1e9 for point in report["latencyDistribution"]}
    return Load(report["rps"], latencies[99])


def ghz_command(target: str, method: str, requests: Path, *options: str) -> list[str]:
    """How ghz is called. Templates are off: they would cost more than the request."""
    plain = ["--insecure", "--disable-template-functions", "--disable-template-data", "--connections", "1"]
    name = _full_name(method)
    contract = ["--proto", str(CONTRACTS[name.partition("/")[0]]), "-i", str(PROTOS), "--call", name]
    return [find_tool("ghz"), *plain, *contract, "-D", str(requests), *options, target]


def _full_name(method: str) -> str:
    """`Get` is one of CacheService; of another it is written `PoolService/Acquire`."""
    return f"{PACKAGE}.{method}" if "/" in method else f"{PACKAGE}.CacheService/{method}"


def _run(command: list[str]) -> str:
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        output, _ = process.communicate(timeout=_LONGEST_SECONDS)
    if process.returncode:
        raise LoadError(f"{Path(command[0]).name} ended with {process.returncode}:\n{output}")
    return output
