"""The pool's policy keeps what its design promised."""

from __future__ import annotations

from proxystash_server.pool.requests import SelectionPolicy
from tests.simulation.__main__ import DESIGNED, TOLERANCE, simulate


def test_as_many_uses_succeed_as_the_policy_was_designed_for() -> None:
    """One of the seeds: 240 proxies, five targets that ban, one and a half hours. Chance would have 80%."""
    found = simulate(1, 1.0, SelectionPolicy.BALANCED)
    assert abs(found.success_rate - DESIGNED) <= TOLERANCE
    assert found.done > 0.98
    assert found.busiest_tenth < 0.3
    # What is evicted is what fails.
    assert found.evicted["good"] + found.evicted["slow"] <= 3
