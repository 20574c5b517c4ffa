"""The commands and programs of the page on other languages, run as a reader would."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from tests.support.rpc import DEADLINE, open_channel
from tests.support.scripts import ROOT
from tests.support.server import ServerProcess, running_server

PAGE = (ROOT / "docs/other-languages.md").read_text(encoding="utf-8")
FENCES = dict(re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
# Of other languages, so a machine may lack them, also one that runs CI.
TOOLS = {
    "ruby": ("protoc", "grpc_ruby_plugin", "ruby"),
    "cpp": ("protoc", "grpc_cpp_plugin", "g++", "pkg-config"),
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with running_server(tmp_path / "data") as server:
        yield server


def need(language: str) -> None:
    missing = [tool for tool in TOOLS[language] if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed, which the page asks its reader for")


def run(command: str, folder: Path, target: str = "") -> str:
    (folder / "protos").unlink(missing_ok=True)
    (folder / "protos").symlink_to(ROOT / "protos")
    result = subprocess.run(
        ["bash", "-c", f"set -e\n{FENCES['bash']}\n{command}"],
        cwd=folder,
        env={**os.environ, "PROXYSTASH_TARGET": target},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_ruby(server: ServerProcess, tmp_path: Path) -> None:
    need("ruby")
    if subprocess.run(["ruby", "-e", "require 'grpc'"], capture_output=True, check=False).returncode:
        pytest.skip("the gem grpc is not installed, which the page asks its reader for")
    (tmp_path / "first.rb").write_text(FENCES["ruby"])
    output = run("stubs ruby; ruby first.rb", tmp_path, server.target)
    assert output == "http://192.0.2.50:8080 from TIER_L1\na miss\nlent http://192.0.2.50:8080\n"


def test_cpp(server: ServerProcess, tmp_path: Path) -> None:
    need("cpp")
    if subprocess.run(["pkg-config", "grpc++", "protobuf"], check=False).returncode:
        pytest.skip("gRPC's C++ library is not installed, which the page asks its reader for")
    (tmp_path / "first.cc").write_text(FENCES["cpp"])
    (build,) = re.findall(r"`(g\+\+ [^`]*)`", PAGE)
    key = run(f"stubs cpp; {build} -o first; ./first", tmp_path, server.target).strip()
    with open_channel(server.target) as channel:
        found = pb_grpc.CacheServiceStub(channel).Get(pb.GetRequest(key=key), timeout=DEADLINE)
    assert found.entry.proxy_url == "http://192.0.2.51:8080"
