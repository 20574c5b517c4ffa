"""What clients see of a server that is killed, or of a cache whose tiers fail, fits one order of events."""

from __future__ import annotations

import itertools
import math
import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from proxystash_server.cache import CacheTierType, L2BackendType
from proxystash_server.cache.coherence.authority import Committed
from proxystash_server.cache.coherence.changes import Changes
from proxystash_server.cache.coherence.plan import Plan, Put, Request
from tests.torture.evicting_cache import POLICIES, Policy, check_under_eviction
from tests.torture.failing_tier import check_under_faults
from tests.torture.histories import record
from tests.torture.killed_server import check_under_kills
from tests.torture.linearizability import Operation, check_history, check_key
from tests.torture.stores import BACKENDS
from tests.torture.tally import BreachError, Tally


@pytest.mark.parametrize("l2_backend", BACKENDS)
def test_clients_of_a_server_that_is_killed_again_and_again_see_one_order(l2_backend: L2BackendType) -> None:
    """Given kill -9 and restart at random moments: reads and writes of each key are linearizable."""
    tally = Tally()

    history = check_under_kills(tally, l2_backend, seed=1, seconds=9)

    assert tally["kills"]
    assert any(one.kind == "get" and one.value is not None for one in history)


@pytest.mark.parametrize("l2_backend", BACKENDS)
@pytest.mark.parametrize("failing", [CacheTierType.L2, CacheTierType.L3])
def test_threads_see_one_order_while_a_tier_fails_again_and_again(
    l2_backend: L2BackendType, failing: CacheTierType
) -> None:
    """Given faults that come and go at random moments, as reads, changes and the recovery go on."""
    tally = Tally()

    history = check_under_faults(tally, l2_backend, failing, seed=1, seconds=2)

    assert tally["faults"]
    assert any(one.kind == "get" and one.value is not None for one in history)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("l2_backend", BACKENDS)
def test_threads_see_one_order_while_entries_make_room_for_each_other(
    l2_backend: L2BackendType, policy: Policy
) -> None:
    """Given tiers of one, two and three entries: what was evicted is gone, and what was put was stored."""
    history = check_under_eviction(Tally(), l2_backend, policy, seed=1, seconds=1)

    assert any(one.kind == "get" and one.value is not None for one in history)


@pytest.mark.parametrize("planted", ["refused", "half"])
def test_a_put_that_is_answered_by_what_its_group_made_of_it_is_found(
    monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    """Given answers that leave out the tiers in which an entry has made room for others of its group."""
    answer = Changes._answer

    def answer_by_what_is_left(
        changes: Changes,
        requests: Sequence[Request],
        plan: Plan,
        committed: Committed,
        took: dict[CacheTierType, list[str]],
    ) -> list[Any]:
        answers = answer(changes, requests, plan, committed, took)
        for place, request in enumerate(requests):
            left = tuple(sorted(tier for tier, evicted in took.items() if request.key not in evicted))
            if isinstance(request, Put) and len(left) < len(took):
                tiers = left if planted == "half" else ()
                answers[place] = answers[place]._replace(stored_in=tiers)
        return answers

    monkeypatch.setattr(Changes, "_answer", answer_by_what_is_left)
    with pytest.raises(BreachError, match="is said to be stored in"):
        check_under_eviction(Tally(), L2BackendType.JSONL, "lru", seed=1, seconds=30, most=5000)


class FakeStore:
    """A register that is right, or one that loses, or brings back, every so manieth write."""

    def __init__(self, *, loses: int = 0, resurrects: int = 0) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, str] = {}
        self._loses = loses
        self._resurrects = resurrects
        self._puts = itertools.count(1)
        self._deletes = itertools.count(1)

    def put(self, keys: Sequence[str], value: str) -> None:
        with self._lock:
            if not self._loses or next(self._puts) % self._loses:
                self._values.update(dict.fromkeys(keys, value))

    def delete(self, key: str) -> None:
        with self._lock:
            if not self._resurrects or next(self._deletes) % self._resurrects:
                self._values.pop(key, None)

    def get(self, keys: Sequence[str]) -> list[str | None]:
        with self._lock:
            return [self._values.get(key) for key in keys]


def _history_of(store: FakeStore, seed: int) -> list[Operation]:
    left = itertools.count()
    return record(lambda: store, seed, lambda: next(left) < 4000)


def test_a_store_that_is_right_is_found_right() -> None:
    check_history(_history_of(FakeStore(), seed=1))


@pytest.mark.parametrize("planted", [{"loses": 50}, {"resurrects": 20}], ids=["loss", "resurrection"])
def test_a_planted_bug_is_found(planted: dict[str, int]) -> None:
    """Given a store that loses a put, or brings back a delete, now and then: the check fails."""
    with pytest.raises(BreachError):
        check_history(_history_of(FakeStore(**planted), seed=1))


@pytest.mark.parametrize("seed", range(5))
def test_a_read_that_is_falsified_in_a_right_history_is_found(seed: int) -> None:
    """Given a right history in which one get is made to show a value that was overwritten long before."""
    history = _history_of(FakeStore(), seed)
    chance = random.Random(seed)
    number = chance.choice(
        [number for number, one in enumerate(history) if one.kind == "get" and number > len(history) // 2]
    )
    old = next(one for one in history if one.kind == "put" and one.key == history[number].key)
    changed = history[number]
    history[number] = Operation(changed.key, "get", old.value, changed.invoked, changed.returned)

    with pytest.raises(BreachError):
        check_history(history)


def test_a_write_without_an_answer_may_have_happened_or_not_or_later() -> None:
    """Given a put and a delete that timed out: each get before, between and after them may show either."""
    first = Operation("k", "put", "a", 0, 1)
    unanswered = Operation("k", "put", "b", 2)
    deleted = Operation("k", "delete", None, 3)

    check_key([first, unanswered, Operation("k", "get", "a", 4, 5), Operation("k", "get", "b", 6, 7)])
    check_key([first, unanswered, Operation("k", "get", "a", 4, 5), Operation("k", "get", "a", 6, 7)])
    check_key([first, deleted, Operation("k", "get", "a", 4, 5), Operation("k", "get", None, 6, 7)])
    with pytest.raises(BreachError):
        check_key([first, unanswered, Operation("k", "get", "b", 4, 5), Operation("k", "get", "a", 6, 7)])
    with pytest.raises(BreachError):
        check_key([first, Operation("k", "get", "b", 4, 5), Operation("k", "put", "b", 6, math.inf)])
    with pytest.raises(BreachError):
        check_key([first, deleted, Operation("k", "get", None, 4, 5), Operation("k", "get", "a", 6, 7)])
