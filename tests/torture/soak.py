"""A long mixed load with faults coming and going, and whether what the process uses stays flat.

As a program, `python -m tests.torture.soak SECONDS SEED BACKEND`, it is the process that is measured: it
prints its Report as JSON.
"""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import proxystash
from proxystash_server.cache import CacheManager, CacheTierConfig, CacheTierType, L2BackendType
from tests.support.rpc import serving
from tests.torture.faults import Faults
from tests.torture.model import Model, State
from tests.torture.stores import (
    Driver,
    LibraryDriver,
    RefusedError,
    RpcDriver,
    eager_compaction,
    is_complete,
    make_config,
    temporary_directory,
)
from tests.torture.tally import BreachError, Tally

ROOT: Final = Path(__file__).resolve().parents[2]
_KEYS_PER_THREAD: Final = 60
_TTL_SECONDS: Final = 24 * 3600
_SAMPLES: Final = 80
# What may grow from the second quarter to the last: by a factor, and by an amount for what begins small.
LIMITS: Final = {
    "memory_kb": (1.25, 16_384),
    "threads": (1.0, 4),
    "descriptors": (1.0, 12),
    "disk_kb": (1.5, 4096),
    # SQLite's logs of two databases, each of which grows to 16 MiB and a little before it starts over.
    "logs_kb": (1.0, 40_960),
}
_LONGEST_HEALING: Final = 90


@dataclass
class Report:
    """What one soak measured: medians of each quarter, and what it counted."""

    quarters: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    breaches: list[str] = field(default_factory=list)

    def grown(self) -> list[str]:
        """What did not stay flat."""
        return [
            f"{what} grew from {quarters[1]:,.0f} to {quarters[3]:,.0f}"
            for what, quarters in self.quarters.items()
            if quarters[3] > quarters[1] * LIMITS[what][0] + LIMITS[what][1]
        ]

    def lines(self) -> list[str]:
        """The medians, for people."""
        return [
            f"{what + ':':14}" + "".join(f"{value:>12,.0f}" for value in quarters)
            for what, quarters in self.quarters.items()
        ]


