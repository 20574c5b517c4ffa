"""A cache service on a real socket that fails as a test tells it to, which a real server would not."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_status import rpc_status

from proxystash.proxies import cache_key
from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import pool_service_pb2 as pool_pb
from proxystash.v1.cache_service_pb2_grpc import CacheServiceServicer, add_CacheServiceServicer_to_server
from proxystash.v1.pool_service_pb2_grpc import PoolServiceServicer, add_PoolServiceServicer_to_server


@dataclass
class Fault:
    """A status that a call fails with, with its rich details; or it hangs until its client has gone."""

    code: grpc.StatusCode
    message: str = "told to fail"
    details: Sequence[Message] = ()
    hangs: bool = False

    def abort(self, context: grpc.ServicerContext) -> None:
        if self.hangs:
            wait_for_end(context)
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in self.details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        context.abort_with_status(rpc_status.to_status(status))


@dataclass
class StreamScript:
    """What one StreamStats call does: send these sequence numbers, then fail, stay open, or end."""

    sequences: Sequence[int]
    then: Fault | None = None
    stay_open: bool = False


@dataclass
class WatchScript:
    """What one Watch call does: send these responses, then fail, stay open, or end."""

    responses: Sequence[pb.WatchResponse]
    then: Fault | None = None
    stay_open: bool = False


@dataclass
class FakeService(CacheServiceServicer, PoolServiceServicer):
    """Keeps entries and leases in dicts. Each call takes the next fault of its method, None being a success.

    At most `most_leases` are held at a time, and none ends by itself.
    """

    faults: dict[str, deque[Fault | None]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    requests: list[Message] = field(default_factory=list)
    entries: dict[str, pb.CacheEntry] = field(default_factory=dict)
    streams: deque[StreamScript] = field(default_factory=deque)
    watches: deque[WatchScript] = field(default_factory=deque)
    most_results: int = 1000
    leases: dict[str, pool_pb.AcquireRequest] = field(default_factory=dict)
    released: list[pool_pb.LeaseRelease] = field(default_factory=list)
    most_leases: int = 1_000_000
    granted: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    hanging: set[str] = field(default_factory=set)
    deadlines: list[float] = field(default_factory=list)

    def fail(self, method: str, fault: Fault, times: int = 1, after: int = 0) -> None:
        """Let a method succeed `after` times, then fail some times, and succeed again."""
        self.faults.setdefault(method, deque()).extend([None] * after + [fault] * times)

    def _called(self, method: str, request: Message, context: grpc.ServicerContext) -> None:
        self.calls[method] += 1
        self.requests.append(request)
        self.deadlines.append(context.time_remaining())
        if method in self.hanging:
            wait_for_end(context)
        faults = self.faults.get(method)
        fault = faults.popleft() if faults else None
        if fault is not None:
            fault.abort(context)

    def Get(self, request: pb.GetRequest, context: grpc.ServicerContext) -> pb.GetResponse:
        self._called("Get", request, context)
        return self._get(request.key)

    def BatchGet(self, request: pb.BatchGetRequest, context: grpc.ServicerContext) -> pb.BatchGetResponse:
        self._called("BatchGet", request, context)
        answered = request.keys[: self.most_results]
        unanswered = len(request.keys) - len(answered)
        return pb.BatchGetResponse(results=[self._get(key) for key in answered], unanswered=unanswered)

    def Put(self, request: pb.PutRequest, context: grpc.ServicerContext) -> pb.PutResponse:
        self._called("Put", request, context)
        return self._put(request.entry)

    def BatchPut(self, request: pb.BatchPutRequest, context: grpc.ServicerContext) -> pb.BatchPutResponse:
        self._called("BatchPut", request, context)
        return pb.BatchPutResponse(
            results=[pb.BatchPutResult(stored=self._put(entry)) for entry in request.entries]
        )

    def Delete(self, request: pb.DeleteRequest, context: grpc.ServicerContext) -> pb.DeleteResponse:
        self._called("Delete", request, context)
        return pb.DeleteResponse(deleted=self.entries.pop(request.key, None) is not None)

    def Clear(self, request: pb.ClearRequest, context: grpc.ServicerContext) -> pb.ClearResponse:
        self._called("Clear", request, context)
        cleared = len(self.entries)
        self.entries.clear()
        return pb.ClearResponse(cleared=cleared)

    def InvalidateByHealth(
        self, request: pb.InvalidateByHealthRequest, context: grpc.ServicerContext
    ) -> pb.InvalidateByHealthResponse:
        self._called("InvalidateByHealth", request, context)
        return pb.InvalidateByHealthResponse(found=request.key in self.entries, failure_threshold=3)

    def ListBans(self, request: pb.ListBansRequest, context: grpc.ServicerContext) -> pb.ListBansResponse:
        self._called("ListBans", request, context)
        return pb.ListBansResponse()

    def Unban(self, request: pb.UnbanRequest, context: grpc.ServicerContext) -> pb.UnbanResponse:
        self._called("Unban", request, context)
        return pb.UnbanResponse()

    def List(self, request: pb.ListRequest, context: grpc.ServicerContext) -> pb.ListResponse:
        self._called("List", request, context)
        after = [key for key in sorted(self.entries) if key > request.page_token]
        page = after[: request.page_size]
        return pb.ListResponse(
            entries=[self.entries[key] for key in page],
            next_page_token=page[-1] if len(after) > len(page) else "",
        )

    def GetStats(self, request: pb.GetStatsRequest, context: grpc.ServicerContext) -> pb.GetStatsResponse:
        self._called("GetStats", request, context)
        return pb.GetStatsResponse(statistics=pb.CacheStatistics(entries=len(self.entries)))

    def StreamStats(
        self, request: pb.StreamStatsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.StreamStatsResponse]:
        self._called("StreamStats", request, context)
        script = self.streams.popleft()
        for sequence in script.sequences:
            yield pb.StreamStatsResponse(sequence=sequence, statistics=pb.CacheStatistics(hits=sequence))
        _end(script, context)

    def Watch(self, request: pb.WatchRequest, context: grpc.ServicerContext) -> Iterator[pb.WatchResponse]:
        self._called("Watch", request, context)
        script = self.watches.popleft()
        yield from script.responses
        _end(script, context)

    def Acquire(
        self, request: pool_pb.AcquireRequest, context: grpc.ServicerContext
    ) -> pool_pb.AcquireResponse:
        self._called("Acquire", request, context)
        with self.lock:
            count = min(request.count, self.most_leases - len(self.leases))
            numbers = range(len(self.granted), len(self.granted) + count)
            names = [f"lease-{number}" for number in numbers]
            self.granted += names
            self.leases.update(dict.fromkeys(names, request))
        leases = [
            pool_pb.Lease(
                lease_id=name,
                key=f"key-{name}",
                entry=pb.CacheEntry(proxy_url="http://h:1"),
                target=request.target,
            )
            for name in names
        ]
        shortage = pool_pb.SHORTAGE_LEASED_OUT if count < request.count else pool_pb.SHORTAGE_UNSPECIFIED
        return pool_pb.AcquireResponse(leases=leases, shortage=shortage)

    def Renew(self, request: pool_pb.RenewRequest, context: grpc.ServicerContext) -> pool_pb.RenewResponse:
        self._called("Renew", request, context)
        return pool_pb.RenewResponse(
            results=[pool_pb.RenewResult(held=lease_id in self.leases) for lease_id in request.lease_ids]
        )

    def Release(
        self, request: pool_pb.ReleaseRequest, context: grpc.ServicerContext
    ) -> pool_pb.ReleaseResponse:
        self._called("Release", request, context)
        with self.lock:
            self.released += request.releases
            held = [self.leases.pop(release.lease_id, None) is not None for release in request.releases]
        return pool_pb.ReleaseResponse(results=[pool_pb.ReleaseResult(released=one) for one in held])

    def ReportResults(
        self, request: pool_pb.ReportResultsRequest, context: grpc.ServicerContext
    ) -> pool_pb.ReportResultsResponse:
        self._called("ReportResults", request, context)
        result = pool_pb.ReportResult(effect=pool_pb.HealthEffect())
        return pool_pb.ReportResultsResponse(results=[result] * len(request.reports))

    def EndSession(
        self, request: pool_pb.EndSessionRequest, context: grpc.ServicerContext
    ) -> pool_pb.EndSessionResponse:
        self._called("EndSession", request, context)
        return pool_pb.EndSessionResponse()

    def GetProxyHealth(
        self, request: pool_pb.GetProxyHealthRequest, context: grpc.ServicerContext
    ) -> pool_pb.GetProxyHealthResponse:
        self._called("GetProxyHealth", request, context)
        return pool_pb.GetProxyHealthResponse()

    def ListTargets(
        self, request: pool_pb.ListTargetsRequest, context: grpc.ServicerContext
    ) -> pool_pb.ListTargetsResponse:
        self._called("ListTargets", request, context)
        return pool_pb.ListTargetsResponse()

    def ListLeases(
        self, request: pool_pb.ListLeasesRequest, context: grpc.ServicerContext
    ) -> pool_pb.ListLeasesResponse:
        self._called("ListLeases", request, context)
        return pool_pb.ListLeasesResponse()

    def _get(self, key: str) -> pb.GetResponse:
        entry = self.entries.get(key)
        return pb.GetResponse() if entry is None else pb.GetResponse(entry=entry, served_by=pb.TIER_L1)

    def _put(self, entry: pb.CacheEntry) -> pb.PutResponse:
        key = entry.key or cache_key(entry.proxy_url, entry.username)
        self.entries[key] = pb.CacheEntry(key=key)
        self.entries[key].MergeFrom(entry)
        return pb.PutResponse(key=key, stored_in=[pb.TIER_L1, pb.TIER_L2, pb.TIER_L3])


def _end(script: StreamScript | WatchScript, context: grpc.ServicerContext) -> None:
    if script.then is not None:
        script.then.abort(context)
    if script.stay_open:
        wait_for_end(context)


def wait_for_end(context: grpc.ServicerContext) -> None:
    """Hold a call until its client gives it up or the server stops."""
    ended = threading.Event()
    if context.add_callback(ended.set):
        ended.wait(60)


@contextmanager
def serving(
    service: FakeService, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None
) -> Iterator[str]:
    """Serve on a free port; yields the target."""
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    add_CacheServiceServicer_to_server(service, server)
    add_PoolServiceServicer_to_server(service, server)
    if credentials is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait(30)
