"""Every row, in the order of the table."""

from __future__ import annotations

from typing import Final

from tests.benchmarks import rows_reads, rows_writes
from tests.benchmarks.bench import Theme

THEMES: Final[tuple[Theme, ...]] = (rows_reads.THEME, rows_writes.THEME)
