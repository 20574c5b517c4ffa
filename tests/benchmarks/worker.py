"""A process that holds one library and runs batches of its operations on request.

`python -m tests.benchmarks.worker SIDE CONFIGURATION` reads a line of JSON for each request, and answers it
with one: {"fill": true} builds the store and tells how much memory that took, {"operation": "miss", "count":
100} measures a batch. It ends when its input does. Only what its side needs is imported, since each side has
an environment of its own.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Batch:
    """Calls that are measured together, and what must be so when they are done.

    `hits` are the lookups that memory answered and those that a tier below did; None is not checked.
    `undo` brings the store back to its size. `units` is how many entries one call deals with.
    """

    call: Callable[..., object]
    arguments: Sequence[tuple[Any, ...]]
    hits: tuple[int, int] | None = None
    undo: Callable[[], object] = lambda: None
    units: int = 1


class Side(Protocol):
    """A library under measurement."""

    def fill(self) -> None:
        """Build the store."""

    def batch(self, operation: str, count: int) -> Batch | None:
        """Prepare at most `count` calls; None if the store is too small for that operation."""

    def hits(self) -> tuple[int, int]:
        """Lookups answered from memory so far, and from the tiers below."""

    def close(self) -> None:
        """Release the store."""


def measure(side: Side, operation: str, count: int) -> Mapping[str, float]:
    """The cost of one call, in microseconds: as the caller's clock has it, and in CPU time of its thread."""
    batch = side.batch(operation, count)
    if batch is None:
        return {}
    hits = side.hits()
    call, arguments = batch.call, batch.arguments
    # A collection would count for whichever operation it happened to hit.
    gc.collect()
    gc.disable()
    cpu, wall = time.thread_time(), time.perf_counter()
    for argument in arguments:
        call(*argument)
    wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
    gc.enable()
    made = tuple(after - before for after, before in zip(side.hits(), hits, strict=True))
    if batch.hits is not None and made != batch.hits:
        raise AssertionError(f"{operation}: hits in memory and below were {made}, not {batch.hits}")
    batch.undo()
    units = max(1, len(arguments) * batch.units)
    return {"wall_us": wall / units * 1e6, "cpu_us": cpu / units * 1e6}


def _resident_bytes() -> int:
    gc.collect()
    with open("/proc/self/statm") as file:  # noqa: PTH123 -- pathlib is no part of what is measured
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(name: str, configuration: dict[str, Any]) -> None:
    """Serve requests until the input ends."""
    side: Side
    if name == "proxystash":
        from tests.benchmarks.proxystash_side import ProxystashSide

        side = ProxystashSide(**configuration)
    elif name == "selection":
        from tests.benchmarks.selection_side import SelectionSide

        side = SelectionSide(**configuration)
    else:
        from tests.benchmarks.proxywhirl_side import ProxywhirlSide

        side = ProxywhirlSide(**configuration)
    for line in sys.stdin:
        request = json.loads(line)
        answer: Mapping[str, float] = {}
        if "fill" in request:
            before = _resident_bytes()
            side.fill()
            answer = {"resident_bytes": _resident_bytes() - before}
        else:
            answer = measure(side, request["operation"], request["count"])
        print(json.dumps(answer), flush=True)
    side.close()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
