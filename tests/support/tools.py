"""The programs of other ecosystems that tests call, where scripts/tools/install put them."""

import os
from pathlib import Path
from typing import Literal

import pytest

from tests.support.scripts import ROOT


def require_tool(name: Literal["buf", "grpcurl"]) -> Path:
    """The program's path. Skips the test if it is not installed; with CI=true, fails it."""
    program = ROOT / ".tools" / "bin" / name
    if os.access(program, os.X_OK):
        return program
    reason = f"{name} is not installed: run scripts/tools/install {name}"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (CI=true does not skip)")
    pytest.skip(reason)
