"""TTLManager: the background cleaner of expired entries."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from proxystash_server.cache.errors import CacheClosedError

if TYPE_CHECKING:
    from proxystash_server.cache.manager import CacheManager

logger = logging.getLogger(__name__)


class TTLManager:
    """Removes expired entries every `cleanup_interval` seconds, in a thread between `start` and `stop`.

    Gets never return an expired entry whether it runs or not; it only gives the room back.
    """

    def __init__(self, cache_manager: CacheManager, cleanup_interval: float = 60) -> None:
        self.cache_manager = cache_manager
        self.cleanup_interval = cleanup_interval
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def enabled(self) -> bool:
        """Whether the cleaner is running."""
        return self._thread is not None

    def start(self) -> None:
        """Start cleaning; does nothing while it runs already."""
        if self._thread is None:
            self._stopping.clear()
            self._thread = threading.Thread(target=self._run, name="proxystash-ttl", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop cleaning and wait for the batch under way."""
        if self._thread is not None:
            self._stopping.set()
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while not self._stopping.wait(self.cleanup_interval):
            try:
                self.cache_manager.cleanup_expired()
            except CacheClosedError:
                return
            except Exception:
                # The cleaner must outlive one bad round; the tiers' own failures are handled below it.
                logger.exception("cleaning up expired entries failed")
