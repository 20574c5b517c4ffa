"""Storing in the table of entries: new rows, others in the place of those with their keys, and uses."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from operator import itemgetter
from typing import NamedTuple

from proxystash_server.cache.coherence.uses import Use
from proxystash_server.cache.tiers.sqlite.format import FILTERED
from proxystash_server.cache.tiers.sqlite.record import COLUMNS, Row

# From the rows themselves: the index has the same, but not if one of the two is damaged.
_HELD_WHERE = (
    f"held.id, {', '.join(f'entries.{column}' for column in FILTERED.split(', '))}, "
    "iif(typeof(entries.version) = 'integer', entries.version, 0), entries.failure_count IS NOT 0 "
    "FROM entries AS held JOIN entries ON entries.id = held.id WHERE held.key"
)
# Each text that comes out costs a call of Python: one's own key is known.
_HELD = f"SELECT {_HELD_WHERE} = ?"
_HELD_OF_MANY = f"SELECT held.key, {_HELD_WHERE} IN (SELECT value FROM json_each(?))"
_WRITTEN = f"{COLUMNS}, scheme, recency"
_MARKS = ", ".join("?" * len(_WRITTEN.split(", ")))
_REPLACED = tuple(_WRITTEN.split(", ")[1:])
# What is set is also written to the index by key again, if it is there, even where it is as it was.
_REPLACED_BESIDE_FILTERED = tuple(column for column in _REPLACED if column not in FILTERED.split(", "))
_filtered_of = itemgetter(*(_WRITTEN.split(", ").index(column) for column in FILTERED.split(", ")))
# As many rows as a statement takes. The interpreter's lock changes hands with every step that Python takes in
# SQLite, and a statement of many rows is one step.
_ROWS_PER_STATEMENT = 50
_USES_PER_STATEMENT = 4 * _ROWS_PER_STATEMENT
_NO_USE: Row = (None,) * 6


class HeldRow(NamedTuple):
    """What a row that is about to be changed says of itself; see `Held`."""

    id: int
    filtered: Row
    version: int
    has_failed: bool


def held_rows(connection: sqlite3.Connection, keys: Sequence[str]) -> dict[str, HeldRow]:
    """Those of the keys that have a row, each with what it says."""
    if len(keys) == 1:
        found = connection.execute(_HELD, keys).fetchone()
        return {} if found is None else {keys[0]: HeldRow(found[0], found[1:-2], found[-2], found[-1])}
    rows = connection.execute(_HELD_OF_MANY, (json.dumps(keys),))
    return {row[0]: HeldRow(row[1], row[2:-2], row[-2], row[-1]) for row in rows}


def store_row(connection: sqlite3.Connection, row: Row, held: HeldRow | None) -> None:
    """Store a row as `write_row` makes it; `held` is what `held_rows` says of its key in this transaction.

    A row in the place of another keeps its id, and with it its place in FIFO's order.
    """
    if held is None:
        connection.execute(_INSERT_ONE, row)
    elif _filtered_of(row) == held.filtered:
        connection.execute(_REPLACE_ONE_BESIDE_FILTERED, (held.id, *row))
    else:
        connection.execute(_REPLACE_ONE, (held.id, *row))


def store_rows(connection: sqlite3.Connection, rows: Sequence[Row], held: Mapping[str, HeldRow]) -> None:
    """`store_row` of each; no two have the same key."""
    new: list[Row] = []
    replacing: list[Row] = []
    replacing_filtered: list[Row] = []
    for row in rows:
        there = held.get(row[0])
        if there is None:
            new.append(row)
        elif _filtered_of(row) == there.filtered:
            replacing.append((there.id, *row))
        else:
            replacing_filtered.append((there.id, *row))
    _execute(connection, _insert, new)
    _execute(connection, partial(_replace, _REPLACED_BESIDE_FILTERED), replacing)
    _execute(connection, partial(_replace, _REPLACED), replacing_filtered)


def store_uses(connection: sqlite3.Connection, uses: Sequence[Use], first_recency: int) -> None:
    """Store how entries were used, where they are still the same; their recencies follow each other."""
    rows: list[Row] = [(*use, recency) for recency, use in enumerate(uses, first_recency)]
    # Uses of nothing, so that there are few statements for SQLite to compile.
    rows += [_NO_USE] * (-len(rows) % _ROWS_PER_STATEMENT)
    _execute(connection, _use, rows, _USES_PER_STATEMENT)


def _execute(
    connection: sqlite3.Connection,
    statement: Callable[[int], str],
    rows: Sequence[Row],
    most: int = _ROWS_PER_STATEMENT,
) -> None:
    for start in range(0, len(rows), most):
        some = rows[start : start + most]
        connection.execute(statement(len(some)), list(chain.from_iterable(some)))


@cache
def _insert(rows: int) -> str:
    """The statement that stores so many new rows."""
    return f"INSERT INTO entries ({_WRITTEN}) VALUES {', '.join([f'({_MARKS})'] * rows)}"


@cache
def _replace(columns: tuple[str, ...], rows: int) -> str:
    """The statement that sets these columns of so many rows, each given as a whole behind its id.

    An upsert that never inserts: it takes a list of rows.
    """
    return (
        f"INSERT INTO entries (id, {_WRITTEN}) VALUES {', '.join([f'(?, {_MARKS})'] * rows)} "
        f"ON CONFLICT (id) DO UPDATE SET ({', '.join(columns)}) = "
        f"({', '.join(f'excluded.{column}' for column in columns)})"
    )


@cache
def _use(rows: int) -> str:
    """The statement that stores so many uses: the fields of each Use, then its recency."""
    return (
        "UPDATE entries SET recency = iif(access_count < used.column3, used.column6, recency), "
        "access_count = used.column3, last_accessed = used.column4, evicted_from_l1 = used.column5 "
        f"FROM (VALUES {', '.join(['(?, ?, ?, ?, ?, ?)'] * rows)}) AS used "
        "WHERE key = used.column1 AND version = used.column2"
    )


_INSERT_ONE = _insert(1)
_REPLACE_ONE = _replace(_REPLACED, 1)
_REPLACE_ONE_BESIDE_FILTERED = _replace(_REPLACED_BESIDE_FILTERED, 1)
