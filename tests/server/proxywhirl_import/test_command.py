"""The command as its users run it: a process, with proxywhirl's keys in its environment."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from proxystash.client import Client
from proxystash.proxies import cache_key
from tests.server.proxywhirl_import.support import (
    CURRENT_KEY,
    PREVIOUS_KEY,
    SECRETS,
    as_if_written_now,
    snapshot,
)
from tests.support.server import running_server

KEYS = {"PROXYWHIRL_CACHE_ENCRYPTION_KEY": CURRENT_KEY, "PROXYWHIRL_CACHE_KEY_PREVIOUS": PREVIOUS_KEY}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return as_if_written_now("jsonl", tmp_path / "source")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


def run(
    *arguments: object, env: Mapping[str, str] = KEYS, stderr: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PROXYSTASH_", "PROXYWHIRL_"))
    }
    return subprocess.run(
        [sys.executable, "-m", "proxystash_server", "import-proxywhirl", *map(str, arguments)],
        env={**kept, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=120,
        check=False,
    )


def test_what_was_imported_is_served(source: Path, data_dir: Path) -> None:
    """Given an import, then `serve` with the same settings finds the entries, and opens their credentials."""
    before = snapshot(source)
    result = run(source, "--data-dir", data_dir, "--l2-backend", "sqlite")
    assert result.returncode == 0, result.stderr
    assert snapshot(source) == before

    with (
        running_server(data_dir, "--l2-backend", "sqlite") as server,
        Client(server.target) as client,
    ):
        found = client.get(cache_key("http://login.example.com:8080", "alice"))
        count = client.stats().entries

    assert found is not None
    assert (found.entry.username, found.entry.password) == ("alice", "current-password")
    assert found.entry.proxy_url == "http://login.example.com:8080"
    assert f"imported {count}, skipped " in result.stdout


def test_every_file_is_told_of_with_its_counts_and_reasons(source: Path, data_dir: Path) -> None:
    result = run(source, "--data-dir", data_dir)

    lines = result.stdout.splitlines()
    database = source / "db" / "proxywhirl.db"
    start = next(number for number, line in enumerate(lines) if line.startswith(f"{database}: read 31, "))
    reasons = []
    for line in lines[start + 1 :]:
        if not line.startswith("  "):
            break
        reasons.append(line)
    assert any(
        line.startswith("  skipped 2: no key that was given opens its credentials (first: cache_entries row ")
        for line in reasons
    )
    for shard in (source / "proxies").iterdir():
        assert any(line.startswith(f"{shard}: read ") for line in lines)
    assert lines[-1].startswith("imported ")


def test_the_report_for_scripts_adds_up(source: Path, data_dir: Path) -> None:
    result = run(source, "--data-dir", data_dir, "--json", "--without-credentials")

    assert result.returncode == 0
    report: dict[str, Any] = json.loads(result.stdout)
    for name in ("imported", "without_credentials", "skipped", "failed"):
        assert report[name] == sum(file[name] for file in report["files"])
    for file in report["files"]:
        assert file["read"] == file["imported"] + file["skipped"] + file["failed"]
        assert file["skipped"] + file["failed"] == sum(reason["count"] for reason in file["reasons"])
    assert report["without_credentials"] == 2
    assert report["imported"] > 20


def test_keys_may_be_in_a_file(source: Path, data_dir: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{CURRENT_KEY}\n{PREVIOUS_KEY}\n")

    result = run(source, "--data-dir", data_dir, "--proxywhirl-key-file", keys, "--json", env={})

    reasons = [reason["reason"] for file in json.loads(result.stdout)["files"] for reason in file["reasons"]]
    assert reasons.count("no key that was given opens its credentials") > 0
    assert not any("no key of proxywhirl's was given" in reason for reason in reasons)


def test_running_it_twice_is_harmless(source: Path, data_dir: Path) -> None:
    first = run(source, "--data-dir", data_dir, "--json")
    again = run(source, "--data-dir", data_dir, "--json")

    assert (first.returncode, again.returncode) == (0, 0)
    assert json.loads(first.stdout)["imported"] > 20
    assert json.loads(again.stdout)["imported"] == 0


def test_it_is_refused_while_a_server_holds_the_data_directory(source: Path, data_dir: Path) -> None:
    with running_server(data_dir) as server, Client(server.target) as client:
        result = run(source, "--data-dir", data_dir)
        assert client.stats().entries == 0

    assert result.returncode == 1
    assert result.stdout == ""
    assert f"is in use by process {server.process.pid}, serving on " in result.stderr


def test_damage_is_told_by_the_exit_code(source: Path, data_dir: Path) -> None:
    shard = source / "proxies" / "shard_10.jsonl"
    shard.write_bytes(shard.read_bytes() + b'{"key": "torn')

    result = run(source, "--data-dir", data_dir)

    assert result.returncode == 1
    assert "  failed 1: the line is damaged (first: line " in result.stdout
    assert "imported " in result.stdout


@pytest.mark.parametrize(
    "fault", ["no source", "missing source", "malformed key", "missing key file", "overlap"]
)
def test_a_wrong_call_changes_nothing(fault: str, source: Path, data_dir: Path) -> None:
    arguments: tuple[object, ...]
    env = KEYS
    if fault == "no source":
        arguments = ("--data-dir", data_dir)
    elif fault == "missing source":
        arguments = (data_dir / "missing", "--data-dir", data_dir)
    elif fault == "malformed key":
        arguments = (source, "--data-dir", data_dir)
        env = {"PROXYWHIRL_CACHE_ENCRYPTION_KEY": "not-a-key-at-all"}
    elif fault == "missing key file":
        arguments = (source, "--data-dir", data_dir, "--proxywhirl-key-file", data_dir / "keys")
    else:
        arguments = (source, "--data-dir", source.parent)
    before = snapshot(source.parent)

    result = run(*arguments, env=env)

    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "not-a-key-at-all" not in result.stderr
    assert not data_dir.exists()
    assert snapshot(source.parent) == before


def test_a_store_of_ours_under_another_key_is_left_alone(source: Path, data_dir: Path) -> None:
    assert run(source, "--data-dir", data_dir).returncode == 0
    before = {path: content for path, (_, _, content) in snapshot(data_dir).items()}

    wrong = {"PROXYSTASH_ENCRYPTION_KEY": Fernet.generate_key().decode()}
    result = run(source, "--data-dir", data_dir, env={**KEYS, **wrong})

    assert result.returncode == 1
    assert "PROXYSTASH_ENCRYPTION_KEY" in result.stderr
    assert {path: content for path, (_, _, content) in snapshot(data_dir).items()} == before


@pytest.mark.parametrize(
    "keys", [KEYS, {}, {"PROXYWHIRL_CACHE_ENCRYPTION_KEY": Fernet.generate_key().decode()}]
)
@pytest.mark.parametrize("more", [(), ("--json",), ("--without-credentials", "--log-level", "debug")])
def test_no_secret_is_in_the_output(
    keys: dict[str, str], more: tuple[str, ...], source: Path, data_dir: Path
) -> None:
    shard = source / "proxies" / "shard_10.jsonl"
    shard.write_bytes(shard.read_bytes().replace(b'"source": "fixture"', b'"source": 7'))

    result = run(source, "--data-dir", data_dir, *more, env=keys)

    assert result.stdout
    for word in (*SECRETS, *keys.values(), "gAAAA", b"gAAAA".hex()):
        assert word not in result.stdout + result.stderr, word


def test_progress_is_shown_on_a_terminal_and_not_to_scripts(
    source: Path, data_dir: Path, tmp_path: Path
) -> None:
    shown, result = _run_on_terminal(source, "--data-dir", data_dir)
    assert result.returncode == 0
    assert "import" in shown

    shown, result = _run_on_terminal(source, "--data-dir", tmp_path / "other", "--json")
    assert result.returncode == 0
    assert "\x1b" not in shown
    assert json.loads(result.stdout)["imported"] > 20


def _run_on_terminal(*arguments: object) -> tuple[str, subprocess.CompletedProcess[str]]:
    """Run the command with a terminal for its standard error: what that showed, and the result."""
    ours, theirs = pty.openpty()
    shown: list[bytes] = []
    reader = threading.Thread(target=_read_to_end, args=(ours, shown))
    reader.start()
    try:
        result = run(*arguments, "--log-level", "error", stderr=theirs, env={**KEYS, "TERM": "xterm"})
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
    return b"".join(shown).decode(), result


def _read_to_end(terminal: int, into: list[bytes]) -> None:
    """Read a pseudo-terminal until nothing has it open any more, which is an error of its own there."""
    try:
        while content := os.read(terminal, 4096):
            into.append(content)
    except OSError:
        pass
