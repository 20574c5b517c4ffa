"""The locks fit what the distributions ask for, carry hashes, and name no index."""

import ast
import json
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.scripts import ROOT

REQUIREMENTS = sorted((ROOT / "requirements").glob("*.txt"))
OTHER_LOCKS = [
    ROOT / "scripts/tools/buf/package-lock.json",
    ROOT / "scripts/tools/grpcurl/go.mod",
    ROOT / "scripts/tools/grpcurl/go.sum",
    ROOT / "scripts/tools/ghz/go.mod",
    ROOT / "scripts/tools/ghz/go.sum",
]
# Two distributions share the package `google`.
GOOGLE = {"google.protobuf": "protobuf", "google.rpc": "googleapis-common-protos"}


def pyproject(folder: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text())


def blocks(lock: Path) -> list[str]:
    """The lock's requirements, each with the hashes that follow it."""
    lines = [line for line in lock.read_text().splitlines() if not line.lstrip().startswith("#")]
    return re.split(r"\n(?=\S)", "\n".join(lines))


def pins(lock: Path) -> dict[str, str]:
    """Name to version, of what this platform installs."""
    pinned: dict[str, str] = {}
    for block in blocks(lock):
        requirement = Requirement(block.split("\\")[0].strip())
        if requirement.marker is None or requirement.marker.evaluate():
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            pinned[canonicalize_name(requirement.name)] = specifier.version
    return pinned


def asked() -> list[tuple[str, str]]:
    """Each requirement of the two pyproject.toml, with the lock it belongs in."""
    server, client = pyproject("."), pyproject("clients/python")
    runtime = server["project"]["dependencies"] + client["project"]["dependencies"]
    runtime = [requirement for requirement in runtime if not requirement.startswith("proxystash==")]
    groups = server["dependency-groups"]
    return [
        *(
            ("runtime.txt", requirement)
            for requirement in runtime
            if not requirement.startswith("proxystash==")
        ),
        *(("dev.txt", requirement) for requirement in runtime),
        *(("dev.txt", requirement) for requirement in groups["dev"]),
        *(("dev.txt", requirement) for requirement in server["build-system"]["requires"]),
        *(("generate.txt", requirement) for requirement in groups["generate"]),
        *(("lock.txt", requirement) for requirement in groups["lock"]),
        *(("bench.txt", requirement) for requirement in [*runtime, *groups["bench"]]),
        *(("bench-proxywhirl.txt", requirement) for requirement in groups["bench-proxywhirl"]),
    ]


@pytest.mark.parametrize(("lock", "requirement"), asked())
def test_the_lock_pins_a_version_that_is_asked_for(lock: str, requirement: str) -> None:
    wanted = Requirement(requirement)

    pinned = pins(ROOT / "requirements" / lock)

    assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), "run scripts/lock"


@pytest.mark.parametrize("lock", ["dev.txt", "bench.txt"])
def test_development_and_benchmark_run_on_the_versions_that_are_deployed(lock: str) -> None:
    runtime = pins(ROOT / "requirements/runtime.txt")

    assert runtime.items() <= pins(ROOT / "requirements" / lock).items()


@pytest.mark.parametrize("lock", REQUIREMENTS, ids=lambda path: path.name)
def test_every_locked_requirement_has_hashes(lock: Path) -> None:
    assert blocks(lock)
    for block in blocks(lock):
        assert "--hash=sha256:" in block, block


@pytest.mark.parametrize("lock", [*REQUIREMENTS, *OTHER_LOCKS], ids=lambda path: path.name)
def test_no_lock_names_an_index(lock: Path) -> None:
    text = lock.read_text()

    assert text
    assert "://" not in text
    assert "index-url" not in text
    assert "find-links" not in text
    assert '"resolved"' not in text


def test_every_locked_node_package_has_a_hash() -> None:
    packages = json.loads(OTHER_LOCKS[0].read_text())["packages"]

    assert len(packages) > 1
    assert all("integrity" in package for name, package in packages.items() if name)


def test_both_distributions_are_released_together() -> None:
    server, client = pyproject(".")["project"], pyproject("clients/python")["project"]

    assert server["version"] == client["version"]
    assert f"proxystash=={client['version']}" in server["dependencies"]
    assert server["requires-python"] == client["requires-python"]


def test_the_stubs_run_on_the_oldest_grpcio_that_is_allowed() -> None:
    """Stubs refuse a grpcio or a protobuf older than their generator's."""
    generator = pins(ROOT / "requirements/generate.txt")["grpcio-tools"]
    stub = (ROOT / "clients/python/proxystash/v1/cache_service_pb2_grpc.py").read_text()
    messages = (ROOT / "clients/python/proxystash/v1/cache_service_pb2.py").read_text()
    (protobuf,) = re.findall(r"^# Protobuf Python Version: (\S+)$", messages, re.MULTILINE)

    assert f"GRPC_GENERATED_VERSION = '{generator}'" in stub
    for folder in (".", "clients/python"):
        dependencies = [Requirement(text) for text in pyproject(folder)["project"]["dependencies"]]
        oldest = {dependency.name: str(dependency.specifier) for dependency in dependencies}
        assert f">={generator}".startswith(oldest["grpcio"])
        assert oldest["protobuf"] == f"<8,>={protobuf}"


def imported(package: Path) -> set[str]:
    """The modules of other distributions that the package's own code imports."""
    modules: set[str] = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module)
    # Type checkers have the last of them, and nobody else.
    ours_or_pythons = {*sys.stdlib_module_names, package.name, "_typeshed"}
    return {name for name in modules if name.split(".")[0] not in ours_or_pythons}


@pytest.mark.parametrize(
    ("folder", "package"),
    [(".", "server/proxystash_server"), ("clients/python", "clients/python/proxystash")],
)
def test_what_a_distribution_imports_it_also_requires(folder: str, package: str) -> None:
    project = pyproject(folder)["project"]
    extras = project.get("optional-dependencies", {}).values()
    required = {Requirement(text).name for texts in (project["dependencies"], *extras) for text in texts}
    # Pinned by pydantic and by aiohttp, and part of their documented interfaces.
    required |= {"pydantic-core", "yarl"}
    distributions = packages_distributions()

    # An editable installation is not in that table; its distribution is called what its package is.
    owners = {
        GOOGLE.get(".".join(name.split(".")[:2])) or distributions.get(root, [root])[0]
        for name in imported(ROOT / package)
        for root in name.split(".")[:1]
    }

    assert "grpcio" in owners
    assert {canonicalize_name(owner) for owner in owners} <= required


def test_a_server_is_installed_without_the_tools_of_developers() -> None:
    runtime, server = (pins(ROOT / "requirements" / name) for name in ("runtime.txt", "server.txt"))
    assert runtime.items() <= server.items()
    # What builds the editable installs.
    build = {"hatchling", "packaging", "pathspec", "pluggy", "tomlkit", "trove-classifiers"}
    assert server.keys() - runtime.keys() == build
