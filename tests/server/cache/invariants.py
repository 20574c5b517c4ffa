"""What must hold inside a cache whenever nothing is under way; checked after every test of the manager."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Collection
from contextlib import closing
from pathlib import Path

from proxystash_server.cache import CacheEntry, CacheManager, CacheTier, JsonlCacheTier, MemoryCacheTier
from proxystash_server.cache.ground.keylocks import KeyLocks
from tests.server.cache.support import guards_of


def check_invariants(manager: CacheManager) -> None:
    """Assert that the tiers of an idle manager agree with themselves and with each other."""
    working = [guard.tier for guard in guards_of(manager) if guard.is_open]
    for tier in (manager.l1_tier, *working):
        check_tier(tier)
    if len(working) == 2:
        check_agreement(manager)
    check_nothing_is_held(manager)


def check_tier(tier: CacheTier) -> None:
    """Assert that one tier's size, keys, order of eviction and capacity fit together."""
    keys = tier.keys()
    assert len(keys) == len(set(keys)) == tier.size(), f"{tier.tier_type} miscounts its entries"
    if tier.config.max_entries is not None:
        assert tier.size() <= tier.config.max_entries, f"{tier.tier_type} holds more than it may"
    if isinstance(tier, MemoryCacheTier | JsonlCacheTier):
        assert sorted(tier._policy.victims()) == sorted(keys), "the policy orders other keys than are held"
    for key in keys:
        entry = tier.get(key)
        assert entry is not None, f"{tier.tier_type} cannot read {key!r}"
        assert entry.key == key


def check_agreement(manager: CacheManager) -> None:
    """Assert that what a faster tier holds is what L3 holds, but for what is doubted or missed."""
    covers = manager._authority.missed.covers
    for key in manager.l2_tier.keys():  # noqa: SIM118 -- no dict
        if manager._cache.serves(key) and not covers(key):
            assert _content(manager.l2_tier.get(key)) == _content(manager.l3_tier.get(key))
    for key in manager.l1_tier.keys():  # noqa: SIM118 -- no dict
        if not covers(key):
            assert _content(manager.l1_tier.get(key)) == _content(manager.l3_tier.get(key))


def check_nothing_is_held(manager: CacheManager) -> None:
    """Assert that no lock outlived its use, and that nobody counts as the leader of changes."""
    assert held_keys(manager._locks) == []
    assert not manager._changes.lock.locked()
    assert not manager._changes._groups._has_leader
    assert not manager._changes._flush_lock.locked()


def held_keys(locks: KeyLocks) -> list[Collection[str] | None]:
    """What is held of key locks: the keys of each holder, or None for all."""
    return [one.keys for one in locks._asked if one.under_way.locked()]


def check_files(directory: Path) -> None:
    """Assert that the files of a closed cache are whole and private."""
    for path in directory.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o077 == 0, f"{path.name} may be read by others"
        if path.suffix == ".db":
            with closing(sqlite3.connect(path)) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                counted = connection.execute("SELECT count(*) FROM entries").fetchone()
                keys = connection.execute("SELECT count(DISTINCT key) FROM entries").fetchone()
                assert keys == counted, f"{path.name} has a key twice"
                kept = connection.execute("SELECT value FROM meta WHERE name = 'entries'").fetchone()
                assert counted == kept, f"{path.name} miscounts its entries"
        if path.name == "entries.jsonl":
            for line in path.read_bytes().splitlines():
                check_line(line)


def check_line(line: bytes) -> None:
    """Assert that a line of a JSONL file is JSON whose last field is the CRC-32 of what stands before it."""
    before, separator, _ = line.rpartition(b',"crc":"')
    assert separator
    assert json.loads(line)["crc"] == f"{zlib.crc32(before):08x}"


def _content(entry: CacheEntry | None) -> dict[str, object] | None:
    if entry is None:
        return None
    names = {*type(entry.content).__slots__} - {"sealed", "encoded"}
    return {name: getattr(entry, name) for name in names}
