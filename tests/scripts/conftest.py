"""A checkout that a test may break."""

import shutil
from pathlib import Path

import pytest

from tests.support.scripts import ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the scripts work on, with the generator's environment of the real one."""
    copy = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in (".ci", "scripts", "protos", "requirements", "clients/python/proxystash/v1"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    shutil.copy(ROOT / "buf.yaml", copy)
    (copy / ".venv-generate").symlink_to(ROOT / ".venv-generate")
    return copy
