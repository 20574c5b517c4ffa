"""A data directory with a cache on it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from proxystash_server.cache import CacheConfig, CacheManager, L2BackendType
from tests.server.cache.invariants import check_files, check_invariants
from tests.server.cache.support import FakeClock, FakeMonotonic


class Stash:
    """A data directory, and the managers that run on it one after another."""

    def __init__(
        self, directory: Path, l2_backend: L2BackendType, clock: FakeClock, monotonic: FakeMonotonic
    ) -> None:
        self.directory = directory
        self.clock = clock
        self.monotonic = monotonic
        # Switched off by tests that do damage on purpose.
        self.validated = True
        self._l2_backend = l2_backend
        self._managers: list[CacheManager] = []

    def config(self, **fields: Any) -> CacheConfig:
        return CacheConfig.model_validate(
            {
                "l2_backend": self._l2_backend,
                "l2_cache_dir": self.directory / "l2",
                "l3_database_path": self.directory / "l3" / "proxystash.db",
                "encryption_key_file": self.directory / "secret.key",
                **fields,
            }
        )

    def open(self, **fields: Any) -> CacheManager:
        """A manager in which nothing happens by itself."""
        return self.open_of(self.config(**fields))

    def open_of(self, config: CacheConfig) -> CacheManager:
        """The same, of a configuration as it is."""
        manager = CacheManager(config, clock=self.clock, monotonic=self.monotonic, background=False)
        self._managers.append(manager)
        return manager

    def reopen(self, **fields: Any) -> CacheManager:
        """The next run after an orderly end of this one."""
        self.close()
        return self.open(**fields)

    def kill(self) -> None:
        """Go on in a copy of the files as they are at this moment, which is all that an abrupt end leaves."""
        killed = self.directory
        self.directory = killed.with_name(killed.name + "-after-kill")
        if killed.exists():
            shutil.copytree(killed, self.directory)

    def reopen_after_kill(self, **fields: Any) -> CacheManager:
        """The next run after an abrupt end of this one."""
        self.kill()
        return self.open(**fields)

    def close(self) -> None:
        for manager in self._managers:
            manager.close()
        self._managers.clear()

    def recover(self, manager: CacheManager) -> None:
        """Let as much time pass as any pause between probes can last, and the background work run."""
        self.monotonic.advance(61)
        manager.maintain()

    def check(self) -> None:
        """Assert the invariants of the last run, end it, and assert those of its files."""
        if self.validated and self._managers and not self._managers[-1]._closed:
            check_invariants(self._managers[-1])
        self.close()
        if self.validated and self.directory.exists():
            check_files(self.directory)
