"""The calls of the page on leasing are calls that the server takes, and its outcomes are the contract's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.error
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format, message_factory

import proxystash
from proxystash import CacheEntry, Client, NoProxyError
from proxystash.v1 import pool_service_pb2 as pb
from proxystash.v1 import pool_service_pb2_grpc as pb_grpc
from proxystash_server.settings import Settings
from tests.support.rpc import DEADLINE, open_channel, refusal_of
from tests.support.scripts import ROOT
from tests.support.server import running_server
from tests.support.site import PAGE, local_proxy, local_site

_PAGE = (ROOT / "docs" / "leasing.md").read_text()
_SERVICE = pb.DESCRIPTOR.services_by_name["PoolService"]


def test_every_call_of_the_page_is_answered(tmp_path: Path) -> None:
    calls = re.findall(r"-d '(\{.*?\})' \$H \$S/(\w+)", _PAGE)
    assert {method for _, method in calls} >= {
        "Acquire",
        "Release",
        "ListTargets",
        "GetProxyHealth",
        "ListLeases",
    }
    with running_server(tmp_path) as server, open_channel(server.target) as channel:
        stub = pb_grpc.PoolServiceStub(channel)
        # Until all entries are loaded, the answer to a shortage is UNAVAILABLE.
        while _is_loading(stub):
            time.sleep(0.01)
        for body, method in calls:
            fields = json.loads(body)
            # There is nothing to wait for here.
            fields.pop("wait", None)
            kind = message_factory.GetMessageClass(_SERVICE.methods_by_name[method].input_type)
            getattr(stub, method)(json_format.ParseDict(fields, kind()), timeout=DEADLINE)


def _is_loading(stub: pb_grpc.PoolServiceStub) -> bool:
    try:
        stub.Acquire(pb.AcquireRequest(), timeout=DEADLINE)
    except grpc.RpcError as error:
        if refusal_of(error).reason != "POOL_LOADING":
            raise
        return True
    return False


def test_the_commands_of_the_page_do_what_they_say(tmp_path: Path) -> None:
    [script] = re.findall(r"^```sh\n(proxystash .*?)^```$", _PAGE, re.MULTILINE | re.DOTALL)
    program = str(Path(sys.executable).with_name("proxystash"))
    with running_server(tmp_path) as server, Client(server.target) as client:
        client.put(CacheEntry("http://192.0.2.10:8080"))
        for line in script.splitlines():
            words = line.partition("#")[0].split()
            done = subprocess.run(
                [program, *words[1:], "--target", server.target], capture_output=True, text=True, check=False
            )
            assert (done.returncode, words) == (0, words), done.stderr
        [lease] = client.pool.leases(holder="me")
        assert lease.target == "shop.example"
        with pytest.raises(NoProxyError):
            client.pool.acquire("shop.example")


def test_the_python_of_the_page_does_what_it_says(tmp_path: Path) -> None:
    """Given a site behind a proxy that answers, then bans."""
    fetch, crawl = re.findall(r"^```python\n(.*?)^```$", _PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"use": lambda url, page: "blocked" if page == "robot" else "success"}
    names |= {"proxystash": proxystash, "timedelta": timedelta}
    exec(fetch, names)
    exec(crawl, names)
    with running_server(tmp_path) as server, Client(server.target) as client, local_site() as site:
        with local_proxy() as first, local_proxy() as second:
            for proxy in (first, second):
                client.put(CacheEntry(proxy.url, labels={"country": "DE"}))
            page = names["fetch"](client, site.url, "fetch.example")
            assert page == PAGE
            site.banned |= {first.address, second.address}
            with pytest.raises(urllib.error.HTTPError):
                names["fetch"](client, site.url, "fetch.example")
            names["crawl"](client, ["a", "b", "robot"])
        targets = {one.target: one for one in client.pool.targets()}
        assert (targets["fetch.example"].resting, targets["shop.example"].resting) == (1, 1)
        assert targets["shop.example"].successes == pytest.approx(2, abs=0.1)
        assert list(client.pool.leases()) == []


def test_the_page_has_every_outcome() -> None:
    told = set(re.findall(r"^\| `([A-Z_]+)` \|", _PAGE, re.MULTILINE))
    assert told == {name.removeprefix("OUTCOME_") for name in pb.Outcome.keys()} - {"UNSPECIFIED"}  # noqa: SIM118 - an enum's


def test_the_page_names_settings_that_there_are() -> None:
    assert set(re.findall(r"`(pool_\w+)`", _PAGE)) <= set(Settings.model_fields)
