"""Every row, in the order of the table."""

from __future__ import annotations

from typing import Final

from tests.benchmarks import (
    rows_growth,
    rows_lending,
    rows_library,
    rows_near,
    rows_reads,
    rows_redis,
    rows_under_load,
    rows_writes,
)
from tests.benchmarks.bench import Theme

THEMES: Final[tuple[Theme, ...]] = (
    rows_reads.THEME,
    rows_writes.THEME,
    rows_library.THEME,
    rows_growth.THEME,
    rows_under_load.TAIL_THEME,
    rows_under_load.STREAMS_THEME,
    rows_under_load.WATCH_THEME,
    rows_lending.LEASE_THEME,
    rows_lending.SELECTION_THEME,
    rows_lending.WAITING_THEME,
    rows_redis.THEME,
    rows_near.THEME,
    rows_reads.CLIENTS_THEME,
)
