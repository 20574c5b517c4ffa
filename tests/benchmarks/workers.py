"""The other end of the workers' pipes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from tests.benchmarks.processes import running
from tests.benchmarks.tools import ROOT, find_tool

_CLOSE_SECONDS: Final = 120


class WorkerError(Exception):
    """A worker ended; what it said is on standard error."""


class Worker:
    """A process that holds one library and its store."""

    def __init__(self, requests: IO[str], answers: IO[str]) -> None:
        self._requests = requests
        self._answers = answers

    def fill(self) -> float:
        """Build the store; how many bytes of memory the process has more."""
        return self._ask({"fill": True})["resident_bytes"]

    def measure(self, operation: str, count: int) -> dict[str, float]:
        """What one call of the operation costs; nothing if the store is too small for it."""
        return self._ask({"operation": operation, "count": count})

    def measuring(self, operation: str, count: int) -> Callable[[], Mapping[str, float]]:
        """The same, for an action of an interleaved round."""
        return lambda: self.measure(operation, count)

    def _ask(self, request: dict[str, Any]) -> dict[str, float]:
        print(json.dumps(request), file=self._requests, flush=True)
        line = self._answers.readline()
        if not line:
            raise WorkerError(f"a worker ended at {request}")
        answer: dict[str, float] = json.loads(line)
        return answer


@contextmanager
def open_worker(side: str, folder: Path, entries: int, backend: str = "jsonl") -> Iterator[Worker]:
    """A worker of `proxystash`, `proxywhirl` or `selection`, its store not built yet."""
    python = find_tool("proxywhirl") if side == "proxywhirl" else sys.executable
    configuration = json.dumps({"folder": str(folder), "backend": backend, "entries": entries})
    command = [python, "-m", "tests.benchmarks.worker", side, configuration]
    with running(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield Worker(process.stdin, process.stdout)
        # It closes its store when its input ends; if something went wrong, it is just stopped.
        process.stdin.close()
        process.wait(_CLOSE_SECONDS)
