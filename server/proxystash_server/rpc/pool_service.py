"""PoolService: every method of the contract, delegated to the pool."""

from __future__ import annotations

import threading
from typing import Final

import grpc
import structlog

from proxystash.v1 import pool_service_pb2 as pb
from proxystash.v1 import pool_service_pb2_grpc as pb_grpc
from proxystash.v1.cache_service_pb2 import PoolStatistics
from proxystash_server.cache import InvalidEntryError
from proxystash_server.pool import requests as limits
from proxystash_server.pool.pool import Pool
from proxystash_server.pool.requests import Answer, HealthEffect, PoolError, Report, SelectionPolicy
from proxystash_server.pool.waiting import Deliver, Ticket
from proxystash_server.rpc import pool_answers, pool_requests
from proxystash_server.rpc.calls import StreamCall
from proxystash_server.rpc.convert import fill_timestamp
from proxystash_server.rpc.errors import (
    Failure,
    Reason,
    RequestError,
    failure_of,
    internal_failure,
    invalid,
    new_request_id,
    refusal_of,
)
from proxystash_server.rpc.paging import make_token, read_token
from proxystash_server.rpc.service import DEFAULT_PAGE, MAX_ANSWER_BYTES, MAX_PAGE
from proxystash_server.rpc.streams import non_blocking

POOL_SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["PoolService"].full_name

_log = structlog.stdlib.get_logger(__name__)


