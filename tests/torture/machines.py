"""Running the state machines: each of them for a number of examples, from a seed or always the same."""

from __future__ import annotations

from typing import Final
from unittest import mock

import hypothesis
from hypothesis.stateful import run_state_machine_as_test

from proxystash_server.cache import CacheTierConfig, L2BackendType
from tests.torture.machine import CacheMachine, GrpcMachine, LibraryMachine
from tests.torture.tally import BreachError, Tally

# Instead of the five minutes of hypothesis, which the time limit of a test would cut off with the report.
_SHRINKING_SECONDS: Final = 60
_NO_L1: Final = CacheTierConfig(enabled=False)
_MACHINES: Final[dict[str, type[CacheMachine]]] = {
    f"{base.__name__.removesuffix('Machine').lower()}-{l2_backend}{'' if has_l1 else '-without-l1'}": type(
        base.__name__, (base,), {"l2_backend": l2_backend, **({} if has_l1 else {"l1": _NO_L1})}
    )
    for base in (LibraryMachine, GrpcMachine)
    for l2_backend in L2BackendType
    for has_l1 in (True, False)
}
NAMES: Final = tuple(_MACHINES)


def make_machine(name: str, tally: Tally) -> type[CacheMachine]:
    """The machine that counts what it does in `tally`."""
    return type(_MACHINES[name].__name__, (_MACHINES[name],), {"tally": tally})


def run_machine(
    name: str, tally: Tally, *, examples: int, steps: int = 40, seed: int | None = None, shrink: bool = True
) -> None:
    """Run one machine; without a seed the examples are the same each time.

    A failure is raised with the steps that led to it, as few as can be found if `shrink` is set.
    """
    phases = set(hypothesis.Phase) - (
        set() if shrink else {hypothesis.Phase.shrink, hypothesis.Phase.explain}
    )
    machine = make_machine(name, tally)
    if seed is not None:
        # Not the same examples for each of them.
        machine = hypothesis.seed(f"{seed} {name}")(machine)
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=seed is None,
        deadline=None,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    try:
        with mock.patch("hypothesis.internal.conjecture.engine.MAX_SHRINKING_SECONDS", _SHRINKING_SECONDS):
            run_state_machine_as_test(machine, settings=settings)
    except BreachError as error:
        tally.add(error.kind)
        raise
