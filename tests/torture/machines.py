"""The state machines, and running them: each for a number of examples, from a seed or always the same."""

from __future__ import annotations

import json
from typing import Final
from unittest import mock

import hypothesis
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

import proxystash
from proxystash_server.cache import CacheTierConfig, L2BackendType
from tests.support.rpc import serving
from tests.torture.lending_machine import LendingMachine
from tests.torture.machine import KEYS, CacheMachine, some_keys, some_ttl
from tests.torture.model import Seen, State
from tests.torture.stores import SECOND_US, Driver, RpcDriver, all_of, credentials_of
from tests.torture.tally import BreachError, Tally


class LibraryMachine(CacheMachine):
    """With what only the library has: warming from files, and exporting to them."""

    @rule(keys=some_keys, ttl=some_ttl)
    def warm(self, keys: list[str], ttl: int) -> None:
        tag = self.new_tag()
        unknown, may_be_refused = self.unknown(), self.may_be_refused(keys)
        path = self.directory.with_name("warm.jsonl")
        with path.open("w") as file:
            for key in keys:
                username, password = credentials_of(key, tag)
                record = {
                    "proxy_url": f"http://{key}.example:80",
                    "key": key,
                    "source": tag,
                    "ttl_seconds": ttl,
                }
                secrets = {"username": username, "password": password} if username else {}
                file.write(json.dumps({**record, **secrets, "labels": {"tag": tag}}) + "\n")
        result = self.manager.warm_from_file(str(path))
        assert result["loaded"] == len(keys) or may_be_refused, result
        self.tally.add("operations", len(keys))
        new = State(tag, 0, self.clock.now_us + ttl * SECOND_US)
        for key in keys:
            taken = result["loaded"] == len(keys)
            self.has_put(key, new, blind=key in unknown, taken=taken, lasts=not may_be_refused)

    @precondition(lambda self: self.l3_knows_all)
    @rule()
    def export(self) -> None:
        path = self.directory.with_name("export.jsonl")
        self.manager.export_to_file(str(path), include_credentials=True)
        records = [json.loads(line) for line in path.read_text().splitlines()]
        seen = {one["key"]: Seen(one["source"], one.get("failure_count", 0)) for one in records}
        self.has_seen(dict(all_of(KEYS, seen)), frozenset(), "an export")


class GrpcMachine(CacheMachine):
    """The same through a server and its client. A small L2, so that entries come from every tier."""

    l2_max_entries = (4, 4)
    faulty = False

    def connect(self) -> Driver:
        server = self.session.enter_context(serving(self.manager, threads=2))
        return RpcDriver(self.session.enter_context(proxystash.Client(server.address, retry=None)))


# Instead of the five minutes of hypothesis, which the time limit of a test would cut off with the report.
_SHRINKING_SECONDS: Final = 60
_NO_L1: Final = CacheTierConfig(enabled=False)
_MACHINES: Final[dict[str, type[CacheMachine]]] = {
    f"{base.__name__.removesuffix('Machine').lower()}-{l2_backend}{'' if has_l1 else '-without-l1'}": type(
        base.__name__, (base,), {"l2_backend": l2_backend, **({} if has_l1 else {"l1": _NO_L1})}
    )
    for base in (LibraryMachine, GrpcMachine, LendingMachine)
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
