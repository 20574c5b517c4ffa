"""The background cleaner, and the manager's own background thread."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref

import pytest

from proxystash_server.cache import CacheManager, TTLManager
from proxystash_server.cache.periodic import PeriodicWork
from tests.server.cache.stash import Stash
from tests.server.cache.support import put

SECOND_US = 1_000_000
SOON = 0.001
NEVER = 3600.0


class Cleaned:
    """Stands in for a manager, and lets a test wait for rounds of cleaning."""

    def __init__(self, *, failures: int = 0) -> None:
        self.rounds = threading.Semaphore(0)
        self.failures = failures

    def cleanup_expired(self) -> int:
        self.rounds.release()
        if self.failures:
            self.failures -= 1
            raise RuntimeError("a bad round")
        return 0

    maintain = cleanup_expired

    def wait_for(self, rounds: int) -> None:
        for _ in range(rounds):
            assert self.rounds.acquire(timeout=30)


def ttl_manager(cleaned: Cleaned, interval: float = SOON) -> TTLManager:
    return TTLManager(cleaned, cleanup_interval=interval)


def test_it_cleans_again_and_again_between_start_and_stop() -> None:
    cleaned = Cleaned()
    cleaner = ttl_manager(cleaned)
    enabled = [cleaner.enabled]
    cleaner.start()
    enabled.append(cleaner.enabled)
    cleaned.wait_for(3)
    cleaner.stop()
    enabled.append(cleaner.enabled)
    assert enabled == [False, True, False]
    while cleaned.rounds.acquire(blocking=False):
        pass
    assert not cleaned.rounds.acquire(timeout=0.05)


def test_it_can_be_started_and_stopped_over_and_over() -> None:
    cleaned = Cleaned()
    cleaner = ttl_manager(cleaned)
    for _ in range(3):
        cleaner.start()
        cleaner.start()
        cleaned.wait_for(1)
        cleaner.stop()
        cleaner.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "proxystash-ttl"]


@pytest.mark.parametrize("interval", [0, -1, float("nan"), float("inf"), threading.TIMEOUT_MAX * 2])
def test_an_interval_that_nobody_can_wait_is_refused(interval: float) -> None:
    with pytest.raises(ValueError, match="greater than 0 and at most 9,223,372,036 s"):
        ttl_manager(Cleaned(), interval)


def test_the_longest_interval_is_waited() -> None:
    cleaner = ttl_manager(Cleaned(), threading.TIMEOUT_MAX)
    cleaner.start()
    time.sleep(0.02)
    assert cleaner.enabled
    cleaner.stop()


def test_one_whose_thread_has_died_is_not_enabled_and_can_be_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cleaned = Cleaned()
    cleaner = ttl_manager(cleaned)

    def die() -> int:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(cleaned, "cleanup_expired", die)
        patched.setattr(threading, "excepthook", lambda _args: None)
        cleaner.start()
        thread = cleaner._cleaning._thread
        assert thread is not None
        thread.join(30)
    enabled = [cleaner.enabled]
    cleaner.start()
    cleaned.wait_for(2)
    enabled.append(cleaner.enabled)
    cleaner.stop()
    assert enabled == [False, True]


def test_stopping_does_not_wait_for_the_interval() -> None:
    cleaner = ttl_manager(Cleaned(), NEVER)
    cleaner.start()
    cleaner.stop()
    assert not cleaner.enabled


def test_it_outlives_a_bad_round_and_logs_it(caplog: pytest.LogCaptureFixture) -> None:
    cleaned = Cleaned(failures=2)
    cleaner = ttl_manager(cleaned)
    cleaner.start()
    cleaned.wait_for(3)
    cleaner.stop()
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]


def test_it_gives_the_room_of_expired_entries_back(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "old", ttl_us=10 * SECOND_US)
    put(manager, "young")
    stash.clock.advance(10)
    gone = threading.Event()
    cleanup_expired = manager.cleanup_expired

    def noted() -> int:
        removed = cleanup_expired()
        gone.set()
        return removed

    manager.cleanup_expired = noted  # type: ignore[method-assign]
    cleaner = TTLManager(manager, cleanup_interval=SOON)
    cleaner.start()
    assert gone.wait(30)
    cleaner.stop()
    assert manager.get_statistics().entries == 1
    assert manager.l3_tier.keys() == ["young"]


def test_a_manager_runs_one_where_the_configuration_asks_for_it(stash: Stash) -> None:
    manager = stash.open(enable_background_cleanup=True, cleanup_interval_seconds=7)
    assert manager.ttl_manager is not None
    assert manager.ttl_manager.enabled
    assert manager.ttl_manager.cleanup_interval == 7
    manager.close()
    assert not manager.ttl_manager.enabled


def test_a_manager_runs_none_by_default(stash: Stash) -> None:
    assert stash.open().ttl_manager is None


# -- the manager's own thread


def test_the_background_work_outlives_a_bad_round(caplog: pytest.LogCaptureFixture) -> None:
    cleaned = Cleaned(failures=1)
    maintenance = PeriodicWork("maintenance", SOON, cleaned, Cleaned.maintain)
    maintenance.start()
    cleaned.wait_for(3)
    maintenance.stop()
    assert "background work failed" in caplog.text


def collect(thread: threading.Thread) -> None:
    """Free what nobody holds, here or in the thread that has it for a round still."""
    gc.collect()
    thread.join(30)


def test_a_manager_that_nobody_holds_any_more_ends_its_background_work(
    stash: Stash, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxystash_server.cache.manager.MAINTENANCE_SECONDS", SOON)
    manager = CacheManager(stash.config(), clock=stash.clock)
    thread = manager._maintenance._thread
    assert thread is not None
    gone = weakref.ref(manager)
    stash.validated = False
    del manager
    with pytest.warns(ResourceWarning, match="was not closed"):
        collect(thread)
    assert not thread.is_alive()
    assert gone() is None


def test_closing_ends_the_background_work(stash: Stash, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        manager = CacheManager(stash.config(enable_background_cleanup=True), clock=stash.clock)
        names = {"proxystash-maintenance", "proxystash-ttl"}
        assert {thread.name for thread in threading.enumerate()} >= names
        manager.close()
    assert not {thread.name for thread in threading.enumerate()} & names
    assert "failed" not in caplog.text
