"""Response streams that hold no worker thread, and what sends on them.

grpcio's threaded server gives a handler with `experimental_non_blocking` a `send` function instead of a
thread. What must be observed with it, and where it is:

- One stream's `send` is never called by two threads: a stream is in the queue, or with one sender, or
  neither.
- `send` blocks without a limit when the client stops reading: only senders call it, and a watchdog cancels
  the call, which makes `send` return.
- Callbacks of a call's end run on the completion thread, which `send` waits for. They take the lock below, so
  the lock is held for memory operations only, never while sending.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import grpc
import structlog
from google.protobuf.message import Message

from proxystash_server.rpc.errors import Failure, RequestError

# What grpcio passes to a non-blocking handler: sends a message, or with None ends the stream.
Send = Callable[[Message | None], None]
BehaviorT = TypeVar("BehaviorT", bound=Callable[..., None])

_log = structlog.stdlib.get_logger(__name__)


def non_blocking(behavior: BehaviorT) -> BehaviorT:
    """Mark a handler of a stream: grpcio passes it `send` as third argument and keeps no thread for it."""
    behavior.experimental_non_blocking = True  # type: ignore[attr-defined]  # grpcio looks for it
    return behavior


class OutgoingStream:
    """One open response stream: its latest message not yet sent, and how it is to end.

    All of it is guarded by the lock of the StreamSender that opened it.
    """

    __slots__ = ("closed", "context", "ending", "given_up", "pending", "queued", "send", "sending_since")

    def __init__(self, context: grpc.ServicerContext, send: Send) -> None:
        self.context = context
        self.send = send
        self.pending: Message | None = None
        self.ending: Failure | None = None
        self.queued = False
        self.sending_since: float | None = None
        self.closed = False
        # The watchdog's own note: its call is cancelled, but `send` has not returned yet.
        self.given_up = False

    def has_work(self) -> bool:
        """Whether there is something to send."""
        return not self.closed and (self.pending is not None or self.ending is not None)


class StreamSender:
    """Sends the latest message of each stream, from a few threads.

    `patience` is how many seconds one send may take, by when a client has not read for that long although
    much is waiting for it; its call is then cancelled. While every thread is held by such a client and others
    wait, or when all streams are to end, it is `short_patience`. Thread-safe.
    """

    def __init__(
        self,
        *,
        threads: int = 4,
        patience: float = 60.0,
        short_patience: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._patience = patience
        self._short_patience = short_patience
        self._clock = clock
        self._senders = threads
        self._changed = threading.Condition()
        self._streams: set[OutgoingStream] = set()
        self._ready: deque[OutgoingStream] = deque()
        self._sending: set[OutgoingStream] = set()
        self._ending: Failure | None = None
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        targets = [("stream-watchdog", self._watch)]
        targets += [(f"stream-sender-{number}", self._send_ready) for number in range(self._senders)]
        for name, target in targets:
            thread = threading.Thread(target=target, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Stop the threads. All calls must be over: what is not sent by now never is."""
        with self._changed:
            self._stopping.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def open(self, stream: OutgoingStream, on_close: Callable[[], None]) -> bool:
        """Take over a stream; False if its client has gone already. Raises RequestError once all are to end.

        `on_close` is called once when the call is over, on the completion thread: memory operations only.
        """

        def close() -> None:
            with self._changed:
                stream.closed = True
                stream.pending = None
                self._streams.discard(stream)
            on_close()

        with self._changed:
            if self._ending is not None:
                raise RequestError(self._ending)
            self._streams.add(stream)
        if stream.context.add_callback(close):
            return True
        with self._changed:
            self._streams.discard(stream)
        return False

    def offer(self, stream: OutgoingStream, message: Message) -> None:
        """Send `message` as soon as what is being sent has gone, unless a later one is offered before."""
        with self._changed:
            if not stream.closed and stream.ending is None:
                stream.pending = message
                self._queue(stream)

    def end_all(self, failure: Failure) -> None:
        """End every stream with `failure`, after what it still has to send, and take no more of them."""
        with self._changed:
            self._ending = failure
            for stream in self._streams:
                if stream.ending is None:
                    stream.ending = failure
                    self._queue(stream)

    def _queue(self, stream: OutgoingStream) -> None:
        if not stream.queued and stream.sending_since is None:
            stream.queued = True
            self._ready.append(stream)
            self._changed.notify()

    def _send_ready(self) -> None:
        while (stream := self._take()) is not None:
            self._send_one(stream)

    def _take(self) -> OutgoingStream | None:
        """The next stream with something to send, from now on this thread's alone; None when stopping."""
        with self._changed:
            while not self._stopping.is_set():
                while self._ready:
                    stream = self._ready.popleft()
                    stream.queued = False
                    if stream.has_work():
                        stream.sending_since = self._clock()
                        self._sending.add(stream)
                        return stream
                self._changed.wait()
            return None

    def _send_one(self, stream: OutgoingStream) -> None:
        with self._changed:
            message, stream.pending = stream.pending, None
            ending = stream.ending
        ended = message is None
        try:
            if message is not None:
                stream.send(message)
            elif ending is not None:
                status = ending.to_status()
                stream.context.set_code(status.code)
                stream.context.set_details(status.details)
                stream.context.set_trailing_metadata(status.trailing_metadata)
                stream.send(None)
        except Exception:  # noqa: BLE001 - one stream must not take the sender of all down
            _log.exception("stream failed", peer=stream.context.peer())
            stream.context.cancel()
            ended = True
        with self._changed:
            stream.sending_since = None
            self._sending.discard(stream)
            if ended:
                stream.closed = True
            elif stream.has_work():
                self._queue(stream)

    def _watch(self) -> None:
        while not self._stopping.wait(self._short_patience / 2):
            for stream in self.overdue():
                stream.given_up = True
                _log.warning("stream cancelled: its client does not read", peer=stream.context.peer())
                stream.context.cancel()

    def overdue(self) -> list[OutgoingStream]:
        """The streams whose client has kept a sender waiting for longer than there is patience for."""
        now = self._clock()
        with self._changed:
            others_wait = bool(self._ready) and len(self._sending) == self._senders
            is_short = others_wait or self._ending is not None
            patience = self._short_patience if is_short else self._patience
            return [
                stream
                for stream in self._sending
                if not stream.given_up
                and stream.sending_since is not None
                and now - stream.sending_since > patience
            ]
