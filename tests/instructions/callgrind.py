"""Counting paths under valgrind's callgrind."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

# The C function below `os.ctermid`, which nothing else uses.
MARKER: Final = "ctermid"
PACKAGES: Final = ("server", "clients/python")
ROOT: Final = Path(__file__).resolve().parents[2]
# A run writes one dump at each marker: what came before, then what is to be counted.
_COUNTED_DUMP: Final = 2
_TOTAL = re.compile(r"^totals: (\d+)$", re.MULTILINE)


class CountingError(Exception):
    """Nothing could be counted; the message is for whoever asked."""


def count(names: Sequence[str], tree: Path = ROOT) -> dict[str, int]:
    """The instructions of one operation of each path, with the packages of the checkout `tree`.

    The paths are this checkout's. Raises CountingError.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise CountingError("valgrind is not installed; on Debian and Ubuntu: apt-get install valgrind")
    with TemporaryDirectory(prefix="proxystash-callgrind-") as directory:
        command = [
            valgrind,
            "--quiet",
            "--vgdb=no",
            "--tool=callgrind",
            f"--dump-before={MARKER}",
            f"--callgrind-out-file={directory}/dump.%p",
            *(sys.executable, "-m", "tests.instructions.measured", str(_cores()), *names),
        ]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment_for(tree),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise CountingError(f"the paths failed under valgrind:\n{done.stderr.rstrip()}")
        counts = read_counts(done.stdout, Path(directory))
    return {name: counts[name] for name in names}


def environment_for(tree: Path) -> dict[str, str]:
    """This environment, with the packages of `tree` before those installed, and hashes that repeat."""
    packages = os.pathsep.join(str(tree / package) for package in PACKAGES)
    return {**os.environ, "PYTHONPATH": packages, "PYTHONHASHSEED": "0"}


def read_counts(runs: str, dumps: Path) -> dict[str, int]:
    """Instructions per operation, from what `measured` printed and the dumps that callgrind wrote."""
    counts = {}
    for line in runs.splitlines():
        run = json.loads(line)
        dump = dumps / f"dump.{run['pid']}.{_COUNTED_DUMP}"
        counts[run["path"]] = round(total_of(dump) / run["operations"])
    return counts


def total_of(dump: Path) -> int:
    """The instructions in one of callgrind's dumps; raises CountingError."""
    try:
        found = _TOTAL.search(dump.read_text())
    except FileNotFoundError:
        found = None
    if found is None:
        raise CountingError(f"callgrind wrote no count: it has not seen the calls of {MARKER}")
    return int(found[1])


def valgrind_version() -> str:
    """What valgrind says of itself; empty if it is not there."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        return ""
    return subprocess.run([valgrind, "--version"], capture_output=True, text=True, check=True).stdout.strip()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
