"""Watch: who watches, and when each is sent what is new."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final
from weakref import WeakValueDictionary

import grpc
import structlog

from proxystash_server.cache import Change
from proxystash_server.rpc.engine import Engine
from proxystash_server.rpc.errors import (
    Failure,
    Reason,
    RequestError,
    failure_of,
    internal_failure,
    new_request_id,
)
from proxystash_server.rpc.streams import Outgoing, OutgoingStream, StreamSender
from proxystash_server.rpc.watch.cursor import Cursor, View
from proxystash_server.rpc.watch.history import Compacted, History
from proxystash_server.rpc.watch.request import Watch

# Under load, watches are told together, in rounds: with a pause, in seconds, for each response that was sent
# in the one before, since one costs as much as half a put however little is in it, but not too long a pause.
_PAUSE_PER_RESPONSE: Final = 1 / 200
_SHORTEST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 1.0

_log = structlog.stdlib.get_logger(__name__)


class _Watcher:
    """One watch. `progress_due` is when it has to hear something."""

    __slots__ = ("cursor", "interval", "is_busy", "progress_due", "stream")

    def __init__(self, call: Outgoing, cursor: Cursor, interval: float, on_sent: Callable[[], None]) -> None:
        self.stream = OutgoingStream(call, self._sent(on_sent))
        self.cursor = cursor
        self.interval = interval
        # At once: the first response says where the watch begins.
        self.progress_due = -math.inf
        # Something is on its way, or it ends.
        self.is_busy = False

    def _sent(self, on_sent: Callable[[], None]) -> Callable[[], None]:
        def sent() -> None:
            self.is_busy = False
            on_sent()

        return sent


class WatchHub:
    """Sends each watcher every change that it selects, in order, as fast as its client reads.

    All share one history of `history_size` changes, kept from the first watch on. A watcher that falls behind
    it, or for whom it begins anew, is ended with REVISION_COMPACTED. One thread makes all responses, each
    when the one before has gone. `clock` is monotonic, in seconds. Thread-safe: the lock guards the set of
    watchers, and is held for memory operations only.
    """

    def __init__(
        self,
        engine: Engine,
        sender: StreamSender,
        *,
        max_watchers: int,
        history_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._sender = sender
        self._max_watchers = max_watchers
        self._clock = clock
        self._history = History(history_size)
        # Held while the history begins, for which changes are kept out: the lock below is not held meanwhile.
        self._beginning = threading.Lock()
        self._listens = False
        self._lock = threading.Lock()
        self._watchers: set[_Watcher] = set()
        self._views: WeakValueDictionary[tuple[object, ...], View] = WeakValueDictionary()
        self._news = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch-hub", daemon=True)

    @property
    def watchers(self) -> int:
        """Watch calls open now."""
        return len(self._watchers)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Send no more changes. The streams stay open until the sender ends them."""
        self._closing.set()
        self._news.set()

    def close(self) -> None:
        """Let the thread go, and hear of no more changes."""
        self.stop()
        if self._thread.is_alive():
            self._thread.join()
        with self._beginning:
            if self._listens:
                self._engine.unsubscribe(self._listen)
                self._listens = False

    def watch(self, watch: Watch, call: Outgoing) -> None:
        """Open a stream of changes.

        Raises RequestError when there are too many, when it cannot be resumed, or when all are to end.
        """
        self._begin()
        try:
            cursor = Cursor(
                self._engine,
                self._history,
                self._view_of(watch),
                include_existing=watch.include_existing,
                resume_after=watch.resume_after,
            )
        except Compacted as error:
            raise RequestError(_compacted(error, "they are older, or of another run of the server")) from None
        watcher = _Watcher(call, cursor, watch.progress_interval, self._news.set)
        with self._lock:
            if len(self._watchers) >= self._max_watchers:
                raise RequestError(self._full())
            self._watchers.add(watcher)
        try:
            is_open = self._sender.open(watcher.stream, on_close=lambda: self._remove(watcher))
        except BaseException:
            self._remove(watcher)
            raise
        if not is_open:
            self._remove(watcher)
        self._news.set()

    def _begin(self) -> None:
        with self._beginning:
            if not self._listens:
                self._history.begin_after(self._engine.subscribe(self._listen))
                self._listens = True

    def _listen(self, changes: Sequence[Change]) -> None:
        self._history.tell(changes)
        if not self._news.is_set():
            self._news.set()

    def _view_of(self, watch: Watch) -> View:
        with self._lock:
            view = self._views.get(watch.selection.identity)
            if view is None:
                view = self._views[watch.selection.identity] = View(self._history, watch.selection)
            return view

    def send_due(self) -> int:
        """Send every watcher that waits the next of what it has not been told; how many were sent one."""
        with self._lock:
            waiting = [watcher for watcher in self._watchers if not watcher.is_busy]
        now = self._clock()
        return sum(
            self._send_next(watcher, now)
            for watcher in waiting
            if watcher.progress_due <= now or watcher.cursor.is_behind
        )

    def _send_next(self, watcher: _Watcher, now: float) -> bool:
        cursor = watcher.cursor
        try:
            response = cursor.next_response()
        except Compacted as error:
            return self._end(watcher, _compacted(error, "this watch was read too slowly for them"))
        except Exception as error:  # noqa: BLE001 - one watch must not keep the others from being told
            failure = failure_of(error)
            if failure is None:
                failure = internal_failure(new_request_id())
                _log.error("watch failed unexpectedly", request_id=failure.request_id, exc_info=error)
            return self._end(watcher, failure)
        if response is None and watcher.progress_due <= now:
            response = cursor.progress()
        if response is None:
            if cursor.is_behind:
                # Of those that were looked at, none matched.
                self._news.set()
            return False
        watcher.progress_due = now + watcher.interval
        watcher.is_busy = True
        self._sender.offer(watcher.stream, response)
        return True

    def _end(self, watcher: _Watcher, failure: Failure) -> bool:
        watcher.is_busy = True
        self._sender.end(watcher.stream, failure)
        return True

    def _run(self) -> None:
        while not self._closing.is_set():
            self._news.wait(self._until_progress())
            self._news.clear()
            sent = self.send_due()
            self._closing.wait(min(max(_SHORTEST_PAUSE, sent * _PAUSE_PER_RESPONSE), _LONGEST_PAUSE))

    def _until_progress(self) -> float | None:
        """Seconds until a watcher has to hear something; None if none waits for that."""
        with self._lock:
            due = min(
                (watcher.progress_due for watcher in self._watchers if not watcher.is_busy), default=math.inf
            )
        return None if math.isinf(due) and due > 0 else max(0.0, due - self._clock())

    def _remove(self, watcher: _Watcher) -> None:
        with self._lock:
            self._watchers.discard(watcher)

    def _full(self) -> Failure:
        return Failure(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            Reason.TOO_MANY_SUBSCRIBERS,
            f"{self._max_watchers} watches are open, which is the limit",
        )


def _compacted(error: Compacted, why: str) -> Failure:
    extent = error.extent
    return Failure(
        grpc.StatusCode.OUT_OF_RANGE,
        Reason.REVISION_COMPACTED,
        f"the next changes are not kept any more: {why}; forget what is known, and begin anew",
        metadata=(
            ("history", extent.history),
            ("oldest_revision", str(extent.oldest)),
            ("revision", str(extent.latest)),
        ),
    )
