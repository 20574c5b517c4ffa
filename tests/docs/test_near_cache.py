"""The page on near caches: its example runs, and it names everything that there is to name."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from proxystash import Client, NearCacheStatistics
from tests.clients.python.near_script import CASES
from tests.support.scripts import ROOT
from tests.support.server import running_server

TEXT = (ROOT / "docs" / "near-cache.md").read_text()


def test_the_example_asks_the_server_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snippet = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(snippet, names)
    with running_server(tmp_path) as server, Client(server.target) as client:
        names["look_up_often"](client, "http://192.0.2.1:1")
        lookups = client.stats().hits
    hits = re.search(r"hits=(\d+), misses=(\d+)", capsys.readouterr().out)
    assert hits is not None
    assert int(hits[1]) + int(hits[2]) == 100_000
    # Those before the watch was heard were calls, too.
    assert int(hits[2]) == lookups < 10_000


def test_every_field_of_the_statistics_is_explained() -> None:
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", TEXT, re.MULTILINE)
    explained = {name for row in rows for name in re.findall(r"\w+", row)}
    assert explained == {item.name for item in fields(NearCacheStatistics)}


def test_every_step_of_the_cases_is_explained() -> None:
    text = (ROOT / "tests" / "near" / "README.md").read_text()
    explained = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*)\|", text, re.MULTILINE))))
    assert explained - {"do"} == {step["do"] for case in CASES for step in case["steps"]}
