"""`proxystash-server check` and `rotate-key`: what they print, refuse and exit with."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest
from cryptography.fernet import Fernet
from typer.testing import CliRunner, Result

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from proxystash_server.cache import L2BackendType, StoreInUseError
from proxystash_server.cache.store_lock import StoreLock, caches_kept_out
from proxystash_server.cli import app
from tests.server.cache.support import PASSWORD, USERNAME, fingerprint
from tests.server.cache_tools.stopped import KEYS, SEALED, StoppedCache, miss_changes, sql
from tests.support.rpc import DEADLINE, open_channel
from tests.support.server import running_server


@pytest.fixture
def l2_backend() -> L2BackendType:
    return L2BackendType.JSONL


@pytest.fixture
def store(cache: StoppedCache) -> StoppedCache:
    cache.fill()
    return cache


def run(*arguments: object, **environment: str) -> Result:
    """The command with these arguments, in an environment that has nothing else to say about it."""
    unset = {name: None for name in os.environ if name.startswith("PROXYSTASH_")}
    return CliRunner().invoke(app, list(map(str, arguments)), env={**unset, **environment})


def test_as_a_process_it_exits_with_its_verdict_and_complains_on_standard_error(store: StoppedCache) -> None:
    def run_process(*arguments: object) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "proxystash_server", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout, done.stderr

    before = fingerprint(store.directory)
    code, output, errors = run_process("check", store.directory)
    assert (code, errors) == (0, "")
    assert "The store is consistent" in output
    assert fingerprint(store.directory) == before
    code, output, errors = run_process("rotate-key", store.directory / "nowhere")
    assert (code, output) == (2, "")
    assert "nowhere does not exist" in errors


def test_a_consistent_store_is_told_in_numbers_and_left_alone(store: StoppedCache) -> None:
    before = fingerprint(store.directory)
    result = run("check", store.directory)
    assert result.exit_code == 0, result.stderr
    assert "The store is consistent: 0 faults, 0 notes." in result.stdout
    for word in ("l2", "jsonl", "l3", "sqlite", str(len(KEYS)), str(len(SEALED))):
        assert word in result.stdout
    assert result.stderr == ""
    assert fingerprint(store.directory) == before


def test_each_fault_is_a_line_that_says_what_to_do(store: StoppedCache) -> None:
    sql(store.l3, "UPDATE entries SET source = 'x' WHERE key IN ('key-1', 'key-2')")
    result = run("check", store.directory)
    assert result.exit_code == 1
    faults = [line for line in result.stdout.splitlines() if line.startswith("fault: ")]
    assert len(faults) == 2
    assert all("row" in line and "--repair sets it aside." in line for line in faults)
    assert "The store has faults: 2 faults, 0 notes." in result.stdout


def test_a_repair_says_what_it_did_and_a_check_agrees(store: StoppedCache) -> None:
    sql(store.l3, "UPDATE entries SET source = 'x' WHERE key IN ('key-1', 'key-2')")
    result = run("check", store.directory, "--repair")
    assert result.exit_code == 0, result.stdout + result.stderr
    assert "repaired: damaged rows set aside: 2" in result.stdout
    assert run("check", store.directory).exit_code == 0
    assert len(store.entries()) == len(KEYS)


def test_the_result_can_be_had_as_json(store: StoppedCache) -> None:
    sql(store.l3, "UPDATE entries SET source = 'x' WHERE key = 'key-1'")
    result = run("check", store.directory, "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["consistent"] is False
    assert [fault["kind"] for fault in told["faults"]] == ["damaged_row"]
    assert [tier["entries"] for tier in told["tiers"]] == [24, 24]
    repaired = json.loads(run("check", store.directory, "--json", "--repair").stdout)
    assert repaired["consistent"] is True
    assert repaired["repaired"]["damaged rows set aside"] == 1


def test_the_directory_may_come_from_the_environment_the_file_or_the_flag(
    store: StoppedCache, tmp_path: Path
) -> None:
    config = tmp_path / "server.toml"
    config.write_text(f'data_dir = "{store.directory}"\nl2_max_entries = 10\n')
    result = run("check", "--config", config)
    assert result.exit_code == 1
    assert "may hold 10" in result.stdout
    assert run("check", PROXYSTASH_DATA_DIR=str(store.directory)).exit_code == 0
    assert run("check", "--data-dir", store.directory).exit_code == 0


@pytest.mark.parametrize("command", ["check", "rotate-key"])
def test_a_directory_that_does_not_exist_is_refused_and_not_made(tmp_path: Path, command: str) -> None:
    result = run(command, tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "nowhere does not exist" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_a_server_holds_is_refused(tmp_path: Path) -> None:
    with running_server(tmp_path / "data") as server:
        for command in (("check",), ("check", "--repair"), ("rotate-key",)):
            result = run(*command, tmp_path / "data")
            assert result.exit_code == 2
            assert "in use" in result.stderr
            assert str(server.process.pid) in result.stderr
        server.kill()
    assert run("check", tmp_path / "data").exit_code == 0


def test_no_server_starts_while_a_check_looks(store: StoppedCache) -> None:
    before = fingerprint(store.directory)
    with (
        caches_kept_out(store.directory),
        caches_kept_out(store.directory),
        pytest.raises(StoreInUseError, match="in use"),
        StoreLock(store.config(), "starting"),
    ):
        pass
    assert fingerprint(store.directory) == before


def test_a_server_of_an_earlier_release_is_noticed_and_notices(store: StoppedCache) -> None:
    """It locks the file, and knows nothing of a lock on the directory."""
    with (store.directory / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StoreInUseError), caches_kept_out(store.directory):
            pass
        with pytest.raises(StoreInUseError), StoreLock(store.config(), "starting"):
            pass
    with (
        StoreLock(store.config(), "starting"),
        (store.directory / "lock").open("r+") as file,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_rotation_tells_its_counts_and_the_store_goes_on(store: StoppedCache) -> None:
    old = store.key_file.read_text()
    result = run("rotate-key", store.directory)
    assert result.exit_code == 0, result.stderr
    assert f"l2 (jsonl): {len(SEALED)} of {len(SEALED)} credentials sealed anew" in result.stdout
    assert f"l3 (sqlite): {len(SEALED)} of {len(SEALED)} credentials sealed anew" in result.stdout
    assert "Everything is sealed under the new key" in result.stdout
    assert store.key_file.read_text() != old
    assert len(store.entries()) == len(KEYS)
    assert run("check", store.directory).exit_code == 0


def test_what_the_next_start_does_is_told_as_a_note(store: StoppedCache) -> None:
    with store.running() as manager:
        miss_changes(manager)
    result = run("check", store.directory)
    assert result.exit_code == 0
    note = "the slowest tier has missed 3 changes. The next start makes up for them."
    assert f"note: {store.missed_changes}: {note}" in result.stdout
    assert "The store is consistent: 0 faults, 1 notes." in result.stdout
    refused = run("rotate-key", store.directory, "--l2-enabled", "false", "--l3-enabled", "false")
    assert refused.exit_code == 2
    assert "no key was changed" in refused.stderr
    assert run("rotate-key", store.directory).exit_code == 0
    assert not store.missed_changes.exists()


def test_a_rotation_with_the_keys_in_the_environment_says_which_variables_to_set(cache: StoppedCache) -> None:
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    cache.settings = {"encryption_key": old}
    cache.fill()
    refused = run("rotate-key", cache.directory, PROXYSTASH_ENCRYPTION_KEY=old)
    assert refused.exit_code == 2
    assert (
        "set PROXYSTASH_ENCRYPTION_KEY to the new key and PROXYSTASH_ENCRYPTION_KEY_PREVIOUS"
        in refused.stderr
    )
    done = run(
        "rotate-key",
        cache.directory,
        PROXYSTASH_ENCRYPTION_KEY=new,
        PROXYSTASH_ENCRYPTION_KEY_PREVIOUS=old,
    )
    assert done.exit_code == 0, done.stderr
    assert "To do: PROXYSTASH_ENCRYPTION_KEY_PREVIOUS is not needed any more" in done.stdout
    assert run("check", cache.directory, PROXYSTASH_ENCRYPTION_KEY=new).exit_code == 0
    assert run("check", cache.directory, PROXYSTASH_ENCRYPTION_KEY=old).exit_code == 1


def test_an_interrupted_rotation_is_noted_by_a_check_and_finished_by_running_it_again(
    store: StoppedCache,
) -> None:
    old = store.key_file.read_text()
    store.key_file.write_text(Fernet.generate_key().decode() + "\n" + old)
    result = run("check", store.directory)
    assert result.exit_code == 0
    assert "note: " in result.stdout
    assert "run it again to finish it" in result.stdout.lower()
    result = run("rotate-key", store.directory)
    assert "Finished a change of key that had been interrupted." in result.stdout
    assert old.strip() not in store.key_file.read_text()


def test_a_rotation_that_fails_on_the_way_says_that_nothing_is_lost_and_to_run_it_again(
    store: StoppedCache, tmp_path: Path
) -> None:
    # The database cannot be built anew: somebody else reads it.
    with sqlite3.connect(store.l3) as other:
        other.execute("BEGIN")
        other.execute("SELECT * FROM entries").fetchone()
        result = run("rotate-key", store.directory)
        other.rollback()
    other.close()
    assert result.exit_code == 1
    assert "run rotate-key again to finish" in result.stderr
    assert run("check", store.directory).exit_code == 0
    assert run("rotate-key", store.directory).exit_code == 0
    assert len(store.entries()) == len(KEYS)


def test_nothing_that_is_printed_has_a_secret_in_it(store: StoppedCache) -> None:
    sql(store.l3, "UPDATE entries SET source = 'x'")
    key = store.key_file.read_text().strip()
    printed = ""
    for command in (("check",), ("check", "--json"), ("rotate-key",), ("check", "--repair"), ("rotate-key",)):
        result = run(*command, store.directory)
        printed += result.stdout + result.stderr
    new_key = store.key_file.read_text().strip()
    for secret in (PASSWORD, USERNAME, key, new_key, "gAAAAA"):
        assert secret not in printed
    assert key != new_key


@pytest.mark.parametrize("l2_backend", list(L2BackendType), ids=str)
def test_a_server_killed_under_load_leaves_a_consistent_store(
    tmp_path: Path, l2_backend: L2BackendType
) -> None:
    flags = ["--l2-max-entries", "50", "--l2-backend", str(l2_backend)]
    for _ in range(2):
        with running_server(tmp_path / "data", *flags) as server:
            busy = threading.Barrier(5)
            writers = [
                threading.Thread(target=put_until_it_fails, args=(server.target, number, busy))
                for number in range(4)
            ]
            for writer in writers:
                writer.start()
            busy.wait(30)
            server.kill()
            for writer in writers:
                writer.join(30)
        result = run("check", tmp_path / "data", *flags)
        assert result.exit_code == 0, result.stdout


def put_until_it_fails(target: str, number: int, busy: threading.Barrier) -> None:
    with open_channel(target) as channel:
        stub = pb_grpc.CacheServiceStub(channel)
        for count in itertools.count():
            entry = pb.CacheEntry(
                proxy_url=f"http://192.0.2.{number}:{1 + count % 100}", username="u", password="p"
            )
            try:
                stub.Put(pb.PutRequest(entry=entry), timeout=DEADLINE)
            except grpc.RpcError:
                return
            if count == 50:
                busy.wait(30)
