"""A cache whose files are about to suffer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from proxystash_server.cache import L2BackendType
from tests.server.cache.stash import Stash
from tests.server.cache.support import FakeClock, FakeMonotonic
from tests.server.faults.machine import Mounts

_IN_MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory in memory where there is such a thing."""
    parent = _IN_MEMORY if os.access(_IN_MEMORY, os.W_OK) else None
    with TemporaryDirectory(prefix="proxystash-test-", dir=parent) as directory:
        yield Path(directory)


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    with Mounts() as mounts:
        yield mounts


@pytest.fixture
def l2_backend() -> L2BackendType:
    """What L2 is made of; a test that is to run on both overrides this."""
    return L2BackendType.JSONL


@pytest.fixture
def stash(tmp_path: Path, mounts: Mounts, l2_backend: L2BackendType) -> Iterator[Stash]:
    """A new data directory; afterwards the tiers must agree and the files be whole."""
    stash = Stash(tmp_path / "data", l2_backend, FakeClock(), FakeMonotonic())
    try:
        yield stash
        stash.check()
    finally:
        stash.close()
