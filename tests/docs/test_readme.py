"""The README's snippets, run as a reader would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.scripts import ROOT
from tests.support.server import ServerProcess, running_server
from tests.support.tools import require_tool

_ADDRESS = "127.0.0.1:50051"
_SECTION = re.compile(r"^##+ (.+)$", re.MULTILINE)
_SNIPPET = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _snippets(section: str) -> dict[str, str]:
    text = (ROOT / "README.md").read_text()
    headings = list(_SECTION.finditer(text))
    [place] = [number for number, heading in enumerate(headings) if heading[1] == section]
    end = headings[place + 1].start() if place + 1 < len(headings) else len(text)
    return dict(_SNIPPET.findall(text[headings[place].end() : end]))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with running_server(tmp_path / "data") as server:
        yield server


def _run(command: list[str], server: ServerProcess | None, folder: Path, path: Path | None = None) -> str:
    folders = [str(Path(sys.executable).parent), *([str(path)] if path else []), os.environ["PATH"]]
    environment = {**os.environ, "PATH": os.pathsep.join(folders)}
    if server is not None:
        environment["PROXYSTASH_TARGET"] = server.target
        command = [word.replace(_ADDRESS, server.target) for word in command]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_five_minutes_do_what_they_say(server: ServerProcess, tmp_path: Path) -> None:
    output = _run(["bash", "-euo", "pipefail", "-c", _snippets("Five minutes")["sh"]], server, tmp_path)

    assert "loaded 3" in output
    assert "http://192.0.2.10:8080" in output
    assert "failure 1 of 3" in output
    assert "secret" not in output


def test_the_grpcurl_calls_do_what_they_say(server: ServerProcess, tmp_path: Path) -> None:
    grpcurl = require_tool("grpcurl")

    output = _run(
        ["bash", "-euo", "pipefail", "-c", _snippets("The same with grpcurl")["sh"]],
        server,
        tmp_path,
        grpcurl.parent,
    )

    assert "proxystash.v1.CacheService.StreamStats" in output
    assert '"proxyUrl": "http://192.0.2.20:8080"' in output
    assert '"servedBy": "TIER_L1"' in output
    assert '"failureCount": 1' in output


def test_the_client_snippet_does_what_it_says(server: ServerProcess, tmp_path: Path) -> None:
    output = _run([sys.executable, "-c", _snippets("The same in Python")["python"]], server, tmp_path)

    assert "http://192.0.2.30:8080 came from l1" in output
    assert "1 entries" in output


def test_the_library_snippet_does_what_it_says(tmp_path: Path) -> None:
    snippet = _snippets("The library without a server")["python"]

    output = _run([sys.executable, "-W", "error", "-c", snippet], None, tmp_path)

    assert "http://192.0.2.40:8080 1" in output
    assert (tmp_path / "cache" / "l3.db").exists()


def test_every_document_that_the_readme_links_to_exists() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())

    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
