"""Runs the simulation and says what came of it."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from proxystash_server.pool.requests import SelectionPolicy
from tests.simulation.fleet import Measures, Simulation

# The share of uses that succeed when the policy was designed, and how far from that it may be.
DESIGNED, TOLERANCE = 0.891, 0.03


def simulate(seed: int, load: float, policy: SelectionPolicy) -> Measures:
    """One fleet."""
    with tempfile.TemporaryDirectory() as directory:
        return Simulation(seed, Path(directory), load, policy).run()


def main() -> int:
    """The exit code: 1 if fewer uses succeed than should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="how many fleets")
    parser.add_argument("--load", type=float, default=1.0, help="how many times as many jobs")
    parser.add_argument("--policy", default="balanced", choices=[one.name.lower() for one in SelectionPolicy])
    options = parser.parse_args()
    print("seed  success  failed per 1,000 jobs  jobs done  busiest tenth  evicted")
    rates = []
    for seed in range(1, options.seeds + 1):
        found = simulate(seed, options.load, SelectionPolicy[options.policy.upper()])
        rates.append(found.success_rate)
        print(
            f"{seed:4}  {found.success_rate:7.1%}  {found.failed:21.0f}  {found.done:9.1%}  "
            f"{found.busiest_tenth:13.1%}  {dict(found.evicted)}",
            flush=True,
        )
    mean = statistics.mean(rates)
    print(f"mean  {mean:7.1%}")
    if options.load == 1.0 and options.policy == "balanced" and mean < DESIGNED - TOLERANCE:
        print(f"fewer uses succeed than the {DESIGNED:.1%} that the policy was designed for")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
