"""Locks per key."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import pytest

from proxystash_server.cache.ground import keylocks
from proxystash_server.cache.ground.keylocks import KeyLocks
from tests.server.cache.invariants import held_keys
from tests.server.cache.support import run_in_threads, wait_until

SHORTLY = 0.05

TakeLock = Callable[[], AbstractContextManager[object]]


@pytest.fixture
def locks() -> Iterator[KeyLocks]:
    locks = KeyLocks()
    yield locks
    assert held_keys(locks) == [], "a lock outlived its use"
    with locks.hold_all():
        pass


@contextmanager
def held(manager: TakeLock) -> Iterator[None]:
    """The lock taken in another thread for as long as the block lasts."""
    taken, release = threading.Event(), threading.Event()

    def hold() -> None:
        with manager():
            taken.set()
            assert release.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert taken.wait(30)
        yield
    finally:
        release.set()
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def waited_for(locks: KeyLocks) -> Iterator[None]:
    locks.wait_for_holders()
    yield


@contextmanager
def interrupted_in(function: str) -> Iterator[None]:
    """A function of the module that Ctrl-C strikes as it begins."""

    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keylocks, function, interrupted)
        yield


class Attempt:
    """A try to take a lock in another thread, and to let go of it at once."""

    def __init__(self, manager: TakeLock) -> None:
        self.succeeded = threading.Event()
        self._manager = manager
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self._manager():
            self.succeeded.set()

    def waits(self) -> bool:
        """Whether it is still waiting; a moment is given to it."""
        return not self.succeeded.wait(SHORTLY)

    def gets_it(self) -> bool:
        return self.succeeded.wait(30)


def test_a_key_is_held_by_one_at_a_time(locks: KeyLocks) -> None:
    inside = [0]
    most = [0]

    def work() -> None:
        for _ in range(200):
            with locks.hold("a"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    run_in_threads(*[work] * 6)
    assert most == [1]


def test_who_has_waited_longest_for_a_key_gets_it_next(locks: KeyLocks) -> None:
    order: list[int] = []

    def work(number: int) -> None:
        with locks.hold("a"):
            order.append(number)

    def wait(waiting: int) -> bool:
        return len(locks._asked) == 1 + waiting

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    with locks.hold("a"):
        for waiting, thread in enumerate(threads, 1):
            thread.start()
            wait_until(partial(wait, waiting))
    for thread in threads:
        thread.join(30)
    assert order == [0, 1, 2, 3, 4]


def test_different_keys_do_not_wait_for_each_other(locks: KeyLocks) -> None:
    with held(partial(locks.hold, "a")):
        assert Attempt(partial(locks.hold, "b")).gets_it()
        assert Attempt(partial(locks.hold_many, ["c", "d"])).gets_it()


def test_several_keys_exclude_each_of_them(locks: KeyLocks) -> None:
    with held(partial(locks.hold_many, ["b", "a", "b"])):
        attempts = [Attempt(partial(locks.hold, key)) for key in "ab"]
        assert all(attempt.waits() for attempt in attempts)
        assert Attempt(partial(locks.hold, "c")).gets_it()
    assert all(attempt.gets_it() for attempt in attempts)


def test_nothing_stays_of_keys_that_were_held_once(locks: KeyLocks) -> None:
    for number in range(1000):
        with locks.hold_many([f"key-{number}", "common"]):
            pass
    with locks.hold_many([]):
        assert len(locks._last) <= 2
        assert len(locks._asked) <= 2


def test_who_waits_for_the_holders_keeps_nobody_out(locks: KeyLocks) -> None:
    with held(partial(locks.hold, "a")):
        waiting = Attempt(partial(waited_for, locks))
        assert waiting.waits()
        assert Attempt(partial(locks.hold, "b")).gets_it()
        assert Attempt(partial(locks.hold_many, ["c", "d"])).gets_it()
    assert waiting.gets_it()


@pytest.mark.parametrize("wanted", ["a", "ab", None])
def test_who_stops_waiting_leaves_the_keys_to_whom_they_belong(locks: KeyLocks, wanted: str | None) -> None:
    """Given an interrupt: whoever came behind still waits for those that were before."""
    with held(partial(locks.hold, "a")):
        with interrupted_in("_wait_for"), pytest.raises(KeyboardInterrupt):
            (locks.hold_all() if wanted is None else locks.hold_many(wanted)).__enter__()
        behind = [Attempt(partial(locks.hold, "a")), Attempt(locks.hold_all)]
        assert all(attempt.waits() for attempt in behind)
    assert all(attempt.gets_it() for attempt in behind)


def test_holders_of_overlapping_keys_in_any_order_do_not_deadlock(locks: KeyLocks) -> None:
    orders = ["abcd", "dcba", "bdac", "cadb"]
    done: list[str] = []

    def work(keys: str) -> None:
        for _ in range(150):
            with locks.hold_many(keys):
                pass
            with locks.hold(keys[0]):
                pass
        done.append(keys)

    run_in_threads(*(partial(work, keys) for keys in orders))
    assert sorted(done) == sorted(orders)


def test_holding_all_waits_for_every_holder_and_keeps_new_ones_out(locks: KeyLocks) -> None:
    with held(partial(locks.hold, "a")):
        everything = Attempt(locks.hold_all)
        assert everything.waits()
    assert everything.gets_it()
    with held(locks.hold_all):
        attempts = [
            Attempt(partial(locks.hold, "a")),
            Attempt(partial(locks.hold_many, ["b", "c"])),
            Attempt(locks.hold_all),
        ]
        assert all(attempt.waits() for attempt in attempts)
    assert all(attempt.gets_it() for attempt in attempts)


def test_holders_of_one_of_all_and_of_many_do_not_deadlock(locks: KeyLocks) -> None:
    def many(keys: str) -> None:
        for _ in range(100):
            with locks.hold_many(keys):
                pass

    def everything() -> None:
        for _ in range(60):
            with locks.hold_all():
                assert held_keys(locks)[0] is None

    run_in_threads(partial(many, "abc"), partial(many, "cba"), partial(many, "b"), everything, everything)


def test_who_holds_some_keys_gets_the_rest_although_somebody_waits_for_all(locks: KeyLocks) -> None:
    with held(partial(locks.hold, "b")):
        many = Attempt(partial(locks.hold_many, ["a", "b", "c"]))
        assert many.waits()
        everything = Attempt(locks.hold_all)
        assert everything.waits()
    # "c" was not asked for before all were.
    assert many.gets_it()
    assert everything.gets_it()


def test_a_lock_is_let_go_of_after_an_error(locks: KeyLocks) -> None:
    lockings: list[TakeLock] = [
        partial(locks.hold, "a"),
        partial(locks.hold_many, ["a", "b"]),
        locks.hold_all,
    ]
    for manager in lockings:
        with pytest.raises(KeyError), manager():
            raise KeyError
        assert Attempt(partial(locks.hold, "a")).gets_it()
