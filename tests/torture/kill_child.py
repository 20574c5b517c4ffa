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

from proxystash_server.cache import CacheConfig, CacheManager, CacheTierConfig, L2BackendType
from proxystash_server.cache.stopped.check import check_store
from proxystash_server.cache.stopped.rotation import rotate_key
from tests.torture.stores import (
    FakeMonotonic,
    LibraryDriver,
    disagreements,
    eager_compaction,
    is_complete,
    make_config,
    numbered_keys,
)

KEYS: Final = numbered_keys(24)
TTL_SECONDS: Final = 24 * 3600
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
}


@dataclass(frozen=True)
class Job:
    """What the process is to do. Tags of what it puts begin with `name`, which no other process has."""

    directory: str
    l2_backend: str
    seed: int
    name: str
    operations: int
    l2_max_entries: int | None
    changes_only: bool = False
    rotates_key: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def _tell(message: dict[str, Any]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def _open(config: CacheConfig) -> CacheManager:
    return CacheManager(config, background=False, monotonic=FakeMonotonic())


def work(job: Job) -> None:
    """Check the store, give it a new key if asked to, open it, tell what is in it, and change it."""
    config = make_config(
        Path(job.directory), L2BackendType(job.l2_backend), l2=CacheTierConfig(max_entries=job.l2_max_entries)
    )
    faults = []
    if config.l3_database_path.exists():
        faults = [f"{fault.kind}: {fault.message}" for fault in check_store(config).faults]
    if job.rotates_key:
        rotate_key(config)
    manager = _open(config)
    # Twice: what the start could not bring up to date at once, the first round does.
    manager.maintain()
    driver = LibraryDriver(manager)
    _tell(
        {
            "check": faults,
            "disagreements": disagreements(manager),
            "complete": is_complete(manager),
            "listed": driver.list(),
            "got": dict(zip(KEYS, driver.get(KEYS), strict=True)),
        }
    )
    chance = random.Random(job.seed)
    weights = {**_WEIGHTS, **({"delete": 0, "invalidate": 0, "clear": 0} if job.changes_only else {})}
    kinds = chance.choices(list(weights), list(weights.values()), k=job.operations)
    for number, kind in enumerate(kinds):
        keys = chance.sample(KEYS, 4) if kind == "put_many" else [chance.choice(KEYS)]
        tag = f"{job.name}-{number}"
        _tell({"begin": kind, "keys": keys, "tag": tag})
        answer: Any = None
        match kind:
            case "put" | "put_many":
                answer = driver.put(keys, tag, ttl_seconds=TTL_SECONDS)
            case "delete":
                answer = driver.delete(keys[0])
            case "invalidate":
                answer = driver.invalidate(keys[0])
            case "get":
                answer = driver.get(keys)
            case "list":
                answer = driver.list()
            case "clear":
                answer = driver.clear()
            case "maintain":
                manager.maintain()
            case "reopen":
                manager.close()
                manager = _open(config)
                driver = LibraryDriver(manager)
        _tell({"acknowledged": answer})
    manager.close()


if __name__ == "__main__":
    with eager_compaction():
        work(Job(**json.loads(sys.argv[1])))
