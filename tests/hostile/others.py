"""Well-behaved clients of the same server, and what they notice."""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import proxystash
from tests.support.rpc import open_channel, refusal_of

# Kept short: what does not answer for so long is a failure.
TIMEOUT: Final = 10.0
# Between two calls of one client, so that their load is not what is measured.
_PAUSE: Final = 0.005


class Others:
    """What several clients did and how it went; each has a thread of its own. Thread-safe."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self.seconds: list[float] = []
        self.failures: Counter[str] = Counter()
        self.longest_silence = 0.0
        self.acknowledged: dict[str, str] = {}

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Have them work until the end of the block."""
        with ExitStack() as stack:
            client = stack.enter_context(proxystash.Client(self._target, timeout=TIMEOUT, retry=None))
            channel = stack.enter_context(open_channel(self._target))
            stream = client.stream_stats(timedelta(milliseconds=100), on_lost=self._note_lost)
            next(stream)
            health: Any = health_pb2_grpc.HealthStub(channel)
            works: list[Callable[[int], object]] = [
                lambda number: self._put(client, number),
                lambda _: client.get("missing"),
                lambda _: client.get_many(["missing"] * 100),
                lambda _: health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT),
            ]
            threads = [threading.Thread(target=self._repeat, args=(work,)) for work in works]
            threads.append(threading.Thread(target=self._watch, args=(stream,)))
            for thread in threads:
                thread.start()
            try:
                yield
            finally:
                self._ended.set()
                stream.close()
                for thread in threads:
                    thread.join()
            self._try(lambda: ProtoReflectionDescriptorDatabase(channel).get_services())

    def lost(self) -> list[str]:
        """The acknowledged puts that are not there."""
        with proxystash.Client(self._target) as client:
            hits = client.get_many(self.acknowledged)
            return [key for key, hit in zip(self.acknowledged, hits, strict=True) if hit is None]

    def _put(self, client: proxystash.Client, number: int) -> None:
        entry = proxystash.CacheEntry(f"http://192.0.2.9:{1 + number % 60_000}")
        stored = client.put(entry)
        self.acknowledged[stored.key] = entry.proxy_url

    def _repeat(self, work: Callable[[int], object]) -> None:
        number = 0
        while not self._ended.wait(_PAUSE):
            number += 1
            self._try(functools.partial(work, number))

    def _try(self, work: Callable[[], object]) -> None:
        begun = time.perf_counter()
        failure = ""
        try:
            work()
        except proxystash.ProxystashError as error:
            failure = error.reason
        except grpc.RpcError as error:
            failure = refusal_of(error).code.name
        with self._lock:
            self.seconds.append(time.perf_counter() - begun)
            if failure:
                self.failures[failure] += 1

    def _watch(self, stream: proxystash.StatsStream) -> None:
        last = time.monotonic()
        for _ in stream:
            now = time.monotonic()
            self.longest_silence = max(self.longest_silence, now - last)
            last = now

    def _note_lost(self, error: proxystash.ProxystashError) -> None:
        with self._lock:
            self.failures[f"stream {error.reason}"] += 1
