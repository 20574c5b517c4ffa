"""A cache on a new data directory, and clocks that only a test moves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from proxystash_server.cache import L2BackendType
from tests.server.cache.stash import Stash
from tests.server.cache.support import FakeClock, FakeMonotonic, scratch_directory


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A new directory, in memory where that is possible."""
    with TemporaryDirectory(prefix="proxystash-test-", dir=scratch_directory()) as directory:
        yield Path(directory)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def monotonic() -> FakeMonotonic:
    return FakeMonotonic()


@pytest.fixture
def l2_backend() -> L2BackendType:
    """What L2 is made of; a module whose tests are to run on both overrides this with parameters."""
    return L2BackendType.JSONL


@pytest.fixture
def stash(
    tmp_path: Path, l2_backend: L2BackendType, clock: FakeClock, monotonic: FakeMonotonic
) -> Iterator[Stash]:
    """A new data directory; afterwards, whatever the test did, the invariants must hold."""
    stash = Stash(tmp_path / "data", l2_backend, clock, monotonic)
    try:
        yield stash
        stash.check()
    finally:
        stash.close()
