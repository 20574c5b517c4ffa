"""The server's end of a stream without a network: a test decides when the client reads and when it leaves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import grpc
from google.protobuf.message import Message

from tests.support.rpc import DEADLINE


class FakeCall:
    """A call's context and its `send`. While it is not reading, `send` blocks, as grpcio's does."""

    def __init__(self, *, reading: bool = True) -> None:
        self.sent: list[Message | None] = []
        self.code: grpc.StatusCode | None = None
        self.cancelled = threading.Event()
        self._changed = threading.Condition()
        self._reading = reading
        self._sending = 0
        self._callbacks: list[Callable[[], None]] | None = []

    @property
    def context(self) -> grpc.ServicerContext:
        return cast("grpc.ServicerContext", self)

    def send(self, message: Message | None) -> None:
        with self._changed:
            self._sending += 1
            assert self._sending == 1, "two threads send on one stream"
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._reading or self.cancelled.is_set() or message is None)
            self._sending -= 1
            self.sent.append(message)
            self._changed.notify_all()

    def read_on(self) -> None:
        with self._changed:
            self._reading = True
            self._changed.notify_all()

    def leave(self) -> None:
        """The client's end of the call: what grpcio would call back on its completion thread."""
        with self._changed:
            callbacks, self._callbacks = self._callbacks, None
        for callback in callbacks or ():
            callback()

    def wait_until_sending(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._sending == 1, DEADLINE)

    def wait_until_sent(self, count: int) -> list[Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.sent) >= count, DEADLINE), self.sent
            return list(self.sent)

    # what the code under test calls on a context

    def add_callback(self, callback: Callable[[], None]) -> bool:
        with self._changed:
            if self._callbacks is None:
                return False
            self._callbacks.append(callback)
            return True

    def cancel(self) -> None:
        self.cancelled.set()
        with self._changed:
            self._changed.notify_all()

    def peer(self) -> str:
        return "test"

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, metadata: object) -> None:
        self.metadata = metadata
