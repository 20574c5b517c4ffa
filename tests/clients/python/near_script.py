"""Runs the cases of tests/near: a near cache of either kind beside a server that does as each step says."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from proxystash import (
    AsyncClient,
    AsyncNearCache,
    CacheEntry,
    Client,
    NearCache,
    NearCacheStatistics,
    ProxystashError,
    WatchPosition,
)
from proxystash.v1 import cache_service_pb2 as pb
from tests.support.scripts import ROOT

from .fake_service import FakeService, Fault
from .waiting import wait_until

CASES = json.loads((ROOT / "tests/near/cases.json").read_text())["cases"]
_SECONDS = 30
_METHODS = {
    "get": "Get",
    "get_many": "BatchGet",
    "put": "Put",
    "update": "Put",
    "put_many": "BatchPut",
    "delete": "Delete",
    "clear": "Clear",
    "invalidate_by_health": "InvalidateByHealth",
}
_LOOKUPS = {"get", "get_many"}


class Clocks:
    """A steady clock and a wall clock that a script owns."""

    def __init__(self) -> None:
        self.steady = 1000.0
        self.wall = 1_800_000_000.0


# -- the server


@dataclass
class Call:
    """A call that has reached the server. What is put into `answers` is sent; a fault ends it."""

    method: str
    request: Any
    answers: queue.Queue[Any] = field(default_factory=queue.Queue)

    def next_answer(self, context: grpc.ServicerContext) -> Any:
        answer = self.answers.get(timeout=2 * _SECONDS)
        if isinstance(answer, Fault):
            answer.abort(context)
        return answer


@dataclass
class ScriptedService(FakeService):
    """Answers no call by itself."""

    held: queue.Queue[Call] = field(default_factory=queue.Queue)
    opened: queue.Queue[Call] = field(default_factory=queue.Queue)

    def _hold(self, method: str, request: Message, context: grpc.ServicerContext) -> Any:
        call = Call(method, request)
        self.held.put(call)
        return call.next_answer(context)

    def Get(self, request: pb.GetRequest, context: grpc.ServicerContext) -> Any:
        return self._hold("Get", request, context)

    def BatchGet(self, request: pb.BatchGetRequest, context: grpc.ServicerContext) -> Any:
        return self._hold("BatchGet", request, context)

    def Put(self, request: pb.PutRequest, context: grpc.ServicerContext) -> Any:
        return self._hold("Put", request, context)

    def BatchPut(self, request: pb.BatchPutRequest, context: grpc.ServicerContext) -> Any:
        return self._hold("BatchPut", request, context)

    def Delete(self, request: pb.DeleteRequest, context: grpc.ServicerContext) -> Any:
        return self._hold("Delete", request, context)

    def Clear(self, request: pb.ClearRequest, context: grpc.ServicerContext) -> Any:
        return self._hold("Clear", request, context)

    def InvalidateByHealth(self, request: pb.InvalidateByHealthRequest, context: grpc.ServicerContext) -> Any:
        return self._hold("InvalidateByHealth", request, context)

    def Watch(self, request: pb.WatchRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        call = Call("Watch", request)
        gone = object()
        if not context.add_callback(lambda: call.answers.put(gone)):
            return
        self.opened.put(call)
        while (answer := call.next_answer(context)) is not gone:
            yield answer


def _fault(step: dict[str, Any]) -> Fault:
    reason = step.get("reason", "")
    details = [error_details_pb2.ErrorInfo(reason=reason, domain="proxystash")] if reason else []
    return Fault(grpc.StatusCode[step["status"]], "as the script says", details)


# -- the client


@dataclass
class Subject:
    """A client with a near cache; `run` has one of their methods run elsewhere."""

    client: Client | AsyncClient
    near: NearCache | AsyncNearCache
    run: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Future[Any]]

    def statistics(self) -> NearCacheStatistics:
        return self.near.statistics()

    def begin(self, method: str, keys: list[str]) -> Future[Any]:
        """Call a method of the near cache or of its client with these keys."""
        entries = [CacheEntry("http://192.0.2.9:1", key=key) for key in keys]
        arguments: dict[str, tuple[Any, ...]] = {
            "get_many": (keys,),
            "put": tuple(entries),
            "put_many": (entries,),
            "clear": (),
        }
        settings = {"source": "changed"} if method == "update" else {}
        owner = self.near if method in _LOOKUPS else self.client
        return self.run(getattr(owner, method), tuple(arguments.get(method, keys)), settings)


@contextmanager
def threads_subject(target: str, **settings: Any) -> Iterator[Subject]:
    """A near cache for threads; each call has one of its own."""
    with ThreadPoolExecutor(8) as pool, Client(target, timeout=2 * _SECONDS, retry=None) as client:
        near = client.near_cache(**settings)

        def run(method: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Future[Any]:
            return pool.submit(method, *arguments, **named)

        yield Subject(client, near, run)


@contextmanager
def asyncio_subject(target: str, **settings: Any) -> Iterator[Subject]:
    """A near cache for asyncio, in a loop that runs in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def connect() -> tuple[AsyncClient, AsyncNearCache]:
        client = AsyncClient(target, timeout=2 * _SECONDS, retry=None)
        return client, client.near_cache(**settings)

    def run(method: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(method(*arguments, **named), loop)

    try:
        client, near = asyncio.run_coroutine_threadsafe(connect(), loop).result(_SECONDS)
        try:
            yield Subject(client, near, run)
        finally:
            run(client.close, (), {}).result(_SECONDS)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_SECONDS)
        loop.close()


