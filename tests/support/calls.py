"""The server's end of a stream without a network: a test decides when the client reads and when it leaves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from google.protobuf.message import Message

from proxystash_server.rpc.errors import Failure
from tests.support.rpc import DEADLINE

MessageT = TypeVar("MessageT", bound=Message)


class FakeCall(Generic[MessageT]):
    """An outgoing call. While its client is not reading, what is sent does not go."""

    def __init__(self, kind: type[MessageT], *, reading: bool = True) -> None:
        self.sent: list[MessageT] = []
        self.ended: Failure | None = None
        self.cancelled: Failure | None = None
        self._kind = kind
        self._changed = threading.Condition()
        self._reading = reading
        self._on_sent: Callable[[], None] | None = None
        self._callbacks: list[Callable[[], None]] | None = []

    @property
    def is_sending(self) -> bool:
        return self._on_sent is not None

    def read_on(self) -> None:
        """Let the client read what is being sent, and all that comes."""
        self._reading = True
        on_sent, self._on_sent = self._on_sent, None
        if on_sent is not None:
            on_sent()

    def leave(self) -> None:
        """The client's end of the call: what grpcio would call back on its completion thread."""
        self._reading = True
        callbacks, self._callbacks = self._callbacks, None
        for callback in callbacks or ():
            callback()

    def wait_until_sent(self, count: int) -> list[MessageT]:
        """The messages, once there are so many: a thread other than the test's may send them."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.sent) >= count, DEADLINE), self.sent
            return list(self.sent)

    # what the code under test calls

    def send(self, message: bytes, on_sent: Callable[[], None]) -> bool:
        assert self._on_sent is None, "a message is sent while another is on its way"
        assert self.ended is None, "a message is sent after the end"
        if self._callbacks is None:
            return False
        with self._changed:
            self.sent.append(self._kind.FromString(message))
            self._changed.notify_all()
        self._on_sent = on_sent
        if self._reading:
            self.read_on()
        return True

    def end(self, failure: Failure) -> None:
        assert self._on_sent is None, "the end is sent while a message is on its way"
        self.ended = failure

    def cancel(self, failure: Failure) -> None:
        self.cancelled = failure

    def add_callback(self, callback: Callable[[], None]) -> bool:
        if self._callbacks is None:
            return False
        self._callbacks.append(callback)
        return True

    def peer(self) -> str:
        return "test"