def run_soak(tally: Tally, l2_backend: L2BackendType, seed: int, seconds: float) -> Report:
    """Soak a cache in a process of its own."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.torture.soak", str(seconds), str(seed), str(l2_backend)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=seconds + 2 * _LONGEST_HEALING,
        check=False,
    )
    assert process.returncode == 0, process.stderr.decode()
    report = Report(**json.loads(process.stdout))
    for what, count in report.counts.items():
        tally.add(what, count)
    return report


class _Worker:
    """A client with keys of its own, so that it knows what each of them must hold."""

    def __init__(self, number: int, driver: Driver, soak: _Soak) -> None:
        self._driver = driver
        self._soak = soak
        self._chance = random.Random(f"{soak.seed} {number}")
        self._keys = [f"w{number}-{index}" for index in range(_KEYS_PER_THREAD)]
        self._model = Model(self._keys, threshold=3)
        self._tags = 0

    def work(self) -> None:
        while not self._soak.ended.is_set():
            self.step()

    def check(self) -> None:
        """Once every fault is gone: every key holds what it must."""
        for key in self._keys:
            self._model.read(key, self._driver.get([key])[0], 0, how="the last get")

    def step(self) -> None:
        chance, model, driver = self._chance, self._model, self._driver
        kind = chance.choices(["put", "get", "delete", "invalidate", "brief"], [30, 50, 6, 8, 4])[0]
        keys = chance.sample(self._keys, chance.choice([1, 1, 1, 5]))
        key = keys[0]
        self._tags += 1
        tag = f"{key}-{self._tags}"
        self._soak.tally.add("operations", len(keys))
        match kind:
            case "put":
                _, lenient = self.attempt(driver.put, keys, tag, ttl_seconds=_TTL_SECONDS)
                for one in keys:
                    model.put(one, State(tag), 0)
                    if lenient:
                        model.put_blindly(one, State(tag))
            case "get":
                seen, lenient = self.attempt(driver.get, keys)
                for one, what in zip(keys, seen or (), strict=seen is not None):
                    model.read(one, what, 0, lenient=lenient, how="a get")
            case "delete":
                held, _ = self.attempt(driver.delete, key)
                model.delete(key, certain=held is not None)
            case "invalidate":
                answer, lenient = self.attempt(driver.invalidate, key)
                model.invalidate(key, answer, 0, lenient=lenient)
            case _:
                # Ever new keys that expire at once: what is stored stays, what expires must go.
                self.attempt(driver.put, [f"brief-{tag}"], tag, ttl_seconds=1)

    def attempt(self, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, bool]:
        """The answer, None if it was refused, and whether a fault may have had a part in it."""
        epoch, lenient = self._soak.faults.epoch, not self._soak.complete
        answer = None
        refused = False
        try:
            answer = operation(*args, **kwargs)
        except RefusedError:
            refused = True
        lenient = lenient or not self._soak.complete or epoch != self._soak.faults.epoch
        assert lenient or not refused, "refused although nothing is wrong"
        return answer, lenient


class _Soak:
    """The load and the faults, in this process."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.ended = threading.Event()
        self.faults = Faults()
        self.tally = Tally()
        self.manager: CacheManager
        self._samples: dict[str, list[float]] = {what: [] for what in LIMITS}

    @property
    def complete(self) -> bool:
        return not self.faults.any and is_complete(self.manager)

    def run(self, l2_backend: L2BackendType, seconds: float) -> Report:
        report = Report()
        with ExitStack() as stack:
            directory = stack.enter_context(temporary_directory())
            stack.enter_context(eager_compaction())
            stack.enter_context(self.faults.installed())
            config = make_config(directory, l2_backend, l1=CacheTierConfig(max_entries=100)).model_copy(
                update={"enable_background_cleanup": True, "cleanup_interval_seconds": 1}
            )
            self.manager = stack.enter_context(CacheManager(config))
            server = stack.enter_context(serving(self.manager, threads=2))
            client = stack.enter_context(proxystash.Client(server.address, retry=None))
            drivers: list[Driver] = [LibraryDriver(self.manager)] * 2 + [RpcDriver(client)] * 2
            workers = [_Worker(number, driver, self) for number, driver in enumerate(drivers)]
            with ThreadPoolExecutor(len(workers)) as pool:
                futures = [pool.submit(worker.work) for worker in workers]
                try:
                    self._let_time_pass(directory, seconds)
                finally:
                    self.ended.set()
            self._heal(_LONGEST_HEALING)
            checks: list[Callable[[], object]] = [future.result for future in futures]
            for check in [*checks, *(worker.check for worker in workers)]:
                try:
                    check()
                except BreachError as error:
                    self.tally.add(error.kind)
                    report.breaches.append(str(error))
        report.counts = {
            what: self.tally[what] for what in ("operations", "lost", "resurrected", "stale")
        } | {"faults": self.faults.injected}
        for what, samples in self._samples.items():
            length = len(samples) / 4
            report.quarters[what] = [
                median(samples[round(number * length) : round((number + 1) * length)]) for number in range(4)
            ]
        return report

    def _let_time_pass(self, directory: Path, seconds: float) -> None:
        """Take samples, and let faults come and go, of one tier or of both."""
        chance = random.Random(self.seed)
        started = time.monotonic()
        for number in range(_SAMPLES):
            while (left := started + seconds * (number + 1) / _SAMPLES - time.monotonic()) > 0:
                tier = chance.choice([CacheTierType.L2, CacheTierType.L3])
                if self.complete and chance.random() < 0.5:
                    if chance.random() < 0.5:
                        self.faults.fail_once(tier, chance.choice(["before", "after"]))
                    else:
                        self.faults.take_down(*chance.choice([(tier,), (CacheTierType.L2, CacheTierType.L3)]))
                elif chance.random() < 0.5:
                    self.faults.heal()
                self.ended.wait(min(left, 0.2))
            for what, value in _measure(directory).items():
                self._samples[what].append(value)

    def _heal(self, seconds: float) -> None:
        self.faults.heal()
        until = time.monotonic() + seconds
        while not self.complete and time.monotonic() < until:
            self.manager.maintain()
            threading.Event().wait(0.1)
        assert self.complete, "a tier did not recover"


def _measure(directory: Path) -> dict[str, float]:
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    sizes: list[int] = []
    logs: list[int] = []
    for path in directory.rglob("*"):
        try:
            (logs if path.name.endswith("-wal") else sizes).append(path.stat().st_size)
        except FileNotFoundError:
            # Compacted away since it was listed.
            continue
    return {
        "memory_kb": int(fields["VmRSS"].split()[0]),
        "threads": int(fields["Threads"]),
        "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        "disk_kb": sum(sizes) / 1024,
        "logs_kb": sum(logs) / 1024,
    }


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    measured = _Soak(int(sys.argv[2])).run(L2BackendType(sys.argv[3]), float(sys.argv[1]))
    print(json.dumps(asdict(measured)))
