"""The page on operations: its commands do what it says, and its table has every file there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from tests.support.rpc import DEADLINE, open_channel
from tests.support.scripts import ROOT
from tests.support.server import running_server

PAGE = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
COMMANDS = "\n".join(re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))


def run(command: str) -> subprocess.CompletedProcess[str]:
    path = f'PATH="{Path(sys.executable).parent}:$PATH"'
    return subprocess.run(
        ["bash", "-c", f"{path}\n{COMMANDS}\n{command}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def entry(number: int) -> pb.CacheEntry:
    return pb.CacheEntry(
        key=f"key-{number}",
        proxy_url=f"http://192.0.2.1:{1 + number}",
        username="user",
        password="password-1",
    )


def test_a_backup_of_a_running_server_is_restored(tmp_path: Path) -> None:
    data, backup, restored = tmp_path / "data", tmp_path / "backup", tmp_path / "restored"
    with running_server(data) as server, open_channel(server.target) as channel:
        stub = pb_grpc.CacheServiceStub(channel)
        stub.BatchPut(pb.BatchPutRequest(entries=map(entry, range(100))), timeout=DEADLINE)
        result = run(f"backup {data} {backup}")
        assert (result.returncode, result.stderr) == (0, "")
        # What comes later is not in it.
        stub.Put(pb.PutRequest(entry=entry(100)), timeout=DEADLINE)
        stub.Delete(pb.DeleteRequest(key="key-0"), timeout=DEADLINE)

    result = run(f"restore {backup} {restored}")
    assert result.returncode == 0, result.stdout + result.stderr
    with running_server(restored) as server, open_channel(server.target) as channel:
        stub = pb_grpc.CacheServiceStub(channel)
        assert stub.GetStats(pb.GetStatsRequest(), timeout=DEADLINE).statistics.entries == 100
        found = stub.Get(pb.GetRequest(key="key-0"), timeout=DEADLINE).entry
        assert (found.username, found.password) == ("user", "password-1")


def test_no_backup_is_made_that_lacks_something(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/missed-changes.jsonl").touch()
    result = run(f"backup {tmp_path}/data {tmp_path}/backup")
    assert (result.returncode, result.stderr) == (1, "L3 is away; wait until it is back\n")
    assert not (tmp_path / "backup").exists()


def test_the_table_has_every_file_of_a_data_directory(tmp_path: Path) -> None:
    with running_server(tmp_path) as server, open_channel(server.target) as channel:
        stub = pb_grpc.CacheServiceStub(channel)
        stub.Put(pb.PutRequest(entry=entry(0)), timeout=DEADLINE)
        for _ in range(3):
            stub.InvalidateByHealth(pb.InvalidateByHealthRequest(key="key-0"), timeout=DEADLINE)
        files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    named = re.findall(r"^\| `([^`]+)`", PAGE, re.MULTILINE)
    assert "failures.jsonl" in files
    for file in files:
        file = re.sub(r"-(wal|shm)$", "", file)
        assert any(file == name or (name.endswith("/") and file.startswith(name)) for name in named), file


def test_the_commands_that_it_names_exist() -> None:
    for command in ("export --include-credentials", "ping", "stats", "watch-stats"):
        result = run(f"proxystash {command} --help")
        assert result.returncode == 0, result.stderr
