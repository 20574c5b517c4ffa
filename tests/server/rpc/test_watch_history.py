"""The history of changes: from which places it can be read on, and from which not."""

from __future__ import annotations

import pytest

from proxystash_server.cache import Change, ChangeKind
from proxystash_server.rpc.watch.history import UNKNOWN, Compacted, Extent, History, Place
from tests.server.cache.support import stored

SIZE = 5


def told(history: History, *revisions: int) -> None:
    """Tell of a Put for each revision, of a key that is its last digit."""
    for revision in revisions:
        key = str(revision % 10)
        history.tell([Change(revision, ChangeKind.PUT, key, stored(key))])


@pytest.fixture
def history() -> History:
    """A history that began behind revision 100, and has room for five changes."""
    history = History(SIZE)
    history.begin_after(100)
    return history


def revisions_after(history: History, revision: int, limit: int = 100) -> list[int]:
    name = history.extent.history
    records, behind = history.read(name, history.place_after(name, revision), limit)
    revisions = [record.change.revision for record in records]
    assert behind.revision == (revisions[-1] if revisions else history.extent.latest)
    return revisions


def test_a_history_can_be_read_from_each_place_that_it_has_everything_after(history: History) -> None:
    """Also from between two changes: revisions may be skipped."""
    for kept in ([], [110], [110, 120, 130], [110, 120, 130, 140, 150]):
        told(history, *kept[-2:])
        for revision in range(100, max([100, *kept]) + 1):
            assert revisions_after(history, revision) == [one for one in kept if one > revision]


def test_the_oldest_place_is_behind_the_change_that_was_dropped_last(history: History) -> None:
    told(history, 110, 120, 130, 140, 150, 160)
    assert history.extent[1:] == (110, 160)
    assert revisions_after(history, 110) == [120, 130, 140, 150, 160]
    for revision in (0, 100, 109):
        with pytest.raises(Compacted) as caught:
            revisions_after(history, revision)
        assert caught.value.extent == history.extent


def test_a_ring_that_went_around_many_times_is_read_in_order(history: History) -> None:
    for revision in range(101, 200):
        told(history, revision)
        kept = range(max(101, revision - SIZE + 1), revision + 1)
        for place in range(kept[0] - 1, revision + 1):
            for limit in (1, 3, SIZE):
                expected = [one for one in kept if one > place][:limit]
                name = history.extent.history
                records, _ = history.read(name, history.place_after(name, place), limit)
                assert [record.change.revision for record in records] == expected


def test_a_revision_of_another_history_is_unknown_even_if_the_numbers_fit(history: History) -> None:
    """Given two runs of a server that number their changes alike, as after a clock that was set back."""
    other = History(SIZE)
    other.begin_after(100)
    told(history, 110, 120)
    told(other, 110, 120)
    with pytest.raises(Compacted):
        history.place_after(other.extent.history, 110)


@pytest.mark.parametrize("revision", [121, 10**18])
def test_a_revision_that_was_not_told_yet_is_unknown(history: History, revision: int) -> None:
    told(history, 110, 120)
    with pytest.raises(Compacted):
        history.place_after(history.extent.history, revision)


def test_a_place_whose_next_change_was_dropped_cannot_be_read_from(history: History) -> None:
    name, place = history.latest()
    told(history, 110, 120, 130, 140, 150)
    assert len(history.read(name, place, 100)[0]) == SIZE
    told(history, 160)
    with pytest.raises(Compacted):
        history.read(name, place, 100)
    with pytest.raises(Compacted):
        history.read(name, place, 0)


def test_what_says_that_copies_begin_anew_begins_another_history(history: History) -> None:
    told(history, 110)
    before, place = history.latest()
    history.tell([Change(120, ChangeKind.RESET, "")])
    told(history, 130)
    with pytest.raises(Compacted):
        history.read(before, place, 1)
    with pytest.raises(Compacted):
        history.place_after(before, 110)
    assert history.extent == Extent(history.extent.history, 120, 130)
    assert history.extent.history != before
    assert revisions_after(history, 120) == [130]


def test_changes_that_are_told_before_the_beginning_is_known_belong_to_the_history() -> None:
    history = History(SIZE)
    told(history, 101)
    history.begin_after(100)
    assert history.extent[1:] == (100, 101)
    assert history.latest()[1] == Place(1, 101)
    assert revisions_after(history, 100) == [101]


def test_a_history_that_began_again_before_its_beginning_was_known_keeps_that() -> None:
    history = History(SIZE)
    history.tell([Change(101, ChangeKind.RESET, "")])
    history.begin_after(100)
    assert history.extent[1:] == (101, 101)


def test_what_a_key_was_before_is_known_as_far_as_the_history_goes_back(history: History) -> None:
    def befores() -> list[object]:
        name = history.extent.history
        records, _ = history.read(name, history.place_after(name, history.extent.oldest), 100)
        return [record.before for record in records]

    told(history, 111, 121)
    history.tell([Change(130, ChangeKind.DELETE, "1")])
    told(history, 141)
    first, second, _ = (
        record.change.entry
        for record in history.read(
            history.extent.history, history.place_after(history.extent.history, 100), 3
        )[0]
    )
    assert befores() == [UNKNOWN, first, second, None]
    # The last change of the key 1 is dropped: nobody knows what it is, but for those before.
    told(history, 152, 162, 172, 182, 192)
    told(history, 201)
    assert befores()[-1] is UNKNOWN
