"""Calls with one answer that are answered later, by any thread, while none waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from grpc import _server

from proxystash_server.rpc.errors import Failure


class HeldCall:
    """A call of a non-blocking handler that is answered once: on the wire, one answer is a stream of one.

    What grpcio passes such a handler sends the message and the status apart, and waits in between until the
    client has read. Here they go together, as those of a usual call do, and nothing waits. For that it goes
    to grpcio's insides, which are the same from grpcio 1.76 to 1.85. Thread-safe.
    """

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context
        self._event: Any = context._rpc_event  # type: ignore[attr-defined]  # noqa: SLF001 -- see above
        self._state: Any = context._state  # type: ignore[attr-defined]  # noqa: SLF001 -- see above

    def answer(self, serialized: bytes) -> bool:
        """Answer and end the call; False if it is over, since its client has gone or it was ended."""
        with self._state.condition:
            if not _server._is_rpc_state_active(self._state):  # noqa: SLF001 -- see above
                return False
            _server._status(self._event, self._state, serialized)  # noqa: SLF001 -- see above
        return True

    def end(self, failure: Failure) -> bool:
        """End the call with a status; False if it is over."""
        status = failure.to_status()
        with self._state.condition:
            if not _server._is_rpc_state_active(self._state):  # noqa: SLF001 -- see above
                return False
            self._context.set_code(status.code)
            self._context.set_details(status.details)
            self._context.set_trailing_metadata(status.trailing_metadata)
            _server._status(self._event, self._state, None)  # noqa: SLF001 -- see above
        return True

    def on_end(self, callback: Callable[[], None]) -> None:
        """Have `callback` called once the call is over, on the completion thread; at once if it is."""
        if not self._context.add_callback(callback):
            callback()
