"""Every method through grpcurl, as someone without a client of ours would call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proxystash.v1 import cache_service_pb2 as pb
from proxystash_server.rpc.server import RpcServer
from tests.support.scripts import run
from tests.support.tools import require_tool

SERVICE = "proxystash.v1.CacheService"
METHODS = list(pb.DESCRIPTOR.services_by_name["CacheService"].methods_by_name)


@pytest.fixture(scope="module")
def grpcurl() -> Path:
    return require_tool("grpcurl")


def call(grpcurl: Path, server: RpcServer, method: str, request: object, *options: str) -> Any:
    result = run(
        grpcurl, "-plaintext", *options, "-d", json.dumps(request), server.address, f"{SERVICE}/{method}"
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_service_is_listed_and_described(grpcurl: Path, server: RpcServer) -> None:
    listed = run(grpcurl, "-plaintext", server.address, "list")
    assert SERVICE in listed.stdout.split()
    assert "grpc.health.v1.Health" in listed.stdout.split()
    described = run(grpcurl, "-plaintext", server.address, "describe", SERVICE)
    for method in METHODS:
        assert f"rpc {method} (" in described.stdout


def test_every_method_can_be_called(grpcurl: Path, server: RpcServer) -> None:
    entry = {"key": "a", "proxyUrl": "http://192.0.2.1:80", "labels": {"country": "DE"}, "ttl": "90s"}
    called = {
        "Put": call(grpcurl, server, "Put", {"entry": entry}),
        "BatchPut": call(
            grpcurl, server, "BatchPut", {"entries": [{**entry, "key": "b"}, {"proxyUrl": "nonsense"}]}
        ),
        "Get": call(grpcurl, server, "Get", {"key": "a"}),
        "BatchGet": call(grpcurl, server, "BatchGet", {"keys": ["a", "missing"]}),
        "List": call(grpcurl, server, "List", {"filter": {"labels": {"country": "DE"}}}),
        "InvalidateByHealth": call(grpcurl, server, "InvalidateByHealth", {"key": "a"}),
        "ListBans": call(grpcurl, server, "ListBans", {}),
        "Unban": call(grpcurl, server, "Unban", {"key": "a"}),
        "GetStats": call(grpcurl, server, "GetStats", {}),
        "StreamStats": _sequences(_stream(grpcurl, server, "StreamStats", {"interval": "0.1s"})),
        "Watch": _stream(grpcurl, server, "Watch", {"includeExisting": True}),
        "Delete": call(grpcurl, server, "Delete", {"key": "a"}),
        "Clear": call(grpcurl, server, "Clear", {}),
    }
    mask = {"paths": ["labels.city", "labels.country"]}
    changed = {"entry": {"key": "b", "labels": {"city": "Bonn"}}, "updateMask": mask}
    call(grpcurl, server, "Put", {"entry": {**entry, "key": "b"}})
    assert call(grpcurl, server, "Put", changed)["key"] == "b"
    assert call(grpcurl, server, "Get", {"key": "b"})["entry"]["labels"] == {"city": "Bonn"}
    call(grpcurl, server, "Clear", {})
    assert set(called) == set(METHODS)
    assert called["Put"]["storedIn"] == ["TIER_L1", "TIER_L2", "TIER_L3"]
    assert called["BatchPut"]["results"][1]["error"]["reason"] == "INVALID_PROXY_URL"
    assert called["Get"]["entry"]["ttl"] == "90s"
    assert [result.get("servedBy") for result in called["BatchGet"]["results"]] == ["TIER_L1", None]
    assert [found["key"] for found in called["List"]["entries"]] == ["a", "b"]
    assert called["InvalidateByHealth"] == {
        "found": True,
        "healthStatus": "HEALTH_STATUS_UNHEALTHY",
        "failureCount": 1,
        "failureThreshold": 3,
    }
    assert called["GetStats"]["statistics"]["entries"] == "2"
    assert called["StreamStats"] == ["1", "2", "3"]
    assert called["ListBans"] == called["Unban"] == {}
    existing = [change["key"] for response in called["Watch"] for change in response.get("changes", ())]
    assert existing == ["a", "b"]
    assert called["Watch"][-1]["synced"]
    assert called["Delete"] == {"deleted": True}
    assert called["Clear"] == {"cleared": "1"}


def test_an_error_names_its_reason_and_field(grpcurl: Path, server: RpcServer) -> None:
    result = run(grpcurl, "-plaintext", "-d", "{}", server.address, f"{SERVICE}/Get")
    assert result.returncode != 0
    assert "InvalidArgument" in result.stderr
    assert "INVALID_KEY" in result.stderr
    assert '"field": "key"' in result.stderr


def _stream(grpcurl: Path, server: RpcServer, method: str, request: Any) -> list[Any]:
    """The responses of a stream within a second."""
    arguments = ("-plaintext", "-max-time", "1", "-d", json.dumps(request), server.address)
    output = run(grpcurl, *arguments, f"{SERVICE}/{method}").stdout
    decoder, responses = json.JSONDecoder(), []
    while output.strip():
        response, end = decoder.raw_decode(output.lstrip())
        responses.append(response)
        output = output.lstrip()[end:]
    return responses


def _sequences(responses: list[Any]) -> list[str]:
    return [response["sequence"] for response in responses[:3]]
