"""The journal of what the authority has missed, opened for a test, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet

from proxystash_server.cache import CredentialEncryptor
from proxystash_server.cache.coherence.missed import MissedChanges
from proxystash_server.cache.tiers.base import Write
from tests.server.cache.support import PASSWORD, USERNAME, stored

ENCRYPTOR = CredentialEncryptor(Fernet.generate_key())

OpenJournal = Callable[..., MissedChanges]


@contextmanager
def opening_journals(path: Path) -> Iterator[OpenJournal]:
    """What opens the journal at `path`, after closing the one that was open before."""
    opened: list[MissedChanges] = []

    def open_journal(
        at: Path = path, encryptor: CredentialEncryptor = ENCRYPTOR, *, sync: bool = False, damaged: int = 0
    ) -> MissedChanges:
        while opened:
            opened.pop().close()
        missed = MissedChanges(at, encryptor, sync=sync)
        opened.append(missed)
        assert missed.open() == damaged
        return missed

    yield open_journal
    while opened:
        opened.pop().close()


def put(key: str, version: int, **fields: Any) -> Write:
    return Write(key, stored(key, version=version, **fields), version)


def delete(key: str, version: int) -> Write:
    return Write(key, None, version)


def as_is_and_reopened(missed: MissedChanges, open_journal: OpenJournal) -> Iterator[MissedChanges]:
    """The journal as it is, and then as the next run finds it."""
    yield missed
    yield open_journal()


def told(missed: MissedChanges) -> tuple[int, dict[str, tuple[int, str | None]]]:
    """The Clear that was missed, and for each key the version of its last change and the source it stored."""
    changes: dict[str, tuple[int, str | None]] = {}
    for key in missed.keys():  # noqa: SIM118 -- no dict
        entry = missed.read(key)
        assert missed.covers(key)
        assert missed.holds(key)
        changes[key] = (missed.version_of(key), None if entry is None else entry.source)
    assert missed.pending == bool(changes or missed.cleared_at)
    assert missed.entries() == sum(source is not None for _, source in changes.values())
    return missed.cleared_at, changes


CHANGES: Sequence[Write | int] = (
    put("a", 1, source="one"),
    put("b", 2, source="two", username=USERNAME, password=PASSWORD),
    delete("a", 3),
    4,
    put("b", 5, source="five"),
    put("c", 6, source="six"),
    delete("b", 7),
)


def write_changes(missed: MissedChanges, changes: Sequence[Write | int] = CHANGES) -> None:
    """Append writes, and Clears of the given versions."""
    for change in changes:
        if isinstance(change, int):
            missed.append_clear(change)
        else:
            missed.append([change])


def outcome_of(changes: Sequence[Write | int]) -> tuple[int, dict[str, tuple[int, str | None]]]:
    """What `told` should give after these changes."""
    cleared_at = 0
    last: dict[str, tuple[int, str | None]] = {}
    for change in changes:
        if isinstance(change, int):
            cleared_at = change
            last.clear()
        else:
            last[change.key] = (change.version, None if change.entry is None else change.entry.source)
    return cleared_at, last
