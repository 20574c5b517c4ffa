"""The calls of the users of the pool by grpcurl, as someone without a client of ours would make them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from proxystash import CacheEntry, Client
from tests.support.scripts import run
from tests.support.server import ServerProcess, running_server
from tests.support.tools import require_tool

POOL, CACHE = "proxystash.v1.PoolService", "proxystash.v1.CacheService"
Call = Callable[[str, dict[str, Any]], Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(tmp_path_factory.mktemp("data")) as server:
        yield server


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.target) as client:
        client.clear()
        yield client


@pytest.fixture
def call(server: ServerProcess) -> Call:
    grpcurl = require_tool("grpcurl")

    def make(method: str, request: dict[str, Any]) -> Any:
        done = run(grpcurl, "-plaintext", "-d", json.dumps(request), server.target, method)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return make


def test_a_browser_keeps_its_session(call: Call, client: Client) -> None:
    client.put_many(CacheEntry(f"http://192.0.2.1:{port}", labels={"country": "DE"}) for port in (1, 2, 3))
    acquire = {
        "filter": {"schemes": ["http"], "labels": {"country": "DE"}},
        "target": "shop.example",
        "lease_duration": "60s",
        "wait": "30s",
        "holder": "browser-7",
        "session": {"id": "account-4711", "idle_timeout": "86400s"},
        "request_id": "6f1c0d2e",
    }
    [lease] = call(f"{POOL}/Acquire", acquire)["leases"]
    [again] = call(f"{POOL}/Acquire", acquire)["leases"]
    assert again["leaseId"] == lease["leaseId"]
    renewed = call(f"{POOL}/Renew", {"lease_ids": [lease["leaseId"], "9b2f"], "lease_duration": "60s"})
    assert [one.get("held", False) for one in renewed["results"]] == [True, False]
    result = {"outcome": "OUTCOME_SUCCESS", "latency": "2.1s"}
    reported = call(f"{POOL}/ReportResults", {"reports": [{"lease_id": lease["leaseId"], "result": result}]})
    assert reported["results"][0]["effect"]["found"]
    banned = {"lease_id": lease["leaseId"], "result": {"outcome": "OUTCOME_BLOCKED"}, "end_session": True}
    [released] = call(f"{POOL}/Release", {"releases": [banned]})["results"]
    assert released["released"]
    assert "restingAtTargetUntil" in released["effect"]
    [other] = call(f"{POOL}/Acquire", acquire)["leases"]
    assert other["key"] != lease["key"]
    assert "sessionMoved" not in other


def test_a_checker_reports_by_key(call: Call, client: Client) -> None:
    good, bad = (client.put(CacheEntry(f"http://192.0.2.2:{port}")).key for port in (1, 2))
    success = {"outcome": "OUTCOME_SUCCESS", "latency": "0.412s", "target": "judge.example"}
    reports = [
        {"key": good, "result": success},
        {"key": bad, "result": {"outcome": "OUTCOME_CONNECT_ERROR"}},
    ]
    effects = [one["effect"] for one in call(f"{POOL}/ReportResults", {"reports": reports})["results"]]
    assert ["restingUntil" in effect for effect in effects] == [False, True]
    wanted = {"page_size": 1000, "filter": {"health_statuses": ["HEALTH_STATUS_UNHEALTHY"]}}
    listed = call(f"{CACHE}/List", {**wanted, "include_credentials": True})
    assert [entry["key"] for entry in listed["entries"]] == [bad]


def test_an_operator_looks_takes_back_and_keeps_away(call: Call, client: Client) -> None:
    gate = {"proxy_url": "http://gate.example:7777", "username": "customer-a", "max_leases": 50}
    key = call(f"{CACHE}/Put", {"entry": gate})["key"]
    held = [
        call(f"{POOL}/Acquire", {"target": "gate.example", "lease_duration": "30s"})["leases"][0]
        for _ in range(3)
    ]
    assert {lease["key"] for lease in held} == {key}
    assert len({lease["leaseId"] for lease in held}) == 3
    assert held[0]["entry"]["username"] == "customer-a"
    listed = call(f"{POOL}/ListLeases", {"key": key})["leases"]
    assert [lease["leaseId"] for lease in listed] == [lease["leaseId"] for lease in held]
    health = call(f"{POOL}/GetProxyHealth", {"key": key})["health"]
    assert (health["leases"], health["maxLeases"]) == (3, 50)
    [released] = call(f"{POOL}/Release", {"releases": [{"lease_id": held[0]["leaseId"]}]})["results"]
    assert released == {"released": True}
    blocked = {"outcome": "OUTCOME_BLOCKED", "target": "gate.example", "retry_after": "86400s"}
    [told] = call(f"{POOL}/ReportResults", {"reports": [{"key": key, "result": blocked}]})["results"]
    until = datetime.fromisoformat(told["effect"]["restingAtTargetUntil"])
    assert until > datetime.now(UTC) + timedelta(hours=23)
    assert call(f"{POOL}/Acquire", {"target": "gate.example"})["shortage"] == "SHORTAGE_RESTING"
    [target] = [one for one in call(f"{POOL}/ListTargets", {})["targets"] if one["target"] == "gate.example"]
    assert (target["resting"], target["leases"]) == ("1", "2")
    assert call(f"{POOL}/EndSession", {"session_id": "account-1", "target": "gate.example"}) == {}
