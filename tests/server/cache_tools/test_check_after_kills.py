"""Whatever a kill leaves behind is consistent, and the next start puts in order what there is a note of.

A cache works, and before each of its steps, down to the middle of a write, the files are copied: that is what
a kill at this moment would leave.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from proxystash_server.cache import CacheManager, CacheTierConfig
from tests.server.cache.support import (
    SWITCHED_OFF,
    FakeMonotonic,
    broken,
    contents,
    disk_of,
    fail_until_skipped,
)
from tests.server.cache_tools.steps import stepping
from tests.server.cache_tools.stopped import StoppedCache, note_kinds, told

SMALL = CacheTierConfig(max_entries=4)


def put(manager: CacheManager, *keys: str, source: str = "") -> None:
    manager.put_many(
        [
            manager.new_entry(f"http://192.0.2.1:{8000 + n}", key=key, source=source, username="u")
            for n, key in enumerate(keys)
        ]
    )


def everyday(manager: CacheManager) -> None:
    put(manager, "a", "b", "c", "d", "e", "f")
    put(manager, "a", source="replaced")
    put(manager, "b", source="replaced too")
    for key in ("c", "d", "e", "f", "a"):
        manager.l1_tier.clear()
        manager.get(key)
    manager.maintain()
    manager.delete("b")
    manager.invalidate_by_health("c")
    manager.put("old", manager.new_entry("http://192.0.2.1:1", key="old", fetch_time_us=1))
    manager.cleanup_expired()
    for _ in range(3):
        manager.invalidate_by_health("d")
    manager.clear()
    put(manager, "a", "g")


def with_garbage(manager: CacheManager) -> None:
    for source in "12345":
        put(manager, "a", "b", "c", source=source)
        manager.maintain()


def without_l3(manager: CacheManager) -> None:
    put(manager, "a", "b", "c")
    with broken(manager.l3_tier):
        put(manager, "a", source="missed by l3")
        fail_until_skipped(manager, manager.l3_tier)
        put(manager, "d")
        manager.delete("b")
    recover(manager)
    put(manager, "a", source="later")


def without_l2(manager: CacheManager) -> None:
    put(manager, "a", "b", "c")
    with broken(manager.l2_tier):
        put(manager, "a", source="missed by l2")
        fail_until_skipped(manager, manager.l2_tier)
        put(manager, "d")
        manager.delete("b")
    recover(manager)
    put(manager, "a", source="later")


def cleared_without(tier: str) -> Callable[[CacheManager], None]:
    def work(manager: CacheManager) -> None:
        put(manager, "a", "b", "c")
        failing = getattr(manager, tier)
        with broken(failing):
            fail_until_skipped(manager, failing)
            manager.clear()
            put(manager, "d")
        recover(manager)

    return work


def without_any(manager: CacheManager) -> None:
    put(manager, "a", "b", "c")
    with broken(manager.l2_tier), broken(manager.l3_tier):
        put(manager, "a", source="in memory alone")
        fail_until_skipped(manager, manager.l2_tier)
        fail_until_skipped(manager, manager.l3_tier)
        put(manager, "d")
    recover(manager)


def recover(manager: CacheManager) -> None:
    clock = disk_of(manager).l2.breaker._monotonic
    assert isinstance(clock, FakeMonotonic)
    clock.advance(61)
    manager.maintain()


WORK: dict[str, tuple[Callable[[CacheManager], None], dict[str, Any]]] = {
    "every operation": (everyday, {}),
    "every operation, with evictions from L2": (everyday, {"l2_config": SMALL}),
    "every operation, with evictions from L3": (everyday, {"l3_config": SMALL}),
    "every operation, with memory off": (everyday, {"l1_config": SWITCHED_OFF}),
    "every operation, without L2": (everyday, {"l2_config": SWITCHED_OFF}),
    "every operation, without L3": (everyday, {"l3_config": SWITCHED_OFF}),
    "compactions": (with_garbage, {}),
    "L3 away": (without_l3, {}),
    "L2 away": (without_l2, {}),
    "a clear while L3 was away": (cleared_without("l3_tier"), {}),
    "a clear while L2 was away": (cleared_without("l2_tier"), {}),
    "both away": (without_any, {}),
    "both away, with memory off": (without_any, {"l1_config": SWITCHED_OFF}),
}


class Watch:
    """Checks, before every step, what a kill now would leave, and that the next start puts it in order."""

    def __init__(self, cache: StoppedCache) -> None:
        self._cache = cache
        self._seen: dict[str, bytes] = {}
        self.steps = 0

    def __call__(self, step: str) -> None:
        state = contents(self._cache.directory)
        if state == self._seen:
            return
        self._seen = state
        self.steps += 1
        killed = self._cache.copy(f"killed-{self.steps}")
        report = killed.check()
        assert report.consistent, f"before step {self.steps}, {step}: {told(report)}"
        with killed.running():
            pass
        report = killed.check()
        assert report.consistent, f"restarted before step {self.steps}, {step}: {told(report)}"
        assert note_kinds(report) <= {"set_aside", "leftover"}, told(report)
        shutil.rmtree(killed.directory)


def watch(cache: StoppedCache, work: Callable[[CacheManager], None]) -> None:
    watch = Watch(cache)
    cache.directory.mkdir(exist_ok=True)
    with stepping(watch):
        manager = CacheManager(cache.config(), background=False, monotonic=FakeMonotonic())
        try:
            work(manager)
        finally:
            manager.close()
    assert watch.steps > 5


@pytest.mark.parametrize("work", WORK)
def test_a_kill_at_any_moment_leaves_a_consistent_store(
    cache: StoppedCache, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxystash_server.cache.tiers.jsonl_shard._GARBAGE_WORTH_COMPACTING", 200)
    operations, cache.settings = WORK[work]
    watch(cache, operations)


def lose_l3(cache: StoppedCache) -> None:
    cache.l3.unlink()


def damage_l3(cache: StoppedCache) -> None:
    data = bytearray(cache.l3.read_bytes())
    data[:100] = b"\xaa" * 100
    cache.l3.write_bytes(data)


def lose_l2(cache: StoppedCache) -> None:
    shutil.rmtree(cache.l2)


def go_on_without(tier: str) -> Callable[[StoppedCache], None]:
    def change(cache: StoppedCache) -> None:
        with cache.running(**{tier: SWITCHED_OFF}) as manager:
            put(manager, "a", source="meanwhile")
            manager.delete("b")

    return change


@pytest.mark.parametrize("change", [lose_l3, lose_l2, go_on_without("l2_config"), go_on_without("l3_config")])
def test_a_kill_during_a_start_that_matches_the_tiers_leaves_a_consistent_store(
    cache: StoppedCache, change: Callable[[StoppedCache], None]
) -> None:
    with cache.running() as manager:
        put(manager, "a", "b", "c")
    change(cache)
    watch(cache, lambda manager: put(manager, "z"))
