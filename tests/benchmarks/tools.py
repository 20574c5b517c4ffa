"""The programs that rows need beside this environment, and what to do where one is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

from tests.benchmarks.results import CannotRunError

ROOT: Final = Path(__file__).resolve().parents[2]
PROTOS: Final = ROOT / "protos"
# By the full name of the service.
CONTRACTS: Final = {
    f"proxystash.v1.{service}": PROTOS / "proxystash" / "v1" / f"{file}.proto"
    for service, file in (("CacheService", "cache_service"), ("PoolService", "pool_service"))
}

_PLACES: Final = {
    "ghz": ROOT / ".tools" / "bin" / "ghz",
    "proxywhirl": ROOT / ".venv-bench-proxywhirl" / "bin" / "python",
}
_REMEDIES: Final = {
    "h2load": "install nghttp2-client",
    "redis-server": "install redis-server",
    "ghz": "run scripts/tools/install ghz, which needs Go",
    "proxywhirl": "scripts/bench says why it could not be installed",
}
_VERSION_COMMANDS: Final = {
    "h2load": ["--version"],
    "redis-server": ["--version"],
    "proxywhirl": ["-c", "import importlib.metadata as m; print(m.version('proxywhirl'))"],
}


def find_tool(name: str) -> str:
    """The path of a program; raises CannotRunError, which says what to do."""
    place = _PLACES.get(name)
    found = shutil.which(name) if place is None else str(place) if os.access(place, os.X_OK) else None
    if found is None:
        raise CannotRunError(f"{name} not found; {_REMEDIES[name]}")
    return found


def tool_versions() -> dict[str, str]:
    """The version of every program that is there. Built by us, ghz does not know its own: the lock does."""
    versions = {}
    lock = re.search(r"github.com/bojand/ghz v(\S+)", (ROOT / "scripts/tools/ghz/go.mod").read_text())
    if lock is not None and os.access(_PLACES["ghz"], os.X_OK):
        versions["ghz"] = lock[1]
    for name, arguments in _VERSION_COMMANDS.items():
        try:
            command = [find_tool(name), *arguments]
        except CannotRunError:
            continue
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        match = re.search(r"\d+\.\d+\.\d+", done.stdout + done.stderr)
        versions[name] = match[0] if match else "unknown"
    return versions
