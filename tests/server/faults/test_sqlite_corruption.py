"""A damaged database costs what was damaged, and nothing where another tier has it too."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from proxystash_server.cache import CacheManager, CacheUnavailableError, L2BackendType, TierState
from tests.server.cache.stash import Stash
from tests.server.cache.support import START_US, SWITCHED_OFF, content_of, content_of_tier, guards_of, put

PAGE = 2048
SMALL = {f"label-{number}": "x" * 250 for number in range(3)}
LARGE = {f"label-{number}": "y" * 250 for number in range(30)}
# A page of the table holds fewer than this many small entries.
MOST_ON_A_PAGE = 8

L2_DATABASE = Path("l2", "l2.db")
L3_DATABASE = Path("l3", "proxystash.db")

Content = dict[str, tuple[str, int]]
Damage = Callable[[bytes], bytes]


@pytest.fixture(params=[L2BackendType.JSONL])
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


on_sqlite = pytest.mark.parametrize("l2_backend", [L2BackendType.SQLITE], indirect=True)


def write_store(stash: Stash, **shape: object) -> Content:
    """A closed store with a database of several dozen pages; what it holds."""
    # A smashed page that nobody has read yet is no reason to complain.
    stash.validated = False
    manager = stash.open(**shape)
    for number in range(100):
        put(manager, f"key-{number:03}", source=f"source-{number}", labels=SMALL, username="u", password="p")
    for number in range(4):
        put(manager, f"large-{number}", source=f"source-{number}", labels=LARGE)
    manager.invalidate_by_health("key-007")
    put(manager, "deleted", labels=SMALL)
    manager.delete("deleted")
    content = content_of(manager)
    assert len(content) == 104
    stash.close()
    return content


class Copies:
    """Copies of a closed store, each with other damage."""

    def __init__(self, stash: Stash) -> None:
        self._stash = stash
        self._sound = stash.directory
        self._number = 0

    def damaged(self, damage: Damage, *databases: Path) -> None:
        """Go on in a new copy in which the databases are damaged."""
        self._stash.close()
        if self._number:
            shutil.rmtree(self._stash.directory)
        self._number += 1
        self._stash.directory = self._sound.with_name(f"copy-{self._number}")
        shutil.copytree(self._sound, self._stash.directory)
        for database in databases:
            path = self._stash.directory / database
            path.write_bytes(damage(path.read_bytes()))

    def pages(self, database: Path) -> int:
        pages = (self._sound / database).stat().st_size // PAGE
        assert pages >= 36, "several dozen pages were meant"
        return pages

    def page(self, database: Path, number: int) -> bytes:
        return (self._sound / database).read_bytes()[number * PAGE : (number + 1) * PAGE]


def zeroed(page: int) -> Damage:
    return lambda data: data[: page * PAGE] + bytes(PAGE) + data[(page + 1) * PAGE :]


def scrambled(page: int) -> Damage:
    noise = random.Random(page).randbytes(PAGE)
    return lambda data: data[: page * PAGE] + noise + data[(page + 1) * PAGE :]


def header(content: bytes) -> Damage:
    return lambda data: content + data[len(content) :]


def cut(size: int) -> Damage:
    return lambda data: data[:size]


def smashed_pages(pages: int, *, both_ways: bool) -> Iterator[tuple[str, Damage]]:
    """Each page zeroed and scrambled, or the one and the other in turn."""
    for page in range(pages):
        if both_ways or page % 2:
            yield f"page {page} zeroed", zeroed(page)
        if both_ways or not page % 2:
            yield f"page {page} scrambled", scrambled(page)


def other_damage(size: int) -> Iterator[tuple[str, Damage]]:
    yield "header zeroed", header(bytes(100))
    yield "header scrambled", header(random.Random(1).randbytes(100))
    yield "first byte changed", header(b"s")
    for end in (
        0,
        1,
        99,
        100,
        1000,
        PAGE - 1,
        PAGE,
        PAGE + 1,
        2 * PAGE,
        5 * PAGE + 17,
        size // 2,
        size - PAGE,
    ):
        yield f"cut off at {end}", cut(end)
    yield f"cut off at {size - 1}", cut(size - 1)


def check_all_is_there(stash: Stash, manager: CacheManager, expected: Content, damage: str) -> None:
    """Assert that a cache with one sound disk tier serves everything, at once, and repairs the other one."""
    for key, (source, failures) in expected.items():
        entry = manager.get(key)
        assert entry is not None, f"{damage}: {key}"
        assert (entry.source, entry.failure_count) == (source, failures), f"{damage}: {key}"
    with suppress(CacheUnavailableError):
        # If L3 turns out only now to be damaged, nobody can say yet that there is none.
        assert manager.get("deleted") is None, damage
    for _ in range(3):
        stash.recover(manager)
    assert content_of(manager) == expected, damage
    # What that has set aside is brought back.
    stash.recover(manager)
    for key in expected:
        assert manager.get(key) is not None
    assert manager.get("deleted") is None, damage
    for guard in guards_of(manager):
        assert guard.is_open, f"{damage}: {guard.name}"
        assert content_of_tier(guard.tier) == expected, f"{damage}: {guard.name}"
    assert manager.get_statistics().entries == len(expected)


def check_what_is_left(stash: Stash, manager: CacheManager, expected: Content, damage: str) -> Content:
    """Assert that a cache serves no entry that was not put, and works; what it has left."""
    for key, (source, failures) in expected.items():
        try:
            entry = manager.get(key)
        except CacheUnavailableError:
            # The tier has just turned out to be damaged, and there is no other.
            continue
        assert entry is None or (entry.source, entry.failure_count) == (source, failures), damage
    for _ in range(3):
        stash.recover(manager)
    left = content_of(manager)
    assert left.items() <= expected.items(), damage
    statistics = manager.get_statistics()
    assert statistics.entries == len(left), damage
    assert {tier.state for tier in statistics.tiers} <= {TierState.ACTIVE, TierState.DISABLED}, damage
    return left


def put_in_the_end(stash: Stash, manager: CacheManager, key: str) -> None:
    """Put an entry; if that is what finds the damage, once more afterwards."""
    entry = manager.new_entry("http://192.0.2.1:1", key=key, source=key)
    if not manager.put(key, entry):
        stash.recover(manager)
        assert manager.put(key, entry), "no tier took it"


def kept_aside(directory: Path, database: Path) -> bool:
    """Whether what was damaged in a database is still there to be looked at."""
    path = directory / database
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT count(*) FROM set_aside").fetchone()[0]
    return bool(rows) or any(path.parent.glob(f"{path.name}.damaged-*"))


@pytest.mark.parametrize(
    ("l2_backend", "database"),
    [
        (L2BackendType.JSONL, L3_DATABASE),
        (L2BackendType.SQLITE, L3_DATABASE),
        (L2BackendType.SQLITE, L2_DATABASE),
    ],
    indirect=["l2_backend"],
    ids=["l3 below jsonl", "l3 below sqlite", "l2"],
)
@pytest.mark.parametrize("what", ["pages", "header and size"])
def test_a_damaged_database_costs_nothing_that_the_other_tier_has(
    stash: Stash, l2_backend: L2BackendType, database: Path, what: str
) -> None:
    expected = write_store(stash)
    copies = Copies(stash)
    pages = copies.pages(database)
    both_ways = l2_backend is L2BackendType.JSONL
    damages = smashed_pages(pages, both_ways=both_ways) if what == "pages" else other_damage(pages * PAGE)
    failed: list[str] = []
    for name, damage in damages:
        copies.damaged(damage, database)
        try:
            check_all_is_there(stash, stash.open(l1_config=SWITCHED_OFF), expected, name)
        except Exception as error:  # noqa: BLE001 -- tell of every damage that costs something
            failed.append(f"{name}: {type(error).__name__} {str(error)[:150]}")
    assert not failed, "\n".join(failed)
    stash.close()


@pytest.mark.parametrize("l2_backend", L2BackendType, indirect=True)
@pytest.mark.parametrize("garbled", ["version + 1", "0", "9223372036854775807", "'text'"])
def test_a_version_damaged_in_l3_costs_nothing_that_l2_has(stash: Stash, garbled: str) -> None:
    expected = write_store(stash)
    with closing(sqlite3.connect(stash.directory / L3_DATABASE)) as connection, connection:
        connection.execute(
            f"UPDATE entries SET version = {garbled} WHERE key BETWEEN 'key-020' AND 'key-039'"
        )
    manager = stash.open(l1_config=SWITCHED_OFF)
    check_all_is_there(stash, manager, expected, garbled)


def test_a_damaged_database_alone_serves_what_is_readable_and_keeps_the_rest_aside(stash: Stash) -> None:
    shape: dict[str, object] = {"l1_config": SWITCHED_OFF, "l2_config": SWITCHED_OFF}
    expected = write_store(stash, **shape)
    copies = Copies(stash)
    pages = copies.pages(L3_DATABASE)
    for page in range(pages):
        for name, damage in (("zeroed", zeroed(page)), ("scrambled", scrambled(page))):
            copies.damaged(damage, L3_DATABASE)
            manager = stash.open(**shape)
            left = check_what_is_left(stash, manager, expected, f"page {page} {name}")
            if left != expected:
                assert manager.get_statistics().l3_stats.evictions_corruption
                assert kept_aside(stash.directory, L3_DATABASE)
            if not page or copies.page(L3_DATABASE, page)[0] in {0x02, 0x05}:
                # The rows are on other pages than those that lead to them.
                assert left == expected, f"page {page} {name}"
            elif copies.page(L3_DATABASE, page)[0] == 0x0D:
                # A leaf of a table: no other row depends on it.
                assert len(expected) - len(left) <= MOST_ON_A_PAGE, f"page {page} {name}"
            put_in_the_end(stash, manager, "later")
            assert content_of(stash.reopen(**shape)) == {**left, "later": ("later", 0)}
    stash.close()


@on_sqlite
def test_with_both_databases_damaged_the_cache_starts_with_what_is_left(stash: Stash) -> None:
    expected = write_store(stash)
    copies = Copies(stash)
    pages = copies.pages(L3_DATABASE)
    damages = [scrambled(page) for page in range(0, pages, 3)] + [
        damage for _, damage in other_damage(pages * PAGE)
    ]
    for number, damage in enumerate(damages):
        copies.damaged(damage, L2_DATABASE, L3_DATABASE)
        manager = stash.open(l1_config=SWITCHED_OFF)
        left = check_what_is_left(stash, manager, expected, f"damage {number}")
        put_in_the_end(stash, manager, "later")
        assert content_of(stash.reopen()) == {**left, "later": ("later", 0)}
    stash.close()


WRITER = textwrap.dedent("""
    import sys
    from proxystash_server.cache import CacheManager, CacheConfig

    directory, backend, start, first, last = sys.argv[1:]
    manager = CacheManager(CacheConfig(
        l2_backend=backend,
        l2_cache_dir=directory + "/l2",
        l3_database_path=directory + "/l3/proxystash.db",
        encryption_key_file=directory + "/secret.key",
    ), clock=lambda: int(start), background=False)
    for number in range(int(first), int(last)):
        key = f"key-{number:03}"
        manager.put(key, manager.new_entry("http://u:p@192.0.2.1:1", key=key, source=str(number)))
    # An entry of the run before, replaced in this one.
    manager.put("key-000", manager.new_entry("http://192.0.2.1:1", key="key-000", source=last))
    print("done", flush=True)
    sys.stdin.read()
    manager.close()
