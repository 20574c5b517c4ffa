"""Promise 2: what was acknowledged survives the end of the process, however abrupt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from proxystash_server.cache import CacheManager, CacheTierType, EntryFilter, HealthStatus, L2BackendType
from proxystash_server.cache.entry.entry import wall_clock
from tests.server.cache.stash import Stash
from tests.server.cache.support import (
    PASSWORD,
    SWITCHED_OFF,
    USERNAME,
    bounded,
    keys_of,
    nothing_writable,
    put,
    stored_in,
)
from tests.server.cache.tier_contract import MONITORING

L1, L2, L3 = CacheTierType
ANY = EntryFilter()


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


WRITER = textwrap.dedent("""
    import sys
    from proxystash_server.cache import CacheManager, CacheConfig

    directory, backend, durability = sys.argv[1:]
    manager = CacheManager(CacheConfig(
        l2_backend=backend,
        l2_cache_dir=directory + "/l2",
        l3_database_path=directory + "/l3/proxystash.db",
        encryption_key_file=directory + "/secret.key",
        durability=durability,
    ))
    number = 0
    while True:
        number += 1
        key = f"key-{number}"
        manager.put(key, manager.new_entry("http://u:secret@192.0.2.1:8080", key=key, source=str(number)))
        if number % 10 == 0:
            manager.delete(f"key-{number - 5}")
        if number % 10 == 1:
            manager.invalidate_by_health(key)
        # Acknowledged: from here on it must be there, or gone, after the end.
        print(number, flush=True)
