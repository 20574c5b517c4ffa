"""A disk tier's store that nobody has open, looked through as it is on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from proxystash_server.cache.check_report import Progress, Report, TierTotals
from proxystash_server.cache.config import CacheTierType
from proxystash_server.cache.credentials import CredentialEncryptor
from proxystash_server.cache.entry import CacheEntry

RESTORE = "restore it from a backup, or move it away"
REPAIR = "--repair sets it aside"


class StoppedStore(ABC):
    """One store on disk. Nothing here changes a file, nor the time of one.

    `open` first; `backlog` and `totals` are complete when `entries` has ended. Not thread-safe.
    """

    def __init__(self, tier: CacheTierType, backend: str, path: Path) -> None:
        self.tier = tier
        self.path = path
        self.totals = TierTotals(tier=str(tier), backend=backend, path=str(path))
        self.store_id = ""
        self.partner_id = ""
        self.key_check: bytes | None = None
        self.last_version = 0
        # What the other tier has missed, as this one remembers it.
        self.backlog: dict[str, int] = {}

    @abstractmethod
    def is_there(self) -> bool:
        """Whether anything of the store exists."""

    @abstractmethod
    def open(self, report: Report) -> bool:
        """Read what the store says it is; whether it is one that can be looked through."""

    @abstractmethod
    def entries(
        self, encryptor: CredentialEncryptor, report: Report, progress: Progress
    ) -> Iterator[CacheEntry]:
        """Every sound entry, expired or not; what is not sound, or not as it should be, is reported."""

    @abstractmethod
    def lookup(self, keys: Sequence[str], encryptor: CredentialEncryptor) -> dict[str, CacheEntry | None]:
        """The entries of those of `keys` that the store holds, None for one that cannot be read."""

    @abstractmethod
    def has_set_aside(self, key: str) -> bool:
        """Whether an entry of `key` was set aside in this store."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files."""