SUBJECTS = {"threads": threads_subject, "asyncio": asyncio_subject}


# -- the script


@dataclass
class _Begun:
    method: str
    keys: list[str]
    call: Call
    future: Future[Any]


class Script:
    """Does the steps of a case, one after the other."""

    def __init__(
        self, service: ScriptedService, subject: Subject, clocks: Clocks, progress_interval: timedelta
    ) -> None:
        self._service = service
        self._progress_interval = progress_interval
        self._subject = subject
        self._clocks = clocks
        self._watch: Call | None = None
        self._history = ""
        self._begun: dict[str, _Begun] = {}
        self._looked_up = 0
        self._done: Counter[str] = Counter()

    def run(self, steps: list[dict[str, Any]]) -> None:
        for number, step in enumerate(steps):
            step = dict(step)
            name = step.pop("do")
            try:
                do = getattr(self, f"_do_{name}", None)
                if do is not None:
                    do(**step)
                else:
                    self._write(name, **step)
            except (AssertionError, queue.Empty) as error:
                pytest.fail(f"step {number}, {name} {step}: {error!r}")
        self._check_the_end()

    def _check_the_end(self) -> None:
        assert not self._begun, "a call was begun and not ended"
        assert self._service.held.empty(), "a call that no step has named"
        found = self._subject.statistics()
        assert found.hits + found.misses == self._looked_up
        assert found.entries <= found.max_entries
        assert self._subject.near._copies._fills == {}

    # -- what the server does

    def _do_watch(
        self,
        history: str = "",
        after: int | None = None,
        revision: int = 0,
        answers_history: str | None = None,
        **end: str,
    ) -> None:
        self._watch = watch = self._service.opened.get(timeout=_SECONDS)
        asked = ("", 0) if after is None else (history, after)
        assert (watch.request.history, watch.request.after_revision) == asked
        assert not watch.request.include_entries
        assert watch.request.progress_interval.ToTimedelta() == self._progress_interval
        if end:
            self._do_cut(**end)
        else:
            self._history = history if answers_history is None else answers_history
            self._do_tell(revision, [])

    def _do_tell(self, revision: int, changes: list[tuple[str, str]]) -> None:
        assert self._watch is not None
        first = revision - len(changes) + 1
        told = [
            pb.Change(kind=pb.ChangeKind.Value(f"CHANGE_KIND_{kind}"), key=key, version=first + place)
            for place, (kind, key) in enumerate(changes)
        ]
        self._watch.answers.put(
            pb.WatchResponse(revision=revision, synced=True, changes=told, history=self._history)
        )
        expected = WatchPosition(self._history, revision)

        def is_heard() -> bool:
            found = self._subject.statistics()
            return (
                found.position == expected
                and found.failure is None
                and found.age is not None
                and not found.age
            )

        wait_until(is_heard)

    def _do_cut(self, **end: str) -> None:
        assert self._watch is not None
        before = self._subject.statistics().failure
        self._watch.answers.put(_fault(end))
        wait_until(lambda: self._subject.statistics().failure not in {None, before})
        failure = self._subject.statistics().failure
        assert failure is not None
        assert failure.code == end["status"]
        self._watch = None

    # -- what the client does

    def _do_get(self, key: str, version: int | None, **rest: Any) -> None:
        if rest.pop("from") == "copy":
            self._looked_up += 1
            found = self._subject.begin("get", [key]).result(_SECONDS)
            assert _version(found) == version
            assert self._service.held.empty(), "the server was asked"
        else:
            self._do_begin("get", "get", key)
            self._do_answer("get", version=version, **rest)

    def _do_get_many(self, keys: list[str], asked: list[str], versions: dict[str, int | None]) -> None:
        if asked:
            self._do_begin("many", "get_many", keys=keys)
            assert list(self._begun["many"].call.request.keys) == asked
            self._do_answer("many", versions=versions)
        else:
            self._looked_up += len(keys)
            found = self._subject.begin("get_many", keys).result(_SECONDS)
            assert {_version(entry) for entry in found} == set(versions.values())
            assert self._service.held.empty(), "the server was asked"

    def _write(self, method: str, key: str = "", keys: list[str] | None = None, **rest: Any) -> None:
        self._do_begin("write", method, key, keys)
        self._do_answer("write", **rest)

    def _do_begin(self, call: str, method: str, key: str = "", keys: list[str] | None = None) -> None:
        keys = [key] if keys is None and key else keys or []
        if method in _LOOKUPS:
            self._looked_up += len(keys)
        future = self._subject.begin(method, keys)
        reached = self._service.held.get(timeout=_SECONDS)
        assert reached.method == _METHODS[method]
        self._begun[call] = _Begun(method, keys, reached, future)

    def _do_answer(
        self,
        call: str,
        version: int | None = None,
        versions: dict[str, int | None] | None = None,
        refused: list[str] | None = None,
        **facts: Any,
    ) -> None:
        begun = self._begun.pop(call)
        request = begun.call.request
        if begun.method == "get":
            begun.call.answers.put(self._found(request.key, version, **facts))
            assert _version(begun.future.result(_SECONDS)) == version
        elif begun.method == "get_many":
            assert versions is not None
            answers = [self._found(key, versions[key], **facts) for key in request.keys]
            begun.call.answers.put(pb.BatchGetResponse(results=answers))
            found = begun.future.result(_SECONDS)
            assert [_version(entry) for entry in found] == [versions[key] for key in begun.keys]
        else:
            begun.call.answers.put(_written(begun.method, request, refused or []))
            begun.future.result(_SECONDS)

    def _do_fail(self, call: str, **end: str) -> None:
        begun = self._begun.pop(call)
        begun.call.answers.put(_fault(end))
        error = begun.future.exception(_SECONDS)
        assert isinstance(error, ProxystashError)
        assert error.code == end["status"]

    def _found(self, key: str, version: int | None, expires_in: float = 3600) -> pb.GetResponse:
        if version is None:
            return pb.GetResponse()
        entry = pb.CacheEntry(key=key, proxy_url="http://192.0.2.9:1", version=version)
        entry.expires_at.FromMicroseconds(round((self._clocks.wall + expires_in) * 1_000_000))
        return pb.GetResponse(entry=entry, served_by=pb.TIER_L1)

    # -- clocks, and what the client says of itself

    def _do_advance(self, seconds: float) -> None:
        self._clocks.steady += seconds
        self._clocks.wall += seconds

    def _do_set_wall_clock(self, seconds: float) -> None:
        self._clocks.wall += seconds

    def _do_statistics(self, **expected: Any) -> None:
        if expected.get("age") is not None:
            expected["age"] = timedelta(seconds=expected["age"])
        found = self._subject.statistics()
        assert {name: getattr(found, name) for name in expected} == expected


def _version(entry: CacheEntry | None) -> int | None:
    return None if entry is None else entry.version


def _written(method: str, request: Any, refused: list[str]) -> Message:
    if method in {"put", "update"}:
        return pb.PutResponse(key=request.entry.key)
    if method == "put_many":
        outcomes = [
            pb.BatchPutResult(error=pb.EntryError(code=3, reason="REFUSED"))
            if entry.key in refused
            else pb.BatchPutResult(stored=pb.PutResponse(key=entry.key))
            for entry in request.entries
        ]
        return pb.BatchPutResponse(results=outcomes)
    answers: dict[str, Message] = {
        "delete": pb.DeleteResponse(deleted=True),
        "clear": pb.ClearResponse(cleared=1),
        "invalidate_by_health": pb.InvalidateByHealthResponse(found=True, failure_threshold=3),
    }
    return answers[method]
