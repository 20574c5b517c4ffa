from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.proxywhirl_import.support import Target


@pytest.fixture
def target(tmp_path: Path) -> Target:
    """A data directory that does not exist yet."""
    return Target(tmp_path / "data")
