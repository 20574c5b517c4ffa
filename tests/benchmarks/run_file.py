"""The JSON of a run: every figure, and on what and with what it was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.results import Goal, Measurement, Result, Row
from tests.benchmarks.rounds import Spread


@dataclass(frozen=True)
class Run:
    """Everything about one run."""

    facts: dict[str, Any]
    results: tuple[Result, ...]


def write_run(path: Path, run: Run) -> None:
    """Write the run, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(result), "state": str(result.state)} for result in run.results]
    path.write_text(json.dumps({**run.facts, "rows": rows}, indent=1, ensure_ascii=False) + "\n")


def read_run(path: Path) -> Run:
    """The run that was written."""
    facts: dict[str, Any] = json.loads(path.read_text())
    rows = facts.pop("rows")
    return Run(facts, tuple(map(_result, rows)))


def find(results: Sequence[Result], name: str) -> Measurement | None:
    """What was measured for a row, if it was."""
    return next((result.measurement for result in results if result.row.name == name), None)


def _result(data: dict[str, Any]) -> Result:
    row, measurement = data["row"], data["measurement"]
    row["goal"] = None if row["goal"] is None else Goal(**row["goal"])
    row["needs"] = tuple(row["needs"])
    if measurement is not None:
        measurement = Measurement(Spread(**measurement["spread"]), measurement["raw"], measurement["remark"])
    return Result(Row(**row), measurement, data["reason"])
