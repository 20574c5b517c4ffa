"""On what, and with what, a run was made."""

from __future__ import annotations

import os
import platform
import sqlite3
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tests.benchmarks.tools import ROOT, tool_versions

_DISTRIBUTIONS = ("proxystash-server", "grpcio", "protobuf", "cryptography", "redis")


def machine() -> dict[str, str | int | float]:
    """The machine, as far as figures depend on it."""
    return {
        "cpu": _after_colon(Path("/proc/cpuinfo"), "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """The versions of everything that is measured or measures."""
    found = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if "redis" in found:
        found["redis-py"] = found.pop("redis")
    return found | tool_versions()


def commit() -> dict[str, str | bool]:
    """The commit that was measured, and whether files differed from it."""
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "-uno"))}


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout.strip()


def _after_colon(path: Path, name: str) -> str:
    if sys.platform != "linux":
        return ""
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""
