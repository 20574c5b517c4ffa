"""Counts the CPU instructions of the hot paths; compares them with the baseline or another revision."""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from tests.instructions.callgrind import PACKAGES, ROOT, CountingError, count
from tests.instructions.comparison import TOLERANCE, Baseline, Comparison, this_environment
from tests.instructions.paths import PATHS

GREW: Final = 1
NO_VERDICT: Final = 3


def main(arguments: Sequence[str]) -> int:
    """Count, compare, and print; the exit code: 1 if a path grew, 3 if there is no verdict."""
    parser = argparse.ArgumentParser(
        prog="scripts/instructions",
        description=__doc__,
        epilog=f"Exit code: 0 if nothing grew, {GREW} if a path did, {NO_VERDICT} if there is no verdict.",
    )
    parser.add_argument(
        "--only", metavar="PATTERN", help="the paths in whose name this regular expression is found"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="PERCENT",
        help="growth to pass over (default: %(default)g)",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--update", action="store_true", help="write the baseline")
    mode.add_argument(
        "--against", metavar="REVISION", help="count this git revision too, and compare with it"
    )
    options = parser.parse_args(arguments)
    try:
        names = _chosen(options.only)
    except re.error as error:
        parser.error(f"--only: {error}")
    if not names:
        parser.error(f"--only: no path matches {options.only}")
    try:
        if options.against is not None:
            with exported(options.against) as tree:
                before = count(names, tree)
            return _report(Comparison(count(names), before, options.tolerance), options.against)
        return _against_baseline(names, options.tolerance, update=options.update)
    except CountingError as error:
        print(f"scripts/instructions: {error}", file=sys.stderr)
        return NO_VERDICT


@contextmanager
def exported(revision: str) -> Iterator[Path]:
    """A folder with the packages of a git revision; raises CountingError."""
    command = ["git", "archive", "--format=tar", revision, *PACKAGES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        raise CountingError(f"git knows no such packages: {done.stderr.decode().strip()}")
    with TemporaryDirectory(prefix="proxystash-revision-") as directory:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(directory, filter="data")
        yield Path(directory)


def _chosen(pattern: str | None) -> list[str]:
    return [name for name in PATHS if pattern is None or re.search(pattern, name)]


def _against_baseline(names: Sequence[str], tolerance: float, *, update: bool) -> int:
    baseline = Baseline.read()
    environment = this_environment()
    differences = baseline.differences(environment)
    if update and differences and len(names) < len(PATHS):
        raise CountingError(
            "\n  ".join(["the baseline is another machine's: update all of it", *differences])
        )
    counted = count(names)
    comparison = Comparison(counted, baseline.instructions, tolerance)
    if update:
        print(comparison.table("before"))
        Baseline(environment, _merged(baseline.instructions, counted)).write()
        return 0
    code = _report(comparison, "baseline")
    if differences:
        print("\nNo verdict, since the baseline was counted with other software:", file=sys.stderr)
        print("\n".join(f"  {difference}" for difference in differences), file=sys.stderr)
        print("--against REVISION counts a revision here and compares with it.", file=sys.stderr)
        return NO_VERDICT
    return code


def _merged(before: Mapping[str, int], counted: Mapping[str, int]) -> dict[str, int]:
    """In the order of the paths; those that are no more go."""
    return {name: number for name in PATHS if (number := counted.get(name, before.get(name))) is not None}


def _report(comparison: Comparison, title: str) -> int:
    print(comparison.table(title))
    if comparison.unknown:
        print(f"\nnot in the baseline: {'; '.join(comparison.unknown)}", file=sys.stderr)
    if comparison.grown:
        print(
            f"\ngrew by more than {comparison.tolerance:g}%: {'; '.join(comparison.grown)}", file=sys.stderr
        )
    return GREW if comparison.grown or comparison.unknown else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
