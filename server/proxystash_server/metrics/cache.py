"""The cache's statistics as metrics, taken when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from proxystash_server import __version__
from proxystash_server.cache import CacheStatistics, CacheTierType, TierState, TierStatistics

Streams = dict[str, int]

_CAUSES: Final = ("capacity", "ttl", "health", "corruption")
_QUANTILES: Final = (("0.5", "p50_us"), ("0.99", "p99_us"), ("1", "max_us"))


class CacheCollector(Collector):
    """Makes metrics of one snapshot of the statistics for each question. Thread-safe.

    `take_snapshot` gives the statistics, `count_streams` the open streams of each method.
    """

    def __init__(
        self, take_snapshot: Callable[[], CacheStatistics], count_streams: Callable[[], Streams]
    ) -> None:
        self._take_snapshot = take_snapshot
        self._count_streams = count_streams

    def collect(self) -> Iterator[Metric]:
        """All metrics, each with its samples."""
        statistics = self._take_snapshot()
        build = GaugeMetricFamily(
            "proxystash_build_info", "1, under the server's version.", labels=["version"]
        )
        build.add_metric([__version__], 1)
        yield build
        yield GaugeMetricFamily(
            "proxystash_start_time_seconds",
            "When the cache was opened, in seconds since the epoch.",
            statistics.started_at_us / 1e6,
        )
        lookups = CounterMetricFamily(
            "proxystash_lookups", "Lookups of a key, by whether any tier had it.", labels=["result"]
        )
        lookups.add_metric(["hit"], statistics.hits)
        lookups.add_metric(["miss"], statistics.misses)
        yield lookups
        yield GaugeMetricFamily("proxystash_entries", "Distinct entries stored.", statistics.entries)
        yield CounterMetricFamily(
            "proxystash_promotions", "Copies of entries into faster tiers.", statistics.promotions
        )
        yield CounterMetricFamily(
            "proxystash_demotions",
            "Entries that a tier evicted and a slower one keeps.",
            statistics.demotions,
        )
        yield CounterMetricFamily(
            "proxystash_removals", "Entries removed by Delete and Clear.", statistics.removals
        )
        streams = GaugeMetricFamily("proxystash_streams", "Streams open now.", labels=["method"])
        for method, count in self._count_streams().items():
            streams.add_metric([method], count)
        yield streams
        yield from _tier_metrics(dict(zip(CacheTierType, statistics.tiers, strict=True)))


def _tier_metrics(tiers: dict[CacheTierType, TierStatistics]) -> Iterator[Metric]:
    state = GaugeMetricFamily(
        "proxystash_tier_state", "1 under the state that a tier is in, else 0.", labels=["tier", "state"]
    )
    entries = GaugeMetricFamily("proxystash_tier_entries", "Entries in a tier.", labels=["tier"])
    most = GaugeMetricFamily(
        "proxystash_tier_max_entries", "Entries that a tier may hold; 0: no bound.", labels=["tier"]
    )
    log = GaugeMetricFamily(
        "proxystash_tier_log_bytes", "Size of a database's write-ahead log.", labels=["tier"]
    )
    lookups = CounterMetricFamily(
        "proxystash_tier_lookups", "Lookups that reached a tier.", labels=["tier", "result"]
    )
    evictions = CounterMetricFamily(
        "proxystash_tier_evictions", "Entries that a tier lost without a Delete.", labels=["tier", "cause"]
    )
    errors = CounterMetricFamily("proxystash_tier_errors", "Failed operations of a tier.", labels=["tier"])
    latency = GaugeMetricFamily(
        "proxystash_tier_latency_seconds",
        "Time of a tier's operations over the last minute: median, 99th percentile and longest.",
        labels=["tier", "operation", "quantile"],
    )
    for name, tier in tiers.items():
        for each in TierState:
            state.add_metric([name, each], float(tier.state is each))
        entries.add_metric([name], tier.entries)
        most.add_metric([name], tier.max_entries)
        log.add_metric([name], tier.log_bytes)
        lookups.add_metric([name, "hit"], tier.hits)
        lookups.add_metric([name, "miss"], tier.misses)
        for cause in _CAUSES:
            evictions.add_metric([name, cause], getattr(tier, f"evictions_{cause}"))
        errors.add_metric([name], tier.errors)
        for operation in ("read", "write"):
            summary = getattr(tier, f"{operation}_latency")
            for quantile, field in _QUANTILES:
                latency.add_metric([name, operation, quantile], getattr(summary, field) / 1e6)
    yield from (state, entries, most, log, lookups, evictions, errors, latency)
