"""The process that is killed: it works on a store and tells what it does, each step before the next begins.

Its argument is a Job as JSON. Its standard output has a JSON value in each line: first the store as it was
found, then for each operation one line before it begins and one when it is acknowledged. The environment
says where it is killed; see proxystash_server.cache.ground.killpoints.
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from proxystash_server.cache import (
    CacheConfig,
    CacheManager,
    CacheTierConfig,
    CacheTierType,
    CacheUnavailableError,
    L2BackendType,
)
from proxystash_server.cache.entry.entry import wall_clock
from proxystash_server.cache.stopped.check import check_store
from proxystash_server.cache.stopped.rotation import rotate_key
from proxystash_server.pool.clocks import Clocks
from proxystash_server.pool.pool import Pool
from proxystash_server.pool.requests import (
    AcquireRequest,
    Answer,
    PoolLoadingError,
    Release,
)
from tests.torture.faults import Faults
from tests.torture.stores import (
    FakeMonotonic,
    LibraryDriver,
    RefusedError,
    disagreements,
    eager_compaction,
    is_complete,
    make_config,
    numbered_keys,
    seen_in,
)

KEYS: Final = numbered_keys(24)
# Few, so that some are banned; the others never fail, and so never rest.
FAILING_KEYS: Final = KEYS[:6]
TTL_SECONDS: Final = 24 * 3600
MAX_LEASES: Final = 2
# Longer than all that is done with a store.
_LEASE_SECONDS: Final = 3600.0
_BAN_SECONDS: Final = 24 * 3600
_WEIGHTS: Final = {
    "put": 30,
    "put_many": 10,
    "delete": 10,
    "invalidate": 12,
    "get": 20,
    "list": 3,
    "clear": 1,
    "maintain": 12,
    "reopen": 2,
    "outage": 3,
    "acquire": 24,
    "release": 10,
    "renew": 3,
}
# Longer than any pause between probes.
_PAUSE: Final = 61


@dataclass(frozen=True)
class Job:
    """What the process is to do. Tags of what it puts begin with `name`, which no other process has.

    L3 fails for a while now and then, and from the start if `l3_is_away`.
    """

    directory: str
    l2_backend: str
    seed: int
    name: str
    operations: int
    l2_max_entries: int | None
    changes_only: bool = False
    rotates_key: bool = False
    l3_is_away: bool = False
    bans: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def _tell(message: dict[str, Any]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


class _Worker:
    """The cache in this process, and what is done to it."""

    def __init__(self, config: CacheConfig, faults: Faults) -> None:
        self._config = config
        self._faults = faults
        self._monotonic = FakeMonotonic()
        self.open()

    def open(self) -> None:
        self.manager = CacheManager(self._config, background=False, monotonic=self._monotonic)
        self.driver = LibraryDriver(self.manager)
        directory = self._config.l2_cache_dir.parent / "pool"
        clocks = Clocks(wall_clock, self._monotonic, boot="")
        self.pool = Pool(self.manager, directory, max_leases=MAX_LEASES, clocks=clocks, background=False)
        self.load()

    def load(self) -> bool:
        """Whether the pool knows all entries."""
        try:
            self.pool.load()
        except CacheUnavailableError:
            return False
        return True

    def close(self) -> None:
        self.pool.close()
        self.manager.close()

    def leases(self) -> dict[str, str]:
        """The keys of the leases that are held, by their ids."""
        leases, more = self.pool.leases(0, 1000)
        assert more is None
        return {lease.id: lease.key for lease in leases}

    def acquire(self) -> list[Any] | None:
        """The id and the key of a lease, and what its entry tells; None for none."""
        try:
            answer = self.pool.acquire(AcquireRequest(duration=_LEASE_SECONDS))
        except (CacheUnavailableError, PoolLoadingError) as error:
            raise RefusedError(str(error)) from error
        assert isinstance(answer, Answer)
        if not answer.granted:
            return None
        [granted] = answer.granted
        return [granted.lease.id, granted.lease.key, seen_in(granted.entry)]

    def tell_what_is_found(self, check: list[str]) -> None:
        # Twice: what the start could not bring up to date at once, the first round does.
        self.manager.maintain()
        _tell(
            {
                "check": check,
                "away": self._faults.any,
                "disagreements": disagreements(self.manager),
                "complete": is_complete(self.manager),
                "listed": self.driver.list(),
                "loaded": self.load(),
                "leases": self.leases(),
                "got": dict(zip(KEYS, self.driver.get(KEYS), strict=True)),
            }
        )

    def do(self, kind: str, keys: list[str], tag: str) -> Any:
        """One operation; what it answered."""
        match kind:
            case "put" | "put_many":
                return self.driver.put(keys, tag, ttl_seconds=TTL_SECONDS)
            case "delete":
                return self.driver.delete(keys[0])
            case "invalidate":
                return self.driver.invalidate(keys[0])
            case "get":
                return self.driver.get(keys)
            case "list":
                return self.driver.list()
            case "clear":
                return self.driver.clear()
            case "acquire":
                return self.acquire()
            case "release":
                [released] = self.pool.release([Release(tag)])
                return released.released
            case "renew":
                return self.pool.renew([tag], _LEASE_SECONDS) != [None]
            case "maintain":
                self.manager.maintain()
                self.load()
                return self.pool.maintain()
            case "reopen":
                self.close()
                return self.open()
            case "leave":
                return self._faults.take_down(CacheTierType.L3)
            case _:
                self._faults.heal()
                self._monotonic.seconds += _PAUSE
                self.manager.maintain()
                return is_complete(self.manager) and self.load()

    def work(self, job: Job) -> None:
        chance = random.Random(job.seed)
        weights = {**_WEIGHTS, **({"delete": 0, "invalidate": 0, "clear": 0} if job.changes_only else {})}
        kinds = chance.choices(list(weights), list(weights.values()), k=job.operations)
        for number, kind in enumerate(kinds):
            keys = chance.sample(KEYS, 4) if kind == "put_many" else [chance.choice(KEYS)]
            tag = f"{job.name}-{number}"
            if kind == "invalidate":
                keys = [chance.choice(FAILING_KEYS)]
            if kind in {"release", "renew"}:
                held = sorted(self.leases())
                tag = chance.choice(held) if held else "none"
            if kind == "outage":
                kind = "return" if self._faults.any else "leave"
            _tell({"begin": kind, "keys": keys, "tag": tag})
            try:
                _tell({"acknowledged": self.do(kind, keys, tag)})
            except RefusedError:
                _tell({"refused": kind})
        self.close()


def work(job: Job, faults: Faults) -> None:
    """Check the store, give it a new key if asked to, open it, tell what is in it, and change it."""
    config = make_config(
        Path(job.directory), L2BackendType(job.l2_backend), l2=CacheTierConfig(max_entries=job.l2_max_entries)
    )
    if job.bans:
        config = config.model_copy(update={"ban_seconds": _BAN_SECONDS, "max_ban_seconds": _BAN_SECONDS})
    check = []
    if config.l3_database_path.exists():
        check = [f"{fault.kind}: {fault.message}" for fault in check_store(config).faults]
    if job.rotates_key:
        rotate_key(config)
    if job.l3_is_away:
        faults.take_down(CacheTierType.L3)
    worker = _Worker(config, faults)
    worker.tell_what_is_found(check)
    worker.work(job)


if __name__ == "__main__":
    faults_of_l3 = Faults()
    with eager_compaction(), faults_of_l3.installed():
        work(Job(**json.loads(sys.argv[1])), faults_of_l3)
