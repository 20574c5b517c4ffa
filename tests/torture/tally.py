"""What a run of the torture tests did, and what it found."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Final, Literal, get_args

Kind = Literal["lost", "resurrected", "stale", "lent twice", "withheld"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

_LABELS: Final = {
    "operations": "operations",
    "kills": "kills",
    "faults": "faults injected",
    "restarts": "clean restarts",
    "corruptions": "corruptions tried",
    "lost": "acknowledged writes lost",
    "resurrected": "resurrections",
    "stale": "stale reads",
    "lent twice": "leases too many",
    "withheld": "proxies withheld",
}


class BreachError(AssertionError):
    """A promise that was broken: which, and how it showed."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Tally:
    """Counts of what was done and of what went wrong. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, what: str, count: int = 1) -> None:
        """Count something that was done, or a kind of breach."""
        with self._lock:
            self._counts[what] += count

    def __getitem__(self, what: str) -> int:
        with self._lock:
            return self._counts[what]

    @property
    def breaches(self) -> int:
        """How often a promise was broken."""
        return sum(self[kind] for kind in KINDS)

    def lines(self) -> list[str]:
        """The summary."""
        return [f"{label + ':':26}{self[what]:>10,}" for what, label in _LABELS.items()]
