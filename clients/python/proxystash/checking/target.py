"""Whether the site that proxies are tried against works itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from proxystash.checking.probe import Probe
from proxystash.pool_models import Outcome

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0


class Target:
    """Asks the site directly when somebody doubts it, once for all who doubt it at a time.

    `is_up` is cleared when it fails, and set when it works again. For one event loop.
    """

    def __init__(self, direct: Callable[[], Awaitable[Probe]], on_change: Callable[[str], None]) -> None:
        self.is_up = asyncio.Event()
        self.reason = ""
        self._direct, self._on_change = direct, on_change
        self._asking = asyncio.Lock()
        self._asked_at = float("-inf")
        self._was_up: bool | None = None

    async def works_since(self, moment: float) -> bool:
        """Whether a direct request that began later than a moment (`time.monotonic`) has been answered."""
        async with self._asking:
            if self._asked_at <= moment:
                await self._ask()
            return self.is_up.is_set()

    async def wait(self) -> None:
        """Return once it works."""
        pause = _FIRST_PAUSE
        while not self.is_up.is_set():
            if await self.works_since(time.monotonic()):
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _ask(self) -> None:
        self._asked_at = time.monotonic()
        probe = await self._direct()
        up = probe.outcome is Outcome.SUCCESS
        self.reason = probe.reason
        if up:
            self.is_up.set()
        else:
            self.is_up.clear()
        if self._was_up is not up and not (self._was_up is None and up):
            self._on_change("" if up else probe.reason)
        self._was_up = up
