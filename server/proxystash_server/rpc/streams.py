"""Response streams that hold no thread, whether their clients read or not.

grpcio's threaded server keeps no thread for a handler with `experimental_non_blocking`. What is sent on its
stream later is sent by `StreamCall`, which does not wait until the client reads. That it has is told on the
completion thread, as is the end of a call. Both take the lock below, so it is held for memory operations
only, never while anything is sent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Protocol, TypeVar

import grpc
import structlog
from google.protobuf.message import Message

from proxystash_server.rpc.errors import Failure, Reason, RequestError

BehaviorT = TypeVar("BehaviorT", bound=Callable[..., None])

_NOT_READ: Final = Failure(
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.STREAM_NOT_READ,
    "the stream was not read for too long; read faster, or ask for fewer messages",
)
_FAILED: Final = Failure(
    grpc.StatusCode.INTERNAL, Reason.INTERNAL, "a message could not be sent; the server's log has the cause"
)

_log = structlog.stdlib.get_logger(__name__)


def non_blocking(behavior: BehaviorT) -> BehaviorT:
    """Mark a handler of a stream: grpcio keeps no thread for it, and passes it one argument more."""
    behavior.experimental_non_blocking = True  # type: ignore[attr-defined]  # grpcio looks for it
    return behavior


class Outgoing(Protocol):
    """What is needed of a call. `StreamCall` is one, and says what the methods do."""

    def send(self, message: bytes, on_sent: Callable[[], None]) -> bool: ...
    def end(self, failure: Failure) -> None: ...
    def cancel(self, failure: Failure) -> None: ...
    def add_callback(self, callback: Callable[[], None]) -> bool: ...
    def peer(self) -> str: ...


class OutgoingStream:
    """One open response stream: its latest message not yet sent, and how it is to end.

    All of it is guarded by the lock of the StreamSender that opened it. `on_sent` is called when a message
    has gone, on the completion thread: memory operations only.
    """

    __slots__ = ("call", "closed", "ending", "given_up", "on_sent", "pending", "sending_since")

    def __init__(self, call: Outgoing, on_sent: Callable[[], None] | None = None) -> None:
        self.call = call
        self.on_sent = on_sent
        self.pending: Message | bytes | None = None
        self.ending: Failure | None = None
        self.sending_since: float | None = None
        self.closed = False
        # The watchdog's own note: its call is cancelled, but that has not come through yet.
        self.given_up = False


class StreamSender:
    """Sends the latest message of each stream, as soon as the one before it has gone. Thread-safe.

    `patience` is how many seconds a client may go without reading although much is waiting for it; then its
    call is cancelled. When all streams are to end, it is `short_patience`.
    """

    def __init__(
        self,
        *,
        patience: float = 60.0,
        short_patience: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._patience = patience
        self._short_patience = short_patience
        self._clock = clock
        self._lock = threading.Lock()
        self._streams: set[OutgoingStream] = set()
        self._ending: Failure | None = None
        self._stopping = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="stream-watchdog", daemon=True)

    def start(self) -> None:
        self._watchdog.start()

    def close(self) -> None:
        """Stop the watchdog."""
        self._stopping.set()
        if self._watchdog.is_alive():
            self._watchdog.join()

    def open(self, stream: OutgoingStream, on_close: Callable[[], None]) -> bool:
        """Take over a stream; False if its client has gone already. Raises RequestError once all are to end.

        `on_close` is called once when the call is over, on the completion thread: memory operations only.
        """

        def close() -> None:
            with self._lock:
                stream.closed = True
                stream.pending = None
                self._streams.discard(stream)
            on_close()

        with self._lock:
            if self._ending is not None:
                raise RequestError(self._ending)
            self._streams.add(stream)
        if stream.call.add_callback(close):
            return True
        with self._lock:
            self._streams.discard(stream)
        return False

    def offer(self, stream: OutgoingStream, message: Message | bytes) -> None:
        """Send `message` as soon as what is being sent has gone, unless a later one is offered before."""
        with self._lock:
            if stream.closed or stream.ending is not None:
                return
            stream.pending = message
        self._send_next(stream)

    def end(self, stream: OutgoingStream, failure: Failure) -> None:
        """End a stream with `failure`, after what it still has to send."""
        with self._lock:
            if stream.ending is not None:
                return
            stream.ending = failure
        self._send_next(stream)

    def end_all(self, failure: Failure) -> None:
        """End every stream with `failure`, after what it still has to send, and take no more of them."""
        with self._lock:
            self._ending = failure
            streams = list(self._streams)
        for stream in streams:
            self.end(stream, failure)

    def overdue(self) -> list[OutgoingStream]:
        """The streams whose client has not read for longer than there is patience for."""
        with self._lock:
            patience = self._patience if self._ending is None else self._short_patience
            latest = self._clock() - patience
            return [
                stream
                for stream in self._streams
                if stream.sending_since is not None and stream.sending_since < latest and not stream.given_up
            ]

    def _send_next(self, stream: OutgoingStream) -> None:
        """Send what waits, or end the stream; while something is on its way, that has to wait for it."""
        with self._lock:
            message, ending = stream.pending, stream.ending
            if stream.closed or stream.sending_since is not None or (message is None and ending is None):
                return
            stream.pending = None
            if message is None:
                stream.closed = True
            else:
                stream.sending_since = self._clock()
        try:
            if message is not None:
                serialized = message if isinstance(message, bytes) else message.SerializeToString()
                stream.call.send(serialized, lambda: self._sent(stream))
            elif ending is not None:
                stream.call.end(ending)
        except Exception:  # noqa: BLE001 - one stream must not keep the others from being sent on
            _log.exception("stream failed", peer=stream.call.peer())
            stream.call.cancel(_FAILED)

    def _sent(self, stream: OutgoingStream) -> None:
        with self._lock:
            stream.sending_since = None
        self._send_next(stream)
        if stream.on_sent is not None:
            stream.on_sent()

    def _watch(self) -> None:
        while not self._stopping.wait(self._short_patience / 2):
            for stream in self.overdue():
                stream.given_up = True
                _log.warning("stream cancelled: its client does not read", peer=stream.call.peer())
                stream.call.cancel(self._ending or _NOT_READ)
