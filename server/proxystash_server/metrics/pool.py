"""What the pool does, as metrics, taken when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from proxystash_server.pool.requests import PoolStatistics


class PoolCollector(Collector):
    """Makes metrics of one snapshot of the pool's statistics for each question. Thread-safe."""

    def __init__(self, take_snapshot: Callable[[], PoolStatistics]) -> None:
        self._take_snapshot = take_snapshot

    def collect(self) -> Iterator[Metric]:
        """All metrics, each with its samples."""
        pool = self._take_snapshot()
        yield GaugeMetricFamily("proxystash_pool_leases", "Leases held.", pool.leases)
        yield GaugeMetricFamily("proxystash_pool_sessions", "Sessions that have a proxy.", pool.sessions)
        yield GaugeMetricFamily("proxystash_pool_waiting", "Acquire calls that wait.", pool.waiting)
        proxies = GaugeMetricFamily(
            "proxystash_pool_proxies", "Entries by whether they can be lent now.", labels=["state"]
        )
        for state in ("ready", "leased_out", "resting"):
            proxies.add_metric([state], getattr(pool, state))
        yield proxies
        yield CounterMetricFamily("proxystash_pool_granted", "Leases granted.", pool.granted)
        ended = CounterMetricFamily("proxystash_pool_ended", "Leases that have ended.", labels=["by"])
        ended.add_metric(["release"], pool.released)
        ended.add_metric(["time"], pool.expired)
        yield ended
        yield CounterMetricFamily(
            "proxystash_pool_shortages", "Acquire calls that got nothing.", pool.shortages
        )
        results = CounterMetricFamily("proxystash_pool_results", "Results taken in.", labels=["outcome"])
        results.add_metric(["success"], pool.successes)
        results.add_metric(["other"], pool.results - pool.successes)
        yield results
        yield GaugeMetricFamily("proxystash_pool_loading", "1 while entries are being loaded.", pool.loading)
        yield GaugeMetricFamily(
            "proxystash_pool_journal_degraded",
            "1 while leases or what was learned are in memory alone.",
            pool.journal_degraded,
        )