""")


@pytest.mark.parametrize("durability", ["process", "full"])
def test_what_was_acknowledged_survives_kill_9_in_the_middle_of_writing(
    stash: Stash, l2_backend: L2BackendType, durability: str
) -> None:
    arguments = [str(stash.directory), l2_backend.value, durability]
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 57:
                break
        os.kill(process.pid, signal.SIGKILL)
        acknowledged = int([line, *process.stdout][-1])
    assert process.returncode == -signal.SIGKILL
    stash.clock.now_us = wall_clock()
    manager = stash.open()
    for number in range(1, acknowledged + 1):
        entry = manager.get(f"key-{number}")
        if number % 10 == 5 and number + 5 <= acknowledged:
            assert entry is None
        elif number % 10 == 5 and entry is None:
            # Its delete may have been made and not yet acknowledged.
            assert number + 5 == acknowledged + 1
        else:
            assert entry is not None
            assert entry.source == str(number)
            assert entry.password is not None
            assert entry.password.get_secret_value() == "secret"
            assert entry.failure_count == (number % 10 == 1)


CHANGES: dict[str, Callable[[CacheManager], object]] = {
    "put": lambda manager: put(manager, "key-1", source="changed"),
    "delete": lambda manager: manager.delete("key-1"),
    "clear": lambda manager: manager.clear(),
    "invalidation": lambda manager: manager.invalidate_by_health("key-1"),
    "third invalidation": lambda manager: [manager.invalidate_by_health("key-1") for _ in range(3)],
    "many puts": lambda manager: manager.put_many(
        [manager.new_entry("http://192.0.2.1:1", key=key) for key in ("key-1", "key-3")]
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", [{}, {"l2_config": SWITCHED_OFF}, {"l3_config": SWITCHED_OFF}])
def test_a_change_is_on_disk_when_it_is_acknowledged(
    stash: Stash, change: str, shape: dict[str, object]
) -> None:
    manager = stash.open(**shape)
    put(manager, "key-1", "key-2", source="before")
    CHANGES[change](manager)
    expected = _what_it_holds(manager)
    assert _what_it_holds(stash.reopen_after_kill(**shape)) == expected


def _what_it_holds(manager: CacheManager) -> list[tuple[str, str, int, HealthStatus]]:
    return [
        (entry.key, entry.source, entry.failure_count, entry.health_status)
        for entry in manager.list_entries("", 100, ANY)
    ]


def test_everything_about_an_entry_survives_a_restart(stash: Stash) -> None:
    manager = stash.open()
    entry = manager.new_entry(
        "socks5h://[2001:DB8::1]:1080/",
        key="key-1",
        username=USERNAME,
        password=PASSWORD,
        source="a source",
        ttl_us=1_500_001,
        health_status=HealthStatus.DEGRADED,
        failure_count=2,
        health_monitoring=MONITORING,
        labels={"country": "DE"},
    )
    manager.put("key-1", entry)
    manager = stash.reopen()
    for tier in (manager.l2_tier, manager.l3_tier):
        assert tier.get("key-1") == entry


def test_the_counts_of_uses_survive_an_orderly_end(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1", "key-2")
    for _ in range(5):
        stash.clock.advance(1)
        manager.get("key-1")
    manager = stash.reopen()
    [entry, _] = manager.list_entries("", 10, ANY)
    assert (entry.access_count, entry.last_accessed_us) == (5, stash.clock())
    again = manager.get("key-1")
    assert again is not None
    assert again.access_count == 6


def test_an_abrupt_end_costs_at_most_the_counts_since_the_last_flush(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1")
    for _ in range(3):
        manager.get("key-1")
    manager.maintain()
    manager.get("key-1")
    entry = stash.reopen_after_kill().get("key-1")
    assert entry is not None
    assert entry.access_count == 4


def test_a_put_is_true_and_one_of_many_says_which_tiers_hold_the_entry(stash: Stash) -> None:
    manager = stash.open()
    assert manager.put("key-1", manager.new_entry("http://192.0.2.1:1")) is True
    assert stored_in(manager, "key-1", manager.new_entry("http://192.0.2.1:1")) == (L1, L2, L3)


def test_a_put_that_no_tier_takes_is_false(stash: Stash) -> None:
    manager = stash.open(l1_config=SWITCHED_OFF)
    with nothing_writable(manager):
        assert manager.put("key-1", manager.new_entry("http://192.0.2.1:1")) is False


@pytest.mark.parametrize(
    ("shape", "tiers"),
    [
        ({"l1_config": SWITCHED_OFF}, (L2, L3)),
        ({"l2_config": SWITCHED_OFF}, (L1, L3)),
        ({"l3_config": SWITCHED_OFF}, (L1, L2)),
        ({"l1_config": SWITCHED_OFF, "l2_config": SWITCHED_OFF}, (L3,)),
    ],
)
def test_a_tier_that_is_switched_off_is_not_said_to_hold_anything(
    stash: Stash, shape: dict[str, object], tiers: tuple[CacheTierType, ...]
) -> None:
    manager = stash.open(**shape)
    assert stored_in(manager, "key-1", manager.new_entry("http://192.0.2.1:1")) == tiers


@pytest.mark.parametrize("bounded_tier", ["l1_config", "l2_config", "l3_config"])
def test_what_makes_room_for_others_of_its_batch_was_stored(stash: Stash, bounded_tier: str) -> None:
    """As if the others had come a moment later."""
    manager = stash.open(**{bounded_tier: bounded(2)})
    entries = [manager.new_entry("http://192.0.2.1:1", key=f"key-{number}") for number in range(5)]
    assert manager.put_many(entries) == [(L1, L2, L3)] * 5


def test_the_authority_is_written_first(stash: Stash) -> None:
    """A change that is cut short after L3 is seen by the next run; one cut short before it is not."""
    manager = stash.open()
    put(manager, "key-1", source="before")
    order: list[str] = []
    apply, commit = manager.l2_tier.apply, manager.l3_tier.commit  # type: ignore[attr-defined]  # L3 decides

    def applied(writes):  # type: ignore[no-untyped-def]  # a spy passes on what it gets
        order.extend(f"l2 {'put' if write.entry else 'remove'}" for write in writes)
        return apply(writes)

    def committed(keys, decide):  # type: ignore[no-untyped-def]  # likewise
        writes, outcome = commit(keys, decide)
        order.extend(f"l3 {'put' if write.entry else 'remove'}" for write in writes)
        return writes, outcome

    manager.l2_tier.apply = applied  # type: ignore[method-assign]
    manager.l3_tier.commit = committed  # type: ignore[attr-defined]
    put(manager, "key-1", source="after")
    manager.delete("key-1")
    assert order == ["l3 put", "l2 put", "l3 remove", "l2 remove"]


def test_a_manager_is_closed_once_and_for_all(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1")
    manager.close()
    manager.close()
    assert keys_of(stash.open().list_entries("", 10, ANY)) == ["key-1"]


def test_a_manager_closes_itself_at_the_end_of_its_block(stash: Stash) -> None:
    with stash.open() as manager:
        put(manager, "key-1")
        manager.get("key-1")
    entry = stash.open().get("key-1")
    assert entry is not None
    assert entry.access_count == 2


def test_the_data_directory_is_made_where_there_is_none(stash: Stash, tmp_path: Path) -> None:
    stash.directory = tmp_path / "several" / "levels" / "deep"
    put(stash.open(), "key-1")
    assert stash.reopen().get("key-1") is not None
