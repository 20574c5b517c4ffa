"""The lock on a store: one cache at a time, in whatever process, and none in a forked child."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from proxystash_server.cache import (
    CacheConfig,
    CacheManager,
    CacheTierConfig,
    EncryptionKeyError,
    L2BackendType,
    StoreError,
    StoreInUseError,
    StoreLock,
)
from proxystash_server.cache.stopped.check import check_store
from proxystash_server.cache.stopped.repair import repair_store
from proxystash_server.cache.stopped.rotation import rotate_key
from proxystash_server.proxywhirl_import.importer import import_stores
from proxystash_server.proxywhirl_import.keyring import load_keyring
from tests.server.cache.stash import Stash
from tests.server.cache.support import SWITCHED_OFF, put


def config_of(directory: Path, **fields: object) -> CacheConfig:
    return CacheConfig.model_validate(
        {
            "l2_cache_dir": directory / "l2",
            "l3_database_path": directory / "l3" / "proxystash.db",
            "encryption_key_file": directory / "secret.key",
            **fields,
        }
    )


def refuse_everybody(config: CacheConfig) -> None:
    """Assert that nothing that changes a store can have it."""
    users: list[Callable[[], object]] = [
        lambda: CacheManager(config, background=False),
        lambda: StoreLock(config, "starting").__enter__(),
        lambda: repair_store(config),
        lambda: rotate_key(config),
        lambda: import_stores([], config, load_keyring({}, [])),
    ]
    for user in users:
        with pytest.raises(StoreInUseError, match="in use by"):
            user()


# -- the lock by itself


def test_a_missing_directory_is_created_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "a" / "data"
    with StoreLock(config_of(path), "starting"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_second_user_is_told_who_has_it(tmp_path: Path) -> None:
    with StoreLock(config_of(tmp_path), "starting") as lock:
        lock.tell("serving on 127.0.0.1:50051")
        with pytest.raises(StoreInUseError) as caught, StoreLock(config_of(tmp_path), "starting"):
            pass
    expected = (
        rf"data directory {re.escape(str(tmp_path))} is in use by this process, "
        r"serving on 127\.0\.0\.1:50051 since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"
    )
    assert re.fullmatch(expected, str(caught.value))


def test_the_first_user_keeps_it_when_a_second_was_refused(tmp_path: Path) -> None:
    with StoreLock(config_of(tmp_path), "starting"):
        for _ in range(2):
            with pytest.raises(StoreInUseError), StoreLock(config_of(tmp_path), "starting"):
                pass
        assert json.loads((tmp_path / "lock").read_text())["purpose"] == "starting"


@pytest.mark.parametrize("note", ["", "[1]", '{"pid": 1}', "[" * 4000, "\0" * 5000])
def test_a_holder_that_left_no_readable_note_is_still_a_holder(tmp_path: Path, note: str) -> None:
    with StoreLock(config_of(tmp_path), "starting"):
        (tmp_path / "lock").write_text(note)
        with (
            pytest.raises(StoreInUseError, match="is in use by another process"),
            StoreLock(config_of(tmp_path), "x"),
        ):
            pass


def test_it_can_be_had_again_once_it_was_let_go_and_whatever_an_earlier_holder_left(tmp_path: Path) -> None:
    for _ in range(2):
        with StoreLock(config_of(tmp_path), "starting"):
            pass
    (tmp_path / "lock").write_text("left by a crash")
    with StoreLock(config_of(tmp_path), "starting"):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_directory_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = config_of(tmp_path / "file")
    with pytest.raises(StoreError, match="cannot be used: "), StoreLock(config, "x"):
        pass


# -- managers


def test_a_second_manager_on_the_same_store_is_refused_until_the_first_is_closed(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a")
    refuse_everybody(stash.config())
    assert manager.get("a") is not None
    manager.close()
    assert stash.open().get("a") is not None


def test_the_same_store_under_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "data")
    with CacheManager(config_of(tmp_path / "data"), background=False):
        refuse_everybody(config_of(tmp_path / "link"))


def test_two_data_directories_do_not_share_a_database(tmp_path: Path) -> None:
    shared = {
        "l3_database_path": tmp_path / "l3" / "proxystash.db",
        "encryption_key": Fernet.generate_key().decode(),
    }
    first, second = (config_of(tmp_path / name, **shared) for name in ("one", "two"))
    with CacheManager(first, background=False):
        with pytest.raises(StoreInUseError, match=r"l3 is in use by another cache"):
            CacheManager(second, background=False)
        # Without that database there is no conflict, and the refused one has left no lock.
        CacheManager(second.model_copy(update={"l3_config": SWITCHED_OFF}), background=False).close()
    CacheManager(second, background=False).close()


def test_different_stores_are_used_side_by_side(tmp_path: Path) -> None:
    with (
        CacheManager(config_of(tmp_path / "one"), background=False),
        CacheManager(config_of(tmp_path / "two"), background=False),
    ):
        pass


def test_memory_alone_is_locked_too_for_what_it_writes_of_failures(tmp_path: Path) -> None:
    config = config_of(tmp_path, l2_config=SWITCHED_OFF, l3_config=SWITCHED_OFF, ban_seconds=60)
    with CacheManager(config, background=False) as manager:
        put(manager, "a")
        manager.invalidate_by_health("a")
        assert (tmp_path / "failures.jsonl").exists()
        with pytest.raises(StoreInUseError):
            CacheManager(config, background=False)


def test_a_manager_that_could_not_be_made_holds_nothing(stash: Stash) -> None:
    put(stash.open(), "a", username="u")
    stash.close()
    wrong = SecretStr(Fernet.generate_key().decode())
    with pytest.raises(EncryptionKeyError) as caught:
        stash.open(encryption_key=wrong)
    assert stash.open().get("a") is not None
    assert "sealed under" in str(caught.value)


def test_a_caller_that_has_the_lock_keeps_it_after_the_manager(stash: Stash) -> None:
    config = stash.config()
    with StoreLock(config, "starting") as lock:
        CacheManager(config, background=False, lock=lock).close()
        refuse_everybody(config)
    CacheManager(config, background=False).close()


def test_a_check_is_refused_while_a_manager_runs_and_harmless_to_the_next(stash: Stash) -> None:
    put(stash.open(), "a")
    stash.close()
    assert check_store(stash.config()).consistent
    assert stash.open().get("a") is not None


# -- managers that were not closed


@pytest.mark.parametrize("cleaner", [False, True], ids=["", "with a cleaner"])
@pytest.mark.parametrize("backend", L2BackendType)
def test_a_dropped_manager_is_freed_with_all_it_held_and_a_warning(
    tmp_path: Path, backend: L2BackendType, cleaner: bool
) -> None:
    config = config_of(
        tmp_path, l2_backend=backend, enable_background_cleanup=cleaner, cleanup_interval_seconds=3600
    )
    before = open_files()
    manager = CacheManager(config)
    put(manager, "a", "b")
    manager.get("a")
    del manager
    with pytest.warns(ResourceWarning, match=rf"<CacheManager in {re.escape(str(tmp_path))}> was not closed"):
        gc.collect()
    assert open_files() == before
    for name in ("proxystash-maintenance", "proxystash-ttl"):
        for thread in threading.enumerate():
            if thread.name == name:
                # It ends at once, and does not wait for its next round.
                thread.join(30)
                assert not thread.is_alive()
    # It left what a killed process leaves.
    with CacheManager(config, background=False) as manager:
        assert [manager.get(key) is not None for key in "ab"] == [True, True]


def test_a_manager_that_nobody_holds_any_more_stands_in_no_ones_way(tmp_path: Path) -> None:
    """Users of proxywhirl close none: there was nothing to close."""
    manager = CacheManager(config_of(tmp_path))
    put(manager, "a")
    del manager
    with pytest.warns(ResourceWarning, match="was not closed"):
        manager = CacheManager(config_of(tmp_path))
    assert manager.get("a") is not None
    manager.close()


@pytest.mark.filterwarnings("error")
def test_a_closed_manager_and_one_that_was_refused_give_no_warning(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    manager = CacheManager(config)
    with pytest.raises(StoreInUseError):
        CacheManager(config)
    manager.close()
    del manager
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        CacheManager(config_of(tmp_path / "file"))
    gc.collect()


def open_files() -> set[str]:
    """What this process has open of files that have a name."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(str(entry.readlink()))
        except FileNotFoundError:
            continue
    return {name for name in found if name.startswith("/") and not name.startswith(("/proc", "/dev"))}


