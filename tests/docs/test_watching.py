"""The snippets about watching, run as a reader would run them."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from proxystash import CacheEntry, ChangeKind, Client
from proxystash_server.rpc.errors import Reason
from tests.clients.python.waiting import wait_until
from tests.support.scripts import ROOT
from tests.support.server import running_server

TEXT = (ROOT / "docs" / "watching.md").read_text()


def test_the_python_snippet_keeps_a_copy(tmp_path: Path) -> None:
    snippet = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(snippet, names)
    copy: dict[str, CacheEntry] = {}
    with running_server(tmp_path) as server, Client(server.target) as client:
        following = Client(server.target)
        old = client.put(CacheEntry("http://192.0.2.1:1", source="webshare")).key
        thread = threading.Thread(target=names["follow"], args=(following, copy))
        thread.start()
        wait_until(lambda: copy.keys() == {old})
        new = client.put(CacheEntry("http://192.0.2.2:1", source="webshare")).key
        client.put(CacheEntry("http://192.0.2.3:1", source="another"))
        client.delete(old)
        wait_until(lambda: copy.keys() == {new})
        client.clear()
        wait_until(lambda: not copy)
        following.close()
        thread.join(30)
        assert not thread.is_alive()


def test_the_commands_are_taken(tmp_path: Path) -> None:
    commands = re.findall(r"^(proxystash watch[^#\n]*)", TEXT, re.MULTILINE)
    assert len(commands) == 3
    with running_server(tmp_path) as server:
        for command in commands:
            words = [*command.split()[1:], "--target", server.target]
            program = str(Path(sys.executable).with_name("proxystash"))
            process = subprocess.Popen([program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            with Client(server.target) as client:
                wait_until(lambda: client.stats().watch_subscribers == 1)
                process.terminate()
                process.communicate(timeout=60)
                wait_until(lambda: client.stats().watch_subscribers == 0)
            assert process.returncode == 143


def test_every_kind_and_every_reason_is_explained() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE))
    assert {kind.value for kind in ChangeKind} <= rows
    reasons = set(re.findall(r"^\| `\w+`, `(\w+)`", TEXT, re.MULTILINE))
    assert reasons <= set(Reason)
    assert Reason.REVISION_COMPACTED in reasons
