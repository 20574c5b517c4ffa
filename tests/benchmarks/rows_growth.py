"""How the cost of each operation of the library grows with the entries stored, and how long a start takes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from tests.benchmarks.bench import Bench, Theme
from tests.benchmarks.growth_operations import CALLS, CLEAR, RARE, TITLES
from tests.benchmarks.results import Measurement, Row, at_most
from tests.benchmarks.rounds import Series, Spread
from tests.benchmarks.starts import measure_starts
from tests.benchmarks.text import beside, number
from tests.benchmarks.workers import Worker, open_worker

BASE = 10_000
LARGE = 1_000_000
_QUICK_LARGE = 50_000
SIZES = (10, BASE, LARGE)
_ROWS = (
    Row(
        "growth",
        f"library, any operation: cost at {LARGE:,} entries",
        f"at {BASE:,} entries",
        "one thread, defaults; the worst operation",
        at_most(1.5),
    ),
    Row(
        "growth-rare",
        f"library, finding 100 of a source that 200 entries have: cost at {LARGE:,} entries",
        f"at {BASE:,} entries",
        "one thread, defaults; as many calls as it takes",
    ),
)
_START_ROWS = (
    Row(
        "start",
        f"start on {LARGE:,} entries",
        "",
        "exec to SERVING, after a clean stop",
        at_most(3),
        unit="s",
    ),
    Row(
        "start-after-kill",
        f"start on {LARGE:,} entries",
        "",
        "exec to SERVING, after kill -9",
        at_most(3),
        unit="s",
    ),
    Row("start-memory", f"memory on {LARGE:,} entries", "", "resident once SERVING", at_most(400), unit="MB"),
)


def _measure(bench: Bench, wanted: frozenset[str]) -> Mapping[str, Measurement]:
    found: dict[str, Measurement] = {}
    large = bench.size(LARGE, _QUICK_LARGE)
    remark = "" if large == LARGE else f"quick: only {large:,} entries"
    starts = wanted & {row.name for row in _START_ROWS}
    growth = wanted - starts
    large_folder = bench.new_folder()
    costs: dict[str, dict[int, Series]] = {}
    with ExitStack() as stack:
        sizes = (SIZES[0], BASE, large) if growth else (large,)
        workers = {}
        for size in sizes:
            bench.tell(f"  filling a store with {size:,} entries")
            folder = large_folder if size == large else bench.new_folder()
            workers[size] = stack.enter_context(open_worker("proxystash", folder, size))
            workers[size].fill()
        operations = (CALLS if "growth" in wanted else {}) | (RARE if "growth-rare" in wanted else {})
        for operation, count in operations.items():
            costs[operation] = _costs(bench, workers, operation, bench.size(count, count // 2))
    if starts:
        figures = measure_starts(bench, large_folder, bench.size(5, 2))
        found.update({name: Measurement(spread, raw, remark) for name, (spread, raw) in figures.items()})
    if "growth" in wanted:
        costs[CLEAR] = _clear_costs(bench, large, large_folder)
        found["growth"] = _worst({name: costs[name] for name in (*CALLS, CLEAR)}, large, remark)
    if "growth-rare" in wanted:
        found["growth-rare"] = _worst({name: costs[name] for name in RARE}, large, remark)
    return {name: measurement for name, measurement in found.items() if name in wanted}


def _costs(bench: Bench, workers: Mapping[int, Worker], operation: str, count: int) -> dict[int, Series]:
    bench.tell(f"  {TITLES[operation]}")
    actions = {f"{size:,}": worker.measuring(operation, count) for size, worker in workers.items()}
    # The first round finds the caches of the others' stores.
    for warm_up in actions.values():
        warm_up()
    measured = bench.interleave(actions, bench.size(9, 3))
    return {size: measured[f"{size:,}"] for size in workers if measured[f"{size:,}"]}


def _clear_costs(bench: Bench, large: int, large_folder: Path) -> dict[int, Series]:
    """By entry. Every size but the largest is filled and cleared several times."""
    bench.tell(f"  {TITLES[CLEAR]}")
    costs: dict[int, Series] = {}
    for size, rounds in ((BASE, bench.size(3, 1)), (large, 1)):
        folder = large_folder if size == large else bench.new_folder()
        with open_worker("proxystash", folder, size) as worker:
            series: Series = {}
            for _ in range(rounds):
                if size != large:
                    worker.fill()
                for figure, value in worker.measure(CLEAR, 1).items():
                    series.setdefault(figure, []).append(value)
            costs[size] = series
    return costs


def growth_of(costs: Mapping[int, Series], large: int, figure: str = "wall_us") -> Spread:
    """The cost in the large store by that in the one of 10,000 entries, with the extremes of the rounds."""
    base, grown = costs[BASE][figure], costs[large][figure]
    rounds = [one / other for one, other in zip(grown, base, strict=False)]
    return Spread(median(grown) / median(base), min(rounds), max(rounds))


def _worst(costs: Mapping[str, dict[int, Series]], large: int, remark: str) -> Measurement:
    growth = {operation: growth_of(series, large) for operation, series in costs.items()}
    worst = max(growth, key=lambda operation: growth[operation].value)
    grown, base = (median(costs[worst][size]["wall_us"]) for size in (large, BASE))
    cpu = growth_of(costs[worst], large, "cpu_us").value
    remarks = [
        f"{TITLES[worst]}: {beside(grown, base, 'µs')}; by the thread's CPU time {number(cpu, '×')}",
        remark,
    ]
    return Measurement(growth[worst], _raw(costs), "; ".join(text for text in remarks if text))


def _raw(costs: Mapping[str, dict[int, Series]]) -> dict[str, dict[str, Series]]:
    return {name: {str(size): figures for size, figures in sizes.items()} for name, sizes in costs.items()}


THEME = Theme("growth", (*_ROWS, *_START_ROWS), _measure)
