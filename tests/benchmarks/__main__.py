"""Measures every row, or some, and prints the table."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

from tests.benchmarks import machine
from tests.benchmarks.bench import Bench, Theme
from tests.benchmarks.catalogue import THEMES
from tests.benchmarks.processes import stop_children
from tests.benchmarks.publish import publish
from tests.benchmarks.report import summary, table
from tests.benchmarks.results import CannotRunError, Measurement, Result
from tests.benchmarks.run_file import Run, write_run
from tests.benchmarks.tools import ROOT, find_tool


def main(arguments: list[str]) -> int:
    """Run what was asked for; the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.publish and options.rows != "*":
        parser.error("--publish is for a run of all rows")
    if options.list:
        for theme in THEMES:
            print(f"{theme.title}:")
            for row in theme.rows:
                print(f"  {row.name:24} {row.what}")
        return 0
    # So that everything is also stopped when the benchmark is, even where a shell has it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # The library below gRPC tells of each connection that ends.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    wanted = {row.name for theme in THEMES for row in theme.rows if fnmatchcase(row.name, options.rows)}
    if not wanted:
        print(f"no row is called {options.rows}; --list names them", file=sys.stderr)
        return 2
    try:
        run = _run(options, wanted)
    except KeyboardInterrupt:
        print("interrupted; everything was stopped", file=sys.stderr)
        return 130
    write_run(options.json, run)
    if options.publish:
        publish(run)
    print(table(run.results))
    print(f"\n{summary(run.results)}; all figures are in {options.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure the server and the library beside what they are compared with.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller stores: two minutes")
    parser.add_argument(
        "--rows", default="*", metavar="PATTERN", help="only rows of these names, such as 'get*'"
    )
    parser.add_argument("--json", type=Path, default=ROOT / "build/bench.json", metavar="FILE")
    parser.add_argument("--publish", action="store_true", help="also put the run into docs/performance.md")
    parser.add_argument("--list", action="store_true", help="name the rows and do nothing")
    return parser


def _run(options: argparse.Namespace, wanted: set[str]) -> Run:
    facts = {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": options.quick,
        "machine": machine.machine(),
        "versions": machine.versions(),
        **machine.commit(),
    }
    # Not where temporary files are, which may be in memory: what is durable is to be so on a disk.
    (ROOT / "build").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=ROOT / "build"))
    bench = Bench(folder, options.quick)
    results: list[Result] = []
    try:
        for theme in THEMES:
            if names := wanted & {row.name for row in theme.rows}:
                bench.tell(theme.title)
                results += _results(bench, theme, names)
    finally:
        stop_children()
        shutil.rmtree(folder, ignore_errors=True)
    facts["seconds"] = round(time.monotonic() - bench.started)
    return Run(facts, tuple(results))


def _results(bench: Bench, theme: Theme, names: set[str]) -> list[Result]:
    rows = [row for row in theme.rows if row.name in names]
    reasons: dict[str, str] = {}
    for row in rows:
        for need in row.needs:
            try:
                find_tool(need)
            except CannotRunError as error:
                reasons[row.name] = str(error)
    measured: Mapping[str, Measurement] = {}
    possible = frozenset(row.name for row in rows if row.name not in reasons)
    if possible:
        try:
            measured = theme.measure(bench, possible)
        except CannotRunError as error:
            reasons.update(dict.fromkeys(possible, str(error)))
        except Exception as error:  # noqa: BLE001 -- the other rows are to be measured whatever this one met
            traceback.print_exc()
            reasons.update(dict.fromkeys(possible, f"{type(error).__name__}, see above"))
    return [Result(row, measured.get(row.name), reasons.get(row.name, "")) for row in rows]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
