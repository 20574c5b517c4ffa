"""The table of a run, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tests.benchmarks.results import Goal, Result, State
from tests.benchmarks.text import markdown_table, number

HEADINGS = ("what", "against", "how", "goal", "measured", "rounds", "result", "figures")


# What the page has first, and what it has for whoever wants to know more.
SHORT: Final = ("what", "against", "goal", "measured", "result")
DETAILS: Final = ("what", "how", "rounds", "figures")


def table(results: Sequence[Result], columns: Sequence[str] = HEADINGS) -> str:
    """One line for each row, in Markdown."""
    places = [HEADINGS.index(column) for column in columns]
    lines = [HEADINGS, *map(_cells, results)]
    return markdown_table([[line[place] for place in places] for line in lines])


def goal_text(goal: Goal | None, unit: str) -> str:
    """The bound, as the design has it."""
    if goal is None:
        return "–"
    bound = f"{goal.bound:g} {unit}" if unit[0].isalpha() else f"{goal.bound:g}{unit}"
    return f"{'≥' if goal.at_least else '≤'} {bound}"


def summary(results: Sequence[Result]) -> str:
    """How many rows ended how."""
    counts = [(state, sum(result.state is state for result in results)) for state in State]
    return ", ".join(f"{count} {state}" for state, count in counts if count)


def _cells(result: Result) -> tuple[str, ...]:
    row, measured = result.row, result.measurement
    facts = (row.what, row.against, row.how, goal_text(row.goal, row.unit))
    if measured is None:
        return (*facts, "", "", str(result.state), result.reason)
    found = measured.spread
    rounds = f"{number(found.low, row.unit)} .. {number(found.high, row.unit)}"
    return (*facts, number(found.value, row.unit), rounds, str(result.state), measured.remark)
