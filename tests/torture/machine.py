"""A state machine over everything that can be asked of a cache and done to it, against a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import proxystash
from proxystash_server.cache import CacheManager, CacheTierConfig, CacheTierType, L2BackendType, TierState
from tests.support.rpc import serving
from tests.torture.faults import Faults, OneFault
from tests.torture.model import Model, Seen, State
from tests.torture.stores import (
    SECOND_US,
    Driver,
    FakeClock,
    FakeMonotonic,
    LibraryDriver,
    RefusedError,
    RpcDriver,
    all_of,
    credentials_of,
    disagreements,
    eager_compaction,
    is_complete,
    make_config,
    numbered_keys,
    temporary_directory,
)
from tests.torture.tally import Tally

KEYS = numbered_keys(6)
_ROUNDS_TO_HEAL = 12
_LONGEST_PAUSE = 61

_key = st.sampled_from(KEYS)
_keys = st.lists(_key, min_size=1, max_size=3, unique=True)
_ttl = st.sampled_from([1, 60, 3600])


class CacheMachine(RuleBasedStateMachine):
    """The cache as a library, with one of its disk tiers failing at a time."""

    l2_backend: ClassVar[L2BackendType]
    l1: ClassVar[CacheTierConfig] = CacheTierConfig(max_entries=3)
    # Not bounded where L3 may be away: what it has missed, L2 alone holds.
    l2_max_entries: ClassVar[int | None] = None
    faulty: ClassVar[bool] = True
    tally: ClassVar[Tally]

    def __init__(self) -> None:
        super().__init__()
        self.resources = ExitStack()
        self.directory = self.resources.enter_context(temporary_directory()) / "data"
        self.resources.enter_context(eager_compaction())
        self.clock = FakeClock()
        self.monotonic = FakeMonotonic()
        self.faults = Faults()
        self.resources.enter_context(self.faults.installed())
        self.model = Model(KEYS, threshold=3)
        self.tags = 0
        self.copies = 0
        self.lookups = 0
        self.failing: CacheTierType | None = None
        self.session = ExitStack()

    @initialize(policy=st.sampled_from(["lru", "lfu", "fifo"]))
    def start(self, policy: str) -> None:
        self.l2 = CacheTierConfig.model_validate(
            {"max_entries": self.l2_max_entries, "eviction_policy": policy}
        )
        self.open()

    def open(self) -> None:
        config = make_config(self.directory, self.l2_backend, l1=self.l1, l2=self.l2)
        self.manager = CacheManager(config, clock=self.clock, monotonic=self.monotonic, background=False)
        self.lookups = 0
        self.session.callback(self.manager.close)
        self.driver: Driver = self.connect()

    def connect(self) -> Driver:
        return LibraryDriver(self.manager)

    @property
    def complete(self) -> bool:
        """Whether nothing can fail, and no tier has missed anything: then every answer must be exact."""
        return not self.faults.any and is_complete(self.manager)

    def attempt(self, operation: Any, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
        """The answer, None if it was refused, and whether a fault may have had a part in it."""
        self.tally.add("operations")
        lenient = not self.complete
        try:
            answer = operation(*args, **kwargs)
        except RefusedError:
            if not lenient:
                raise
            return None, True
        return answer, lenient or not self.complete

    # -- operations

    @rule(keys=_keys, ttl=_ttl, failures=st.integers(0, 3), healthy=st.booleans())
    def put(self, keys: list[str], ttl: int, failures: int, healthy: bool) -> None:
        tag = self.new_tag()
        lenient = not self.complete
        stored, _ = self.attempt(
            self.driver.put, keys, tag, ttl_seconds=ttl, failures=failures, healthy=healthy
        )
        for key, tiers in zip(keys, stored, strict=True):
            assert {"l2", "l3"} & set(tiers), f"no disk tier took {key!r}, though one works"
            assert lenient or "l3" in tiers, f"{key!r} is only in {tiers}"
        self.has_put(keys, tag, ttl, failures, healthy=healthy, lenient=lenient)

    def has_put(
        self, keys: list[str], tag: str, ttl: int, failures: int = 0, *, healthy: bool = False, lenient: bool
    ) -> None:
        for key in keys:
            new = State(tag, failures, self.clock.now_us + ttl * SECOND_US)
            self.model.put(key, new, self.clock.now_us, healthy=healthy)
            if lenient and not healthy:
                self.model.put_blindly(key, new)

    @rule(keys=_keys)
    def get(self, keys: list[str]) -> None:
        seen, lenient = self.attempt(self.driver.get, keys)
        if seen is not None:
            self.lookups += len(keys)
            for key, one in zip(keys, seen, strict=True):
                self.model.read(key, one, self.clock.now_us, lenient=lenient, how="a get")

    @rule()
    def list(self) -> None:
        seen, lenient = self.attempt(self.driver.list)
        if seen is not None:
            self.has_seen(seen, lenient, "a list")

    def has_seen(self, seen: dict[str, Seen], lenient: bool, how: str) -> None:
        for key, one in all_of(KEYS, seen):
            self.model.read(key, one, self.clock.now_us, lenient=lenient, how=how)

    @rule(key=_key)
    def delete(self, key: str) -> None:
        held, lenient = self.attempt(self.driver.delete, key)
        if not lenient and not self.model.in_doubt(key):
            assert held == (self.model.known(key, self.clock.now_us) is not None), f"delete told {held}"
        self.model.delete(key, certain=held is not None)

    @rule(key=_key)
    def invalidate(self, key: str) -> None:
        answer, lenient = self.attempt(self.driver.invalidate, key)
        self.model.invalidate(key, answer, self.clock.now_us, lenient=lenient)

    @rule()
    def clear(self) -> None:
        count, lenient = self.attempt(self.driver.clear)
        if not lenient and not any(map(self.model.in_doubt, KEYS)):
            assert count == sum(self.model.known(key, self.clock.now_us) is not None for key in KEYS)
        self.model.clear(certain=count is not None)

    @rule(
        steps=st.lists(st.tuples(st.sampled_from(["put", "get", "delete", "invalidate"]), _key), min_size=6)
    )
    def use(self, steps: Sequence[tuple[str, str]]) -> None:
        """Several operations in a row, so that there is more use than there are restarts."""
        for kind, key in steps:
            match kind:
                case "put":
                    self.put([key], 3600, 0, False)
                case "get":
                    self.get([key])
                case "delete":
                    self.delete(key)
                case _:
                    self.invalidate(key)

    @rule()
    def statistics(self) -> None:
        statistics = self.manager.get_statistics()
        if not self.faulty:
            assert statistics.hits + statistics.misses == self.lookups
        for stats in (statistics.l1_stats, statistics.l2_stats, statistics.l3_stats):
            assert stats.max_entries == 0 or stats.entries <= stats.max_entries
        if self.complete and not any(map(self.model.in_doubt, KEYS)):
            live = sum(self.model.known(key, self.clock.now_us) is not None for key in KEYS)
            assert statistics.entries == live

    # -- what goes on around them

    @rule(seconds=st.sampled_from([-5, 1, 30, 70, 4000]))
    def pass_time(self, seconds: int) -> None:
        self.clock.now_us += seconds * SECOND_US
        self.model.time_passed(self.clock.now_us)

    @rule()
    def maintain(self) -> None:
        self.monotonic.seconds += _LONGEST_PAUSE
        self.manager.maintain()

    @rule()
    def clean_up(self) -> None:
        self.manager.cleanup_expired()

    @rule()
    def restart(self) -> None:
        self.tally.add("restarts")
        self.session.close()
        self.open()

    @rule()
    def crash(self) -> None:
        """Go on with the files as they are at this moment, which is all that a kill leaves."""
        self.tally.add("kills")
        abandoned = self.directory
        self.copies += 1
        self.directory = abandoned.with_name(f"data-{self.copies}")
        shutil.copytree(abandoned, self.directory)
        with self.faults.suspended():
            self.session.close()
        shutil.rmtree(abandoned)
        self.open()

    @precondition(lambda self: self.faulty)
    @rule(
        tier=st.sampled_from([CacheTierType.L2, CacheTierType.L3]),
        how=st.sampled_from(["before", "after", "down"]),
    )
    def break_tier(self, tier: CacheTierType, how: OneFault | str) -> None:
        """One tier fails at a time: the other only when this one has caught up."""
        if self.failing is None or self.complete:
            self.failing = tier
        if how == "down":
            self.faults.take_down(self.failing)
        else:
            self.faults.fail_once(self.failing, "before" if how == "before" else "after")

    @precondition(lambda self: self.faults.any)
    @rule()
    def heal(self) -> None:
        self.faults.heal()

    def teardown(self) -> None:
        try:
            if hasattr(self, "manager"):
                self.finish()
        finally:
            self.tally.add("faults", self.faults.injected)
            with self.faults.suspended():
                self.session.close()
                self.resources.close()

    def finish(self) -> None:
        """Once every fault is gone, everything is found again, in every tier alike, also in the next run."""
        self.faults.heal()
        for _ in range(_ROUNDS_TO_HEAL):
            self.maintain()
        for _ in range(2):
            assert self.complete, f"a tier is still behind: {self.states()}"
            assert not disagreements(self.manager)
            self.has_seen(self.driver.list(), False, "the last list")
            for key in KEYS:
                self.model.read(key, self.driver.get([key])[0], self.clock.now_us, how="the last get")
            self.restart()

    def states(self) -> dict[str, TierState]:
        statistics = self.manager.get_statistics()
        return {"l2": statistics.l2_stats.state, "l3": statistics.l3_stats.state}

    def new_tag(self) -> str:
        self.tags += 1
        return f"t{self.tags}"


class LibraryMachine(CacheMachine):
    """With what only the library has: warming from files, and exporting to them."""

    @rule(keys=_keys, ttl=_ttl)
    def warm(self, keys: list[str], ttl: int) -> None:
        tag = self.new_tag()
        lenient = not self.complete
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
        assert result["loaded"] == len(keys), result
        self.tally.add("operations", len(keys))
        self.has_put(keys, tag, ttl, lenient=lenient)

    @precondition(lambda self: self.complete)
    @rule()
    def export(self) -> None:
        path = self.directory.with_name("export.jsonl")
        self.manager.export_to_file(str(path), include_credentials=True)
        records = [json.loads(line) for line in path.read_text().splitlines()]
        seen = {one["key"]: Seen(one["source"], one.get("failure_count", 0)) for one in records}
        self.has_seen(seen, not self.complete, "an export")


class GrpcMachine(CacheMachine):
    """The same through a server and its client. A small L2, so that entries come from every tier."""

    l2_max_entries = 4
    faulty = False

    def connect(self) -> Driver:
        server = self.session.enter_context(serving(self.manager, threads=2))
        return RpcDriver(self.session.enter_context(proxystash.Client(server.address, retry=None)))
