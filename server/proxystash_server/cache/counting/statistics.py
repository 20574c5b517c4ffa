"""What the cache counts, and snapshots of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, computed_field

from proxystash_server.cache.config import CacheTierType
from proxystash_server.cache.counting.latency import LatencySummary, LatencyWindow


class TierState(StrEnum):
    """Whether a tier works, is skipped until it recovers, or is switched off by configuration."""

    ACTIVE = "active"
    DEGRADED = "degraded"
    DISABLED = "disabled"


class EvictionCause(StrEnum):
    """Why an entry left a tier without being deleted."""

    CAPACITY = "capacity"
    TTL = "ttl"
    HEALTH = "health"
    CORRUPTION = "corruption"


def _rate(hits: int, misses: int) -> float:
    return hits / (hits + misses) if hits + misses else 0.0


class TierStatistics(BaseModel):
    """One tier in a snapshot. Evictions count what this tier lost, each once, under its cause."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: str = ""
    state: TierState = TierState.ACTIVE
    entries: int = 0
    max_entries: int = 0
    hits: int = 0
    misses: int = 0
    evictions_capacity: int = 0
    evictions_ttl: int = 0
    evictions_health: int = 0
    evictions_corruption: int = 0
    errors: int = 0
    read_latency: LatencySummary = LatencySummary()
    write_latency: LatencySummary = LatencySummary()
    log_bytes: int = 0

    @computed_field  # type: ignore[prop-decorator]  # pydantic's documented pair of decorators
    @property
    def hit_rate(self) -> float:
        """Hits over the lookups that reached this tier, 0.0 to 1.0."""
        return _rate(self.hits, self.misses)

    @computed_field  # type: ignore[prop-decorator]  # as above
    @property
    def total_evictions(self) -> int:
        """Evictions under all causes."""
        return (
            self.evictions_capacity + self.evictions_ttl + self.evictions_health + self.evictions_corruption
        )

    @computed_field  # type: ignore[prop-decorator]  # as above
    @property
    def current_size(self) -> int:
        """proxywhirl's name for `entries`."""
        return self.entries

    @computed_field  # type: ignore[prop-decorator]  # as above
    @property
    def evictions_lru(self) -> int:
        """proxywhirl's name for `evictions_capacity`."""
        return self.evictions_capacity


class CacheStatistics(BaseModel):
    """A snapshot of the cache, consistent in itself. Counts are since the manager was made, and only grow."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    observed_at_us: int = 0
    started_at_us: int = 0
    l1_stats: TierStatistics = TierStatistics()
    l2_stats: TierStatistics = TierStatistics()
    l3_stats: TierStatistics = TierStatistics()
    hits: int = 0
    misses: int = 0
    entries: int = 0
    promotions: int = 0
    demotions: int = 0
    removals: int = 0

    @computed_field  # type: ignore[prop-decorator]  # pydantic's documented pair of decorators
    @property
    def hit_rate(self) -> float:
        """Lookups answered from any tier over all lookups, 0.0 to 1.0."""
        return _rate(self.hits, self.misses)

    @property
    def tiers(self) -> tuple[TierStatistics, TierStatistics, TierStatistics]:
        """The three tiers, fastest first."""
        return self.l1_stats, self.l2_stats, self.l3_stats

    @computed_field  # type: ignore[prop-decorator]  # as above
    @property
    def overall_hit_rate(self) -> float:
        """proxywhirl's rate: of the hits of all tiers to those and the misses of the tier that has most.

        Less than `hit_rate` where lower tiers answer: such a lookup is a hit there and a miss above.
        """
        return _rate(sum(tier.hits for tier in self.tiers), max(tier.misses for tier in self.tiers))

    @computed_field  # type: ignore[prop-decorator]  # as above
    @property
    def total_size(self) -> int:
        """proxywhirl's sum over the tiers: unlike in `entries`, one in three tiers counts three times."""
        return sum(tier.entries for tier in self.tiers)

    @computed_field  # type: ignore[prop-decorator]  # as above
    @property
    def l1_degraded(self) -> bool:
        """Whether L1 does not serve."""
        return self.l1_stats.state != TierState.ACTIVE

    @computed_field  # type: ignore[prop-decorator]  # as above
    @property
    def l2_degraded(self) -> bool:
        """Whether L2 does not serve."""
        return self.l2_stats.state != TierState.ACTIVE

    @computed_field  # type: ignore[prop-decorator]  # as above
    @property
    def l3_degraded(self) -> bool:
        """Whether L3 does not serve."""
        return self.l3_stats.state != TierState.ACTIVE

    def to_metrics_dict(self) -> dict[str, float]:
        """A flat dictionary of gauges and counters for monitoring systems, as proxywhirl has it."""
        metrics = {
            "cache.overall.hit_rate": self.overall_hit_rate,
            "cache.total_size": float(self.total_size),
            "cache.promotions": float(self.promotions),
            "cache.demotions": float(self.demotions),
        }
        for name, tier in zip(CacheTierType, self.tiers, strict=True):
            metrics[f"cache.{name}.hit_rate"] = tier.hit_rate
            metrics[f"cache.{name}.size"] = float(tier.entries)
        return metrics


