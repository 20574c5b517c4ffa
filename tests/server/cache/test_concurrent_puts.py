"""Puts of concurrent callers are stored together, and each caller gets an answer of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from proxystash_server.cache import CacheClosedError, CacheEntry, CacheManager, CacheTierType, L2BackendType
from proxystash_server.cache.coherence.changes import StoredIn
from proxystash_server.cache.entry.entry import stamped
from proxystash_server.cache.tiers.base import Applied, AuthorityTier, Decide, Write
from tests.server.cache.stash import Stash
from tests.server.cache.support import bounded, wait_until

EVERYWHERE = tuple(CacheTierType)


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


class Together:
    """Puts that all come while the one before them is being stored."""

    def __init__(self, manager: CacheManager, pool: ThreadPoolExecutor) -> None:
        self.stored: list[list[str]] = []
        self._manager = manager
        self._pool = pool
        self._waiting = manager._changes._groups._queue

    def put(self, *entries: CacheEntry) -> Future[list[StoredIn]]:
        """Have a thread put entries; returns once they wait for their turn."""
        waiting = len(self._waiting)
        future = self._pool.submit(self._manager.put_many, entries)
        wait_until(lambda: len(self._waiting) > waiting)
        return future


@contextmanager
def together(manager: CacheManager, monkeypatch: pytest.MonkeyPatch) -> Iterator[Together]:
    """Hold L3 up with a put of `first`; what is put inside the block waits until the block ends."""
    tier = manager.l3_tier
    assert isinstance(tier, AuthorityTier)
    commit = tier.commit
    go_on = threading.Event()
    with ThreadPoolExecutor(20) as pool:
        puts = Together(manager, pool)

        def noting(keys: Sequence[str], decide: Decide) -> tuple[Sequence[Write], list[Applied]]:
            puts.stored.append(sorted(keys))
            assert go_on.wait(30)
            return commit(keys, decide)

        monkeypatch.setattr(tier, "commit", noting)
        first = pool.submit(manager.put_many, [entry(manager, "first")])
        try:
            wait_until(lambda: bool(puts.stored))
            yield puts
        finally:
            go_on.set()
        assert first.result(30) == [EVERYWHERE]


def entry(manager: CacheManager, key: str, source: str = "") -> CacheEntry:
    return manager.new_entry("http://192.0.2.1:8080", key=key, source=source)


def test_those_who_come_during_a_commit_share_the_next(stash: Stash, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = stash.open()
    keys = [f"key-{number}" for number in range(8)]
    with together(manager, monkeypatch) as puts:
        answers = [puts.put(entry(manager, key)) for key in keys]
    assert [answer.result(30) for answer in answers] == [[EVERYWHERE]] * 8
    assert puts.stored == [["first"], keys]
    for tier in (manager.l1_tier, manager.l2_tier, manager.l3_tier):
        assert sorted(tier.keys()) == ["first", *keys]


def test_of_equal_keys_the_last_counts_and_everyone_is_answered(
    stash: Stash, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = stash.open()
    with together(manager, monkeypatch) as puts:
        answers = [puts.put(entry(manager, "key", source=f"source-{number}")) for number in range(4)]
        answers.append(puts.put(entry(manager, "other"), entry(manager, "key", source="last")))
    assert [answer.result(30) for answer in answers] == [[EVERYWHERE]] * 4 + [[EVERYWHERE] * 2]
    assert puts.stored == [["first"], ["key", "other"]]
    for found in (manager.get("key"), manager.l2_tier.get("key"), manager.l3_tier.get("key")):
        assert found is not None
        assert found.source == "last"
    assert manager.get_statistics().entries == 3


def test_what_goes_wrong_with_one_is_not_the_others_fault(
    stash: Stash, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = stash.open()

    def failing(
        put: CacheEntry, key: str, version: int, failure_count: int, sealed: bytes | None
    ) -> CacheEntry:
        if key == "bad":
            raise ArithmeticError("this one cannot be stored")
        return stamped(put, key, version, failure_count, sealed)

    monkeypatch.setattr("proxystash_server.cache.coherence.plan.stamped", failing)
    with together(manager, monkeypatch) as puts:
        good = [puts.put(entry(manager, "good-1"))]
        bad = puts.put(entry(manager, "bad"))
        good.append(puts.put(entry(manager, "good-2")))
    assert [answer.result(30) for answer in good] == [[EVERYWHERE]] * 2
    with pytest.raises(ArithmeticError):
        bad.result(30)
    assert sorted(manager.l3_tier.keys()) == ["first", "good-1", "good-2"]


def test_a_group_takes_no_more_than_a_batch_or_two(stash: Stash, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = stash.open()
    batches = [[entry(manager, f"{batch}-{number}") for number in range(300)] for batch in range(4)]
    with together(manager, monkeypatch) as puts:
        answers = [puts.put(*batch) for batch in batches]
    for answer in answers:
        assert answer.result(30) == [EVERYWHERE] * 300
    assert [len(group) for group in puts.stored] == [1, 600, 600]


def test_who_waits_while_the_cache_is_closed_is_refused_and_what_was_begun_is_kept(
    stash: Stash, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = stash.open()
    with ThreadPoolExecutor(1) as closing:
        with together(manager, monkeypatch) as puts:
            waiting = [puts.put(entry(manager, f"key-{number}")) for number in range(3)]
            closed = closing.submit(manager.close)
            wait_until(lambda: manager._closed)
        closed.result(30)
    for answer in waiting:
        with pytest.raises(CacheClosedError):
            answer.result(30)
    assert stash.reopen().l3_tier.keys() == ["first"]


def test_failures_are_carried_on_through_a_group(stash: Stash, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = stash.open()
    manager.put_many([entry(manager, "failed"), entry(manager, "sound")])
    manager.invalidate_by_health("failed")
    with together(manager, monkeypatch) as puts:
        answers = [puts.put(entry(manager, key)) for key in ("failed", "sound", "failed")]
    for answer in answers:
        assert answer.result(30) == [EVERYWHERE]
    counts = {key: manager.l3_tier.get(key) for key in ("failed", "sound")}
    assert {key: found and found.failure_count for key, found in counts.items()} == {"failed": 1, "sound": 0}


@pytest.mark.parametrize("bounded_tier", ["l1_config", "l2_config", "l3_config"])
def test_a_put_that_makes_room_for_others_of_its_group_was_stored(
    stash: Stash, monkeypatch: pytest.MonkeyPatch, bounded_tier: str
) -> None:
    """Each caller is told what it would be told if the others had come a moment later."""
    manager = stash.open(**{bounded_tier: bounded(1)})
    with together(manager, monkeypatch) as puts:
        futures = [puts.put(entry(manager, f"key-{number}")) for number in range(4)]
    assert [future.result() for future in futures] == [[EVERYWHERE]] * 4
    assert puts.stored[1:] == [[f"key-{number}" for number in range(4)]]
