"""Faults under the disk tiers of a cache in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal
from unittest import mock

from proxystash_server.cache import CacheTierType, DurableTier, JsonlCacheTier, SQLiteCacheTier
from proxystash_server.cache.errors import TierError

OneFault = Literal["before", "after"]

_OPERATIONS: Final = (
    "get", "__contains__", "expired_keys", "page", "keys", "versions", "apply", "touch", "clear",
    "clear_before", "trim", "extend_backlog", "settle", "backlog", "set_partner", "probe", "open", "maintain",
)  # fmt: skip


class Faults:
    """What is wrong with which tier: everything, until it is healed, or the next operation alone.

    `before` fails an operation that then did not happen, `after` one that did. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._down: set[CacheTierType] = set()
        self._once: dict[CacheTierType, OneFault] = {}
        self._suspended = False
        self.injected = 0
        # Grows when anything changes, so that an operation can tell that a fault came and went under it.
        self.epoch = 0

    @property
    def any(self) -> bool:
        """Whether an operation could fail now."""
        return bool(self._down or self._once)

    def take_down(self, tier: CacheTierType) -> None:
        """Fail every operation of a tier from now on."""
        with self._lock:
            self._down.add(tier)
            self.epoch += 1

    def fail_once(self, tier: CacheTierType, how: OneFault) -> None:
        """Fail the next operation of a tier."""
        with self._lock:
            self._once[tier] = how
            self.epoch += 1

    def heal(self) -> None:
        """Let everything work again."""
        with self._lock:
            self._down.clear()
            self._once.clear()
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
        setup = "proxystash_server.cache.setup"
        with (
            mock.patch(f"{setup}.JsonlCacheTier", self._faulty(JsonlCacheTier)),
            mock.patch(f"{setup}.SQLiteCacheTier", self._faulty(SQLiteCacheTier)),
        ):
            yield

    def _strike(self, tier: CacheTierType) -> OneFault | None:
        with self._lock:
            if self._suspended:
                return None
            how = "before" if tier in self._down else self._once.pop(tier, None)
            if how is not None:
                self.injected += 1
                self.epoch += 1
            return how

    def _faulty(self, intact: type[DurableTier]) -> type[DurableTier]:
        def wrap(name: str) -> Callable[..., Any]:
            method = getattr(intact, name)

            def operation(tier: DurableTier, *args: Any, **kwargs: Any) -> Any:
                how = self._strike(tier.tier_type)
                result = None if how == "before" else method(tier, *args, **kwargs)
                if how is not None:
                    raise TierError(f"{name}: a fault made by the test")
                return result

            return operation

        return type(f"Faulty{intact.__name__}", (intact,), {name: wrap(name) for name in _OPERATIONS})
