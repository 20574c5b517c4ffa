"""The pool that handlers run in."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import structlog

from proxystash_server.rpc.workers import WorkerPool
from tests.support.rpc import DEADLINE


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(2, "test")
    yield pool
    pool.close()


def test_work_runs_in_the_order_of_its_submission_in_a_thread_of_the_pool(pool: WorkerPool) -> None:
    names: list[str] = []
    done = threading.Event()
    pool.submit(names.append, "first").add_done_callback(
        lambda _: pool.submit(lambda: names.append(threading.current_thread().name)).add_done_callback(
            lambda _: done.set()
        )
    )
    assert done.wait(DEADLINE)
    assert names[0] == "first"
    assert names[1].startswith("test_")


def test_as_much_work_runs_at_once_as_there_are_threads(pool: WorkerPool) -> None:
    together = threading.Barrier(3)
    for _ in range(2):
        pool.submit(together.wait, DEADLINE)
    together.wait(DEADLINE)


def test_a_callback_is_called_once_however_late_it_is_added(pool: WorkerPool) -> None:
    ran, called = threading.Event(), threading.Semaphore(0)
    item = pool.submit(ran.set)
    assert ran.wait(DEADLINE)
    item.add_done_callback(lambda _: called.release())
    assert called.acquire(timeout=DEADLINE)
    # Everything submitted before has been done with by both threads.
    idle = threading.Barrier(3)
    for _ in range(2):
        pool.submit(idle.wait, DEADLINE)
    idle.wait(DEADLINE)
    assert not called.acquire(blocking=False)


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_what_work_raises_is_logged_and_the_thread_goes_on(
    pool: WorkerPool, error: type[BaseException]
) -> None:
    def fail() -> None:
        raise error

    done = threading.Event()
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            pool.submit(fail)
        pool.submit(done.set)
        assert done.wait(DEADLINE)
        idle = threading.Barrier(3)
        for _ in range(2):
            pool.submit(idle.wait, DEADLINE)
        idle.wait(DEADLINE)
    assert [log["event"] for log in logs] == ["work failed", "work failed"]


def test_a_closed_pool_finishes_what_it_is_at_and_begins_nothing_more() -> None:
    pool = WorkerPool(1, "test")
    began, go_on, begun = threading.Event(), threading.Event(), threading.Event()
    finished = threading.Event()

    def work() -> None:
        began.set()
        go_on.wait(DEADLINE)

    pool.submit(work).add_done_callback(lambda _: finished.set())
    pool.submit(begun.set)
    assert began.wait(DEADLINE)
    pool.close()
    go_on.set()
    assert finished.wait(DEADLINE)
    for thread in pool._threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert not begun.is_set()
