"""Account of answers that are not read."""

from __future__ import annotations

from proxystash_server.rpc.unread import UnreadAnswers


def test_the_oldest_go_when_there_is_too_much() -> None:
    unread = UnreadAnswers[str](100)
    assert [unread.add(name, 40) for name in ("a", "b")] == [[], []]
    assert unread.add("c", 40) == ["a"]
    assert unread.add("d", 90) == ["b", "c"]


def test_what_was_read_counts_no_more() -> None:
    unread = UnreadAnswers[str](100)
    unread.add("a", 60)
    unread.remove("a")
    unread.remove("a")
    assert unread.add("b", 60) == []
    assert unread.add("c", 60) == ["b"]
    unread.remove("b")
    assert unread.add("d", 40) == []


def test_a_single_answer_goes_however_large_it_is() -> None:
    unread = UnreadAnswers[str](100)
    assert unread.add("a", 1000) == []
    assert unread.add("b", 1) == ["a"]
