"""Faults under the disk tiers of a cache in this process, and under the journal of what L3 has missed."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal
from unittest import mock

from proxystash_server.cache import CacheTierType, DiskTier, JsonlCacheTier, SQLiteCacheTier
from proxystash_server.cache.coherence.missed import MissedChanges
from proxystash_server.cache.errors import TierError
from proxystash_server.cache.tiers.jsonl.log import LogFile

OneFault = Literal["before", "after"]
Fault = OneFault | Literal["down"]
# What can fail: a disk tier, or the journal.
Part = CacheTierType | Literal["journal"]
JOURNAL: Final = "journal"

_OPERATIONS: Final = (
    "get", "__contains__", "expired_keys", "scan", "keys", "versions", "apply", "commit", "note_uses",
    "clear", "clear_before", "trim", "note", "seal", "break_seal", "probe", "open", "maintain",
)  # fmt: skip


class Faults:
    """What is wrong with which part: everything, until it is healed, or the next operation alone.

    `before` fails an operation that then did not happen, `after` one that did. Of the journal's, that is a
    line which is in the file although writing it failed. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._down: set[Part] = set()
        self._once: dict[Part, OneFault] = {}
        self._suspended = False
        self.injected = 0
        # Grows when anything changes, so that an operation can tell that a fault came and went under it.
        self.epoch = 0

    @property
    def any(self) -> bool:
        """Whether an operation could fail now."""
        return bool(self._down or self._once)

    def may_strike(self, *parts: Part) -> bool:
        """Whether an operation of one of these parts could fail now."""
        return any(part in self._down or part in self._once for part in parts)

    def is_down(self, *parts: Part) -> bool:
        """Whether every operation of all these parts fails now."""
        return self._down.issuperset(parts)

    def take_down(self, *parts: Part) -> None:
        """Fail every operation of these parts from now on."""
        with self._lock:
            self._down.update(parts)
            self.epoch += 1

    def fail_once(self, part: Part, how: OneFault) -> None:
        """Fail the next operation of a part."""
        with self._lock:
            self._once[part] = how
            self.epoch += 1

    def heal(self, *parts: Part) -> None:
        """Let these parts work again; all of them if none is named."""
        with self._lock:
            for part in parts or {*self._down, *self._once}:
                self._down.discard(part)
                self._once.pop(part, None)
            self.epoch += 1

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Leave alone what happens inside."""
        self._suspended = True
        try:
            yield
        finally:
            self._suspended = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put these faults under every manager that is made inside."""
        cache = "proxystash_server.cache"
        with (
            mock.patch(f"{cache}.setup.JsonlCacheTier", self._faulty_tier(JsonlCacheTier)),
            mock.patch(f"{cache}.setup.SQLiteCacheTier", self._faulty_tier(SQLiteCacheTier)),
            mock.patch(f"{cache}.manager.MissedChanges", self._faulty_journal()),
            mock.patch(f"{cache}.coherence.missed.LogFile", self._faulty_log()),
        ):
            yield

    def _strike(self, part: Part, *, only_if_down: bool = False) -> OneFault | None:
        with self._lock:
            if self._suspended:
                return None
            how: OneFault | None = "before" if part in self._down else None
            if how is None and not only_if_down:
                how = self._once.pop(part, None)
            if how is not None:
                self.injected += 1
                self.epoch += 1
            return how

    def _failing(
        self, method: Callable[..., Any], part_of: Callable[[Any], Part], error: Callable[[str], Exception]
    ) -> Callable[..., Any]:
        def operation(self_: Any, *args: Any, **kwargs: Any) -> Any:
            how = self._strike(part_of(self_))
            result = None if how == "before" else method(self_, *args, **kwargs)
            if how is not None:
                raise error(f"{method.__name__}: a fault made by the test")
            return result

        return operation

    def _faulty_tier(self, intact: type[DiskTier]) -> type[DiskTier]:
        operations = {
            name: self._failing(getattr(intact, name), lambda tier: tier.tier_type, TierError)
            for name in _OPERATIONS
            if hasattr(intact, name)
        }
        return type(f"Faulty{intact.__name__}", (intact,), operations)

    def _faulty_journal(self) -> type[MissedChanges]:
        finish = self._failing(MissedChanges.finish, lambda _journal: JOURNAL, TierError)
        return type("FaultyMissedChanges", (MissedChanges,), {"finish": finish})

    def _faulty_log(self) -> type[LogFile]:
        """The journal's file. What cuts it off after a fault fails only if everything does."""
        faults = self

        class FaultyLogFile(LogFile):
            __slots__ = ()

            def __init__(self, path: Path, *args: Any, **options: Any) -> None:
                self._descriptor = -1
                if faults._strike(JOURNAL) is not None:
                    raise _error("open")
                super().__init__(path, *args, **options)

            def truncate(self, size: int) -> None:
                if faults._strike(JOURNAL, only_if_down=True) is not None:
                    raise _error("truncate")
                super().truncate(size)

        for name in ("read", "lines", "write"):
            operation = self._failing(getattr(LogFile, name), lambda _log: JOURNAL, _error)
            setattr(FaultyLogFile, name, operation)
        return FaultyLogFile


def _error(what: str) -> OSError:
    return OSError(errno.EIO, what)
