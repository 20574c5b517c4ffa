"""The wheels of both distributions build, and install together into an empty environment."""

import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.scripts import ROOT, run

SOURCES = {"proxystash": ROOT / "clients/python", "proxystash_server": ROOT}


def checked(command: Path | str, *arguments: str | Path, cwd: Path | None = None) -> str:
    result = run(command, *arguments, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build_wheel(source: Path, out: Path) -> None:
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    checked(*pip, "--wheel-dir", out, source)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("wheels")
    for source in SOURCES.values():
        build_wheel(source, out)
    return {name: next(out.glob(f"{name}-*.whl")) for name in SOURCES}


@pytest.fixture(scope="module")
def installed(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with both wheels and what the runtime lock lists, nothing else."""
    folder = tmp_path_factory.mktemp("deployment")
    venv.create(folder, with_pip=True)
    pip = (folder / "bin/python", "-m", "pip", "install", "--quiet")
    lock = ROOT / "requirements/runtime.txt"
    checked(*pip, "--require-hashes", "--only-binary", ":all:", "--requirement", lock)
    # Resolves: a dependency that the lock lacks would have to come from an index, and there is none.
    checked(*pip, "--no-index", *wheels.values())
    return folder / "bin"


@pytest.mark.parametrize("name", SOURCES)
def test_each_wheel_is_typed_licensed_and_holds_one_package(wheels: dict[str, Path], name: str) -> None:
    files = zipfile.ZipFile(wheels[name]).namelist()

    assert f"{name}/py.typed" in files
    assert any(file.endswith(".dist-info/licenses/LICENSE") for file in files)
    assert {file.split("/")[0].split("-")[0] for file in files} == {name}


def test_the_client_wheel_has_the_stubs_and_their_types(wheels: dict[str, Path]) -> None:
    files = zipfile.ZipFile(wheels["proxystash"]).namelist()

    for suffix in ("pb2.py", "pb2.pyi", "pb2_grpc.py", "pb2_grpc.pyi"):
        assert f"proxystash/v1/cache_service_{suffix}" in files


@pytest.mark.parametrize("name", SOURCES)
def test_the_source_distribution_builds_the_same_wheel(
    wheels: dict[str, Path], name: str, tmp_path: Path
) -> None:
    hatchling = Path(sys.executable).with_name("hatchling")
    checked(hatchling, "build", "-t", "sdist", "-d", tmp_path, cwd=SOURCES[name])
    (sdist,) = tmp_path.glob("*.tar.gz")

    build_wheel(sdist, tmp_path)

    (wheel,) = tmp_path.glob("*.whl")
    assert sorted(zipfile.ZipFile(wheel).namelist()) == sorted(zipfile.ZipFile(wheels[name]).namelist())


def test_the_source_distribution_of_the_server_has_the_contract(tmp_path: Path) -> None:
    hatchling = Path(sys.executable).with_name("hatchling")
    checked(hatchling, "build", "-t", "sdist", "-d", tmp_path, cwd=ROOT)
    (sdist,) = tmp_path.glob("*.tar.gz")

    with tarfile.open(sdist) as archive:
        files = archive.getnames()

    assert f"{sdist.name.removesuffix('.tar.gz')}/protos/proxystash/v1/cache_service.proto" in files


def test_the_installed_distributions_need_nothing_more(installed: Path) -> None:
    assert "No broken requirements" in checked(installed / "python", "-m", "pip", "check")


@pytest.mark.parametrize("command", ["proxystash", "proxystash-server"])
def test_the_installed_commands_run(installed: Path, command: str, tmp_path: Path) -> None:
    assert "Usage" in checked(installed / command, "--help", cwd=tmp_path)


@pytest.mark.parametrize(
    "module", ["proxystash.v1.cache_service_pb2_grpc", "proxystash", "proxystash_server.cache"]
)
def test_the_installed_packages_import(installed: Path, module: str, tmp_path: Path) -> None:
    where = checked(installed / "python", "-c", f"import {module} as m; print(m.__file__)", cwd=tmp_path)

    assert Path(where.strip()).is_relative_to(installed.parent)


def test_reading_proxy_files_loads_no_grpc(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys, proxystash.files; print([name for name in sys.modules if name.split('.')[0] == 'grpc'])"
    )

    assert checked(installed / "python", "-c", code, cwd=tmp_path) == "[]\n"
