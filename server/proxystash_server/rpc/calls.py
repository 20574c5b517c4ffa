"""Receiving and sending without a thread that waits: what grpcio has no public way to do.

grpcio gives a call a thread when its headers have come, and lets the thread wait for the request: eight calls
that never send one hold eight threads, for as long as their client likes, whatever the kind of handler. And a
thread that sends on a stream waits as long as the client does not read. So a call is in the hands of
`CallPool` before it has a thread, and a stream in those of `StreamCall` once its handler has returned.

What is used of grpcio's insides is all in this module, and is the same from grpcio 1.76 to 1.85. If another
one hands calls over in another form, they get a thread at once, as grpcio means it, and a test fails.
"""

# ruff: noqa: SLF001, ANN401 -- see above; and what is not public has no types

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeVar

import grpc
from grpc import _common, _server
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # the stubs leave out what is not public

from proxystash_server.rpc.errors import Failure, Reason
from proxystash_server.rpc.reception import Reception
from proxystash_server.rpc.unread import UnreadAnswers
from proxystash_server.rpc.workers import WorkerPool

# Calls that have their request and wait for a thread: somewhat more than a second's work.
MOST_QUEUED: Final = 4000
# A request of so many bytes keeps its place in the reception until a thread has taken it.
LARGE_REQUEST: Final = 64 * 1024
# Of answers from this size on, in bytes, account is kept until they are read.
LARGE_ANSWER: Final = 16 * 1024

OVERLOADED: Final = Failure(
    grpc.StatusCode.UNAVAILABLE,
    Reason.OVERLOADED,
    "more calls are waiting than the server can answer soon; try again later",
)
REQUEST_OVERDUE: Final = Failure(
    grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.REQUEST_OVERDUE,
    "the request did not come in time, while other calls of its connection waited",
)
ANSWER_NOT_READ: Final = Failure(
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.ANSWER_NOT_READ,
    "the answer was not read for too long, while others needed its memory; ask for less at once",
)
_TOO_LATE: Final = Failure(
    grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.DEADLINE_EXCEEDED,
    "the deadline was over before the call's turn came",
)
_NO_REQUEST: Final = Failure(
    grpc.StatusCode.UNIMPLEMENTED, Reason.NO_REQUEST, "the method takes exactly one message, and none came"
)

BehaviorT = TypeVar("BehaviorT", bound=Callable[..., Any])

# Is told of each call that has ended: its method (`/package.Service/Method`), its status, and how many
# nanoseconds there were from its headers to its end. Called on the completion thread, so it must be quick.
Observe = Callable[[str, grpc.StatusCode, int], None]


def urgent(behavior: BehaviorT) -> BehaviorT:
    """Mark a handler that has a thread of its own, and is called also when the server is about to end."""
    behavior.urgent = True  # type: ignore[attr-defined]  # CallPool looks for it
    return behavior


class CallPool:
    """What grpcio's server takes for its executor: receives each call's request, then asks for a thread.

    Handlers marked `urgent` run on `urgent_workers`, all others on `workers`. Overload ends in UNAVAILABLE.
    `observe` is told of every call that takes one message, also of those that end without a thread.
    Thread-safe; nothing waits in `submit`, where the completion thread holds a lock of grpcio's.
    """

    def __init__(
        self,
        workers: WorkerPool,
        urgent_workers: WorkerPool,
        *,
        most_queued: int = MOST_QUEUED,
        reception: Reception[_Call] | None = None,
        unread: UnreadAnswers[_Answering] | None = None,
        observe: Observe | None = None,
    ) -> None:
        self._workers = workers
        self._urgent_workers = urgent_workers
        self._most_queued = most_queued
        self._reception = Reception[_Call]() if reception is None else reception
        self._unread = UnreadAnswers[_Answering]() if unread is None else unread
        self._observe = observe
        self._ending: Failure | None = None

    def submit(self, run: Callable[..., Any], /, *arguments: Any) -> _Submitted:
        """Take over a call that grpcio wants to have run, by `run(*arguments)`."""
        if not _Call.is_one(arguments):
            self._workers.put(lambda: run(*arguments))
            return _SUBMITTED
        call = _Call(run, arguments)
        if self._observe is not None:
            call.observe_end(self._observe)
        if self._ending is not None and not call.is_urgent:
            call.end(self._ending)
        elif self._reception.enter(call):
            self._receive(call)
        else:
            call.on_end(lambda: self._leave(call))
            for other in self._reception.overdue(call.connection):
                if not other.has_request:
                    other.end(REQUEST_OVERDUE)
        return _SUBMITTED

    def refuse_new_calls(self, failure: Failure) -> None:
        """End calls that have no request, and all that come from now on, with `failure`; not urgent ones."""
        self._ending = failure
        for call in self._reception.waiting():
            if not call.is_urgent and not call.has_request:
                call.end(failure)

    def _receive(self, call: _Call) -> None:
        following: _Call | None = call
        while following is not None and not following.receive(self._received):
            following = self._reception.leave(following)

    def _received(self, call: _Call, size: int | None) -> None:
        """On the completion thread: the request is there; without a size, none will be."""
        workers = self._urgent_workers if call.is_urgent else self._workers
        if size is None:
            self._leave(call)
        elif workers.queued >= self._most_queued:
            self._leave(call)
            call.end(OVERLOADED)
        elif size < LARGE_REQUEST:
            self._leave(call)
            workers.put(lambda: call.run(None, self._answered))
        else:
            workers.put(lambda: call.run(self._leave, self._answered))

    def _answered(self, call: _Answering, size: int) -> None:
        for other in self._unread.add(call, size):
            other.cancel(ANSWER_NOT_READ)
        call.on_end(lambda: self._unread.remove(call))

    def _leave(self, call: _Call) -> None:
        following = self._reception.leave(call)
        if following is not None:
            self._receive(following)


