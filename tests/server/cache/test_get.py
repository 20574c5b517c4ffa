"""Promise 3: L1, then L2, then L3; what is found goes into every faster tier; counts of uses are exact."""

from __future__ import annotations

import threading
from functools import partial
from itertools import pairwise

import pytest

from proxystash_server.cache import (
    CacheManager,
    CacheTier,
    CacheTierType,
    CacheUnavailableError,
    EntryFilter,
    L2BackendType,
)
from proxystash_server.cache.errors import TierError
from tests.server.cache.stash import Stash
from tests.server.cache.support import START_US, SWITCHED_OFF, bounded, broken, put, run_in_threads, stored

L1, L2, L3 = CacheTierType
ANY = EntryFilter()


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


def holders(manager: CacheManager, key: str) -> tuple[CacheTierType, ...]:
    """The tiers that hold a key."""
    tiers: tuple[CacheTier, ...] = (manager.l1_tier, manager.l2_tier, manager.l3_tier)
    return tuple(tier.tier_type for tier in tiers if tier.enabled and key in tier)


# -- where an entry is found, and where it is afterwards


def test_an_entry_in_every_tier_is_served_by_l1(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1")
    assert manager.lookup("key-1").served_by is L1


def test_an_entry_that_l1_has_not_is_served_by_l2_and_copied_into_l1(stash: Stash) -> None:
    put(stash.open(), "key-1")
    manager = stash.reopen()
    assert holders(manager, "key-1") == (L2, L3)
    assert manager.lookup("key-1").served_by is L2
    assert holders(manager, "key-1") == (L1, L2, L3)
    assert manager.lookup("key-1").served_by is L1
    assert manager.get_statistics().promotions == 1


def test_an_entry_that_only_l3_has_is_copied_into_both_faster_tiers(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(1), l2_config=bounded(1))
    put(manager, "key-1", "key-2")
    assert holders(manager, "key-1") == (L3,)
    assert manager.lookup("key-1").served_by is L3
    assert holders(manager, "key-1") == (L1, L2, L3)
    assert manager.get_statistics().promotions == 2


def test_a_key_that_no_tier_has_is_a_miss(stash: Stash) -> None:
    manager = stash.open()
    assert manager.lookup("nothing") == (None, None)
    assert manager.get("nothing") is None
    assert holders(manager, "nothing") == ()


@pytest.mark.parametrize(
    ("shape", "served_by", "afterwards"),
    [
        ({"l1_config": SWITCHED_OFF, "l2_config": bounded(1)}, L3, (L2, L3)),
        ({"l1_config": bounded(1), "l2_config": SWITCHED_OFF}, L3, (L1, L3)),
        ({"l1_config": bounded(1), "l3_config": SWITCHED_OFF}, L2, (L1, L2)),
    ],
)
def test_nothing_is_copied_into_a_tier_that_is_switched_off(
    stash: Stash, shape: dict[str, object], served_by: CacheTierType, afterwards: tuple[CacheTierType, ...]
) -> None:
    manager = stash.open(**shape)
    put(manager, "key-1", "key-2")
    assert manager.lookup("key-1").served_by is served_by
    assert holders(manager, "key-1") == afterwards


def test_a_copy_in_l2_is_as_good_as_the_original(stash: Stash) -> None:
    manager = stash.open(l2_config=bounded(1))
    put(manager, "key-1", username="u", password="p", labels={"country": "DE"})
    put(manager, "key-2")
    manager = stash.reopen(l2_config=bounded(1))
    original = manager.l3_tier.get("key-1")
    assert original is not None
    manager.get("key-1")
    manager.maintain()
    copy = manager.l2_tier.get("key-1")
    assert copy is not None
    assert copy.model_copy(update={"access_count": 0, "last_accessed": original.last_accessed}) == original
    assert copy.version == original.version


# -- counts of uses


def test_each_get_counts_as_one_use_at_its_time(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1")
    for uses in range(1, 5):
        stash.clock.advance(1)
        entry = manager.get("key-1")
        assert entry is not None
        assert entry.access_count == uses
        assert entry.last_accessed_us == START_US + uses * 1_000_000


def test_an_entry_that_was_never_used_was_last_accessed_when_it_was_fetched(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1", fetch_time_us=START_US - 500)
    [entry] = manager.list_entries("", 10, ANY)
    assert (entry.access_count, entry.last_accessed_us) == (0, START_US - 500)


SHAPES = {
    "all in L1": {},
    "L1 holds two": {"l1_config": bounded(2)},
    "L1 and L2 hold one": {"l1_config": bounded(1), "l2_config": bounded(1)},
    "without L1": {"l1_config": SWITCHED_OFF},
    "without L1, L2 holds one": {"l1_config": SWITCHED_OFF, "l2_config": bounded(1)},
    "without L2": {"l1_config": bounded(1), "l2_config": SWITCHED_OFF},
    "without L3": {"l1_config": bounded(1), "l3_config": SWITCHED_OFF},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("flush_every", [1, 3, 100])
@pytest.mark.parametrize("restart_every", [7, 100])
def test_counts_are_exact_wherever_the_entry_was_and_whenever_it_was_flushed(
    stash: Stash, shape: str, flush_every: int, restart_every: int
) -> None:
    manager = stash.open(**SHAPES[shape])
    keys = ["a", "b", "c", "d"]
    put(manager, *keys)
    uses = dict.fromkeys(keys, 0)
    for step, key in enumerate("aabacdabbbcadddcbaabcd", 1):
        stash.clock.advance(1)
        entry = manager.get(key)
        uses[key] += 1
        assert entry is not None
        assert (entry.access_count, entry.last_accessed_us) == (uses[key], stash.clock())
        if step % flush_every == 0:
            manager.maintain()
        if step % restart_every == 0:
            manager = stash.reopen(**SHAPES[shape])
        assert {entry.key: entry.access_count for entry in manager.list_entries("", 10, ANY)} == uses


def test_a_use_is_counted_though_its_entry_is_pushed_out_while_another_get_looks_for_it(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(1))
    put(manager, "key-1")
    l1 = manager._l1
    use = l1.use
    calls = []

    def too_late(key: str, now_us: int) -> None:
        calls.append(key)
        if len(calls) == 2:
            # By now another thread has promoted it, used it, and promoted the next entry in its place.
            assert use(key, now_us) is not None
            l1.put("key-2", stored("key-2"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(l1, "use", too_late)
        entry = manager.get("key-1")
    assert calls == ["key-1", "key-1"]
    assert entry is not None
    assert entry.access_count == 2


def test_listing_is_not_a_use(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1")
    for _ in range(3):
        [entry] = manager.list_entries("", 10, ANY)
        assert entry.access_count == 0


def test_an_invalidation_is_no_use_and_keeps_the_count(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(1))
    put(manager, "key-1", "key-2")
    manager.get("key-1")
    manager.get("key-2")
    manager.invalidate_by_health("key-1")
    entry = manager.get("key-1")
    assert entry is not None
    assert entry.access_count == 2


def test_a_replacement_starts_counting_anew(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1")
    manager.get("key-1")
    manager.maintain()
    put(manager, "key-1")
    entry = manager.get("key-1")
    assert entry is not None
    assert entry.access_count == 1


def test_uses_of_what_is_gone_leave_nothing_behind_in_memory(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(1))
    put(manager, "deleted", "replaced", "cleared")
    for key in ("deleted", "replaced", "cleared"):
        manager.get(key)
    manager.delete("deleted")
    put(manager, "replaced")
    assert manager._uses.peek("deleted") is None
    assert manager._uses.peek("replaced") is None
    manager.clear()
    assert len(manager._uses) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_uses_from_several_threads_are_all_counted(stash: Stash, shape: str) -> None:
    manager = stash.open(**SHAPES[shape])
    put(manager, "a", "b", "c")
    done = threading.Event()

    def use(offset: int) -> list[tuple[str, int]]:
        seen = []
        for number in range(60):
            key = "abc"[(number + offset) % 3]
            entry = manager.get(key)
            assert entry is not None
            seen.append((key, entry.access_count))
        return seen

    def flush() -> list[tuple[str, int]]:
        while not done.wait(0.001):
            manager.maintain()
        return []

    flusher = threading.Thread(target=flush)
    flusher.start()
    try:
        seen = run_in_threads(*(partial(use, offset) for offset in range(4)))
    finally:
        done.set()
        flusher.join()
    for key in "abc":
        counts = sorted(count for one in seen for seen_key, count in one if seen_key == key)
        # No two of them saw the same count, and none was left out.
        assert counts == list(range(1, 81))
        for one in seen:
            own = [count for seen_key, count in one if seen_key == key]
            assert all(earlier < later for earlier, later in pairwise(own))


@pytest.mark.parametrize("faulty", ["l2_tier", "l3_tier"])
def test_counts_stay_exact_when_a_tier_could_not_store_them(stash: Stash, faulty: str) -> None:
    manager = stash.open(l1_config=SWITCHED_OFF)
    put(manager, "key-1")
    for _ in range(3):
        manager.get("key-1")
    with broken(getattr(manager, faulty), {"note_uses"}):
        manager.maintain()
    stash.recover(manager)
    entry = manager.get("key-1")
    assert entry is not None
    assert entry.access_count == 4
    manager = stash.reopen(l1_config=SWITCHED_OFF)
    entry = manager.get("key-1")
    assert entry is not None
    assert entry.access_count == 5


def test_counts_wait_in_memory_while_no_disk_tier_can_store_them(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1")
    manager.get("key-1")
    with broken(manager.l2_tier, {"note_uses"}), broken(manager.l3_tier, {"note_uses"}):
        manager.maintain()
        manager.get("key-1")
    manager.maintain()
    for tier in (manager.l2_tier, manager.l3_tier):
        entry = tier.get("key-1")
        assert entry is not None
        assert entry.access_count == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_a_listing_in_the_middle_of_a_flush_has_the_exact_counts(stash: Stash, shape: str) -> None:
    manager = stash.open(**SHAPES[shape])
    put(manager, "a", "b")
    for key in "aab":
        manager.get(key)
    listed: list[dict[str, int]] = []
    tiers = [tier for tier in (manager.l2_tier, manager.l3_tier) if tier.enabled]
    for tier in tiers:
        note_uses = tier.note_uses

        def note_and_list(accesses, note_uses=note_uses):  # type: ignore[no-untyped-def]  # stands in for the real one
            for when in ("before", "after"):
                if when == "after":
                    note_uses(accesses)
                entries = manager.list_entries("", 10, ANY)
                listed.append({entry.key: entry.access_count for entry in entries})

        tier.note_uses = note_and_list  # type: ignore[method-assign]
    manager.maintain()
    assert listed == [{"a": 2, "b": 1}] * len(listed)
    assert len(listed) == 2 * len(tiers)


def test_a_page_that_is_read_while_uses_leave_the_log_has_the_exact_counts(stash: Stash) -> None:
    """Given a flush after the tier was read, and before the page is compared with the log."""
    manager = stash.open()
    put(manager, "a")
    manager.get("a")
    scan = manager.l3_tier.scan

    def scan_and_flush(*asked):  # type: ignore[no-untyped-def]  # stands in for the real one
        page = scan(*asked)
        manager.maintain()
        return page

    manager.l3_tier.scan = scan_and_flush  # type: ignore[method-assign]
    [entry] = manager.list_entries("", 10, ANY)
    assert entry.access_count == 1


# -- what a read waits for


def test_a_hit_in_l1_waits_for_nobody(stash: Stash) -> None:
    """Not even for a change of the same key that is being written, nor for a clear."""
    manager = stash.open()
    put(manager, "key-1")
    with manager._locks.hold_all():
        [(entry, served_by)] = run_in_threads(partial(manager.lookup, "key-1"))
    assert entry is not None
    assert served_by is L1


def test_a_get_below_l1_does_not_wait_for_the_write_of_another_key(stash: Stash) -> None:
    put(stash.open(), "key-1", "key-2")
    manager = stash.reopen()
    writing, go_on = threading.Event(), threading.Event()
    commit = manager.l3_tier.commit  # type: ignore[attr-defined]  # L3 decides

    def slow_commit(keys, decide):  # type: ignore[no-untyped-def]  # stands in for the real one
        writing.set()
        assert go_on.wait(30)
        return commit(keys, decide)

    manager.l3_tier.commit = slow_commit  # type: ignore[attr-defined]
    writer = threading.Thread(target=put, args=(manager, "key-2"))
    writer.start()
    try:
        assert writing.wait(30)
        assert manager.lookup("key-1").served_by is L2
        assert manager.get("nothing") is None
        assert manager.get_statistics().hits == 1
    finally:
        go_on.set()
        writer.join()


@pytest.mark.parametrize("stored_in", ["l2", "l3"])
def test_a_get_does_not_wait_for_a_commit_under_way(stash: Stash, stored_in: str) -> None:
    """Whatever it would have to write itself, such as a promotion, is done later."""
    manager = stash.open(l2_config=bounded(1))
    put(manager, "in-l3", "in-l2")
    manager = stash.reopen(l2_config=bounded(1))
    lock = (
        manager.l2_tier.commit_lock  # type: ignore[attr-defined]
        if manager.l2_tier.backend == "jsonl"
        else manager.l2_tier._database._lock  # type: ignore[attr-defined]
    )
    with lock:
        [(entry, served_by)] = run_in_threads(partial(manager.lookup, f"in-{stored_in}"))
    assert entry is not None
    assert served_by == stored_in
    manager.maintain()
    assert holders(manager, f"in-{stored_in}") == (L1, L2, L3)
    assert manager.get_statistics().promotions == (1 if stored_in == "l2" else 2)


def test_a_failing_read_of_one_tier_is_answered_by_the_next(stash: Stash) -> None:
    put(stash.open(), "key-1")
    manager = stash.reopen()
    with broken(manager.l2_tier, {"get"}):
        assert manager.lookup("key-1").served_by is L3
    assert manager.get_statistics().l2_stats.errors == 1


def test_no_tier_error_ever_reaches_the_caller(stash: Stash) -> None:
    put(stash.open(), "key-1", "key-2")
    manager = stash.reopen()
    with broken(manager.l2_tier), broken(manager.l3_tier):
        for operation in (
            lambda: manager.get("key-1"),
            lambda: manager.list_entries("", 10, ANY),
            lambda: put(manager, "key-3"),
            lambda: manager.delete("key-2"),
            lambda: manager.invalidate_by_health("key-1"),
            manager.clear,
            manager.cleanup_expired,
            manager.get_statistics,
            manager.maintain,
        ):
            try:
                operation()
            except TierError as error:
                pytest.fail(f"{error!r} got through")
            except CacheUnavailableError:
                pass
    stash.recover(manager)
