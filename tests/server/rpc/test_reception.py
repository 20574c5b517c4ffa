"""Who has a place to be received in, without a network, by a clock that the test owns."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxystash_server.rpc.reception import Reception


@dataclass(frozen=True, eq=False)
class Call:
    connection: bytes


@pytest.fixture
def now() -> list[float]:
    return [100.0]


@pytest.fixture
def reception(now: list[float]) -> Reception[Call]:
    return Reception(most=4, most_of_one=2, patience=10, clock=lambda: now[0])


def calls(connection: bytes, count: int) -> list[Call]:
    return [Call(connection) for _ in range(count)]


def test_a_connection_may_have_all_places_that_there_are(reception: Reception[Call]) -> None:
    assert [reception.enter(call) for call in calls(b"a", 6)] == [True] * 4 + [False] * 2


def test_one_that_has_them_all_holds_no_other_up(reception: Reception[Call]) -> None:
    for call in calls(b"a", 9):
        reception.enter(call)
    for connection in (b"b", b"c"):
        assert [reception.enter(call) for call in calls(connection, 3)] == [True, True, False]


def test_who_waits_gets_the_place_of_who_leaves_in_order(reception: Reception[Call]) -> None:
    first = calls(b"a", 4)
    waiting = calls(b"a", 2)
    for call in (*first, *waiting):
        reception.enter(call)
    assert [reception.leave(call) for call in first] == [*waiting, None, None]
    assert reception.waiting() == waiting


def test_lines_take_turns(reception: Reception[Call]) -> None:
    ahead = calls(b"a", 4)
    lines = [calls(connection, 4) for connection in (b"b", b"c")]
    for call in (*ahead, *lines[0], *lines[1]):
        reception.enter(call)
    # Two of each connection were let in at once, so there are too many until all of the first have left.
    assert [reception.leave(call) for call in ahead] == [None] * 4
    assert reception.leave(lines[0][0]) is lines[0][2]
    assert reception.leave(lines[0][1]) is lines[0][3]
    assert reception.leave(lines[0][2]) is lines[1][2]


def test_who_leaves_the_line_gets_no_place(reception: Reception[Call]) -> None:
    first, gone, waiting = calls(b"a", 4), Call(b"a"), Call(b"a")
    for call in (*first, gone, waiting):
        reception.enter(call)
    assert reception.leave(gone) is None
    assert reception.leave(gone) is None
    assert reception.leave(first[0]) is waiting


def test_what_is_awaited_for_too_long_is_overdue(reception: Reception[Call], now: list[float]) -> None:
    early, late = Call(b"a"), Call(b"a")
    reception.enter(early)
    now[0] += 5
    reception.enter(late)
    now[0] += 5.1
    assert reception.overdue(b"a") == [early]
    assert reception.overdue(b"b") == []


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([b"a", b"b", b"c"]), st.integers(0, 30))))
def test_nobody_is_forgotten_and_the_limits_hold(steps: list[tuple[bool, bytes, int]]) -> None:
    reception = Reception[Call](most=3, most_of_one=1)
    inside: list[Call] = []
    in_line: list[Call] = []
    for enters, connection, number in steps:
        if enters:
            call = Call(connection)
            (inside if reception.enter(call) else in_line).append(call)
        elif inside or in_line:
            call = (inside + in_line)[number % len(inside + in_line)]
            following = reception.leave(call)
            (inside if call in inside else in_line).remove(call)
            if following is not None:
                in_line.remove(following)
                inside.append(following)
        assert set(reception.waiting()) == {*inside, *in_line}
        assert len(inside) <= 3 + 3
        # Whoever waits waits for a reason: its connection has its place, and there is none for everybody.
        held = {call.connection for call in inside}
        assert not in_line or len(inside) >= 3
        assert {call.connection for call in in_line} <= held
    while inside:
        following = reception.leave(inside.pop())
        if following is not None:
            in_line.remove(following)
            inside.append(following)
    assert in_line == []
    assert reception._places == {}
    assert reception._lines == {}
