"""All metrics of a server, and their address."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, ProcessCollector

from proxystash_server.cache import CacheStatistics
from proxystash_server.metrics.cache import CacheCollector, Streams
from proxystash_server.metrics.calls import CallMetrics
from proxystash_server.metrics.endpoint import MetricsEndpoint
from proxystash_server.metrics.pool import PoolCollector
from proxystash_server.pool.requests import PoolStatistics


class Metrics:
    """Listens on an address once made, answers after `start`, and closes as a context.

    `observe_call` counts a call: its method, its status and its nanoseconds. Raises OSError where it cannot
    listen.
    """

    def __init__(self, listen: str) -> None:
        self._registry = CollectorRegistry()
        calls = CallMetrics()
        self.observe_call = calls.observe
        self._registry.register(calls)
        ProcessCollector(registry=self._registry)
        self._endpoint = MetricsEndpoint(listen, self._registry)
        self.address = self._endpoint.address

    def start(
        self,
        take_snapshot: Callable[[], CacheStatistics],
        take_pool_snapshot: Callable[[], PoolStatistics] | None,
        count_streams: Callable[[], Streams],
    ) -> None:
        """Answer with the statistics of cache and pool, and the open streams, as they are when asked."""
        self._registry.register(CacheCollector(take_snapshot, count_streams))
        if take_pool_snapshot is not None:
            self._registry.register(PoolCollector(take_pool_snapshot))
        self._endpoint.start()

    def close(self) -> None:
        """Answer no more; idempotent. Before what the snapshots are taken of is closed."""
        self._endpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._endpoint.close()
