"""What borrowers see of a pool, of a server that is killed as well, fits one order of events."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from proxystash_server.cache import L2BackendType
from proxystash_server.pool.index import SelectionIndex, State
from proxystash_server.pool.lending import Lending
from tests.torture.borrowers import LIMITS, check_leases_in_process
from tests.torture.killed_server import check_leases_under_kills
from tests.torture.lease_histories import LeaseOperation, check_leases
from tests.torture.stores import BACKENDS
from tests.torture.tally import BreachError, Tally


@pytest.mark.parametrize("l2_backend", BACKENDS)
def test_borrowers_of_a_server_that_is_killed_again_and_again_see_one_order(
    l2_backend: L2BackendType,
) -> None:
    """Given kill -9 and restart at random moments, and calls that are repeated until they are answered."""
    tally = Tally()

    history = check_leases_under_kills(tally, l2_backend, seed=1, seconds=6)

    assert tally["kills"]
    _check_is_telling(history)
    assert any(one.attempts for one in history)


@pytest.mark.parametrize("l2_backend", BACKENDS)
def test_borrowers_see_one_order_while_their_proxies_are_put_again(l2_backend: L2BackendType) -> None:
    _check_is_telling(check_leases_in_process(Tally(), l2_backend, seed=1, seconds=2))


def _check_is_telling(history: list[LeaseOperation]) -> None:
    """There is something to explain: proxies were lent, given back, and refused."""
    assert {one.key for one in history if not one.releases} == {None, *LIMITS}
    assert any(one.releases for one in history)


def test_a_planted_double_grant_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a pool that sometimes forgets that a proxy is lent to its limit."""
    set_state = SelectionIndex.set_state
    times = itertools.count(1)

    def set_most(index: SelectionIndex, slot: int, state: State) -> None:
        if state is not State.LEASED_OUT or next(times) % 10:
            set_state(index, slot, state)

    monkeypatch.setattr(SelectionIndex, "set_state", set_most)
    with pytest.raises(BreachError):
        check_leases_in_process(Tally(), L2BackendType.JSONL, seed=1, seconds=30, most=20_000)


def test_a_proxy_that_is_withheld_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a pool that sometimes does not find the proxy that is free."""
    choose = Lending._choose
    times = itertools.count(1)

    def choose_mostly(lending: Lending, *arguments: Any) -> int | None:
        return choose(lending, *arguments) if next(times) % 10 else None

    monkeypatch.setattr(Lending, "_choose", choose_mostly)
    with pytest.raises(BreachError):
        check_leases_in_process(Tally(), L2BackendType.JSONL, seed=1, seconds=30, most=20_000)


def test_what_cannot_be_explained_is_found_and_what_can_be_is_not() -> None:
    limits = {"a": 1, "b": 1}
    acquired = LeaseOperation("a", False, 0, 1)
    other = LeaseOperation("b", False, 0, 1)
    check_leases([acquired, other, LeaseOperation(None, False, 2, 3)], limits)
    # Refused while the other call was under way, and so perhaps after it.
    check_leases([acquired, LeaseOperation("b", False, 2, 9), LeaseOperation(None, False, 3, 4)], limits)
    # Refused because of an attempt that was lost.
    lost = LeaseOperation("b", False, 2, 9, attempts=(2,))
    check_leases(
        [acquired, lost, LeaseOperation(None, False, 3, 4), LeaseOperation("b", True, 10, 11)], limits
    )
    check_leases([acquired, LeaseOperation("a", True, 2, 5), LeaseOperation("a", False, 3, 4)], limits)
    with pytest.raises(BreachError, match="withheld"):
        check_leases([acquired, LeaseOperation(None, False, 2, 3)], limits)
    with pytest.raises(BreachError, match="lent twice"):
        check_leases([acquired, LeaseOperation("a", False, 2, 3)], limits)
    with pytest.raises(BreachError, match="lent twice"):
        check_leases([acquired, LeaseOperation("a", False, 2, 3), LeaseOperation("a", True, 4, 5)], limits)
