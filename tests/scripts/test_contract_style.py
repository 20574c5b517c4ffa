"""The contract passes buf's STANDARD rules and is formatted its way."""

import re
from pathlib import Path

import pytest

from tests.support.scripts import ROOT, run
from tests.support.tools import require_tool


@pytest.fixture(scope="module")
def buf() -> Path:
    return require_tool("buf")


def replace(checkout: Path, old: str, new: str) -> None:
    proto = checkout / "protos/proxystash/v1/cache_service.proto"
    text = proto.read_text()
    assert old in text
    proto.write_text(text.replace(old, new))


def test_the_contract_has_no_lint(buf: Path) -> None:
    result = run(buf, "lint", cwd=ROOT)

    assert result.returncode == 0, result.stdout + result.stderr


def test_lint_fails_on_a_name_outside_the_standard(buf: Path, checkout: Path) -> None:
    replace(checkout, "string proxy_url = ", "string proxyUrl = ")

    result = run(buf, "lint", cwd=checkout)

    assert result.returncode != 0
    assert "proxyUrl" in result.stdout


def test_the_contract_is_formatted(buf: Path) -> None:
    result = run(buf, "format", "--diff", "--exit-code", cwd=ROOT)

    assert result.returncode == 0, result.stdout + result.stderr


def test_the_format_check_fails_on_a_badly_indented_line(buf: Path, checkout: Path) -> None:
    replace(checkout, "  TIER_L1 = 1;", "      TIER_L1   = 1;")

    result = run(buf, "format", "--diff", "--exit-code", cwd=checkout)

    assert result.returncode != 0
    assert "TIER_L1" in result.stdout


LANGUAGES = (
    "csharp_namespace", "go_package", "java_multiple_files", "java_package", "objc_class_prefix",
    "php_namespace", "ruby_package", "swift_prefix",
)  # fmt: skip


@pytest.mark.parametrize("proto", sorted((ROOT / "protos").rglob("*.proto")), ids=lambda path: path.name)
def test_a_proto_says_where_its_code_goes_in_each_language(proto: Path) -> None:
    told = dict(re.findall(r'^option (\w+) = (?:"([^"]*)"|\w+);$', proto.read_text(), re.MULTILINE))
    assert tuple(sorted(told)) == LANGUAGES
    # All of a package go to one place.
    first = min(proto.parent.glob("*.proto"))
    assert [line for line in proto.read_text().splitlines() if line.startswith("option ")] == [
        line for line in first.read_text().splitlines() if line.startswith("option ")
    ]
