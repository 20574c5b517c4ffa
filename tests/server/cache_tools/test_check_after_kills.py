"""Whatever a kill leaves behind is consistent, and the next start puts in order what there is a note of.

A cache works, and before each of its steps, down to the middle of a write, the files are copied: that is what
a kill at this moment would leave.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from proxystash_server.cache import CacheManager, CacheTierConfig, EntryFilter
from tests.server.cache.support import (
    SWITCHED_OFF,
    FakeMonotonic,
    broken,
    contents,
    fail_until_skipped,
    guards_of,
    nothing_writable,
)
from tests.server.cache_tools.steps import stepping
from tests.server.cache_tools.stopped import StoppedCache, expired, note_kinds, told

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
    manager.put("old", expired("old"))
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
        put(manager, "a", source="in the journal alone")
        fail_until_skipped(manager, manager.l2_tier)
        fail_until_skipped(manager, manager.l3_tier)
        put(manager, "d")
    recover(manager)


def without_a_place_to_write(manager: CacheManager) -> None:
    put(manager, "a", "b", "c")
    with nothing_writable(manager):
        put(manager, "a", source="in memory alone")
        fail_until_skipped(manager, manager.l2_tier)
        fail_until_skipped(manager, manager.l3_tier)
        put(manager, "d")
    manager.maintain()
    put(manager, "e")
    recover(manager)


def recover(manager: CacheManager) -> None:
    clock = guards_of(manager)[0].breaker._monotonic
    assert isinstance(clock, FakeMonotonic)
    clock.advance(61)
    manager.maintain()


UNSEALED = {"unsealed_cache"}
MISSED = {"unsealed_cache", "missed_changes"}
# What is done, under which configuration, and what a check tells on the way.
WORK: dict[str, tuple[Callable[[CacheManager], None], dict[str, Any], set[str]]] = {
    "every operation": (everyday, {}, UNSEALED),
    "every operation, with evictions from L2": (everyday, {"l2_config": SMALL}, UNSEALED),
    "every operation, with evictions from L3": (everyday, {"l3_config": SMALL}, UNSEALED),
    "every operation, with memory off": (everyday, {"l1_config": SWITCHED_OFF}, UNSEALED),
    "every operation, without L2": (everyday, {"l2_config": SWITCHED_OFF}, set()),
    "every operation, without L3": (everyday, {"l3_config": SWITCHED_OFF}, set()),
    "compactions": (with_garbage, {}, UNSEALED),
    "L3 away": (without_l3, {}, MISSED),
    "L2 away": (without_l2, {}, UNSEALED),
    "a clear while L3 was away": (cleared_without("l3_tier"), {}, MISSED),
    "a clear while L2 was away": (cleared_without("l2_tier"), {}, UNSEALED),
    "both away": (without_any, {}, MISSED),
    "both away, with memory off": (without_any, {"l1_config": SWITCHED_OFF}, MISSED),
    "nothing writable": (without_a_place_to_write, {}, MISSED),
}


class Watch:
    """Checks, before every step, what a kill now would leave, and that the next start puts it in order.

    Then the cache must hold one of `states`, keys with their sources, if there are any to compare with.
    """

    def __init__(self, cache: StoppedCache, states: Sequence[Mapping[str, str]]) -> None:
        self._cache = cache
        self._states = states
        self._seen: dict[str, bytes] = {}
        self.steps = 0
        self.notes: set[str] = set()

    def __call__(self, step: str) -> None:
        state = contents(self._cache.directory)
        if state == self._seen:
            return
        self._seen = state
        self.steps += 1
        killed = self._cache.copy(f"killed-{self.steps}")
        report = killed.check()
        assert report.consistent, f"before step {self.steps}, {step}: {told(report)}"
        self.notes |= note_kinds(report)
        with killed.running() as manager:
            # What L2 starts without, it gets back, to be compared with L3.
            entries = manager.list_entries("", 100, EntryFilter())
            for entry in entries:
                got = manager.get(entry.key)
                assert got is not None
                assert got.version == entry.version
        if self._states:
            found = {entry.key: entry.source for entry in entries}
            assert found in self._states, f"restarted before step {self.steps}, {step}"
        report = killed.check()
        assert report.consistent, f"restarted before step {self.steps}, {step}: {told(report)}"
        assert note_kinds(report) <= {"set_aside", "leftover"}, told(report)
        shutil.rmtree(killed.directory)


def watch(
    cache: StoppedCache,
    work: Callable[[CacheManager], None],
    states: Sequence[Mapping[str, str]] = (),
) -> set[str]:
    """Watch a cache that does some work; the kinds of the notes that there were on the way."""
    watch = Watch(cache, states)
    cache.directory.mkdir(exist_ok=True)
    with stepping(watch):
        manager = CacheManager(cache.config(), background=False, monotonic=FakeMonotonic())
        try:
            work(manager)
        finally:
            manager.close()
    assert watch.steps > 5
    return watch.notes


@pytest.mark.parametrize("work", WORK)
def test_a_kill_at_any_moment_leaves_a_consistent_store(
    cache: StoppedCache, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxystash_server.cache.tiers.jsonl.tier._GARBAGE_WORTH_COMPACTING", 200)
    operations, cache.settings, notes = WORK[work]
    assert watch(cache, operations) >= notes


def lose_l3(cache: StoppedCache) -> None:
    cache.l3.unlink()


def lose_l2(cache: StoppedCache) -> None:
    shutil.rmtree(cache.l2)


def go_on_without(tier: str) -> Callable[[StoppedCache], None]:
    def change(cache: StoppedCache) -> None:
        with cache.running(**{tier: SWITCHED_OFF}) as manager:
            put(manager, "a", source="meanwhile")
            manager.delete("b")

    return change


def leave_a_journal(cache: StoppedCache) -> None:
    with cache.running() as manager:
        guards_of(manager)[1].breaker.force_open()
        put(manager, "a", "new", source="missed by l3")
        manager.delete("b")


def leave_a_journal_with_a_clear(cache: StoppedCache) -> None:
    with cache.running() as manager:
        guards_of(manager)[1].breaker.force_open()
        manager.clear()
        put(manager, "new", source="missed by l3")


def leave_a_journal_and_lose(lose: Callable[[StoppedCache], None]) -> Callable[[StoppedCache], None]:
    def change(cache: StoppedCache) -> None:
        leave_a_journal(cache)
        lose(cache)

    return change


def set_l3_back(cache: StoppedCache) -> None:
    yesterday = cache.l3.read_bytes()
    with cache.running() as manager:
        put(manager, "a", "new", source="today")
    cache.l3.write_bytes(yesterday)


BEFORE = {"a": "", "b": "", "c": ""}
MEANWHILE = {"a": "meanwhile", "c": ""}
WITH_JOURNAL = {"a": "missed by l3", "new": "missed by l3", "c": ""}
# What is done before the start, what a check tells on the way, and what is held from then on.
START: dict[str, tuple[Callable[[StoppedCache], None], set[str], dict[str, str]]] = {
    "L3 lost": (lose_l3, {"incomplete"}, BEFORE),
    "L2 lost": (lose_l2, set(), BEFORE),
    "L2 switched off for a while": (go_on_without("l2_config"), UNSEALED, MEANWHILE),
    "L3 switched off for a while": (go_on_without("l3_config"), {"alone"}, MEANWHILE),
    "L3 set back": (set_l3_back, {"set_back", "unsealed_cache"}, {**BEFORE, "a": "today", "new": "today"}),
    "an earlier format": (StoppedCache.turn_into_format_1, {"older_format"}, BEFORE),
    "a journal": (leave_a_journal, MISSED, WITH_JOURNAL),
    "a journal with a clear": (leave_a_journal_with_a_clear, MISSED, {"new": "missed by l3"}),
    "a journal, and L2 lost": (leave_a_journal_and_lose(lose_l2), {"missed_changes"}, WITH_JOURNAL),
    "a journal, and L3 lost": (
        leave_a_journal_and_lose(lose_l3),
        {"missed_changes", "incomplete"},
        WITH_JOURNAL,
    ),
}


@pytest.mark.parametrize("start", START)
def test_a_kill_during_a_start_that_matches_the_tiers_leaves_a_consistent_store(
    cache: StoppedCache, start: str
) -> None:
    with cache.running() as manager:
        put(manager, "a", "b", "c")
    change, notes, held = START[start]
    change(cache)
    assert watch(cache, lambda manager: put(manager, "z"), [held, {**held, "z": ""}]) >= notes
