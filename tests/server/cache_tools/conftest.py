"""A data directory that a cache has worked in, stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from proxystash_server.cache import L2BackendType
from tests.server.cache.support import scratch_directory
from tests.server.cache_tools.stopped import StoppedCache


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A new directory, in memory where that is possible."""
    with TemporaryDirectory(prefix="proxystash-test-", dir=scratch_directory()) as directory:
        yield Path(directory)


@pytest.fixture(params=list(L2BackendType), ids=str)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    """What L2 is made of: every test runs on both, unless its module overrides this."""
    backend: L2BackendType = request.param
    return backend


@pytest.fixture
def cache(tmp_path: Path, l2_backend: L2BackendType) -> StoppedCache:
    """An empty data directory."""
    return StoppedCache(tmp_path / "data", l2_backend)
