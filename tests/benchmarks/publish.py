"""A run in the documentation: docs/performance.md, its plots and its figures.

As a program, `python -m tests.benchmarks.publish FILE`, it publishes a run that was made earlier.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.growth_operations import TITLES
from tests.benchmarks.report import DETAILS, SHORT, summary, table
from tests.benchmarks.rows_growth import growth_of
from tests.benchmarks.run_file import Run, find, read_run, write_run
from tests.benchmarks.text import markdown_table, number
from tests.benchmarks.tools import ROOT

PAGE: Final = ROOT / "docs" / "performance.md"
FIGURES: Final = ROOT / "docs" / "performance"
RUN: Final = FIGURES / "run.json"
ENTRIES_PLOT: Final = "cost-by-entries.svg"
CLIENTS_PLOT: Final = "throughput-by-clients.svg"


class PublishError(Exception):
    """The page has no place for something, or the run lacks it."""


def publish(run: Run) -> None:
    """Write the page's sections, the plots and the figures."""
    from tests.benchmarks.plots import draw_clients, draw_growth

    page = fill_in(PAGE.read_text(), sections(run))
    FIGURES.mkdir(exist_ok=True)
    # What was not measured keeps its earlier plot.
    if growth := find(run.results, "growth"):
        draw_growth(growth.raw, FIGURES / ENTRIES_PLOT)
    if clients := find(run.results, "clients"):
        draw_clients(clients.raw, FIGURES / CLIENTS_PLOT)
    write_run(RUN, run)
    PAGE.write_text(page)


def sections(run: Run) -> dict[str, str]:
    """What the page says of a run, by the name of the section."""
    return {
        "run": _description(run.facts, summary(run.results)),
        "table": table(run.results, SHORT),
        "details": table(run.results, DETAILS),
        "growth": growth_table(run),
    }


def fill_in(page: str, parts: dict[str, str]) -> str:
    """The page with each part between its markers; whatever else is on it stays."""
    for name, text in parts.items():
        begin, end = f"<!-- bench: {name} -->\n", f"<!-- bench: end of {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise PublishError(f"the page needs {begin.strip()} and {end} once")
        filled = f"{begin}\n{text}\n\n{end}"
        page = pattern.sub(lambda _, filled=filled: filled, page)  # type: ignore[misc]  # a default argument
    return page


def growth_table(run: Run) -> str:
    """What every operation costs in each of the stores, in microseconds."""
    costs: dict[str, dict[str, Any]] = {}
    for row in ("growth", "growth-rare"):
        if measurement := find(run.results, row):
            costs.update(measurement.raw)
    if not costs:
        return "Not measured."
    sizes = sorted({int(size) for by_size in costs.values() for size in by_size})
    lines = [("operation", *(f"{size:,} entries" for size in sizes), "growth", "by CPU time")]
    for operation, by_size in costs.items():
        series = {int(size): figures for size, figures in by_size.items()}
        lines.append(
            (
                TITLES[operation],
                *(_cost(series.get(size)) for size in sizes),
                *(
                    number(growth_of(series, sizes[-1], figure).value, "×")
                    for figure in ("wall_us", "cpu_us")
                ),
            )
        )
    return markdown_table(lines)


def _cost(series: dict[str, list[float]] | None) -> str:
    if series is None:
        return "–"
    values = sorted(series["wall_us"])
    return number(values[len(values) // 2], "µs")


def _description(facts: dict[str, Any], counts: str) -> str:
    machine, versions = facts["machine"], facts["versions"]
    commit = facts["commit"][:12] + (" with uncommitted changes" if facts["dirty"] else "")
    kind = "A quick run" if facts["quick"] else "A full run"
    day, minutes = facts["began"][:10], facts["seconds"] / 60
    when = f"{kind} of {minutes:.0f} minutes on {day}, of commit {commit}: {counts}."
    where = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, kernel {machine['kernel']}; "
        f"load average before the run: {machine['load_before']}."
    )
    return "\n".join(
        [when, where, ", ".join(f"{name} {version}" for name, version in versions.items()) + "."]
    )


if __name__ == "__main__":
    publish(read_run(Path(sys.argv[1])))
