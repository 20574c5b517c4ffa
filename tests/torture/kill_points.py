"""Killing a process at every named point, and looking at what that leaves."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
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

from proxystash_server import cache, pool
from proxystash_server.cache import L2BackendType
from proxystash_server.cache.ground.killpoints import VARIABLE
from tests.torture.kill_child import FAILING_KEYS, KEYS, MAX_LEASES, Job
from tests.torture.lease_model import LeaseModel
from tests.torture.model import Invalidated, Model, Seen, State
from tests.torture.stores import BACKENDS, temporary_directory
from tests.torture.tally import BreachError, Tally

ROOT: Final = Path(__file__).resolve().parents[2]
_KILL_POINT: Final = re.compile(r"""\bkill_point\(\s*(["'])(.+?)\1""")
_OPERATIONS: Final = 600
_THRESHOLD: Final = 3
_SECONDS_FOR_ONE: Final = 120


def find_points() -> dict[str, frozenset[L2BackendType]]:
    """Every point that the source of the cache and the pool names, and the backends it exists with."""
    points: dict[str, frozenset[L2BackendType]] = {}
    roots = [Path(root) for package in (cache, pool) for root in package.__path__]
    for path in sorted(path for root in roots for path in root.rglob("*.py")):
        backends = frozenset({L2BackendType.JSONL} if path.parent.name == "jsonl" else BACKENDS)
        source = path.read_text()
        names = list(_KILL_POINT.finditer(source))
        assert path.name == "killpoints.py" or len(names) == source.count("kill_point("), (
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
    # Whether what is evicted for its failures is banned.
    bans: bool = True
    model: Model = field(init=False)
    leases: LeaseModel = field(default_factory=lambda: LeaseModel(MAX_LEASES))
    runs: int = 0
    # Whether L3 was away when the last process ended, and the keys that were changed since it went.
    l3_is_away: bool = False
    missed: set[str] = field(default_factory=set)
    # Whether the check must find no fault; not so after damage that was done on purpose.
    sound: bool = True

    def __post_init__(self) -> None:
        self.model = Model(KEYS, threshold=_THRESHOLD, bans=self.bans)

    def run(
        self,
        *,
        kill_at: str = "",
        operations: int = _OPERATIONS,
        changes_only: bool = False,
        rotates_key: bool = False,
        l3_is_away: bool = False,
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
            l3_is_away,
            self.bans,
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
        if not (self.l3_is_away and l3_is_away):
            # Even a start that was killed may have brought L3 what stood in the journal.
            self.missed.clear()
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
                if begun["begin"] == "return":
                    # From now on, who has what is not known before it has returned.
                    self.missed.clear()
            else:
                assert begun is not None, "an acknowledgement of nothing"
                self.tally.add("operations", len(begun["keys"]))
                if "refused" in message:
                    assert self.l3_is_away, f"{message['refused']} was refused, although nothing is wrong"
                else:
                    self._lent(begun, message["acknowledged"])
                    self._acknowledged(begun, message["acknowledged"])
                begun = None
        if begun is not None:
            self._in_flight(begun)

    def _compare(self, found: dict[str, Any]) -> None:
        self.l3_is_away = found["away"]
        self.leases.listed(found["leases"], is_whole=found["loaded"] and self.sound)
        for key in KEYS:
            self._read(key, found["got"][key], "a get in the next process")
            self._read(key, found["listed"].get(key), "a list in the next process")
        assert not found["check"] or not self.sound, f"the check finds faults: {found['check']}"
        assert not found["disagreements"], f"the tiers disagree: {found['disagreements']}"
        assert found["complete"] or self.l3_is_away, "a tier is degraded, or has missed something"

    def _is_known(self, key: str) -> bool:
        """Whether L3, or the journal, can be asked."""
        return not self.l3_is_away or key in self.missed

    def _read(self, key: str, told: list[Any] | None, how: str) -> None:
        self.model.read(key, _seen(told), 0, lenient=not self._is_known(key), how=how)

    def _acknowledged(self, begun: dict[str, Any], answer: Any) -> None:
        kind, keys = begun["begin"], begun["keys"]
        key = keys[0]
        is_exact = self._is_known(key) and not self.model.in_doubt(key)
        match kind:
            case "put" | "put_many":
                assert all(tiers and ("l3" in tiers or self.l3_is_away) for tiers in answer), (
                    f"a put was stored in {answer}"
                )
                for one in keys:
                    self.model.put(one, State(begun["tag"]), 0)
                    if not self._is_known(one):
                        self.model.put_blindly(one, State(begun["tag"]))
                self.missed.update(keys)
            case "delete":
                expected = is_exact and self.model.known(key, 0) is not None
                assert answer == expected or not is_exact, f"delete of {key!r} told {answer}"
                self.model.delete(key)
                self.missed.add(key)
            case "invalidate":
                done = Invalidated(*answer)
                self.model.invalidate(key, done, 0, lenient=not self._is_known(key))
                if done.found:
                    self.missed.add(key)
            case "get":
                self._read(key, answer[0], "a get")
            case "list":
                for one in KEYS:
                    self._read(one, answer.get(one), "a list")
            case "clear":
                if not self.l3_is_away and not any(map(self.model.in_doubt, KEYS)):
                    count = sum(self.model.known(one, 0) is not None for one in KEYS)
                    assert answer == count, f"clear told {answer}, and there were {count}"
                self.model.clear()
                self.missed.update(KEYS)
            case "leave":
                self.l3_is_away = True
                self.missed.clear()
            case "return":
                assert answer, "L3 has not caught up"
                self.l3_is_away = False

    def _lent(self, begun: dict[str, Any], answer: Any) -> None:
        key, lease = begun["keys"][0], begun["tag"]
        match begun["begin"]:
            case "delete":
                self.leases.removed(key, certain=self._is_known(key))
            case "invalidate" if Invalidated(*answer).evicted:
                self.leases.removed(key)
            case "clear":
                for one in KEYS:
                    self.leases.removed(one)
            case "acquire" if answer is not None:
                lease, key, told = answer
                self._read(key, told, "a lease")
                self.leases.granted(lease, key)
            case "acquire" if not self.l3_is_away:
                never_rest = [key for key in KEYS if key not in FAILING_KEYS and not self.model.in_doubt(key)]
                self.leases.refused(key for key in never_rest if self.model.known(key, 0) is not None)
            case "release":
                self.leases.released(lease, answer)
            case "renew":
                self.leases.renewed(lease, answer)
            case "maintain":
                self.leases.written_down()

    def _in_flight(self, begun: dict[str, Any]) -> None:
        kind, keys = begun["begin"], begun["keys"]
        match kind:
            case "put" | "put_many":
                for key in keys:
                    self.model.put(key, State(begun["tag"]), 0, certain=False)
                    if not self._is_known(key):
                        self.model.put_blindly(key, State(begun["tag"]))
            case "delete":
                self.model.delete(keys[0], certain=False)
                self.leases.removed(keys[0], certain=False)
            case "invalidate":
                self.model.invalidate(keys[0], None, 0)
                self.leases.removed(keys[0], certain=False)
            case "clear":
                self.model.clear(certain=False)
                for key in KEYS:
                    self.leases.removed(key, certain=False)
            case "acquire":
                self.leases.may_be_granted()
            case "release":
                self.leases.may_be_released(begun["tag"])


def _seen(told: list[Any] | None) -> Seen | None:
    return None if told is None else Seen(*told)


# -- what it takes to reach a point


def _while_working(store: Store, kill_at: str) -> bool:
    return store.run(kill_at=kill_at, l3_is_away=store.random.random() < 0.3)


def _after_a_kill(store: Store, kill_at: str) -> bool:
    """L2 is not believed at the start."""
    store.run(kill_at=f"sqlite.after_commit:{store.random.randint(1, 20)}")
    return store.run(kill_at=kill_at, operations=20)


def _at_first_start(store: Store, kill_at: str) -> bool:
    with temporary_directory() as directory:
        fresh = Store(directory, store.l2_backend, store.tally, store.random)
        killed = fresh.run(kill_at=kill_at, operations=20)
        fresh.check()
    return killed


def _after_damage(store: Store, kill_at: str) -> bool:
    """L3's file has lost its first page; L2 holds everything, so that nothing may be lost."""

    def damage(path: Path) -> None:
        with path.open("r+b") as file:
            file.write(b"\xa5" * 1024)

    # What was deleted may still be found on some page.
    return _without_l3(store, kill_at, damage, changes_only=True)


def _after_loss(store: Store, kill_at: str) -> bool:
    """L3's directory is gone; likewise."""
    return _without_l3(store, kill_at, lambda path: shutil.rmtree(path.parent), changes_only=False)


def _without_l3(store: Store, kill_at: str, harm: Callable[[Path], object], *, changes_only: bool) -> bool:
    with temporary_directory() as directory:
        harmed = Store(directory, store.l2_backend, store.tally, store.random, l2_max_entries=None)
        harmed.run(operations=60, changes_only=changes_only)
        harm(directory / "l3" / "proxystash.db")
        store.tally.add("corruptions")
        harmed.sound = False
        killed = harmed.run(kill_at=kill_at, operations=20)
        harmed.check()
        harmed.sound = True
        harmed.check()
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
_WAYS: Final[tuple[_Way, ...]] = (
    _while_working,
    _after_a_kill,
    _at_first_start,
    _during_a_rotation,
    _after_damage,
    _after_loss,
)
# Where a point is known to be reached; one that is not, by each way until one succeeds.
_KNOWN_WAYS: Final[dict[str, tuple[_Way, ...]]] = {
    "key.": (_at_first_start,),
    "replace.": (_at_first_start, _during_a_rotation),
    "salvage.": (_after_damage,),
    "match.": (_after_a_kill,),
    "fill_up.": (_after_damage, _after_loss),
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
