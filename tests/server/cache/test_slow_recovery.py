"""A tier that is slow to recover keeps nobody waiting for another key."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from proxystash_server.cache import CacheManager, CacheTier, L2BackendType
from tests.server.cache.stash import Stash
from tests.server.cache.support import (
    SWITCHED_OFF,
    broken,
    content_of,
    content_of_tier,
    fail_until_skipped,
    put,
    run_in_threads,
)

KEYS = [f"key-{number}" for number in range(250)]


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


@contextmanager
def held_up_in(tier: CacheTier, operation: str, work: Any) -> Iterator[list[Any]]:
    """Inside the block, work in another thread has come to an operation of the tier, which takes long.

    Gives what that was called with.
    """
    called_with: list[Any] = []
    real = getattr(tier, operation)
    begun, go_on = threading.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        called_with.extend(args)
        begun.set()
        assert go_on.wait(30)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tier, operation, slow)
        thread = threading.Thread(target=work)
        thread.start()
        try:
            assert begun.wait(30)
            patch.undo()
            yield called_with
        finally:
            go_on.set()
            thread.join(30)
            assert not thread.is_alive()


def look_up(manager: CacheManager, *keys: str) -> None:
    """Gets of what memory does not hold, and of nothing, from another thread."""
    keys = keys or ("key-7", "key-8")
    [found] = run_in_threads(lambda: [manager.get(key) for key in (*keys, "nothing")])
    assert [entry and entry.key for entry in found] == [*keys, None]


@pytest.mark.parametrize("operation", ["close", "open", "clear"])
def test_a_get_is_answered_while_an_l2_that_was_away_is_made_anew(stash: Stash, operation: str) -> None:
    manager = stash.open(l1_config=SWITCHED_OFF)
    put(manager, *KEYS)
    with broken(manager.l2_tier):
        fail_until_skipped(manager, manager.l2_tier)
    stash.monotonic.advance(61)
    with held_up_in(manager.l2_tier, operation, manager.maintain):
        look_up(manager)
        # Changes, too.
        run_in_threads(partial(put, manager, "key-8", source="meanwhile"))
    assert content_of_tier(manager.l2_tier).get("key-8", ("meanwhile", 0)) == ("meanwhile", 0)
    assert content_of(manager)["key-8"] == ("meanwhile", 0)


@pytest.mark.parametrize("operation", ["close", "open"])
def test_a_get_is_answered_while_an_l3_that_was_away_is_opened(stash: Stash, operation: str) -> None:
    manager = stash.open(l1_config=SWITCHED_OFF)
    put(manager, *KEYS)
    with broken(manager.l3_tier):
        fail_until_skipped(manager, manager.l3_tier)
    stash.monotonic.advance(61)
    with held_up_in(manager.l3_tier, operation, manager.maintain):
        look_up(manager)
    assert len(content_of(manager)) == len(KEYS)


def test_a_get_is_answered_while_an_l2_is_emptied_that_is_not_believed(stash: Stash) -> None:
    """Given an L3 that is there again, and is another one than L2 belongs to."""
    other = Stash(stash.directory.with_name("other"), L2BackendType.JSONL, stash.clock, stash.monotonic)
    put(other.open(encryption_key_file=stash.directory / "secret.key"), *KEYS, source="other")
    other.close()
    manager = stash.open(l1_config=SWITCHED_OFF)
    put(manager, *KEYS[:3], source="its own")
    with broken(manager.l3_tier):
        fail_until_skipped(manager, manager.l3_tier)
    path = stash.directory / "l3" / "proxystash.db"
    for old in path.parent.iterdir():
        old.unlink()
    (other.directory / "l3" / "proxystash.db").rename(path)
    stash.monotonic.advance(61)
    with held_up_in(manager.l2_tier, "clear", manager.maintain):
        look_up(manager)
        assert manager.get("key-1").source == "other"  # type: ignore[union-attr]
    assert manager._cache.works
    assert content_of_tier(manager.l2_tier) == {}
    assert set(content_of(manager).values()) == {("other", 0)}


def test_a_get_is_answered_while_a_recovery_waits_for_a_slow_get_of_another_key(stash: Stash) -> None:
    manager = stash.open(l1_config=SWITCHED_OFF)
    put(manager, *KEYS)
    with broken(manager.l2_tier):
        fail_until_skipped(manager, manager.l2_tier)
    stash.monotonic.advance(61)
    with held_up_in(manager.l3_tier, "get", partial(manager.get, "key-1")):
        recovery = threading.Thread(target=manager.maintain)
        recovery.start()
        look_up(manager)
    recovery.join(30)
    assert manager._cache.works


def test_a_get_is_answered_while_others_are_brought_back_to_l3(stash: Stash) -> None:
    """Given an L3 that was lost, into which a batch of what L2 has is being written."""
    manager = stash.open(l1_config=SWITCHED_OFF)
    put(manager, *KEYS)
    for path in (stash.directory / "l3").iterdir():
        path.unlink()
    # Who notices that.
    put(manager, "key-9")
    stash.monotonic.advance(61)
    with held_up_in(manager.l3_tier, "apply", manager.maintain) as called_with:
        in_batch = {write.key for write in called_with[0]}
        look_up(manager, *set(KEYS).difference(in_batch))
    stash.recover(manager)
    assert content_of_tier(manager.l3_tier).keys() == set(KEYS)
