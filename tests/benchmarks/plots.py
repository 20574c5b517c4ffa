"""Plots of a run, the same bytes for the same figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

from tests.benchmarks.growth_operations import TITLES

_SIZE: Final = (8, 5)
# Those that tell a story; all are in the table.
_PLOTTED: Final = (
    "l1_get",
    "l3_get",
    "miss",
    "put",
    "put_many",
    "delete",
    "list_first",
    "statistics",
    "expiry",
)


def draw_growth(raw: Mapping[str, Any], path: Path) -> None:
    """The cost of operations against the entries stored."""
    figure, axes = _axes("entries stored", "µs for one call, or one entry of a batch")
    for operation in _PLOTTED:
        sizes = sorted(raw[operation], key=int)
        costs = [median(raw[operation][size]["wall_us"]) for size in sizes]
        axes.plot([int(size) for size in sizes], costs, marker="o", label=TITLES[operation])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def draw_clients(raw: Mapping[str, Any], path: Path) -> None:
    """Throughput against the Gets that are under way at a time."""
    figure, axes = _axes("Gets at a time, on one connection", "Gets/s")
    streams = sorted(int(name.removeprefix("get ")) for name in raw if name.startswith("get "))
    for name, label in (("no-op get", "a handler that does nothing"), ("get", "proxystash, in L1")):
        rates = [raw[f"{name} {count}"]["per_second"] for count in streams]
        axes.plot(streams, list(map(median, rates)), marker="o", label=label)
        axes.fill_between(streams, list(map(min, rates)), list(map(max, rates)), alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(streams, [str(count) for count in streams])
    axes.set_ylim(bottom=0)
    axes.legend()
    _save(figure, path)


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.grid(visible=True, which="major", alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    # Text stays text, and names of elements and dates do not change from one drawing to the next.
    with mpl.rc_context({"svg.hashsalt": "proxystash", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    # No trailing spaces, which version control complains of.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
