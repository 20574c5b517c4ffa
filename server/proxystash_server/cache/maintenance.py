"""The manager's own background thread."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING

from proxystash_server.cache.errors import CacheClosedError

if TYPE_CHECKING:
    from proxystash_server.cache.manager import CacheManager

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 1.0


class Maintenance:
    """Calls the manager's `maintain` once a second.

    And ends by itself when the manager has been garbage collected.
    """

    def __init__(self, manager: CacheManager) -> None:
        self._manager = weakref.ref(manager)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxystash-maintenance", daemon=True)

    def start(self) -> None:
        """Start the thread; only once."""
        self._thread.start()

    def stop(self) -> None:
        """Stop, and wait for the round under way."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL_SECONDS):
            manager = self._manager()
            if manager is None:
                return
            try:
                manager.maintain()
            except CacheClosedError:
                return
            except Exception:
                # The next round may do better; the tiers' own failures are handled below it.
                logger.exception("maintenance failed")
            del manager
