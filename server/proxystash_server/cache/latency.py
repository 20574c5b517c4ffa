"""Latency summaries over a sliding minute, at a fixed small cost per sample."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict

_WINDOW_SLICES = 12
_SLICE_SECONDS = 5.0
# Buckets grow by an eighth of an octave: a percentile is at most 9% off, and 40 octaves of nanoseconds cover
# 18 minutes.
_SUBDIVISIONS = 8
_BUCKETS = 40 * _SUBDIVISIONS


class LatencySummary(BaseModel):
    """Latencies of the last minute, in microseconds; zeros where there were none."""

    model_config = ConfigDict(frozen=True)

    p50_us: float = 0.0
    p99_us: float = 0.0
    max_us: float = 0.0


def _bucket(nanoseconds: int) -> int:
    if nanoseconds < _SUBDIVISIONS:
        return max(nanoseconds, 0)
    octave = nanoseconds.bit_length() - 4
    bucket = (octave << 3) + (nanoseconds >> octave)
    return bucket if bucket < _BUCKETS else _BUCKETS - 1


def _upper_bound(bucket: int) -> int:
    if bucket < 2 * _SUBDIVISIONS:
        return bucket
    octave = (bucket >> 3) - 1
    return ((bucket - (octave << 3)) + 1 << octave) - 1


class LatencyWindow:
    """Counts durations in logarithmic buckets, a ring of five-second slices making the last minute.

    Thread-safe.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._slices: list[dict[int, int]] = [{} for _ in range(_WINDOW_SLICES)]
        self._longest = [0] * _WINDOW_SLICES
        self._current = int(monotonic() / _SLICE_SECONDS)

    def record(self, nanoseconds: int) -> None:
        """Count one duration."""
        bucket = _bucket(nanoseconds)
        with self._lock:
            now = int(self._monotonic() / _SLICE_SECONDS)
            if now > self._current:
                self._advance(now)
            place = self._current % _WINDOW_SLICES
            counts = self._slices[place]
            counts[bucket] = counts.get(bucket, 0) + 1
            if nanoseconds > self._longest[place]:
                self._longest[place] = nanoseconds

    def summary(self) -> LatencySummary:
        """The last minute in three numbers."""
        total: dict[int, int] = {}
        with self._lock:
            self._advance(int(self._monotonic() / _SLICE_SECONDS))
            longest = max(self._longest)
            for counts in self._slices:
                for bucket, count in counts.items():
                    total[bucket] = total.get(bucket, 0) + count
        if not total:
            return LatencySummary()
        ordered = sorted(total.items())
        return LatencySummary(
            p50_us=min(_percentile(ordered, 0.50), longest) / 1000,
            p99_us=min(_percentile(ordered, 0.99), longest) / 1000,
            max_us=longest / 1000,
        )

    def _advance(self, now: int) -> None:
        for passed in range(max(self._current + 1, now - _WINDOW_SLICES + 1), now + 1):
            self._slices[passed % _WINDOW_SLICES] = {}
            self._longest[passed % _WINDOW_SLICES] = 0
        self._current = max(self._current, now)


def _percentile(ordered: list[tuple[int, int]], fraction: float) -> int:
    rank = fraction * sum(count for _, count in ordered)
    seen = 0
    for bucket, count in ordered:
        seen += count
        if seen >= rank:
            return _upper_bound(bucket)
    return _upper_bound(ordered[-1][0])