class PoolService(pb_grpc.PoolServiceServicer):
    """The service behind the error boundary: its methods raise RequestError and the pool's errors.

    `policy` is what Acquire chooses by where it names none, `labels` those that it can ask for; None for all.
    """

    def __init__(self, pool: Pool, *, policy: SelectionPolicy, labels: frozenset[str] | None) -> None:
        self._pool = pool
        self._policy = policy
        self._labels = labels
        self._lock = threading.Lock()
        # Calls that wait, and what they are told when the server ends.
        self._waiting: set[StreamCall] = set()
        self._ending: Failure | None = None

    def add_to(self, server: grpc.Server) -> None:
        """Register the methods: Acquire as a stream of one, so that a call that waits holds no thread."""
        pb_grpc.add_PoolServiceServicer_to_server(self, server)
        acquire = grpc.unary_stream_rpc_method_handler(
            self.Acquire,
            request_deserializer=pb.AcquireRequest.FromString,
            response_serializer=pb.AcquireResponse.SerializeToString,
        )
        server.add_registered_method_handlers(POOL_SERVICE_NAME, {"Acquire": acquire})

    def statistics(self) -> PoolStatistics:
        """A snapshot for CacheService."""
        return pool_answers.statistics_message(self._pool.statistics())

    def drain(self, failure: Failure) -> None:
        """End the calls that wait, and have none wait from now on."""
        with self._lock:
            self._ending = failure
            waiting = list(self._waiting)
        for call in waiting:
            call.end(failure)

    @non_blocking
    def Acquire(  # type: ignore[override]  # a non-blocking handler takes one more argument
        self, request: pb.AcquireRequest, context: grpc.ServicerContext, send: object
    ) -> None:
        wanted = pool_requests.read_acquire(request, self._policy, self._labels)
        call = StreamCall(context)
        if wanted.wait:
            pool_requests.check_deadline(context, wanted.wait)

        def deliver(outcome: Answer | Exception) -> bool:
            return self._deliver(call, outcome)

        begun = self._pool.acquire(wanted, deliver)
        if isinstance(begun, Ticket):
            self._wait(call, begun, deliver)
        elif not self._answer(call, begun):
            self._pool.abandon(begun)

    def _wait(self, call: StreamCall, ticket: Ticket, deliver: Deliver) -> None:
        with self._lock:
            ending = self._ending
            if ending is None:
                self._waiting.add(call)

        def ended() -> None:
            with self._lock:
                self._waiting.discard(call)
            self._pool.cancel(ticket, deliver)

        if not call.add_callback(ended):
            ended()
        elif ending is not None:
            call.end(ending)

    def _deliver(self, call: StreamCall, outcome: Answer | Exception) -> bool:
        """Answer a call that has waited; False if its client has gone."""
        if isinstance(outcome, Answer):
            return self._answer(call, outcome)
        failure = failure_of(outcome)
        if failure is None:
            failure = internal_failure(new_request_id())
            _log.error("a call that waited failed", request_id=failure.request_id, exc_info=outcome)
        call.end(failure)
        return True

    def _answer(self, call: StreamCall, answer: Answer) -> bool:
        """Answer a call; what it has no room for is released. False if its client has gone."""
        serialized, left = pool_answers.acquire_response(answer, MAX_ANSWER_BYTES, self._to_wall)
        if not call.answer(serialized):
            return False
        self._pool.abandon(Answer(left))
        return True

    def Renew(self, request: pb.RenewRequest, context: grpc.ServicerContext) -> pb.RenewResponse:
        pool_requests.check_size(request.lease_ids, "lease_ids", Reason.TOO_MANY_LEASE_IDS)
        duration = pool_requests.read_lease_duration(request)
        response = pb.RenewResponse()
        for end in self._pool.renew(request.lease_ids, duration):
            result = response.results.add(held=end is not None)
            if end is not None:
                fill_timestamp(result.expires_at, self._to_wall(end))
        return response

    def Release(self, request: pb.ReleaseRequest, context: grpc.ServicerContext) -> pb.ReleaseResponse:
        response = pb.ReleaseResponse()
        for released in self._pool.release(pool_requests.read_releases(request, self._pool)):
            result = response.results.add(released=released.released)
            if released.effect is not None:
                pool_answers.fill_effect(result.effect, released.effect, self._to_wall)
        return response

    def ReportResults(
        self, request: pb.ReportResultsRequest, context: grpc.ServicerContext
    ) -> pb.ReportResultsResponse:
        pool_requests.check_size(request.reports, "reports", Reason.TOO_MANY_REPORTS)
        outcomes: list[Report | Failure] = []
        for message in request.reports:
            try:
                outcomes.append(pool_requests.read_report(message, self._pool))
            except (InvalidEntryError, RequestError) as error:
                outcomes.append(refusal_of(error))
        effects = iter(self._pool.report([one for one in outcomes if isinstance(one, Report)]))
        response = pb.ReportResultsResponse()
        for outcome in outcomes:
            effect: HealthEffect | PoolError | Failure | None = (
                next(effects) if isinstance(outcome, Report) else outcome
            )
            if isinstance(effect, PoolError):
                effect = failure_of(effect)
            if isinstance(effect, HealthEffect):
                pool_answers.fill_effect(response.results.add().effect, effect, self._to_wall)
            else:
                assert effect is not None
                response.results.add(error=effect.to_entry_error())
        return response

    def EndSession(
        self, request: pb.EndSessionRequest, context: grpc.ServicerContext
    ) -> pb.EndSessionResponse:
        session_id = pool_requests.read_session_id(request.session_id, "session_id")
        target = pool_requests.read_target(request.target, "target")
        return pb.EndSessionResponse(ended=self._pool.end_session(session_id, target))

    def GetProxyHealth(
        self, request: pb.GetProxyHealthRequest, context: grpc.ServicerContext
    ) -> pb.GetProxyHealthResponse:
        key = pool_requests.read_key(request.key, "key")
        health = self._pool.health_of(key)
        if health is None:
            return pb.GetProxyHealthResponse()
        return pb.GetProxyHealthResponse(health=pool_answers.health_message(key, health, self._to_wall))

    def ListTargets(
        self, request: pb.ListTargetsRequest, context: grpc.ServicerContext
    ) -> pb.ListTargetsResponse:
        size = _page_size(request.page_size)
        after = read_token(request.page_token, ("targets",))
        targets, has_more = self._pool.targets(after, size)
        response = pb.ListTargetsResponse(targets=pool_answers.target_messages(targets, self._to_wall))
        if has_more:
            response.next_page_token = make_token(targets[-1].target, ("targets",))
        return response

    def ListLeases(
        self, request: pb.ListLeasesRequest, context: grpc.ServicerContext
    ) -> pb.ListLeasesResponse:
        size = _page_size(request.page_size)
        if request.key:
            pool_requests.read_key(request.key, "key")
        holder = pool_requests.read_text(
            request.holder, "holder", Reason.INVALID_HOLDER, limits.MAX_HOLDER_BYTES
        )
        target = pool_requests.read_target(request.target, "target")
        session_id = pool_requests.read_text(
            request.session_id, "session_id", Reason.INVALID_SESSION, limits.MAX_SESSION_BYTES
        )
        scope = ("leases", request.key, holder, target, session_id)
        after = read_token(request.page_token, scope) or "0"
        if not after.isdecimal():
            raise invalid("page_token", Reason.INVALID_PAGE_TOKEN, "page_token is damaged")
        leases, next_after = self._pool.leases(
            int(after), size, key=request.key, holder=holder, target=target, session_id=session_id
        )
        response = pb.ListLeasesResponse(
            leases=[pool_answers.lease_message(lease, self._to_wall) for lease in leases]
        )
        if next_after is not None:
            response.next_page_token = make_token(str(next_after), scope)
        return response

    def _to_wall(self, steady: float) -> int:
        return self._pool.to_wall_us(steady)


def _page_size(size: int) -> int:
    if size < 0:
        raise invalid("page_size", Reason.INVALID_PAGE_SIZE, "page_size is negative")
    return min(size or DEFAULT_PAGE, MAX_PAGE)
