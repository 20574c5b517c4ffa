"""Runs every hostile case against a real server, and prints what each cost the others.

Exit code 1 if a call of theirs failed, a put that was acknowledged is gone, or the server did not last.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tests.hostile.attacks import ATTACKS
from tests.hostile.cases import Outcome, run_case

_HEADINGS = (
    "attack",
    "how often",
    "others' calls",
    "failed",
    "p50 ms",
    "p99 ms",
    "worst ms",
    "stream's gap s",
    "MB",
)


def main(arguments: list[str]) -> int:
    """Run the cases one after another; the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/hostile", description="Attack a server, and tell what that costs its other clients."
    )
    parser.add_argument("--seconds", type=float, default=10, help="how long each attack lasts (default: 10)")
    parser.add_argument("--only", choices=ATTACKS, help="run one attack alone")
    options = parser.parse_args(arguments)
    attacks = [attack for attack in ATTACKS.values() if options.only in {None, attack.name}]
    for attack in attacks:
        print(f"{attack.name}: {attack.tried}")
    print()
    print(_row(_HEADINGS))
    outcomes = []
    for case in (None, *attacks):
        outcomes.append(run_case(case, options.seconds))
        print(line_of(outcomes[-1]), flush=True)
    breaches = [f"{outcome.name}: {breach}" for outcome in outcomes for breach in outcome.breaches]
    print()
    print("\n".join(breaches) or "nobody else noticed more than that")
    return 1 if breaches else 0


def line_of(outcome: Outcome) -> str:
    """The row of the table."""
    cells = (
        outcome.name,
        outcome.times,
        f"{len(outcome.seconds):,}",
        f"{sum(outcome.failures.values()):,}",
        f"{outcome.percentile_ms(50):.1f}",
        f"{outcome.percentile_ms(99):.1f}",
        f"{outcome.percentile_ms(100):.1f}",
        f"{outcome.longest_silence:.2f}",
        f"{outcome.memory_mb:,.0f}",
    )
    return _row(cells)


def _row(cells: Sequence[str]) -> str:
    return f"{cells[0]:>18}" + "".join(f"{cell:>19}" for cell in cells[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
