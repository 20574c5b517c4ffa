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


def test_work_is_done_in_the_order_it_came_in_a_thread_of_the_pool() -> None:
    pool = WorkerPool(1, "test")
    names: list[str] = []
    done = threading.Event()
    pool.put(lambda: names.append("first"))
    pool.put(lambda: names.append(threading.current_thread().name))
    pool.put(done.set)
    assert done.wait(DEADLINE)
    pool.close()
    assert names == ["first", "test_0"]


def test_as_much_is_done_at_once_as_there_are_threads_and_the_rest_is_queued(pool: WorkerPool) -> None:
    together, go_on = threading.Barrier(3), threading.Event()

    def work() -> None:
        together.wait(DEADLINE)
        go_on.wait(DEADLINE)

    for _ in range(2):
        pool.put(work)
    together.wait(DEADLINE)
    for _ in range(3):
        pool.put(go_on.is_set)
    assert pool.queued == 3
    go_on.set()


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_what_work_raises_is_logged_and_the_thread_goes_on(error: type[BaseException]) -> None:
    def fail() -> None:
        raise error

    pool = WorkerPool(1, "test")
    done = threading.Event()
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            pool.put(fail)
        pool.put(done.set)
        assert done.wait(DEADLINE)
    pool.close()
    assert [log["event"] for log in logs] == ["work failed", "work failed"]


def test_a_closed_pool_finishes_what_it_is_at_and_begins_nothing_more() -> None:
    pool = WorkerPool(1, "test")
    began, go_on, begun = threading.Event(), threading.Event(), threading.Event()
    finished = threading.Event()

    def work() -> None:
        began.set()
        go_on.wait(DEADLINE)
        finished.set()

    pool.put(work)
    pool.put(begun.set)
    assert began.wait(DEADLINE)
    pool.close()
    go_on.set()
    assert finished.wait(DEADLINE)
    for thread in pool._threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert not begun.is_set()
