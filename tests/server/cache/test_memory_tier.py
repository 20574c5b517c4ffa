"""L1."""

from __future__ import annotations

import pytest

from proxystash_server.cache import CacheTierConfig, MemoryCacheTier
from proxystash_server.cache.coherence.uses import UseLog
from tests.server.cache.support import START_US, FakeClock, bounded, stored
from tests.server.cache.tier_contract import UNBOUNDED, MakeTier, TierContract


class TestMemoryTier(TierContract):
    @pytest.fixture
    def make(self, clock: FakeClock) -> MakeTier:
        def make(config: CacheTierConfig = UNBOUNDED) -> MemoryCacheTier:
            return MemoryCacheTier(config, clock=clock)

        return make


def test_a_hit_is_a_use() -> None:
    tier = MemoryCacheTier(bounded(10))
    tier.put("key-1", stored("key-1", evicted_from_l1=True))
    tier.use("key-1", START_US + 1)
    used = tier.use("key-1", START_US + 2)
    assert used == stored("key-1", access_count=2, last_accessed_us=START_US + 2)
    assert tier.get("key-1") == used


def test_a_hit_on_an_expired_entry_is_none_and_no_use() -> None:
    tier = MemoryCacheTier(bounded(10))
    tier.put("key-1", stored("key-1", ttl=10))
    assert tier.use("key-1", START_US + 10_000_000) is None
    assert tier.get("key-1") == stored("key-1", ttl=10)


def test_what_falls_out_of_memory_stands_in_the_use_log_marked_and_with_its_counts() -> None:
    log = UseLog()
    tier = MemoryCacheTier(bounded(1), use_log=log)
    tier.put("key-1", stored("key-1", version=5))
    tier.use("key-1", START_US + 1)
    tier.put("key-2", stored("key-2", version=6))
    demoted = log.peek("key-1")
    assert demoted is not None
    assert (demoted.version, demoted.access_count, demoted.last_accessed_us) == (5, 1, START_US + 1)
    assert demoted.evicted_from_l1


def test_an_update_keeps_the_uses_that_happened_meanwhile() -> None:
    tier = MemoryCacheTier(bounded(10))
    tier.put("key-1", stored("key-1", version=1))
    tier.use("key-1", START_US + 1)
    held = tier.update("key-1", stored("key-1", version=2, failure_count=1))
    assert held == tier.get("key-1")
    assert held == stored("key-1", access_count=1, last_accessed_us=START_US + 1, failure_count=1)


def test_an_update_of_what_is_not_held_changes_nothing() -> None:
    tier = MemoryCacheTier(bounded(10))
    assert tier.update("key-1", stored("key-1")) is None
    assert tier.size() == 0
