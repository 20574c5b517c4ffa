"""The threads that handlers run in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import structlog

Work = Callable[[], object]

_log = structlog.stdlib.get_logger(__name__)


class WorkerPool:
    """A fixed number of threads that do what is put before them, in order.

    At a third of what `concurrent.futures.ThreadPoolExecutor` costs for each call: no future that can be
    cancelled or waited for, no count of idle threads. The threads end with the process, or with `close`.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}_{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued(self) -> int:
        """How much no thread has begun with."""
        return self._queue.qsize()

    def put(self, work: Work) -> None:
        """Have a thread call `work`; after `close`, none does. What it raises goes to the log."""
        self._queue.put(work)

    def close(self) -> None:
        """Let the threads go, after what they are at; what has not begun never will. Does not wait."""
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)

    def _run(self) -> None:
        take = self._queue.get
        while (work := take()) is not None:
            if not self._closed:
                try:
                    work()
                except BaseException:  # noqa: BLE001 -- a worker outlives what it runs
                    _log.exception("work failed")
            # Nothing of a call is kept while this thread waits for the next.
            del work