class _TierCounters:
    __slots__ = ("errors", "evictions", "hits", "misses", "read_latency", "write_latency")

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self.hits = 0
        self.misses = 0
        self.errors = 0
        self.evictions = dict.fromkeys(EvictionCause, 0)
        self.read_latency = LatencyWindow(monotonic)
        self.write_latency = LatencyWindow(monotonic)


class TierFacts(NamedTuple):
    """What a snapshot takes from a tier itself rather than from the counters."""

    backend: str
    state: TierState
    entries: int
    max_entries: int
    log_bytes: int = 0


class StatisticsRecorder:
    """Owns the counters; thread-safe.

    Each method records one event whole, so no snapshot sees half of one.
    """

    def __init__(self, started_at_us: int, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._started_at_us = started_at_us
        self._tiers = {tier: _TierCounters(monotonic) for tier in CacheTierType}
        self._misses = self._promotions = self._demotions = self._removals = 0

    def record_lookup(
        self, hit: CacheTierType | None, missed: Iterable[CacheTierType], promotions: int
    ) -> None:
        """A lookup that L1 could not answer: those that it can, it counts itself.

        The tier that answered it, those that could not, and the copies it made into faster tiers.
        """
        with self._lock:
            if hit is None:
                self._misses += 1
            else:
                self._tiers[hit].hits += 1
            for tier in missed:
                self._tiers[tier].misses += 1
            self._promotions += promotions

    def record_evictions(
        self, cause: EvictionCause, losses: dict[CacheTierType, int], *, demotions: int = 0
    ) -> None:
        """Entries that tiers lost under one cause; `demotions` of them stay in a slower tier."""
        with self._lock:
            for tier, count in losses.items():
                self._tiers[tier].evictions[cause] += count
            self._demotions += demotions

    def record_promotions(self, count: int) -> None:
        """Copies into faster tiers that were made after their lookup had been answered."""
        with self._lock:
            self._promotions += count

    def record_removals(self, count: int) -> None:
        """Distinct entries that Delete or Clear removed."""
        with self._lock:
            self._removals += count

    def record_error(self, tier: CacheTierType) -> None:
        """A failed operation of a tier."""
        with self._lock:
            self._tiers[tier].errors += 1

    def latency(self, tier: CacheTierType, kind: Literal["read", "write"]) -> LatencyWindow:
        """Where the durations of a tier's reads or writes are counted."""
        counters = self._tiers[tier]
        return counters.read_latency if kind == "read" else counters.write_latency

    def snapshot(
        self, observed_at_us: int, facts: dict[CacheTierType, TierFacts], entries: int, l1_hits: int
    ) -> CacheStatistics:
        """Everything counted so far, at one instant; `l1_hits` is what L1 has counted."""
        latencies = {
            tier: (counters.read_latency.summary(), counters.write_latency.summary())
            for tier, counters in self._tiers.items()
        }
        with self._lock:
            hits = {tier: counters.hits for tier, counters in self._tiers.items()}
            hits[CacheTierType.L1] = l1_hits
            tiers = {
                f"{tier}_stats": TierStatistics(
                    backend=facts[tier].backend,
                    state=facts[tier].state,
                    entries=facts[tier].entries,
                    max_entries=facts[tier].max_entries,
                    hits=hits[tier],
                    misses=counters.misses,
                    evictions_capacity=counters.evictions[EvictionCause.CAPACITY],
                    evictions_ttl=counters.evictions[EvictionCause.TTL],
                    evictions_health=counters.evictions[EvictionCause.HEALTH],
                    evictions_corruption=counters.evictions[EvictionCause.CORRUPTION],
                    errors=counters.errors,
                    read_latency=latencies[tier][0],
                    write_latency=latencies[tier][1],
                    log_bytes=facts[tier].log_bytes,
                )
                for tier, counters in self._tiers.items()
            }
            return CacheStatistics.model_validate(
                {
                    "observed_at_us": observed_at_us,
                    "started_at_us": self._started_at_us,
                    "hits": sum(hits.values()),
                    "misses": self._misses,
                    "entries": entries,
                    "promotions": self._promotions,
                    "demotions": self._demotions,
                    "removals": self._removals,
                    **tiers,
                }
            )


class SilentStatistics(StatisticsRecorder):
    """Counts nothing: what `enable_statistics = False` asks for."""

    def snapshot(
        self, observed_at_us: int, facts: dict[CacheTierType, TierFacts], entries: int, l1_hits: int
    ) -> CacheStatistics:
        return super().snapshot(observed_at_us, facts, entries, 0)

    def record_lookup(
        self, hit: CacheTierType | None, missed: Iterable[CacheTierType], promotions: int
    ) -> None:
        pass

    def record_evictions(
        self, cause: EvictionCause, losses: dict[CacheTierType, int], *, demotions: int = 0
    ) -> None:
        pass

    def record_promotions(self, count: int) -> None:
        pass

    def record_removals(self, count: int) -> None:
        pass

    def record_error(self, tier: CacheTierType) -> None:
        pass
