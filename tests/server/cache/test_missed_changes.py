"""What the authority has missed: which changes count, and until when."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxystash_server.cache.coherence import missed as missed_module
from proxystash_server.cache.coherence.uses import Use
from proxystash_server.cache.errors import TierError
from proxystash_server.cache.tiers.base import Write
from tests.server.cache.journal import OpenJournal, as_is_and_reopened, delete, opening_journals, put, told
from tests.server.cache.support import START_US, stored
from tests.server.cache.tier_contract import AWKWARD_KEYS, everything_set


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "missed-changes.jsonl"


@pytest.fixture
def open_journal(path: Path) -> Iterator[OpenJournal]:
    with opening_journals(path) as open_journal:
        yield open_journal


# -- what was missed


def test_while_nothing_was_missed_there_is_no_file(open_journal: OpenJournal, path: Path) -> None:
    missed = open_journal()
    missed.append([])
    missed.finish()
    assert told(missed) == (0, {})
    assert not missed.is_in_use
    assert not missed.covers("a")
    assert not missed.holds("a")
    assert missed.read("a") is None
    assert missed.last_version == 0
    assert not path.parent.exists()


def test_what_was_missed_is_read_whole(open_journal: OpenJournal) -> None:
    missed = open_journal()
    entries = {key: everything_set(key, version=7) for key in ("full", *AWKWARD_KEYS)}
    missed.append([Write(key, entry, 7) for key, entry in entries.items()])
    for one in as_is_and_reopened(missed, open_journal):
        assert {key: one.read(key) for key in one.keys()} == entries  # noqa: SIM118 -- no dict
        assert [one.write_of(key) for key in entries] == [Write(key, entries[key], 7) for key in entries]


def test_of_several_changes_of_a_key_the_last_counts(open_journal: OpenJournal) -> None:
    missed = open_journal()
    missed.append([put("a", 1), put("b", 2), delete("c", 3), put("d", 4)])
    missed.append([put("a", 5, source="later"), delete("b", 6), put("c", 7, source="back")])
    for one in as_is_and_reopened(missed, open_journal):
        assert told(one) == (0, {"a": (5, "later"), "b": (6, None), "c": (7, "back"), "d": (4, "")})
        assert one.write_of("b") == delete("b", 6)
        assert one.last_version == 7
        assert one.is_in_use
        assert not one.covers("e")


def test_of_equal_keys_in_one_append_the_last_counts(open_journal: OpenJournal) -> None:
    missed = open_journal()
    missed.append([put("a", 1), put("a", 2, source="last")])
    for one in as_is_and_reopened(missed, open_journal):
        assert told(one) == (0, {"a": (2, "last")})


def test_a_clear_covers_every_key_and_makes_what_was_before_it_count_no_more(
    open_journal: OpenJournal,
) -> None:
    missed = open_journal()
    missed.append([put("a", 1), put("b", 2)])
    missed.append_clear(3)
    missed.append([put("b", 4, source="after")])
    for one in as_is_and_reopened(missed, open_journal):
        assert told(one) == (3, {"b": (4, "after")})
        assert one.covers("never seen")
        assert one.read("a") is None
        assert not one.holds("a")
        assert one.last_version == 4
        one.cleared()
        assert told(one) == (0, {"b": (4, "after")})
        assert not one.covers("a")


def test_a_clear_alone_is_pending_until_it_is_made_up_for(open_journal: OpenJournal, path: Path) -> None:
    missed = open_journal()
    missed.append_clear(3)
    for one in as_is_and_reopened(missed, open_journal):
        assert told(one) == (3, {})
        one.finish()
        assert path.exists()
        one.cleared()
        assert not one.pending
    one.finish()
    assert not path.exists()


def test_the_greatest_version_counts_whatever_came_last(open_journal: OpenJournal) -> None:
    missed = open_journal()
    missed.append([put("a", 9)])
    missed.append_clear(5)
    missed.append([put("b", 7)])
    for one in as_is_and_reopened(missed, open_journal):
        assert one.last_version == 9


# -- making up for it


def test_what_the_authority_has_got_is_covered_no_more_but_still_in_the_journal(
    open_journal: OpenJournal,
) -> None:
    missed = open_journal()
    missed.append([put("a", 1), put("b", 2)])
    missed.mark_applied(["a", "never missed"])
    assert told(missed) == (0, {"b": (2, "")})
    assert not missed.covers("a")
    assert missed.holds("a")
    missed.mark_applied(["b"])
    assert told(missed) == (0, {})
    # A run that ends here does it again.
    assert told(open_journal()) == (0, {"a": (1, ""), "b": (2, "")})


def test_a_later_change_of_what_the_authority_has_got_is_missed_again(open_journal: OpenJournal) -> None:
    missed = open_journal()
    missed.append([put("a", 1)])
    missed.mark_applied(["a"])
    missed.append([put("a", 2, source="later")])
    for one in as_is_and_reopened(missed, open_journal):
        assert told(one) == (0, {"a": (2, "later")})


def test_a_change_that_turns_out_to_be_older_than_what_the_authority_had_is_dropped(
    open_journal: OpenJournal,
) -> None:
    missed = open_journal()
    missed.append([put("older", 1), put("same", 5), put("newer", 6)])
    for key in ("older", "same", "newer", "never missed"):
        missed.drop_older(key, 5)
    assert told(missed) == (0, {"same": (5, ""), "newer": (6, "")})


def test_the_journal_goes_when_the_authority_lacks_nothing_of_it(
    open_journal: OpenJournal, path: Path
) -> None:
    missed = open_journal()
    missed.append([put("a", 1), delete("b", 2)])
    missed.mark_applied(["a"])
    missed.finish()
    assert path.exists()
    missed.mark_applied(["b"])
    missed.finish()
    assert list(path.parent.iterdir()) == []
    assert not missed.is_in_use
    assert not missed.holds("a")
    missed.append([put("c", 3)])
    for one in as_is_and_reopened(missed, open_journal):
        assert told(one) == (0, {"c": (3, "")})


def test_a_journal_that_cannot_be_taken_away_is_a_fault_that_passes(
    open_journal: OpenJournal, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missed = open_journal()
    missed.append([put("a", 1)])
    missed.mark_applied(["a"])

    def cannot_unlink(*_args: object, **_options: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", cannot_unlink)
        with pytest.raises(TierError):
            missed.finish()
    assert missed.holds("a")
    missed.finish()
    assert not path.exists()


# -- what stands in memory alone


def test_what_could_not_be_written_down_is_missed_until_this_run_ends(
    open_journal: OpenJournal, path: Path
) -> None:
    missed = open_journal()
    missed.note_unsaved([put("a", 1)])
    assert missed.is_in_use
    assert missed.pending
    assert missed.covers("a")
    assert missed.holds("a")
    assert missed.keys() == missed.unsaved_keys() == ["a"]
    # Memory has the entry.
    assert missed.read("a") is None
    assert missed.write_of("a") is None
    missed.finish()
    assert not path.exists()
    assert told(open_journal()) == (0, {})


def test_what_stands_in_memory_alone_is_no_more_when_the_authority_has_got_it(
    open_journal: OpenJournal,
) -> None:
    missed = open_journal()
    missed.note_unsaved([put("a", 1)])
    missed.mark_applied(["a"])
    assert told(missed) == (0, {})
    assert not missed.is_in_use


def test_what_memory_has_lost_is_missed_no_more(open_journal: OpenJournal) -> None:
    missed = open_journal()
    missed.note_unsaved([put("a", 1), put("b", 2)])
    missed.forget_unsaved(["a", "never missed"])
    assert told(missed) == (0, {"b": (2, None)})
    assert missed.unsaved_keys() == ["b"]
    missed.forget_unsaved(["b"])
    assert not missed.is_in_use
    assert not missed.pending


def test_of_a_change_that_memory_has_lost_the_one_before_counts_again(open_journal: OpenJournal) -> None:
    missed = open_journal()
    missed.append([put("a", 1, source="in the file")])
    missed.note_unsaved([put("a", 2)])
    assert missed.keys() == ["a"]
    assert missed.version_of("a") == 2
    assert missed.write_of("a") == put("a", 1, source="in the file")
    missed.forget_unsaved(["a"])
    assert told(missed) == (0, {"a": (1, "in the file")})


def test_what_the_authority_has_got_does_not_come_back_when_memory_loses_what_came_after_it(
    open_journal: OpenJournal,
) -> None:
    missed = open_journal()
    missed.append([put("a", 1)])
    missed.mark_applied(["a"])
    missed.note_unsaved([put("a", 2)])
    assert missed.keys() == ["a"]
    assert missed.write_of("a") is None
    missed.forget_unsaved(["a"])
    assert told(missed) == (0, {})
    assert missed.write_of("a") is None


def test_what_stands_in_memory_alone_goes_with_a_clear(open_journal: OpenJournal) -> None:
    missed = open_journal()
    missed.note_unsaved([put("a", 1)])
    missed.append_clear(2)
    for one in as_is_and_reopened(missed, open_journal):
        assert told(one) == (2, {})
        assert one.unsaved_keys() == []


def test_what_stands_in_memory_alone_can_be_written_down_later(open_journal: OpenJournal) -> None:
    missed = open_journal()
    missed.note_unsaved([put("a", 1)])
    missed.append([put("a", 1)])
    assert missed.unsaved_keys() == []
    for one in as_is_and_reopened(missed, open_journal):
        assert told(one) == (0, {"a": (1, "")})


def test_a_change_in_memory_hides_the_one_of_its_key_in_the_file(open_journal: OpenJournal) -> None:
    missed = open_journal()
    missed.append([put("a", 1, source="in the file")])
    for one in as_is_and_reopened(missed, open_journal):
        one.note_unsaved([put("a", 2)])
        assert one.covers("a")
        assert one.read("a") is None
        one.mark_applied(["a"])
        assert not one.covers("a")
        # Its line would bring it back, if the next change of it were not written down too.
        assert one.holds("a")


# -- uses


def test_what_was_missed_is_read_as_it_was_used_since(open_journal: OpenJournal) -> None:
    missed = open_journal()
    missed.append([put("a", 1), put("b", 2), put("b", 3)])
    missed.add_uses([Use("a", 1, 5, START_US + 9, True), Use("b", 2, 5, START_US + 9, True)])
    assert missed.read("a") == stored(
        "a", access_count=5, last_accessed_us=START_US + 9, evicted_from_l1=True
    )
    # That was a use of an earlier content.
    assert missed.read("b") == stored("b")


def test_the_last_use_of_each_key_is_kept_until_it_is_taken(open_journal: OpenJournal) -> None:
    missed = open_journal()
    uses = [Use("a", 1, count, START_US + count, False) for count in range(1, 4)]
    missed.add_uses([uses[0], Use("b", 1, 1, START_US, False), uses[1]])
    missed.add_uses([uses[2]])
    assert missed.take_uses() == [Use("b", 1, 1, START_US, False), uses[2]]
    assert missed.take_uses() == []


def test_of_too_many_uses_the_oldest_go(open_journal: OpenJournal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(missed_module, "_MOST_USES", 3)
    missed = open_journal()
    missed.add_uses([Use(key, 1, 1, START_US, False) for key in "abcad"])
    assert [use.key for use in missed.take_uses()] == ["c", "a", "d"]


def test_a_clear_takes_the_uses_with_it(open_journal: OpenJournal) -> None:
    missed = open_journal()
    missed.add_uses([Use("a", 1, 1, START_US, False)])
    missed.append_clear(2)
    assert missed.take_uses() == []
