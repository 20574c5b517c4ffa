"""What the themes share: how much to measure, where to keep files, whom to tell."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import TypeVar

from tests.benchmarks.results import Measurement, Row
from tests.benchmarks.rounds import Figures, Series, interleave

_Value = TypeVar("_Value")


@dataclass
class Bench:
    """One run."""

    folder: Path
    quick: bool
    started: float = field(default_factory=time.monotonic)

    def new_folder(self) -> Path:
        """A folder of its own for a store, on the disk that the checkout is on."""
        return Path(mkdtemp(dir=self.folder))

    @property
    def rounds(self) -> int:
        """How many rounds of each comparison."""
        return self.size(7, 3)

    def size(self, full: _Value, quick: _Value) -> _Value:
        """The first in a full run, the second in a quick one."""
        return quick if self.quick else full

    def tell(self, text: str) -> None:
        """Progress, on standard error."""
        print(f"{time.monotonic() - self.started:6.0f} s  {text}", file=sys.stderr, flush=True)

    def interleave(self, actions: Mapping[str, Callable[[], Figures]], rounds: int = 0) -> dict[str, Series]:
        """Interleaved rounds of the actions, as many as usual if not told otherwise."""
        return interleave(actions, rounds or self.rounds)


@dataclass(frozen=True)
class Theme:
    """Rows that are measured together. `measure` gets the names of the rows that are wanted."""

    title: str
    rows: tuple[Row, ...]
    measure: Callable[[Bench, frozenset[str]], Mapping[str, Measurement]]
