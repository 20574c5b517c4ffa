"""The cache against a dictionary: whatever is done, in whatever order, it holds what the dictionary holds.

One machine does everything but faults, and checks every number; the other breaks tiers, kills and restarts.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from proxystash_server.cache import (
    CacheUnavailableError,
    DiskTier,
    EntryFilter,
    HealthStatus,
    L2BackendType,
    TierState,
)
from tests.server.cache.stash import Stash
from tests.server.cache.support import (
    WRITES,
    FakeClock,
    FakeMonotonic,
    bounded,
    break_tier,
    guards_of,
    missed_by_authority,
    repair_tier,
    scratch_directory,
)

ANY = EntryFilter()
Result = TypeVar("Result")
KEYS = st.sampled_from(["a", "b", "c", "d", "e", "f"])
SECOND_US = 1_000_000
THRESHOLD = 3

QUICKLY = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@dataclasses.dataclass
class Expected:
    """What the cache must say about one key."""

    source: str
    expires_at_us: int
    failures: int = 0
    uses: int | None = 0


class Machine(RuleBasedStateMachine):
    """What both machines do."""

    fields: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="proxystash-test-", dir=scratch_directory()))
        self.clock = FakeClock()
        self.model: dict[str, Expected] = {}
        self.writes = 0

    @initialize(
        l2_backend=st.sampled_from(L2BackendType),
        small=st.booleans(),
        policy=st.sampled_from(["lru", "lfu", "fifo"]),
    )
    def begin(self, l2_backend: L2BackendType, small: bool, policy: str) -> None:
        self.stash = Stash(self.directory / "data", l2_backend, self.clock, FakeMonotonic())
        self.configure(small, policy)
        self.manager = self.stash.open(**self.fields)

    def configure(self, small: bool, policy: str) -> None:
        raise NotImplementedError

    def teardown(self) -> None:
        if hasattr(self, "stash"):
            self.stash.close()
        shutil.rmtree(self.directory)

    def patiently(self, operation: Callable[..., Result], *arguments: object) -> Result:
        """Do it again where the cache asks for that: until a failing tier is skipped."""
        for _ in range(3):
            try:
                return operation(*arguments)
            except CacheUnavailableError:
                assert not isinstance(self, Counted)
        return operation(*arguments)

    def live(self) -> dict[str, Expected]:
        return {key: one for key, one in self.model.items() if one.expires_at_us > self.clock()}

    def new_entry(self, key: str, ttl: int, healthy: bool):  # type: ignore[no-untyped-def]  # a CacheEntry
        self.writes += 1
        before = self.live().get(key)
        failures = 0 if healthy or before is None else before.failures
        entry = self.manager.new_entry(
            "http://192.0.2.1:8080",
            key=key,
            source=str(self.writes),
            ttl_us=ttl * SECOND_US,
            health_status=HealthStatus.HEALTHY if healthy else HealthStatus.UNKNOWN,
            username="u",
            password="p",
        )
        self.model[key] = Expected(entry.source, entry.expires_at_us, failures)
        return entry

    @rule(key=KEYS, ttl=st.sampled_from([5, 1000]), healthy=st.booleans())
    def put(self, key: str, ttl: int, healthy: bool) -> None:
        assert self.manager.put(key, self.new_entry(key, ttl, healthy))

    @rule(keys=st.lists(KEYS, min_size=1, max_size=4))
    def put_many(self, keys: list[str]) -> None:
        assert all(self.manager.put_many([self.new_entry(key, 1000, False) for key in keys]))

    @rule(key=KEYS)
    def get(self, key: str) -> None:
        entry = self.patiently(self.manager.get, key)
        expected = self.live().get(key)
        assert (entry is None) == (expected is None)
        if entry is not None and expected is not None:
            if expected.uses is not None:
                expected.uses += 1
            assert (entry.source, entry.failure_count) == (expected.source, expected.failures)
            assert expected.uses is None or entry.access_count == expected.uses
            assert entry.last_accessed_us == self.clock()
        else:
            self.model.pop(key, None)

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        held = self.manager.delete(key)
        expected = self.model.pop(key, None)
        if expected is None or expected.expires_at_us > self.clock():
            assert held == (expected is not None)

    @rule()
    def clear(self) -> None:
        self.manager.clear()
        self.model.clear()

    @rule(key=KEYS)
    def invalidate(self, key: str) -> None:
        result = self.patiently(self.manager.invalidate_by_health, key)
        expected = self.live().get(key)
        assert result.found == (expected is not None)
        if expected is None:
            self.model.pop(key, None)
            return
        expected.failures += 1
        assert result.failure_count == expected.failures
        assert result.evicted == (expected.failures >= THRESHOLD)
        if result.evicted:
            del self.model[key]

    @rule(seconds=st.sampled_from([1, 6]))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @rule()
    def clean(self) -> None:
        self.manager.cleanup_expired()
        self.model = self.live()

    @rule()
    def maintain(self) -> None:
        self.manager.maintain()

    @rule(limit=st.integers(min_value=1, max_value=4))
    def list_in_pages(self, limit: int) -> None:
        listed: list[str] = []
        while page := self.patiently(self.manager.list_entries, listed[-1] if listed else "", limit, ANY):
            for entry in page:
                expected = self.model[entry.key]
                assert (entry.source, entry.failure_count) == (expected.source, expected.failures)
                assert expected.uses is None or entry.access_count == expected.uses
                listed.append(entry.key)
        assert listed == sorted(self.live())


class Counted(Machine):
    """Without faults every number is known."""

    def configure(self, small: bool, policy: str) -> None:
        self.fields = {
            "l1_config": bounded(2 if small else 100, policy),
            "l2_config": bounded(4 if small else 100, policy),
        }
        self.lookups = 0
        self.hits = 0
        self.removed = 0

    @rule(key=KEYS)
    def get(self, key: str) -> None:
        self.lookups += 1
        self.hits += key in self.live()
        super().get(key)

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        self.removed += key in self.model
        super().delete(key)

    @rule()
    def clear(self) -> None:
        assert self.manager.get_statistics().entries == len(self.model)
        self.removed += len(self.model)
        super().clear()

    @rule()
    def restart(self) -> None:
        self.stash.check()
        self.manager = self.stash.open(**self.fields)
        self.lookups = self.hits = self.removed = 0

    @invariant()
    def the_numbers_add_up(self) -> None:
        if not hasattr(self, "stash"):
            return
        statistics = self.manager.get_statistics()
        assert statistics.entries == len(self.model)
        assert (statistics.hits, statistics.misses) == (self.hits, self.lookups - self.hits)
        assert statistics.hits == sum(tier.hits for tier in statistics.tiers)
        assert statistics.removals == self.removed
        assert statistics.l3_stats.entries == len(self.model)
        for tier in statistics.tiers:
            assert tier.errors == tier.evictions_corruption == 0
            assert tier.state is TierState.ACTIVE

    def teardown(self) -> None:
        try:
            if hasattr(self, "stash"):
                self.stash.check()
        finally:
            super().teardown()


class Faulty(Machine):
    """One tier at a time fails; what was acknowledged holds all the same, also over restarts and kills."""

    broken: DiskTier | None = None

    def configure(self, small: bool, policy: str) -> None:
        # Room for everything in L2: what L3 has missed cannot be evicted for want of room.
        self.fields = {"l1_config": bounded(2 if small else 100, policy)}

    @precondition(lambda self: self.broken is None)
    @rule(name=st.sampled_from(["l2", "l3"]), writes_only=st.booleans(), after_doing_it=st.booleans())
    def break_one(self, name: str, writes_only: bool, after_doing_it: bool) -> None:
        self.settle()
        self.broken = self.manager.l2_tier if name == "l2" else self.manager.l3_tier
        if writes_only:
            break_tier(self.broken, WRITES, after_doing_it=after_doing_it)
        else:
            break_tier(self.broken)

    @precondition(lambda self: self.broken is not None)
    @rule()
    def repair(self) -> None:
        assert self.broken is not None
        repair_tier(self.broken)
        self.broken = None

    @rule()
    def let_time_pass_for_probes(self) -> None:
        self.stash.recover(self.manager)

    @rule()
    def restart(self) -> None:
        if any(tier.state is not TierState.ACTIVE for tier in self.manager.get_statistics().tiers):
            self.forget_uses()
        if self.broken is not None:
            self.forget_uses()
            repair = self.broken
            self.manager.close()
            repair_tier(repair)
            self.broken = None
        self.manager = self.stash.reopen(**self.fields)

    @rule()
    def kill(self) -> None:
        killed = self.stash.directory
        self.manager = self.stash.reopen_after_kill(**self.fields)
        if self.broken is not None:
            repair_tier(self.broken)
            self.broken = None
        for manager in self.stash._managers[:-1]:
            manager.close()
        del self.stash._managers[:-1]
        shutil.rmtree(killed)
        self.stash.directory.rename(killed)
        self.stash.directory = killed
        self.manager = self.stash.reopen(**self.fields)
        self.forget_uses()

    def forget_uses(self) -> None:
        """Uses that a tier has not been told of may be unknown to it after a restart; entries may not."""
        for expected in self.model.values():
            expected.uses = None

    def settle(self) -> None:
        """Bring both tiers fully up to date, so that either of them may fail."""
        for _ in range(3):
            self.stash.recover(self.manager)
        assert all(guard.is_open for guard in guards_of(self.manager))
        assert not missed_by_authority(self.manager)
        assert not self.manager._cache.doubted
        # L2 refills from use: here at once, so that L3 may fail without hiding anything.
        l2, l3 = self.manager.l2_tier, self.manager.l3_tier
        for key in set(l3.keys()) - set(l2.keys()):
            entry = l3.get(key)
            assert entry is not None
            l2.put(key, entry)

    def teardown(self) -> None:
        try:
            if hasattr(self, "stash"):
                if self.broken is not None:
                    self.repair()
                self.settle()
                self.list_in_pages(limit=3)
                live = set(self.live())
                for tier in (self.manager.l2_tier, self.manager.l3_tier):
                    assert live <= set(tier.keys()) <= set(self.model)
                self.stash.check()
        finally:
            super().teardown()


TestCounted = pytest.mark.timeout(240)(Counted.TestCase)
TestCounted.settings = QUICKLY
TestFaulty = pytest.mark.timeout(240)(Faulty.TestCase)
TestFaulty.settings = QUICKLY
