"""Runs every torture test for as long as one likes, and prints one summary.

Exit code 1 if a write was lost, something came back or a read was stale, or if anything else failed.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
import traceback
from collections.abc import Callable

from proxystash_server.cache import CacheTierType
from tests.torture.borrowers import check_leases_in_process
from tests.torture.evicting_cache import POLICIES, check_under_eviction
from tests.torture.failing_tier import check_under_faults
from tests.torture.kill_points import find_points, kill_everywhere
from tests.torture.killed_server import check_leases_under_kills, check_under_kills
from tests.torture.machines import NAMES, run_machine
from tests.torture.soak import run_soak
from tests.torture.stores import BACKENDS
from tests.torture.tally import Tally

# What part of the time each takes; the kill points go on until each was hit, however long that takes.
_SHARES = {"kill points": 0.25, "linearizability": 0.2, "leases": 0.1, "state machine": 0.25, "soak": 0.2}
# Those over gRPC take longer, and meet no faults.
_EXAMPLES_AT_A_TIME = {"library": 40, "grpc": 10, "lending": 20}


def torture_kill_points(tally: Tally, seed: int, seconds: float) -> None:
    """Kill at every point, again and again."""
    hits = kill_everywhere(tally, seed, seconds=seconds, latest_arrival=60 if seconds > 60 else 6)
    points = find_points()
    missed = [
        f"{point} with {one}"
        for point, backends in points.items()
        for one in backends
        if not hits[one][point]
    ]
    total = sum(counter.total() for counter in hits.values())
    print(f"  {len(points)} points, killed at {total} times; never reached: {', '.join(missed) or 'none'}")
    assert not missed, "a point was never reached"


def torture_linearizability(tally: Tally, seed: int, seconds: float) -> None:
    """Histories of a server that is killed again and again, of a cache that fails, and of one that evicts."""
    share = seconds / len(BACKENDS) / 3
    for l2_backend in BACKENDS:
        until = time.monotonic() + share
        histories = operations = 0
        while not histories or time.monotonic() < until:
            left = min(60.0, max(5.0, until - time.monotonic()))
            operations += len(check_under_kills(tally, l2_backend, seed + histories, left))
            histories += 1
        until = time.monotonic() + share
        while time.monotonic() < until:
            for failing in (CacheTierType.L2, CacheTierType.L3):
                operations += len(check_under_faults(tally, l2_backend, failing, seed + histories, 2))
                histories += 1
        until = time.monotonic() + share
        while time.monotonic() < until:
            policy = POLICIES[histories % len(POLICIES)]
            operations += len(check_under_eviction(tally, l2_backend, policy, seed + histories, 2))
            histories += 1
        print(f"  {l2_backend}: {operations:,} operations in {histories} histories, each explained")


def torture_leases(tally: Tally, seed: int, seconds: float) -> None:
    """Borrowers of a server that is killed again and again, and of a pool in this process."""
    share = seconds / len(BACKENDS)
    for l2_backend in BACKENDS:
        until = time.monotonic() + share
        histories = operations = 0
        while not histories or time.monotonic() < until:
            left = min(60.0, max(5.0, (until - time.monotonic()) / 2))
            operations += len(check_leases_under_kills(tally, l2_backend, seed + histories, left))
            operations += len(check_leases_in_process(tally, l2_backend, seed + histories, 2))
            histories += 1
        print(f"  {l2_backend}: {operations:,} operations in {2 * histories} histories, each explained")


def torture_with_machines(tally: Tally, seed: int, seconds: float) -> None:
    """Every state machine in turn."""
    until = time.monotonic() + seconds
    rounds = 0
    while not rounds or time.monotonic() < until:
        for name in NAMES:
            examples = _EXAMPLES_AT_A_TIME[name.split("-", maxsplit=1)[0]]
            run_machine(name, tally, examples=examples, seed=seed + rounds)
            if rounds and time.monotonic() > until:
                break
        rounds += 1
    print(f"  {len(NAMES)} machines, {rounds} rounds")


def torture_by_soaking(tally: Tally, seed: int, seconds: float) -> None:
    """A soak of each backend."""
    grown: list[str] = []
    broken: list[str] = []
    for l2_backend in BACKENDS:
        report = run_soak(tally, l2_backend, seed, seconds / len(BACKENDS))
        print(f"  {l2_backend}, medians of each quarter:")
        print("\n".join(f"    {line}" for line in report.lines()))
        grown += report.grown()
        broken += report.breaches
    assert not broken, broken
    assert not grown, grown


_PARTS: dict[str, Callable[[Tally, int, float], None]] = {
    "kill points": torture_kill_points,
    "linearizability": torture_linearizability,
    "leases": torture_leases,
    "state machine": torture_with_machines,
    "soak": torture_by_soaking,
}


def main(arguments: list[str]) -> int:
    """Run the parts one after another; the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/torture", description="Kill, break and soak the store, and tell what that found."
    )
    parser.add_argument("--minutes", type=float, default=2, help="how long all of it takes (default: 2)")
    parser.add_argument("--seed", type=int, help="repeat a run; chosen and printed if not given")
    parser.add_argument("--only", choices=_PARTS, help="run one part alone, for all of the time")
    options = parser.parse_args(arguments)
    seed = random.randrange(1_000_000) if options.seed is None else options.seed
    logging.disable(logging.CRITICAL)

    print(f"seed {seed}: to repeat this run, scripts/torture --minutes {options.minutes:g} --seed {seed}")
    tally = Tally()
    failed: list[str] = []
    for name, part in _PARTS.items():
        if options.only not in {None, name}:
            continue
        seconds = options.minutes * 60 * (_SHARES[name] if options.only is None else 1)
        print(f"{name}, {seconds:.0f} s", flush=True)
        try:
            part(tally, seed, seconds)
        except Exception:  # noqa: BLE001 -- the other parts are to run whatever this one met
            traceback.print_exc()
            failed.append(name)
    print()
    print("\n".join(tally.lines()))
    if failed:
        print(f"failed: {', '.join(failed)}; seed {seed}")
    return 1 if failed or tally.breaches else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