class _Answering(Protocol):
    """A call, as far as its answer is concerned: _Call and StreamCall."""

    def cancel(self, failure: Failure) -> None: ...
    def on_end(self, callback: Callable[[], None]) -> None: ...


class _Submitted:
    """What grpcio gets for a future. It counts calls with it, but only where it is told to limit them."""

    def add_done_callback(self, callback: Callable[..., object]) -> None:
        """Never called."""


_SUBMITTED: Final = _Submitted()


class _Call:
    """A call of a method that takes one message, as grpcio's server hands it over."""

    __slots__ = ("_arguments", "_event", "_run", "_state", "connection", "is_urgent")

    def __init__(self, run: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._run = run
        self._arguments = arguments
        _, self._event, self._state, behavior, *_ = arguments
        self.connection: bytes = self._event.call.peer()
        self.is_urgent: bool = hasattr(behavior, "urgent")

    @staticmethod
    def is_one(arguments: tuple[Any, ...]) -> bool:
        """Whether that is what was handed over; the error boundary marks what takes one message."""
        return len(arguments) == 7 and hasattr(arguments[3], "takes_one_message")

    def observe_end(self, observe: Observe) -> None:
        """Have `observe` told of this call's end. Before anybody else knows of the call."""
        now, method, status = time.perf_counter_ns, self._arguments[3].method, self._status
        started = now()
        self._state.callbacks.append(lambda: observe(method, status(), now() - started))

    def _status(self) -> grpc.StatusCode:
        """What the call has ended with; CANCELLED if its client left, perhaps for lack of time."""
        code: grpc.StatusCode | None = self._state.code
        if code is not None:
            return code
        return grpc.StatusCode.OK if self._state.statused else grpc.StatusCode.CANCELLED

    @property
    def has_request(self) -> bool:
        """Whether the request has been received, and no thread has taken it."""
        return self._state.request is not None

    def receive(self, on_received: Callable[[_Call, int | None], None]) -> bool:
        """Begin to receive the request; False if the call is over.

        `on_received` is called on the completion thread, with the request's size, or None if none comes.
        """

        def received() -> None:
            request = self._state.request
            if request is None:
                self.end(_NO_REQUEST)
                on_received(self, None)
            else:
                on_received(self, len(request))

        return _receive(self._event, self._state, received)

    def run(
        self,
        on_taken: Callable[[_Call], None] | None,
        on_large_answer: Callable[[_Answering, int], None],
    ) -> None:
        """Run the handler with the request, unless the call is over or its deadline is.

        `on_taken` is called once the request's bytes are not needed any more, `on_large_answer` with the size
        of an answer, before it is sent.
        """
        function, event, state, behavior, _, deserialize, serialize = self._arguments

        def take_request() -> Any:
            with state.condition:
                serialized, state.request = state.request, None
                is_over = not _server._is_rpc_state_active(state)
            request = None
            if is_over:
                pass
            elif event.call_details.deadline <= time.time():
                self.end(_TOO_LATE)
            else:
                request = serialized if deserialize is None else deserialize(serialized)
            del serialized
            if on_taken is not None:
                on_taken(self)
            return request

        def serialize_answer(answer: Any) -> bytes:
            serialized: bytes = answer if serialize is None else serialize(answer)
            if len(serialized) >= LARGE_ANSWER:
                on_large_answer(self, len(serialized))
            return serialized

        # Where StreamCall finds it, which has the state of a call and not its CallPool.
        state.on_large_answer = on_large_answer
        self._run(function, event, state, behavior, take_request, deserialize, serialize_answer)

    def end(self, failure: Failure) -> None:
        """End the call with a status instead of an answer, unless it is over."""
        _end(self._event, self._state, failure)

    def cancel(self, failure: Failure) -> None:
        """End the call at once with a status, whatever is being sent."""
        _cancel(self._event, self._state, failure)

    def on_end(self, callback: Callable[[], None]) -> None:
        """Have `callback` called on the completion thread once the call is over; at once if it is."""
        _on_end(self._state, callback)


class StreamCall:
    """A call with a stream, whose handler has returned or will. Nothing here waits. Thread-safe."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context
        self._event: Any = context._rpc_event  # type: ignore[attr-defined]
        self._state: Any = context._state  # type: ignore[attr-defined]

    def send(self, message: bytes, on_sent: Callable[[], None]) -> bool:
        """Begin to send a message, when the one before it has gone; False if the call is over.

        `on_sent` is called on the completion thread when the client's window has taken the message, or the
        call is over.
        """
        state = self._state
        with state.condition:
            if not _server._is_rpc_state_active(state):
                return False
            operations = [cygrpc.SendMessageOperation(message, 0)]
            token = _server._SEND_MESSAGE_TOKEN
            if state.initial_metadata_allowed:
                state.initial_metadata_allowed = False
                operations.insert(0, _server._get_initial_metadata_operation(state, None))
                token = _server._SEND_INITIAL_METADATA_AND_SEND_MESSAGE_TOKEN

            def sent(_event: object) -> Any:
                with state.condition:
                    finished = _server._possibly_finish_call(state, token)
                on_sent()
                return finished

            self._event.call.start_server_batch(operations, sent)
            state.due.add(token)
        return True

    def receive(self, on_received: Callable[[bytes | None], None]) -> bool:
        """Begin to receive the next message, when the one before is there; False if the call is over.

        `on_received` is called on the completion thread, with None if the client sends no more.
        """
        state = self._state

        def received() -> None:
            message, state.request = state.request, None
            on_received(message)

        return _receive(self._event, state, received)

    def answer(self, message: bytes) -> bool:
        """End the call well with one message, sent together with the status; False if the call is over.

        So a call with one answer can be answered later, without a thread that waits: on the wire, one answer
        is a stream of one.
        """
        on_large_answer = getattr(self._state, "on_large_answer", None)
        if len(message) >= LARGE_ANSWER and on_large_answer is not None:
            on_large_answer(self, len(message))
        with self._state.condition:
            if not _server._is_rpc_state_active(self._state):
                return False
            _server._status(self._event, self._state, message)
        return True

    def finish(self) -> None:
        """End the call well, when what was sent has gone."""
        _server._status(self._event, self._state, None)

    def end(self, failure: Failure) -> None:
        """End the call with a status, when what was sent has gone."""
        _end(self._event, self._state, failure)

    def cancel(self, failure: Failure) -> None:
        """End the call at once with a status: a client that does not read is told, too."""
        _cancel(self._event, self._state, failure)

    def on_end(self, callback: Callable[[], None]) -> None:
        """Have `callback` called on the completion thread once the call is over; at once if it is."""
        _on_end(self._state, callback)

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Have `callback` called on the completion thread once the call is over; False if it is over."""
        return self._context.add_callback(callback)

    def peer(self) -> str:
        """Whose it is, for the log."""
        return self._context.peer()


def _receive(event: Any, state: Any, on_received: Callable[[], None]) -> bool:
    """Receive a message into the state, see StreamCall.receive."""
    take_event = _server._receive_message(state, event.call, None)

    def received(received_event: Any) -> Any:
        finished = take_event(received_event)
        on_received()
        return finished

    with state.condition:
        if not _server._is_rpc_state_active(state):
            return False
        event.call.start_server_batch((cygrpc.ReceiveMessageOperation(0),), received)
        state.due.add(_server._RECEIVE_MESSAGE_TOKEN)
    return True


def _end(event: Any, state: Any, failure: Failure) -> None:
    with state.condition:
        if _server._is_rpc_state_active(state):
            state.trailing_metadata = failure.to_status().trailing_metadata
            state.code = failure.code
            _server._abort(state, event.call, _cygrpc_code(failure), failure.message.encode())


def _cancel(event: Any, state: Any, failure: Failure) -> None:
    with state.condition:
        state.code = failure.code
    # What `cancel` of a context does, where clients are told CANCELLED.
    event.call.cancel(_cygrpc_code(failure), failure.message)


def _on_end(state: Any, callback: Callable[[], None]) -> None:
    with state.condition:
        callbacks = state.callbacks
        if callbacks is not None:
            callbacks.append(callback)
    if callbacks is None:
        callback()


def _cygrpc_code(failure: Failure) -> Any:
    return _common.STATUS_CODE_TO_CYGRPC_STATUS_CODE[failure.code]
