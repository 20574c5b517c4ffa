"""The threads that handlers run in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final

import structlog

_log = structlog.stdlib.get_logger(__name__)

_TOKEN: Final = object()

Callback = Callable[["WorkItem"], None]


class WorkItem:
    """One function that was submitted; of a future it has what grpcio's server asks for."""

    __slots__ = ("_arguments", "_callback", "_function", "_token")

    def __init__(self, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
        self._function = function
        self._arguments = arguments
        self._callback: Callback | None = None
        self._token = [_TOKEN]

    def add_done_callback(self, callback: Callback) -> None:
        """Call `callback` once the function has returned; to be called once, by the one who submitted it."""
        self._callback = callback
        self._meet()

    def run(self) -> None:
        """Call the function; what it raises goes to the log."""
        try:
            self._function(*self._arguments)
        except BaseException:  # noqa: BLE001 -- a worker outlives what it runs
            _log.exception("work failed")
        finally:
            self._meet()

    def _meet(self) -> None:
        # Taking the only token is atomic: of the two who come here, the second finds none, and calls back.
        try:
            self._token.pop()
        except IndexError:
            if self._callback is not None:
                self._callback(self)


class WorkerPool:
    """A fixed number of threads that run what is submitted, in order.

    What grpcio's server needs of `concurrent.futures.ThreadPoolExecutor`, at a third of its cost for each
    call: no future that can be cancelled or waited for, no count of idle threads. The threads end with the
    process, or with `close`.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._queue: SimpleQueue[WorkItem | None] = SimpleQueue()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}_{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], /, *arguments: object) -> WorkItem:
        """Have a thread call `function`; after `close`, none does."""
        item = WorkItem(function, arguments)
        self._queue.put(item)
        return item

    def close(self) -> None:
        """Let the threads go, after what they are at; what has not begun never will. Does not wait."""
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)

    def _run(self) -> None:
        take = self._queue.get
        while (item := take()) is not None:
            if not self._closed:
                item.run()
            # Nothing of a call is kept while this thread waits for the next.
            del item