""")


def write_in_a_process(stash: Stash, backend: L2BackendType, first: int, last: int, *, kill: bool) -> None:
    arguments = [str(stash.directory), backend.value, str(START_US), str(first), str(last)]
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "done\n"
        if kill:
            os.kill(process.pid, signal.SIGKILL)
        process.stdin.close()
    assert process.returncode == (-signal.SIGKILL if kill else 0)


def lose_the_log(database: Path) -> None:
    log = database.with_name(database.name + "-wal")
    assert log.stat().st_size > 0
    log.unlink()
    database.with_name(database.name + "-shm").unlink()


@pytest.mark.parametrize("l2_backend", L2BackendType, indirect=True)
@pytest.mark.parametrize("earlier", [0, 30], ids=["in the first run", "after an orderly one"])
def test_a_lost_log_of_the_database_costs_nothing_that_l2_has(
    stash: Stash, l2_backend: L2BackendType, earlier: int
) -> None:
    if earlier:
        write_in_a_process(stash, l2_backend, 0, earlier, kill=False)
    write_in_a_process(stash, l2_backend, earlier, 60, kill=True)
    lose_the_log(stash.directory / L3_DATABASE)
    expected = {f"key-{number:03}": (str(number), 0) for number in range(60)} | {"key-000": ("60", 0)}
    manager = stash.open(l1_config=SWITCHED_OFF)
    check_all_is_there(stash, manager, expected, "no log")
    assert content_of(stash.reopen_after_kill()) == expected


@pytest.mark.parametrize("earlier", [0, 30], ids=["in the first run", "after an orderly one"])
@pytest.mark.parametrize("lost", [[L2_DATABASE], [L2_DATABASE, L3_DATABASE]], ids=["l2", "both"])
@on_sqlite
def test_a_lost_log_of_l2_or_of_both_costs_at_most_what_was_in_them(
    stash: Stash, l2_backend: L2BackendType, earlier: int, lost: list[Path]
) -> None:
    if earlier:
        write_in_a_process(stash, l2_backend, 0, earlier, kill=False)
    write_in_a_process(stash, l2_backend, earlier, 60, kill=True)
    for database in lost:
        lose_the_log(stash.directory / database)
    everything = {f"key-{number:03}": (str(number), 0) for number in range(60)} | {"key-000": ("60", 0)}
    before = {f"key-{number:03}": (str(number), 0) for number in range(earlier)}
    if earlier:
        before["key-000"] = (str(earlier), 0)
    manager = stash.open(l1_config=SWITCHED_OFF)
    check_all_is_there(stash, manager, everything if len(lost) == 1 else before, "no log")
