"""What the package offers, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import proxystash


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after running some code."""
    command = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("module", ["", ".models", ".proxies", ".files", ".errors"])
def test_the_pure_modules_load_without_grpc(module: str) -> None:
    loaded = modules_after(f"import proxystash{module}")

    assert not {"grpc", "google.protobuf", "rich", "typer"} & loaded


def test_help_is_shown_without_loading_grpc() -> None:
    loaded = modules_after(
        "import contextlib, io, sys\n"
        "from proxystash.cli import main\n"
        "sys.argv = ['proxystash', '--help']\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main()"
    )

    assert "grpc" not in loaded


@pytest.mark.parametrize("name", proxystash.__all__)
def test_every_name_that_is_offered_is_there(name: str) -> None:
    assert getattr(proxystash, name).__name__ == name if name != "SCHEMES" else proxystash.SCHEMES
    assert name in dir(proxystash)


def test_a_name_that_is_not_offered_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Server'"):
        proxystash.Server  # noqa: B018


def test_both_clients_have_the_same_methods() -> None:
    def methods(cls: type) -> set[str]:
        return {name for name in vars(cls) if not name.startswith("_")}

    assert methods(proxystash.Client) == methods(proxystash.AsyncClient)
