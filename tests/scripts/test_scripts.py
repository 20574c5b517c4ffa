"""The scripts work from anywhere, do nothing twice, and say what a machine lacks."""

import os
import signal
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.scripts import ROOT, run

SCRIPTS = sorted(
    path
    for path in [*(ROOT / "scripts").rglob("*"), ROOT / ".ci/run"]
    if path.is_file() and not path.suffix and path.read_bytes().startswith(b"#!")
)


def without(folder: Path, hidden: Callable[[str], bool]) -> str:
    """A PATH of what the real one offers, less the commands that are hidden."""
    folder.mkdir()
    for entry in os.get_exec_path():
        for program in Path(entry).iterdir() if Path(entry).is_dir() else ():
            link = folder / program.name
            if not hidden(program.name) and not link.is_symlink():
                link.symlink_to(program)
    return str(folder)


@pytest.fixture
def no_node_no_go(tmp_path: Path) -> str:
    return without(tmp_path / "bin", lambda name: name in {"node", "npm", "go"})


def test_the_scripts_every_project_has_are_here() -> None:
    names = {path.name for path in SCRIPTS if path.parent == ROOT / "scripts"}

    assert names >= {"bootstrap", "server", "test", "check", "generate", "lock", "bench"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_is_executable_and_stops_at_the_first_error(script: Path) -> None:
    lines = script.read_text().splitlines()

    assert script.stat().st_mode & stat.S_IXUSR
    if lines[0] == "#!/usr/bin/env bash":
        assert "set -euo pipefail" in lines


def test_bootstrap_does_nothing_the_second_time_from_any_folder(tmp_path: Path) -> None:
    first = run(ROOT / "scripts/bootstrap", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    before = {path: path.stat().st_mtime_ns for path in (ROOT / ".venv").iterdir()}

    second = run(ROOT / "scripts/bootstrap", cwd=tmp_path)

    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert {path: path.stat().st_mtime_ns for path in (ROOT / ".venv").iterdir()} == before


def test_bootstrap_says_when_no_python_is_new_enough(checkout: Path, tmp_path: Path) -> None:
    path = without(tmp_path / "bin", lambda name: name.startswith(("python", "pypy")))

    result = run(checkout / "scripts/bootstrap", env={"PATH": path, "PYTHON": ""})

    assert result.returncode == 1
    assert "found no Python 3.11 or later" in result.stderr
    assert not (checkout / ".venv").exists()


def test_bootstrap_refuses_a_chosen_python_that_is_too_old(checkout: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)

    result = run(checkout / "scripts/bootstrap", env={"PYTHON": str(old)})

    assert result.returncode == 1
    assert f"PYTHON={old} is not a Python 3.11 or later" in result.stderr


def test_without_node_and_go_the_tools_are_skipped_aloud(checkout: Path, no_node_no_go: str) -> None:
    result = run(checkout / "scripts/tools/install", env={"PATH": no_node_no_go, "CI": ""})

    assert result.returncode == 0
    assert [line.split(",")[0] for line in result.stderr.splitlines()] == [
        "install: skipped: buf",
        "install: skipped: grpcurl",
        "install: skipped: ghz",
    ]


@pytest.mark.parametrize("tool", ["buf", "grpcurl", "ghz"])
def test_without_node_or_go_ci_fails(checkout: Path, no_node_no_go: str, tool: str) -> None:
    result = run(checkout / "scripts/tools/install", tool, env={"PATH": no_node_no_go, "CI": "true"})

    assert result.returncode == 1
    assert f"install: {tool}, " in result.stderr


def test_ci_runs_the_tests_with_nothing_skipped(checkout: Path) -> None:
    (checkout / "scripts/test").write_text('#!/usr/bin/env bash\necho "CI=$CI" "$@"\n')

    result = run("bash", checkout / ".ci/run", "-k", "some thing", env={"CI": ""})

    assert result.stdout == "CI=true -k some thing\n"


def test_the_server_script_serves_from_any_folder_and_hands_on_signals(tmp_path: Path) -> None:
    with subprocess.Popen(
        [ROOT / "scripts/server", "--listen", "127.0.0.1:0", "--data-dir", "data"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            first_line = server.stdout.readline()
            server.send_signal(signal.SIGTERM)
            rest = server.stdout.read()
            code = server.wait(timeout=30)
        finally:
            server.kill()

    assert code == 0, first_line + rest
    assert (tmp_path / "data").is_dir()
