"""The library beside proxywhirl 0.3.3, which has the same names."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from statistics import median

from tests.benchmarks.bench import Bench, Theme
from tests.benchmarks.results import Measurement, Row, at_least
from tests.benchmarks.rounds import Series, ratio
from tests.benchmarks.text import beside, number
from tests.benchmarks.workers import open_worker

ENTRIES = 6000
_BACKENDS = ("jsonl", "sqlite")
_SIDES = ("proxystash", "proxywhirl")
# Operation, its name, the goal with each backend, and how often a round does it: ours, and theirs with each.
_OPERATIONS = (
    ("l1_get", "get, in L1", (4, 4), 20_000, (10_000, 10_000)),
    ("below_get", "get, below L1", (40, 40), 400, (8, 50)),
    ("put", "put", (100, 20), 200, (8, 40)),
    ("miss", "miss", (8, 8), 5000, (1000, 1000)),
    ("invalidate", "health invalidation", (15, 15), 200, (8, 40)),
)


def _row_name(operation: str, backend: str) -> str:
    return f"library-{operation.replace('_', '-')}-{backend}"


_ROWS = tuple(
    Row(
        _row_name(operation, backend),
        f"library, {title}: cost",
        f"proxywhirl 0.3.3, L2 in {backend} in both",
        f"{ENTRIES:,} entries, one thread, defaults",
        at_least(goals[place]),
        needs=("proxywhirl",),
    )
    for operation, title, goals, _, _ in _OPERATIONS
    for place, backend in enumerate(_BACKENDS)
)


def _measure(bench: Bench, wanted: frozenset[str]) -> Mapping[str, Measurement]:
    found: dict[str, Measurement] = {}
    for place, backend in enumerate(_BACKENDS):
        operations = [one for one in _OPERATIONS if _row_name(one[0], backend) in wanted]
        if not operations:
            continue
        with ExitStack() as stack:
            bench.tell(f"  filling both with {ENTRIES:,} entries, L2 in {backend}")
            workers = {}
            for side in _SIDES:
                workers[side] = stack.enter_context(open_worker(side, bench.new_folder(), ENTRIES, backend))
                workers[side].fill()
            for operation, _, _, ours, theirs in operations:
                counts = {"proxystash": ours, "proxywhirl": bench.size(theirs[place], theirs[place] // 2)}
                bench.tell(f"  {operation}")
                measured = bench.interleave(
                    {side: workers[side].measuring(operation, counts[side]) for side in _SIDES}
                )
                found[_row_name(operation, backend)] = _measurement(measured)
    return found


def _measurement(measured: dict[str, Series]) -> Measurement:
    ours, theirs = measured["proxystash"], measured["proxywhirl"]
    cpu = median(theirs["cpu_us"]) / median(ours["cpu_us"])
    figures = beside(median(ours["wall_us"]), median(theirs["wall_us"]), "µs")
    remark = f"{figures}; by the thread's CPU time {number(cpu, '×')}"
    return Measurement(ratio(theirs["wall_us"], ours["wall_us"]), measured, remark)


THEME = Theme("the library beside proxywhirl", _ROWS, _measure)
