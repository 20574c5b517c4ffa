"""docs/observability.md names all that the server tells of itself; what is deployed asks for nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf.descriptor import Descriptor
from prometheus_client.parser import text_string_to_metric_families

from proxystash.v1 import cache_service_pb2 as pb
from tests.server.metrics.test_metrics import ON, ask
from tests.support.scripts import ROOT
from tests.support.server import running_server

PAGE = (ROOT / "docs/observability.md").read_text(encoding="utf-8")
NAMED = frozenset(re.findall(r"`([A-Za-z_0-9]+)`", PAGE))
RULES = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text(encoding="utf-8"))["groups"][0][
    "rules"
]
RULE_TESTS = yaml.safe_load((ROOT / "deploy/prometheus/alerts_test.yml").read_text(encoding="utf-8"))["tests"]
DASHBOARD = json.loads((ROOT / "deploy/grafana/proxystash.json").read_text(encoding="utf-8"))

# What Prometheus itself adds to each target.
OF_PROMETHEUS = {"up"}


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Every metric of a server by the name that it is documented under, and its labels."""
    with running_server(tmp_path_factory.mktemp("data"), *ON) as server:
        families = text_string_to_metric_families(ask(server)[2])
        labels: dict[str, set[str]] = {}
        for family in families:
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels[name] = {label for sample in family.samples for label in sample.labels}
    # Not asked for yet, so without samples.
    labels["grpc_server_handled_total"] = {"grpc_service", "grpc_method", "grpc_code"}
    labels["grpc_server_handling_seconds"] = {"grpc_service", "grpc_method", "le"}
    return labels


def test_every_metric_is_named(labels: dict[str, set[str]]) -> None:
    assert labels.keys() - NAMED == set()
    assert {name for name in NAMED if name.startswith("proxystash_")} - labels.keys() == set()


@pytest.mark.parametrize(
    "message", [pb.CacheStatistics.DESCRIPTOR, pb.TierStatistics.DESCRIPTOR, pb.PoolStatistics.DESCRIPTOR]
)
def test_every_field_of_the_statistics_is_named(message: Descriptor) -> None:
    assert {field.name for field in message.fields} - NAMED == set()


def test_every_alert_is_named_and_tested() -> None:
    alerts = {rule["alert"] for rule in RULES}
    assert {name for name in NAMED if re.match("Proxystash[A-Z]", name)} == alerts
    for expected in (1, 0):
        assert alerts == {
            case["alertname"]
            for test in RULE_TESTS
            for case in test["alert_rule_test"]
            if len(case["exp_alerts"]) == expected
        }


def queries() -> list[str]:
    asked: list[Any] = [rule["expr"] for rule in RULES]
    asked += [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return [str(query) for query in asked]


@pytest.mark.parametrize("query", queries())
def test_what_is_deployed_asks_for_what_there_is(labels: dict[str, set[str]], query: str) -> None:
    added = {"instance", "job"}
    selectors = re.findall(r"\b((?:proxystash|grpc|process)_\w+|up)\b(?:\{([^}]*)\})?", query)
    metrics = [(name, chosen) for name, chosen in selectors if name not in {"grpc_method", "grpc_code"}]
    assert metrics
    for name, chosen in metrics:
        if name in OF_PROMETHEUS:
            continue
        known = labels[name.removesuffix("_bucket")] | added
        assert set(re.findall(r"(\w+)(?:=|!=|=~|!~)\"", chosen)) <= known
    for grouping in re.findall(r"(?:by|on) \(([^)]*)\)", query):
        known = set().union(*(labels.get(name.removesuffix("_bucket"), set()) for name, _ in metrics))
        assert set(re.split(r",\s*", grouping)) <= known | added


def test_the_panels_have_places_of_their_own() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    squares = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(squares)) == len(squares)
    assert max(x for x, _ in squares) < 24


def test_the_page_is_found_from_the_readme() -> None:
    assert "docs/observability.md" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert Path(ROOT / "deploy").is_dir()
