"""The calls of the page on leasing are calls that the server takes, and its outcomes are the contract's."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import grpc
from google.protobuf import json_format, message_factory

from proxystash.v1 import pool_service_pb2 as pb
from proxystash.v1 import pool_service_pb2_grpc as pb_grpc
from proxystash_server.settings import Settings
from tests.support.rpc import DEADLINE, open_channel, refusal_of
from tests.support.scripts import ROOT
from tests.support.server import running_server

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


def test_the_page_has_every_outcome() -> None:
    told = set(re.findall(r"^\| `([A-Z_]+)` \|", _PAGE, re.MULTILINE))
    assert told == {name.removeprefix("OUTCOME_") for name in pb.Outcome.keys()} - {"UNSPECIFIED"}  # noqa: SIM118 - an enum's


def test_the_page_names_settings_that_there_are() -> None:
    assert set(re.findall(r"`(pool_\w+)`", _PAGE)) <= set(Settings.model_fields)
