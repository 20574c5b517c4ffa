"""The write-ahead log of the SQLite backend: who copies it into the file, and when it starts over."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from proxystash_server.cache import CacheEntry, CacheTierType, SQLiteCacheTier
from proxystash_server.cache.tiers.base import Write
from proxystash_server.cache.tiers.sqlite import database
from tests.server.cache.store_contract import ENCRYPTOR
from tests.server.cache.support import stored
from tests.server.cache.tier_contract import UNBOUNDED

_LIMIT = 64 * 1024
_PAGE = 2048

OpenTier = Callable[[], SQLiteCacheTier]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def open_tier(path: Path) -> Iterator[OpenTier]:
    opened: list[SQLiteCacheTier] = []

    def open_tier() -> SQLiteCacheTier:
        tier = SQLiteCacheTier(UNBOUNDED, CacheTierType.L3, path, ENCRYPTOR)
        tier.open()
        opened.append(tier)
        return tier

    yield open_tier
    for tier in opened:
        tier.close()


def _fill(tier: SQLiteCacheTier, start: int, stop: int) -> None:
    tier.apply([Write(f"{number:05}", stored(f"{number:05}")) for number in range(start, stop)])


def _log_bytes(path: Path) -> int:
    return path.with_name(path.name + "-wal").stat().st_size


def test_writers_leave_the_log_to_maintenance(open_tier: OpenTier, path: Path) -> None:
    tier = open_tier()
    before = path.stat().st_size
    for start in range(0, 5000, 10):
        _fill(tier, start, start + 10)
    # SQLite's own default would have them copy it from here on.
    assert _log_bytes(path) > 1000 * _PAGE
    assert path.stat().st_size == before


def test_a_short_log_is_left_alone(open_tier: OpenTier, path: Path) -> None:
    tier = open_tier()
    _fill(tier, 0, 100)
    before = path.stat().st_size
    tier.maintain()
    assert path.stat().st_size == before


def test_maintenance_copies_a_long_log_and_lets_it_start_over(
    open_tier: OpenTier, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_LOG_LIMIT_BYTES", _LIMIT)
    tier = open_tier()
    _fill(tier, 0, 1000)
    assert _log_bytes(path) > _LIMIT
    tier.maintain()
    # All of it is in the file now, which is seen by whoever reads that alone.
    with closing(sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)) as connection:
        assert connection.execute("SELECT count(*) FROM entries").fetchone() == (1000,)
    _fill(tier, 1000, 1001)
    assert _log_bytes(path) <= _LIMIT
    assert tier.size() == 1001
    assert tier.get("00999") is not None


def test_a_reader_does_not_stop_maintenance_and_goes_on_to_see_what_it_saw(
    open_tier: OpenTier, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_LOG_LIMIT_BYTES", _LIMIT)
    tier = open_tier()
    _fill(tier, 0, 1000)
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM entries").fetchone() == (1000,)
        _fill(tier, 1000, 2000)
        tier.maintain()
        assert reader.execute("SELECT count(*) FROM entries").fetchone() == (1000,)
    tier.maintain()
    _fill(tier, 2000, 2001)
    assert _log_bytes(path) <= _LIMIT


def test_a_log_that_a_reader_keeps_growing_is_told_of_each_time_it_has_doubled(
    open_tier: OpenTier, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(database, "_LOG_LIMIT_BYTES", _LIMIT)
    tier = open_tier()
    assert tier.log_bytes == _log_bytes(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM entries").fetchone()
        for start in range(0, 4000, 100):
            _fill(tier, start, start + 100)
            tier.maintain()
        held = tier.log_bytes
        told = [record.log_bytes for record in caplog.records]  # type: ignore[attr-defined]  # its extra
    assert held > 16 * _LIMIT
    assert told[0] >= 2 * _LIMIT
    assert all(later >= 2 * earlier for earlier, later in pairwise(told))
    assert 2 * told[-1] > held

    tier.maintain()
    _fill(tier, 4000, 4001)
    assert tier.log_bytes <= _LIMIT
    tier.maintain()
    assert len(caplog.records) == len(told)


def test_lookups_do_not_keep_the_log_from_starting_over(
    open_tier: OpenTier, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_LOG_LIMIT_BYTES", _LIMIT)
    tier = open_tier()
    _fill(tier, 0, 1000)

    # On a connection of their own, since another is lent meanwhile, which maintenance then takes.
    connection = tier._database.lend()
    for number in range(5):
        assert tier.get(f"{number:05}") is not None
    tier._database.take_back(connection)
    tier.maintain()
    _fill(tier, 1000, 1001)
    assert _log_bytes(path) <= _LIMIT


def test_lookups_under_way_during_maintenance_and_the_next_change_do_not_keep_the_log_from_starting_over(
    open_tier: OpenTier, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_LOG_LIMIT_BYTES", _LIMIT)
    tier = open_tier()
    _fill(tier, 0, 1000)
    for under_way in (tier.maintain, lambda: _fill(tier, 1000, 1001)):
        for _ in range(5):
            assert tier.get("00999") is not None
        connection = tier._database.lend()
        under_way()
        tier._database.take_back(connection)
    assert _log_bytes(path) <= _LIMIT


def test_a_lookup_sees_a_change_during_which_others_came(
    open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier()
    found: list[CacheEntry | None] = []

    def look_up(place: str) -> None:
        if place == "sqlite.before_commit":
            found.extend(tier.get("00000") for _ in range(3))

    monkeypatch.setattr(database, "kill_point", look_up)
    _fill(tier, 0, 1)
    assert found == [None] * 3
    assert tier.get("00000") is not None


def test_a_clear_does_not_write_everything_that_it_clears(
    open_tier: OpenTier, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_LOG_LIMIT_BYTES", _LIMIT)
    tier = open_tier()
    _fill(tier, 0, 5000)
    tier.maintain()
    assert tier.clear() == 5000
    assert _log_bytes(path) < path.stat().st_size / 10


def test_without_maintenance_the_log_does_not_grow_for_ever(
    open_tier: OpenTier, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_LOG_BACKSTOP_BYTES", 100 * _PAGE)
    tier = open_tier()
    sizes = []
    for start in range(0, 10_000, 100):
        _fill(tier, start, start + 100)
        sizes.append(_log_bytes(path))
    assert max(sizes) < 200 * _PAGE
