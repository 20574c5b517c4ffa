"""Watches beside random changes: what each has been told is what the cache holds."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest

from proxystash.v1 import cache_service_pb2 as pb
from proxystash_server.cache import (
    CacheEntry,
    CacheUnavailableError,
    EntryFilter,
    HealthStatus,
    L2BackendType,
    Page,
)
from proxystash_server.rpc import convert
from proxystash_server.rpc.engine import Engine
from proxystash_server.rpc.watch import cursor as cursor_module
from proxystash_server.rpc.watch.cursor import Cursor, Selection, View
from proxystash_server.rpc.watch.history import Compacted, History
from tests.server.cache.stash import Stash
from tests.server.cache.support import FakeClock, FakeMonotonic, bounded, break_tier, repair_tier
from tests.server.rpc.follower import Follower

KEYS = [f"key-{number}" for number in range(8)]
SOURCES = ["", "a", "b"]
SCHEMES = ["http", "socks5"]
FILTERS = [
    EntryFilter(),
    EntryFilter(source="a"),
    EntryFilter(health_statuses=frozenset({HealthStatus.UNHEALTHY})),
    EntryFilter(health_statuses=frozenset({HealthStatus.HEALTHY, HealthStatus.UNKNOWN})),
    EntryFilter(schemes=frozenset({"socks5"}), labels={"country": "DE"}),
]
STEPS = 1000
HISTORY = 20


class Cache:
    """A cache that changes at random, also while its entries are listed."""

    def __init__(self, stash: Stash, rand: random.Random) -> None:
        self.stash = stash
        self.rand = rand
        self.manager = stash.open(l1_config=bounded(4), l3_config=bounded(rand.choice([None, 6])))
        self.is_broken = False
        self.resets = 0

    def change(self) -> None:
        operations: list[tuple[Callable[[], object], int]] = [
            (self._put, 10),
            (self._put_several, 2),
            (lambda: self.manager.delete(self._key()), 4),
            (lambda: self.manager.invalidate_by_health(self._key()), 6),
            (lambda: self.manager.get(self._key()), 2),
            (self.manager.cleanup_expired, 1),
            (self._let_time_pass, 1),
            (self.manager.maintain, 1),
            (self._break_or_repair, 1),
        ]
        if self.rand.random() < 0.02:
            operations = [(self.manager.clear, 1)]
        [operation] = self.rand.choices(
            [operation for operation, _ in operations], [weight for _, weight in operations]
        )
        # While L3 is broken some changes are refused, and told to nobody.
        with suppress(CacheUnavailableError):
            operation()

    def scan_entries(self, after: str, limit: int, entry_filter: EntryFilter) -> Page:
        """A page that is behind the times or ahead of them, as one of a busy server is."""
        for _ in range(self.rand.randrange(3)):
            self.change()
        page = self.manager.scan_entries(after, limit, entry_filter)
        for _ in range(self.rand.randrange(3)):
            self.change()
        return page

    def repair(self) -> None:
        if self.is_broken:
            self._break_or_repair()

    def _break_or_repair(self) -> None:
        if self.is_broken:
            repair_tier(self.manager.l3_tier)
            self.stash.recover(self.manager)
        else:
            break_tier(self.manager.l3_tier)
        self.is_broken = not self.is_broken

    def _key(self) -> str:
        return self.rand.choice(KEYS)

    def _entry(self) -> CacheEntry:
        rand = self.rand
        return self.manager.new_entry(
            f"{rand.choice(SCHEMES)}://192.0.2.1:{rand.randrange(1, 1000)}",
            key=self._key(),
            source=rand.choice(SOURCES),
            health_status=rand.choice(list(HealthStatus)),
            labels=rand.choice([{}, {"country": "DE"}]),
            username=rand.choice([None, "jane"]),
            ttl_us=rand.choice([5, 1000]) * 1_000_000,
        )

    def _put(self) -> None:
        entry = self._entry()
        self.manager.put(entry.key, entry)

    def _put_several(self) -> None:
        self.manager.put_many([self._entry() for _ in range(self.rand.randrange(1, 5))])

    def _let_time_pass(self) -> None:
        self.stash.clock.advance(self.rand.choice([1, 3, 10]))


class Watcher:
    """A watch that is read at random, and comes again where its history ends."""

    def __init__(self, cache: Cache, history: History, view: View) -> None:
        self._cache = cache
        self._history = history
        self._view = view
        self.compacted = 0
        self.begin()

    def begin(self) -> None:
        self.follower = Follower()
        self._past: deque[Follower] = deque(maxlen=30)
        self.cursor = Cursor(cast("Engine", self._cache), self._history, self._view, include_existing=True)

    def step(self) -> None:
        try:
            response = self.cursor.next_response()
        except Compacted:
            self.compacted += 1
            self.begin()
            return
        except CacheUnavailableError:
            self.begin()
            return
        self.follower.hear(self.cursor.progress() if response is None else response)
        if self.follower.synced:
            self._past.append(self.follower.snapshot())

    def resume(self) -> None:
        """Lose the connection, and come again with the copy of now or of some time before."""
        if not self._past:
            self.begin()
            return
        self.follower = self._cache.rand.choice([*self._past, self._past[-1]]).snapshot()
        try:
            place = (self.follower.history, self.follower.revision)
            self.cursor = Cursor(cast("Engine", self._cache), self._history, self._view, resume_after=place)
        except Compacted:
            self.compacted += 1
            self.begin()

    def catch_up(self) -> None:
        while self.cursor.is_behind or not self.follower.synced:
            self.step()

    def compare(self) -> None:
        manager, selection = self._cache.manager, self._view.selection
        now = self._cache.stash.clock()
        listed = {entry.key: entry for entry in manager.list_entries("", 100, selection.entry_filter)}
        copied = self.follower.copy
        expired = set(copied) - set(listed)
        assert set(listed) <= set(copied)
        for key in expired:
            assert copied[key].entry.expires_at.ToMicroseconds() <= now, f"{key} was removed, and is here"
        for key, entry in listed.items():
            assert copied[key].version == entry.version
            expected = pb.CacheEntry()
            convert.fill_entry(expected, entry)
            for message in (expected, sent := copied[key].entry):
                # A use is no change.
                for name in ("access_count", "last_accessed", "evicted_from_l1"):
                    message.ClearField(name)
            assert sent == expected


@pytest.fixture
def stash(tmp_path: Path) -> Iterator[Stash]:
    stash = Stash(tmp_path / "data", L2BackendType.JSONL, FakeClock(), FakeMonotonic())
    yield stash
    stash.close()


@pytest.mark.parametrize("seed", range(8))
def test_a_follower_has_what_the_cache_has(stash: Stash, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cursor_module, "EXISTING_PAGE", 2)
    monkeypatch.setattr(cursor_module, "MAX_LOOKED_AT", 5)
    monkeypatch.setattr(cursor_module, "RESPONSE_BYTES", 200)
    rand = random.Random(seed)
    cache = Cache(stash, rand)
    history = History(HISTORY, stash.clock)
    history.begin_after(cache.manager.subscribe(history.tell))
    views = [View(history, selection(entry_filter)) for entry_filter in FILTERS]
    watchers = [Watcher(cache, history, view) for view in views for _ in range(2)]

    for _ in range(STEPS):
        if rand.random() < 0.75:
            cache.change()
        else:
            watcher = rand.choice(watchers)
            if rand.random() < 0.1:
                watcher.resume()
            for _ in range(rand.randrange(4)):
                watcher.step()
        if rand.random() < 0.02:
            cache.repair()
            for watcher in watchers:
                watcher.catch_up()
            for watcher in watchers:
                # Others that were catching up have changed the cache meanwhile.
                cache.repair()
                watcher.catch_up()
                if not cache.is_broken:
                    watcher.compare()

    assert sum(watcher.compacted for watcher in watchers) > 0


def selection(entry_filter: EntryFilter, **fields: Any) -> Selection:
    settings = {"kinds": frozenset(), "include_entries": True, "include_credentials": True, **fields}
    return Selection(entry_filter, **settings)
