"""The committed stubs are what the contract generates."""

from pathlib import Path

import pytest

from tests.support.scripts import ROOT, run

PROTO = "protos/proxystash/v1/cache_service.proto"
STUBS = "clients/python/proxystash/v1"


@pytest.fixture(scope="module", autouse=True)
def _generator() -> None:
    """Make .venv-generate, which the copies share, if no one has yet."""
    assert run(ROOT / "scripts/generate", "--check").returncode in (0, 1)


def stubs(checkout: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (checkout / STUBS).glob("*_pb2*")}


def test_the_committed_stubs_match_the_contract() -> None:
    result = run(ROOT / "scripts/generate", "--check")

    assert result.returncode == 0, result.stdout + result.stderr


def test_the_check_fails_and_shows_the_difference_when_the_contract_changed(checkout: Path) -> None:
    proto = checkout / PROTO
    proto.write_text(
        proto.read_text().replace("message GetRequest {", "message GetRequest {\n  string extra = 99;")
    )
    before = stubs(checkout)

    result = run(checkout / "scripts/generate", "--check")

    assert result.returncode == 1
    assert "+    extra: " in result.stdout
    assert "run scripts/generate" in result.stderr
    assert stubs(checkout) == before


@pytest.mark.parametrize("name", ["cache_service_pb2.py", "cache_service_pb2_grpc.pyi"])
def test_the_check_fails_when_a_stub_is_missing(checkout: Path, name: str) -> None:
    (checkout / STUBS / name).unlink()

    result = run(checkout / "scripts/generate", "--check")

    assert result.returncode == 1
    assert name in result.stdout


def test_generating_repairs_edited_missing_and_stale_stubs(checkout: Path) -> None:
    expected = stubs(checkout)
    package = checkout / STUBS
    (package / "cache_service_pb2.pyi").write_text("edited = True\n")
    (package / "cache_service_pb2_grpc.py").unlink()
    (package / "removed_service_pb2.py").write_text("stale = True\n")

    result = run(checkout / "scripts/generate")

    assert result.returncode == 0, result.stderr
    assert stubs(checkout) == expected
    assert (package / "__init__.py").exists()
