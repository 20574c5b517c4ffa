"""lru, lfu and fifo: the same promises for the policies by themselves and for every tier that follows one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxystash_server.cache import (
    CacheTier,
    CacheTierConfig,
    CacheTierType,
    DiskTier,
    JsonlCacheTier,
    MemoryCacheTier,
    SQLiteCacheTier,
)
from proxystash_server.cache.coherence.uses import Use
from proxystash_server.cache.tiers.eviction import EvictionPolicy, make_policy
from tests.server.cache.store_contract import ENCRYPTOR
from tests.server.cache.support import START_US, bounded, stored

CAPACITY = 3


class Store:
    """Three places and a policy, whatever stands behind it."""

    def put(self, key: str, access_count: int = 0) -> None:
        raise NotImplementedError

    def use(self, key: str) -> None:
        raise NotImplementedError

    def delete(self, key: str) -> None:
        raise NotImplementedError

    def reopen(self) -> None:
        """A restart, for those that survive one."""

    def keys(self) -> set[str]:
        raise NotImplementedError


class PolicyStore(Store):
    def __init__(self, policy: str) -> None:
        self.policy: EvictionPolicy = make_policy(policy)
        self.counts: dict[str, int] = {}

    def put(self, key: str, access_count: int = 0) -> None:
        if key not in self.counts and len(self.counts) == CAPACITY:
            self.delete(next(self.policy.victims()))
        self.counts[key] = access_count
        self.policy.record_put(key, access_count)

    def use(self, key: str) -> None:
        self.counts[key] += 1
        self.policy.record_use(key, self.counts[key])

    def delete(self, key: str) -> None:
        del self.counts[key]
        self.policy.remove(key)

    def keys(self) -> set[str]:
        return set(self.counts)


class TierStore(Store):
    def __init__(self, make: Callable[[], CacheTier]) -> None:
        self.make = make
        self.tier = make()
        self.version = 0
        self.now_us = START_US

    def put(self, key: str, access_count: int = 0) -> None:
        self.version += 1
        self.tier.put(key, stored(key, version=self.version, access_count=access_count))

    def use(self, key: str) -> None:
        self.now_us += 1
        if isinstance(self.tier, MemoryCacheTier):
            assert self.tier.use(key, self.now_us) is not None
        elif isinstance(self.tier, DiskTier):
            entry = self.tier.get(key)
            assert entry is not None
            self.tier.note_uses([Use(key, entry.version, entry.access_count + 1, self.now_us, False)])

    def delete(self, key: str) -> None:
        assert self.tier.delete(key)

    def reopen(self) -> None:
        if isinstance(self.tier, JsonlCacheTier):
            # A compaction before the restart must not make a difference.
            self.tier._needs_compaction = True
            self.tier.maintain()
        if isinstance(self.tier, DiskTier):
            self.tier.close()
            self.tier = self.make()

    def keys(self) -> set[str]:
        return set(self.tier.keys())

    def close(self) -> None:
        if isinstance(self.tier, DiskTier):
            self.tier.close()


def _jsonl(config: CacheTierConfig, directory: Path) -> CacheTier:
    tier = JsonlCacheTier(config, CacheTierType.L2, directory, ENCRYPTOR)
    tier.open()
    return tier


def _sqlite(config: CacheTierConfig, directory: Path) -> CacheTier:
    tier = SQLiteCacheTier(config, CacheTierType.L3, directory / "store.db", ENCRYPTOR)
    tier.open()
    return tier


def _memory(config: CacheTierConfig, _directory: Path) -> CacheTier:
    return MemoryCacheTier(config)


TIERS = {"memory": _memory, "jsonl": _jsonl, "sqlite": _sqlite}


@pytest.fixture(params=["policy", *TIERS])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(kind: str, tmp_path: Path) -> Iterator[Callable[[str], Store]]:
    stores: list[TierStore] = []

    def make(policy: str) -> Store:
        if kind == "policy":
            return PolicyStore(policy)
        stores.append(TierStore(lambda: TIERS[kind](bounded(CAPACITY, policy), tmp_path / "store")))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


MakeStore = Callable[[str], Store]


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo"])
def test_entries_that_were_never_used_go_in_the_order_they_came(make: MakeStore, policy: str) -> None:
    store = make(policy)
    for key in "abcdef":
        store.put(key)
    assert store.keys() == {"d", "e", "f"}


def test_lru_evicts_what_was_used_least_recently(make: MakeStore) -> None:
    store = make("lru")
    for key in "abc":
        store.put(key)
    store.use("a")
    store.put("d")
    assert store.keys() == {"a", "c", "d"}
    store.use("c")
    store.put("e")
    assert store.keys() == {"c", "d", "e"}


def test_lru_takes_a_put_for_a_use(make: MakeStore) -> None:
    store = make("lru")
    for key in "abc":
        store.put(key)
    store.put("a")
    store.put("d")
    assert store.keys() == {"a", "c", "d"}


def test_lfu_evicts_what_was_used_least_often(make: MakeStore) -> None:
    store = make("lfu")
    for key in "abc":
        store.put(key)
    for key in "aabcc":
        store.use(key)
    store.put("d")
    assert store.keys() == {"a", "c", "d"}
    # What has just come has been used least of all.
    store.put("e")
    assert store.keys() == {"a", "c", "e"}


def test_lfu_evicts_the_least_recently_used_of_those_used_equally_often(make: MakeStore) -> None:
    store = make("lfu")
    for key in "abc":
        store.put(key)
    for key in "bca":
        store.use(key)
    store.put("d")
    assert store.keys() == {"a", "c", "d"}


def test_lfu_counts_the_uses_an_entry_brings_along(make: MakeStore) -> None:
    store = make("lfu")
    store.put("a", access_count=5)
    store.put("b", access_count=1)
    store.put("c", access_count=3)
    store.put("d", access_count=9)
    assert store.keys() == {"a", "c", "d"}


def test_lfu_counts_anew_for_a_replacement(make: MakeStore) -> None:
    store = make("lfu")
    for key in "abc":
        store.put(key)
    for key in "aaabbc":
        store.use(key)
    store.put("a")
    store.put("d")
    assert store.keys() == {"b", "c", "d"}


def test_fifo_evicts_what_came_first_however_it_was_used_or_replaced(make: MakeStore) -> None:
    store = make("fifo")
    for key in "abc":
        store.put(key)
    store.use("a")
    store.use("a")
    store.put("a")
    store.put("d")
    assert store.keys() == {"b", "c", "d"}


def test_fifo_lets_what_was_deleted_and_came_again_start_over(make: MakeStore) -> None:
    store = make("fifo")
    for key in "abc":
        store.put(key)
    store.delete("a")
    store.put("a")
    store.put("d")
    assert store.keys() == {"a", "c", "d"}


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo"])
def test_a_deleted_key_is_no_victim(make: MakeStore, policy: str) -> None:
    store = make(policy)
    for key in "abc":
        store.put(key)
    store.delete("a")
    store.put("d")
    assert store.keys() == {"b", "c", "d"}


@pytest.mark.parametrize(
    ("policy", "left"), [("lru", {"a", "c", "d"}), ("lfu", {"a", "b", "d"}), ("fifo", {"b", "c", "d"})]
)
def test_the_order_of_eviction_survives_a_restart(make: MakeStore, policy: str, left: set[str]) -> None:
    store = make(policy)
    for key in "abc":
        store.put(key)
    for key in "bbca":
        store.use(key)
    store.put("c")
    store.use("a")
    store.reopen()
    store.put("d")
    assert store.keys() == left


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo"])
def test_a_restart_changes_nothing_for_what_comes_after_it(make: MakeStore, policy: str) -> None:
    store = make(policy)
    for key in "ab":
        store.put(key)
    store.reopen()
    store.put("c")
    store.reopen()
    store.put("d")
    assert store.keys() == {"b", "c", "d"}


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo"])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "use", "remove"]), st.sampled_from("abcdefg"), st.sampled_from([0, 2, 9])
        ),
        max_size=60,
    )
)
def test_the_policies_agree_with_a_plain_list(policy: str, steps: list[tuple[str, str, int]]) -> None:
    """The order of victims is that of sorting every key by (what the policy looks at, time of it)."""
    real = make_policy(policy)
    facts: dict[str, tuple[int, int]] = {}
    counts: dict[str, int] = {}
    for now, (step, key, brought) in enumerate(steps):
        if step == "put":
            real.record_put(key, brought)
            counts[key] = brought
            if policy != "fifo" or key not in facts:
                facts[key] = (brought if policy == "lfu" else 0, now)
        elif step == "use" and key in facts:
            counts[key] += 1
            real.record_use(key, counts[key])
            if policy != "fifo":
                facts[key] = (counts[key] if policy == "lfu" else 0, now)
        elif step == "remove":
            real.remove(key)
            facts.pop(key, None)
        assert list(real.victims()) == sorted(facts, key=lambda held: facts[held])


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo"])
def test_a_cleared_policy_has_no_victims(policy: str) -> None:
    real = make_policy(policy)
    real.record_put("a", 3)
    real.clear()
    assert list(real.victims()) == []
    real.record_put("b", 0)
    assert list(real.victims()) == ["b"]


class _Compared(int):
    """A count that counts how often two of its kind are compared."""

    comparisons = 0

    def __lt__(self, other: object) -> bool:
        _Compared.comparisons += 1
        return int.__lt__(self, other)  # type: ignore[operator]  # both are integers


def test_lfu_looks_at_few_of_many_different_counts() -> None:
    """One search among n sorted counts to find a place, one to leave it, and none to name the victim."""
    keys = 4096
    policy = make_policy("lfu")
    counts = [_Compared(3 * number) for number in range(keys)]
    random.Random(1).shuffle(counts)
    for count in counts:
        policy.record_put(f"key-{count}", count)

    def comparisons(step: Callable[[], object]) -> int:
        before = _Compared.comparisons
        step()
        return _Compared.comparisons - before

    search = keys.bit_length()
    assert comparisons(lambda: next(policy.victims())) == 0
    assert comparisons(lambda: policy.record_use("key-0", _Compared(1))) <= 2 * search
    assert comparisons(lambda: policy.record_put("promoted", _Compared(3 * keys // 2 + 1))) <= search
    assert comparisons(lambda: policy.remove("key-3")) <= search
    assert next(policy.victims()) == "key-0"