# -- other processes

PRELUDE = """
import os, sys, time
from pathlib import Path
from proxystash_server.cache import *
directory = Path(sys.argv[1])
config = CacheConfig(
    l2_cache_dir=directory / "l2",
    l3_database_path=directory / "l3" / "proxystash.db",
    encryption_key_file=directory / "secret.key",
)
def put(manager, key):
    assert manager.put(key, manager.new_entry("http://192.0.2.1:1", key=key)) is True
def wait(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


def run(program: str, directory: Path, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error::ResourceWarning", "-c", PRELUDE + textwrap.dedent(program), directory],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return output


def test_another_process_is_refused_until_the_first_ends_however_it_ends(tmp_path: Path) -> None:
    program = """
        manager = CacheManager(config)
        put(manager, "a")
        print("ready", flush=True)
        sys.stdin.read()
    """
    with run(program, tmp_path) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(StoreInUseError, match=rf"in use by process {holder.pid}, a CacheManager since"):
            CacheManager(config_of(tmp_path))
        holder.send_signal(signal.SIGKILL)
    with CacheManager(config_of(tmp_path), background=False) as manager:
        assert manager.get("a") is not None


def test_a_forked_child_is_refused_everything_and_harms_nothing(tmp_path: Path) -> None:
    """Whatever locks were held in the moment of the fork, and whether or not it ends in an orderly way."""
    program = """
        import gc, threading
        from concurrent.futures import ThreadPoolExecutor
        manager = CacheManager(config)
        put(manager, "a")
        stopping = threading.Event()
        def work(number):
            rounds = 0
            while not stopping.is_set():
                put(manager, f"key-{number}-{rounds % 50}")
                manager.get(f"key-{number}-{rounds % 50}")
                manager.get_statistics()
                rounds += 1
        calls = {
            "get": lambda: manager.get("a"),
            "lookup_many": lambda: manager.lookup_many(["a"]),
            "put": lambda: put(manager, "b"),
            "delete": lambda: manager.delete("a"),
            "clear": lambda: manager.clear(),
            "list": lambda: manager.list_entries("", 10, EntryFilter()),
            "invalidate": lambda: manager.invalidate_by_health("a"),
            "statistics": lambda: manager.get_statistics(),
            "statistics too": lambda: manager.statistics,
            "subscribe": lambda: manager.subscribe(print),
            "unsubscribe": lambda: manager.unsubscribe(print),
            "maintain": lambda: manager.maintain(),
            "clean": lambda: manager.cleanup_expired(),
            "l1": lambda: manager.l1_tier,
            "l2": lambda: manager.l2_tier,
            "l3": lambda: manager.l3_tier,
        }
        def be_a_child():
            global manager
            for name, call in calls.items():
                try:
                    call()
                except CacheClosedError as error:
                    assert "forked" in str(error), error
                else:
                    raise AssertionError(name)
            manager.close()
            for another in (config, config.model_copy(update={"l2_cache_dir": directory / "other" / "l2"})):
                try:
                    CacheManager(another)
                except StoreInUseError as error:
                    assert "forked" in str(error), error
                else:
                    raise AssertionError("it took the store")
            calls.clear()
            manager = None
            gc.collect()
        with ThreadPoolExecutor(2) as pool:
            workers = [pool.submit(work, number) for number in range(2)]
            for number in range(8):
                time.sleep(0.02)
                child = os.fork()
                if not child:
                    try:
                        be_a_child()
                    except BaseException:
                        import traceback; traceback.print_exc()
                        os._exit(1)
                    os._exit(0) if number % 2 else sys.exit()
                wait(child)
            stopping.set()
            for worker in workers:
                worker.result()
        put(manager, "last")
        manager.close()
    """
    finish(run(program, tmp_path))
    assert check_store(config_of(tmp_path)).consistent
    with CacheManager(config_of(tmp_path), background=False) as manager:
        assert manager.get("last") is not None
        assert manager.get("a") is not None


def test_a_forked_child_may_have_a_cache_of_its_own(tmp_path: Path) -> None:
    program = """
        manager = CacheManager(config, background=False)
        put(manager, "a")
        child = os.fork()
        if not child:
            own = CacheConfig(
                l2_cache_dir=directory / "child" / "l2", l3_database_path=directory / "child" / "l3" / "l3.db"
            )
            with CacheManager(own) as manager:
                put(manager, "b")
            sys.exit()
        wait(child)
        print([manager.get(key) is not None for key in "ab"])
        manager.close()
    """
    assert finish(run(program, tmp_path)) == "[True, False]\n"


def test_a_child_keeps_nobody_out_once_its_parent_is_gone_but_stays_out_itself(tmp_path: Path) -> None:
    program = """
        manager = CacheManager(config)
        put(manager, "a")
        if not os.fork():
            print("child", flush=True)
            sys.stdin.read()
            try:
                CacheManager(config)
            except StoreInUseError as error:
                print("refused", flush=True)
            os._exit(0)
        time.sleep(60)
    """
    with run(program, tmp_path) as parent:
        assert parent.stdout is not None
        assert parent.stdin is not None
        assert parent.stdout.readline() == "child\n"
        parent.kill()
        # It has the lock until it has ended, not until it was told to.
        parent.wait(60)
        with CacheManager(config_of(tmp_path), background=False) as manager:
            assert manager.get("a") is not None
        parent.stdin.close()
        assert parent.stdout.readline() == "refused\n"


def test_a_cache_that_was_closed_before_the_fork_may_be_opened_in_the_child(tmp_path: Path) -> None:
    program = """
        manager = CacheManager(config)
        put(manager, "a")
        manager.close()
        child = os.fork()
        with CacheManager(config) if not child else open(os.devnull) as manager:
            if not child:
                put(manager, "b")
        if not child:
            os._exit(0)
        wait(child)
        with CacheManager(config) as manager:
            print([manager.get(key) is not None for key in "ab"])
    """
    assert finish(run(program, tmp_path)) == "[True, True]\n"


def test_a_subprocess_does_not_inherit_the_lock(tmp_path: Path) -> None:
    manager = CacheManager(config_of(tmp_path), background=False)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False):
        manager.close()
        CacheManager(config_of(tmp_path), background=False).close()


def test_the_lock_is_the_servers_too(tmp_path: Path) -> None:
    """A tier that is switched off in one configuration may be on in the other."""
    config = config_of(tmp_path, l2_config=CacheTierConfig(enabled=False))
    with CacheManager(config, background=False):
        refuse_everybody(config_of(tmp_path))
