"""Group commit: writers that come together share one commit."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

import pytest

from proxystash_server.cache.errors import TierError
from proxystash_server.cache.ground.group_commit import GroupCommit
from tests.server.cache.support import run_in_threads


class Log:
    """A commit that takes as long as a test wants, and notes what was committed together."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.under_way = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.error: BaseException | None = None
        self.commits: GroupCommit[int, str] = GroupCommit(self._commit)

    def _commit(self, items: Sequence[int]) -> list[str]:
        self.under_way.set()
        assert self.go_on.wait(30)
        self.groups.append(list(items))
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return [f"result {item}" for item in items]

    def submit_meanwhile(
        self, items: Sequence[int]
    ) -> tuple[list[threading.Thread], dict[int, str | BaseException]]:
        """Submit from one thread each while a commit is under way, in this order; what each got."""
        got: dict[int, str | BaseException] = {}

        def submit(item: int) -> None:
            try:
                got[item] = self.commits.submit(item)
            except (TierError, KeyboardInterrupt) as error:
                got[item] = error

        threads = []
        for place, item in enumerate(items, 1):
            threads.append(threading.Thread(target=submit, args=(item,)))
            threads[-1].start()
            while len(self.commits._queue) < place:
                pass
        return threads, got

    def commit_in_background(self, item: int) -> threading.Thread:
        """A commit that is under way, and lasts until `go_on` is set."""
        self.go_on.clear()
        self.under_way.clear()
        thread = threading.Thread(target=self.commits.submit, args=(item,))
        thread.start()
        assert self.under_way.wait(30)
        return thread

    def fail_the_group_with(self, item: int, error: BaseException) -> None:
        """Let the commit that this item is part of fail."""
        commit = self.commits._commit

        def failing(items: Sequence[int]) -> Sequence[str]:
            if item in items:
                self.error = error
            return commit(items)

        self.commits._commit = failing


@pytest.fixture
def log() -> Log:
    return Log()


def test_a_lone_writer_commits_at_once(log: Log) -> None:
    assert log.commits.submit(1) == "result 1"
    assert log.commits.submit(2) == "result 2"
    assert log.groups == [[1], [2]]


def test_those_that_wait_during_a_commit_share_the_next_in_the_order_they_came(log: Log) -> None:
    first = log.commit_in_background(1)
    threads, got = log.submit_meanwhile([2, 3, 4, 5])
    log.go_on.set()
    for thread in (first, *threads):
        thread.join(30)
    assert log.groups == [[1], [2, 3, 4, 5]]
    assert got == {item: f"result {item}" for item in (2, 3, 4, 5)}


def test_each_writer_gets_its_own_result_whoever_commits(log: Log) -> None:
    def write(start: int) -> list[tuple[int, str]]:
        return [(item, log.commits.submit(item)) for item in range(start, start + 50)]

    results = run_in_threads(*(partial(write, start) for start in range(0, 400, 50)))
    assert sorted(item for one in results for item, _ in one) == list(range(400))
    assert all(result == f"result {item}" for one in results for item, result in one)
    assert sorted(item for group in log.groups for item in group) == list(range(400))


def test_a_group_is_closed_when_its_items_weigh_enough() -> None:
    log = Log()
    log.commits = GroupCommit(log._commit, 10, lambda item: item)
    first = log.commit_in_background(1)
    threads, got = log.submit_meanwhile([4, 5, 6, 20, 1, 2])
    log.go_on.set()
    for thread in (first, *threads):
        thread.join(30)
    assert log.groups == [[1], [4, 5, 6], [20], [1, 2]]
    assert got == {item: f"result {item}" for item in (4, 5, 6, 20, 1, 2)}


@pytest.mark.parametrize("about_to_lead", [False, True])
def test_who_stops_waiting_leaves_the_others_a_leader(log: Log, about_to_lead: bool) -> None:
    first = log.commit_in_background(1)
    threads, got = log.submit_meanwhile([2, 3])
    interrupted = log.commits._queue[0]
    if about_to_lead:
        # Handed to it in the moment of the interrupt.
        log.commits._queue.popleft()
        interrupted.leads = True
    log.commits._leave(interrupted)
    log.go_on.set()
    first.join(30)
    threads[1].join(30)
    assert got == {3: "result 3"}
    assert log.commits.submit(4) == "result 4"
    interrupted.done = True
    interrupted.turn.release()
    threads[0].join(30)
    assert isinstance(got[2], TierError)


def test_an_error_reaches_every_writer_of_its_group_and_nobody_else(log: Log) -> None:
    first = log.commit_in_background(1)
    threads, got = log.submit_meanwhile([2, 3])
    log.fail_the_group_with(2, TierError("disk full"))
    log.go_on.set()
    for thread in (first, *threads):
        thread.join(30)
    assert isinstance(got[2], TierError)
    assert isinstance(got[3], TierError)
    assert log.commits.submit(4) == "result 4"


def test_an_interrupt_belongs_to_the_thread_it_struck_and_the_others_learn_that_nothing_was_committed(
    log: Log,
) -> None:
    first = log.commit_in_background(1)
    threads, got = log.submit_meanwhile([2, 3, 4])
    log.fail_the_group_with(2, KeyboardInterrupt())
    log.go_on.set()
    for thread in (first, *threads):
        thread.join(30)
    kinds = sorted(type(got[item]).__name__ for item in (2, 3, 4))
    assert kinds == ["KeyboardInterrupt", "TierError", "TierError"]
    assert log.commits.submit(5) == "result 5"


def _after_a_group_of(size: int, patience: float) -> Log:
    log = Log()
    log.commits = GroupCommit(log._commit, patience=patience)
    first = log.commit_in_background(0)
    group = list(range(1, size + 1))
    threads, _ = log.submit_meanwhile(group)
    log.go_on.set()
    for thread in (first, *threads):
        thread.join(30)
    assert log.groups == [[0], group]
    return log


def test_a_writer_whose_predecessors_came_together_waits_until_as_many_have_come() -> None:
    # Longer than the threads are waited for: who waits on after the third has come fails the test.
    log = _after_a_group_of(3, patience=120)
    run_in_threads(*(partial(log.commits.submit, item) for item in (4, 5, 6)))
    assert [sorted(group) for group in log.groups[2:]] == [[4, 5, 6]]


def test_two_are_no_company_to_wait_for() -> None:
    log = _after_a_group_of(2, patience=120)
    run_in_threads(partial(log.commits.submit, 3))
    assert log.groups[2:] == [[3]]


def test_a_writer_for_whom_nobody_comes_runs_out_of_patience_and_the_next_has_none() -> None:
    log = _after_a_group_of(3, patience=0.01)
    assert log.commits.submit(4) == "result 4"
    log.commits._patience = 120
    assert log.commits.submit(5) == "result 5"
    assert log.groups[2:] == [[4], [5]]


def test_an_interrupt_while_a_leader_waits_for_company_leaves_the_others_a_leader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = _after_a_group_of(3, patience=30)

    def interrupted() -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(log.commits, "_gather", interrupted)
    with pytest.raises(KeyboardInterrupt):
        log.commits.submit(4)
    log.commits._patience = 0
    assert log.commits.submit(5) == "result 5"
    assert log.groups[2:] == [[5]]
