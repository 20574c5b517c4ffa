"""Latency summaries over a sliding minute, at a fixed small cost per sample."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict

_WINDOW_SLICES = 12
_SLICE_SECONDS = 5.0
# Buckets grow by an eighth of an octave: a percentile is at most 9% off.
_SUBDIVISIONS = 8


class LatencySummary(BaseModel):
    """Latencies of the last minute, in microseconds; zeros where there were none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    p50_us: float = 0.0
    p99_us: float = 0.0
    max_us: float = 0.0


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
        # The place of the current slice, its counts, and when it ends.
        self._place = self._current % _WINDOW_SLICES
        self._counts = self._slices[self._place]
        self._ends = (self._current + 1) * _SLICE_SECONDS

    def record(self, nanoseconds: int) -> None:
        """Count one duration."""
        # Several times in each write, so without a function in between.
        octave = nanoseconds.bit_length() - 4
        if octave > 0:
            bucket = (octave << 3) + (nanoseconds >> octave)
        else:
            bucket = max(0, nanoseconds)
        with self._lock:
            if self._monotonic() >= self._ends:
                self._advance()
            counts = self._counts
            counts[bucket] = counts.get(bucket, 0) + 1
            if nanoseconds > self._longest[self._place]:
                self._longest[self._place] = nanoseconds

    def summary(self) -> LatencySummary:
        """The last minute in three numbers."""
        total: dict[int, int] = {}
        with self._lock:
            self._advance()
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

    def _advance(self) -> None:
        now = int(self._monotonic() / _SLICE_SECONDS)
        for passed in range(max(self._current + 1, now - _WINDOW_SLICES + 1), now + 1):
            self._slices[passed % _WINDOW_SLICES] = {}
            self._longest[passed % _WINDOW_SLICES] = 0
        self._current = max(self._current, now)
        self._place = self._current % _WINDOW_SLICES
        self._counts = self._slices[self._place]
        self._ends = (self._current + 1) * _SLICE_SECONDS


def _percentile(ordered: list[tuple[int, int]], fraction: float) -> int:
    rank = fraction * sum(count for _, count in ordered)
    seen = 0
    for bucket, count in ordered:
        seen += count
        if seen >= rank:
            return _upper_bound(bucket)
    return _upper_bound(ordered[-1][0])
