"""Killing a process at every named point, and looking at what that leaves."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from proxystash_server import cache
from proxystash_server.cache import L2BackendType
from proxystash_server.cache.ground.killpoints import VARIABLE
from tests.torture.kill_child import KEYS, Job
from tests.torture.model import Invalidated, Model, Seen, State
from tests.torture.stores import BACKENDS, temporary_directory
from tests.torture.tally import BreachError, Tally

ROOT: Final = Path(__file__).resolve().parents[2]
_REACH: Final = re.compile(r"""\breach\(\s*(["'])(.+?)\1""")
_OPERATIONS: Final = 600
_THRESHOLD: Final = 3
_SECONDS_FOR_ONE: Final = 120


def find_points() -> dict[str, frozenset[L2BackendType]]:
    """Every point that the source of the cache names, and the backends it exists with."""
    points: dict[str, frozenset[L2BackendType]] = {}
    (root,) = cache.__path__
    for path in sorted(Path(root).rglob("*.py")):
        backends = frozenset({L2BackendType.JSONL} if path.parent.name == "jsonl" else BACKENDS)
        source = path.read_text()
        names = list(_REACH.finditer(source))
        assert path.name == "killpoints.py" or len(names) == source.count("reach("), (
            f"{path}: a name is hidden"
        )
        for match in names:
            points[match[2]] = points.get(match[2], frozenset()) | backends
    return points


@dataclass
class Store:
    """A store under torture: its directory, and what it may hold."""

    directory: Path
    l2_backend: L2BackendType
    tally: Tally
    random: random.Random
    l2_max_entries: int | None = 8
    model: Model = field(default_factory=lambda: Model(KEYS, threshold=_THRESHOLD))
    runs: int = 0
    # Whether the check must find no fault; not so after damage that was done on purpose.
    sound: bool = True

    def run(
        self,
        *,
        kill_at: str = "",
        operations: int = _OPERATIONS,
        changes_only: bool = False,
        rotates_key: bool = False,
    ) -> bool:
        """Have a new process check the store and work on it; whether it was killed where it should be.

        Raises BreachError for anything in the store, or told of it, that what was acknowledged rules out.
        """
        self.runs += 1
        job = Job(
            str(self.directory),
            str(self.l2_backend),
            self.random.randrange(1 << 30),
            f"run{self.runs}",
            operations,
            self.l2_max_entries,
            changes_only,
            rotates_key,
        )
        environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
        process = subprocess.run(
            [sys.executable, "-m", "tests.torture.kill_child", job.to_json()],
            cwd=ROOT,
            env={**environment, **({VARIABLE: kill_at} if kill_at else {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS_FOR_ONE,
            check=False,
        )
        killed = process.returncode == -signal.SIGKILL
        assert killed or process.returncode == 0, (kill_at, job, process.stderr.decode())
        try:
            self._follow(map(json.loads, process.stdout.splitlines()))
        except AssertionError as error:
            error.add_note(f"with {self.l2_backend}, in {job}, killed at {kill_at or 'no point'}")
            raise
        self.tally.add("kills", killed)
        return killed

    def check(self) -> None:
        """Have a fresh process look at the store."""
        self.run(operations=0)

    def _follow(self, told: Iterator[dict[str, Any]]) -> None:
        begun: dict[str, Any] | None = None
        for message in told:
            if "check" in message:
                self._compare(message)
            elif "begin" in message:
                begun = message
            else:
                assert begun is not None, "an acknowledgement of nothing"
                self.tally.add("operations", len(begun["keys"]))
                self._acknowledged(begun, message["acknowledged"])
                begun = None
        if begun is not None:
            self._in_flight(begun)

    def _compare(self, found: dict[str, Any]) -> None:
        for key in KEYS:
            self.model.read(key, _seen(found["got"][key]), 0, how="a get in the next process")
            self.model.read(key, _seen(found["listed"].get(key)), 0, how="a list in the next process")
        assert not found["check"] or not self.sound, f"the check finds faults: {found['check']}"
        assert not found["disagreements"], f"the tiers disagree: {found['disagreements']}"
        assert found["complete"], "a tier is degraded, or has missed something, without any fault"

    def _acknowledged(self, begun: dict[str, Any], answer: Any) -> None:
        kind, keys = begun["begin"], begun["keys"]
        match kind:
            case "put" | "put_many":
                assert all({"l3"} <= set(tiers) for tiers in answer), f"a put was stored in {answer}"
                for key in keys:
                    self.model.put(key, State(begun["tag"]), 0)
            case "delete":
                expected = self.model.known(keys[0], 0) is not None
                assert answer == expected, f"delete of {keys[0]!r} told {answer}"
                self.model.delete(keys[0])
            case "invalidate":
                self.model.invalidate(keys[0], Invalidated(*answer), 0)
            case "get":
                self.model.read(keys[0], _seen(answer[0]), 0, how="a get")
            case "list":
                for key in KEYS:
                    self.model.read(key, _seen(answer.get(key)), 0, how="a list")
            case "clear":
                expected_count = sum(self.model.known(key, 0) is not None for key in KEYS)
                assert answer == expected_count, f"clear told {answer}, and there were {expected_count}"
                self.model.clear()

    def _in_flight(self, begun: dict[str, Any]) -> None:
        kind, keys = begun["begin"], begun["keys"]
        match kind:
            case "put" | "put_many":
                for key in keys:
                    self.model.put(key, State(begun["tag"]), 0, certain=False)
            case "delete":
                self.model.delete(keys[0], certain=False)
            case "invalidate":
                self.model.invalidate(keys[0], None, 0)
            case "clear":
                self.model.clear(certain=False)


def _seen(told: list[Any] | None) -> Seen | None:
    return None if told is None else Seen(*told)


# -- what it takes to reach a point


def _while_working(store: Store, kill_at: str) -> bool:
    return store.run(kill_at=kill_at)


def _at_first_start(store: Store, kill_at: str) -> bool:
    with temporary_directory() as directory:
        fresh = Store(directory, store.l2_backend, store.tally, store.random)
        killed = fresh.run(kill_at=kill_at, operations=20)
        fresh.check()
    return killed


def _after_damage(store: Store, kill_at: str) -> bool:
    """L3's file has lost its first page; L2 holds everything, so that nothing may be lost."""
    with temporary_directory() as directory:
        damaged = Store(directory, store.l2_backend, store.tally, store.random, l2_max_entries=None)
        damaged.run(operations=60, changes_only=True)
        with (directory / "l3" / "proxystash.db").open("r+b") as file:
            file.write(b"\xa5" * 1024)
        store.tally.add("corruptions")
        damaged.sound = False
        killed = damaged.run(kill_at=kill_at, operations=20)
        damaged.check()
        damaged.sound = True
        damaged.check()
    return killed


def _during_a_rotation(store: Store, kill_at: str) -> bool:
    """What is left of an interrupted rotation can be used as it is, and finished by another one."""
    with temporary_directory() as directory:
        sealed = Store(directory, store.l2_backend, store.tally, store.random)
        sealed.run(operations=60, changes_only=True)
        killed = sealed.run(kill_at=kill_at, operations=0, rotates_key=True)
        sealed.check()
        sealed.run(operations=20, rotates_key=True)
        sealed.check()
    return killed


_Way = Callable[[Store, str], bool]
_WAYS: Final[tuple[_Way, ...]] = (_while_working, _at_first_start, _during_a_rotation, _after_damage)
# Where a point is known to be reached; one that is not, by each way until one succeeds.
_KNOWN_WAYS: Final[dict[str, tuple[_Way, ...]]] = {
    "key.": (_at_first_start,),
    "replace.": (_at_first_start, _during_a_rotation),
    "salvage.": (_after_damage,),
}


def _visit(store: Store, point: str, latest_arrival: int) -> int:
    """Kill at one point, at some arrival up to the given one, else at the first; how often it was hit."""
    arrival = store.random.randint(1, latest_arrival)
    known = next((ways for prefix, ways in _KNOWN_WAYS.items() if point.startswith(prefix)), None)
    if known is not None:
        # There it comes once or twice, not often enough for a choice.
        hits = sum(way(store, f"{point}:1") for way in known)
    else:
        hits = int(_while_working(store, f"{point}:{arrival}"))
    return hits or next((1 for way in _WAYS if way(store, f"{point}:1")), 0)


def kill_everywhere(
    tally: Tally, seed: int, *, seconds: float = 0, latest_arrival: int = 6
) -> dict[L2BackendType, Counter[str]]:
    """Kill at every point with each backend, again and again for so long; how often each was hit.

    The store is never made new, so every start finds what many kills have left.
    """
    until = time.monotonic() + seconds

    def torture(l2_backend: L2BackendType) -> Counter[str]:
        chance = random.Random(f"{seed} {l2_backend}")
        hits: Counter[str] = Counter()
        points = sorted(point for point, backends in find_points().items() if l2_backend in backends)
        with ExitStack() as stack:
            store = Store(stack.enter_context(temporary_directory()), l2_backend, tally, chance)
            while True:
                chance.shuffle(points)
                for point in points:
                    hits[point] += _visit(store, point, latest_arrival)
                if time.monotonic() > until:
                    break
            store.check()
        return hits

    with ThreadPoolExecutor(len(BACKENDS)) as pool:
        futures = {l2_backend: pool.submit(torture, l2_backend) for l2_backend in BACKENDS}
        try:
            return {l2_backend: future.result() for l2_backend, future in futures.items()}
        except BreachError as error:
            tally.add(error.kind)
            raise
