"""Uses of entries that have not reached the disk yet."""

from __future__ import annotations

from proxystash_server.cache import CacheEntry
from proxystash_server.cache.coherence.uses import UseLog, combine
from tests.server.cache.support import stored


def used(key: str, count: int, version: int = 1) -> CacheEntry:
    return stored(key, version=version, access_count=count, last_accessed_us=count)


def counts(log: UseLog, limit: int = 100) -> list[tuple[str, int]]:
    return [(use.key, use.access_count) for use in log.begin_flush(limit)]


def test_the_latest_use_of_each_key_is_flushed_least_recently_used_first() -> None:
    log = UseLog()
    for key, count in (("a", 1), ("b", 1), ("c", 1), ("a", 2)):
        log.record_use(used(key, count))
    assert counts(log) == [("b", 1), ("c", 1), ("a", 2)]
    log.end_flush(written=True)
    assert counts(log) == []


def test_a_flush_takes_no_more_than_it_is_asked_for() -> None:
    log = UseLog()
    for key in "abc":
        log.record_use(used(key, 1))
    assert counts(log, 2) == [("a", 1), ("b", 1)]
    log.end_flush(written=True)
    assert counts(log, 2) == [("c", 1)]
    assert len(log) == 1


def test_what_is_being_flushed_stays_visible_until_it_is_written() -> None:
    log = UseLog()
    log.record_use(used("a", 1))
    log.begin_flush(10)
    assert log.peek("a") is not None
    log.end_flush(written=True)
    assert log.peek("a") is None


def test_a_use_during_a_flush_is_for_the_next_one() -> None:
    log = UseLog()
    log.record_use(used("a", 1))
    log.begin_flush(10)
    log.record_use(used("a", 2))
    log.end_flush(written=True)
    assert counts(log) == [("a", 2)]


def test_what_could_not_be_written_is_tried_again_unless_there_is_something_newer() -> None:
    log = UseLog()
    for key in "abc":
        log.record_use(used(key, 1))
    log.begin_flush(2)
    log.record_use(used("b", 2))
    log.end_flush(written=False)
    assert counts(log) == [("a", 1), ("c", 1), ("b", 2)]


def test_flushes_are_counted_when_they_end() -> None:
    log = UseLog()
    before = log.flushes
    log.begin_flush(10)
    assert log.flushes == before
    log.end_flush(written=True)
    assert log.flushes == before + 1


def test_a_discarded_key_is_flushed_no_more_even_in_the_middle_of_a_flush() -> None:
    log = UseLog()
    log.record_use(used("a", 1))
    log.record_use(used("b", 1))
    log.begin_flush(1)
    log.discard(["a", "b"])
    log.end_flush(written=False)
    assert counts(log) == []
    assert log.peek("a") is None


def test_a_cleared_log_is_empty() -> None:
    log = UseLog()
    log.record_use(used("a", 1))
    log.begin_flush(10)
    log.record_use(used("b", 1))
    log.clear()
    log.end_flush(written=False)
    assert len(log) == 0


def test_the_log_knows_whether_anything_was_used_since_the_last_flush() -> None:
    log = UseLog()
    seen = [log.has_uses]
    log.note_demotion(used("a", 0))
    seen.append(log.has_uses)
    log.record_use(used("b", 1))
    seen.append(log.has_uses)
    log.begin_flush(100)
    log.end_flush(written=True)
    seen.append(log.has_uses)
    assert seen == [False, False, True, False]


def test_the_later_of_disk_and_log_counts() -> None:
    on_disk = used("a", 3, version=7)
    assert combine(on_disk, None) == on_disk
    assert combine(on_disk, used("a", 5, version=7)).access_count == 5
    assert combine(on_disk, used("a", 2, version=7)).access_count == 3
    # Uses of an earlier or a later content are no uses of this one.
    assert combine(on_disk, used("a", 9, version=6)).access_count == 3
    assert combine(on_disk, used("a", 9, version=8)).access_count == 3
