"""One attack on one server, and what it cost the others."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from tests.hostile.attacks import Attack
from tests.hostile.others import Others
from tests.support.scripts import ROOT
from tests.support.server import ServerProcess, running_server

# Beyond this a server holds more for a hostile client than its limits add up to, in MB.
MOST_MEMORY: Final = 800


@dataclass
class Outcome:
    """What one case was, and what the others noticed: their calls, how long each took, and what failed."""

    name: str
    tried: str
    times: str
    seconds: list[float]
    longest_silence: float
    memory_mb: float
    failures: dict[str, int] = field(default_factory=dict)
    breaches: list[str] = field(default_factory=list)

    def percentile_ms(self, percent: float) -> float:
        """How long the given share of the calls took at most."""
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def run_case(attack: Attack | None, seconds: float) -> Outcome:
    """Attack a new server for so long, while others use it; no attack is what all is compared with."""
    with TemporaryDirectory() as directory, running_server(directory) as server:
        others = Others(server.target)
        with _memory_of(server) as peak, others.at_work():
            if attack is None:
                threading.Event().wait(seconds)
                times = ""
            else:
                times = f"{_attack(attack, server, seconds):,} {attack.counts}"
        breaches = [f"{count} calls of others: {what}" for what, count in others.failures.items()]
        if server.process.poll() is not None:
            breaches.append(f"the server ended with {server.process.returncode}")
        else:
            breaches += [f"acknowledged and lost: {key}" for key in others.lost()]
            # A log that nobody reads must not keep it from ending either.
            server.process.terminate()
            try:
                code = server.process.wait(60)
            except subprocess.TimeoutExpired:
                server.process.kill()
                breaches.append("told to stop, the server did not end")
            else:
                if code != 0:
                    breaches.append(f"told to stop, the server ended with {code}")
        server.read_log()
        if peak[0] > MOST_MEMORY:
            breaches.append(f"the server took {peak[0]:,.0f} MB")
    return Outcome(
        name=attack.name if attack else "none",
        tried=attack.tried if attack else "the others alone",
        times=times,
        seconds=others.seconds,
        longest_silence=others.longest_silence,
        memory_mb=peak[0],
        failures=dict(others.failures),
        breaches=breaches,
    )


def _attack(attack: Attack, server: ServerProcess, seconds: float) -> int:
    if attack.holds_log:
        server.hold_log()
    process = subprocess.run(
        [sys.executable, "-m", "tests.hostile.attacks", attack.name, server.target, str(seconds)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return int(process.stdout)


@contextmanager
def _memory_of(server: ServerProcess) -> Iterator[list[float]]:
    """The most memory that the server had resident, in MB, once the block has ended."""
    peak = [0.0]
    try:
        yield peak
    finally:
        status = Path(f"/proc/{server.process.pid}/status")
        if status.exists():
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            peak[0] = int(fields.get("VmHWM", "0").split()[0]) / 1024
