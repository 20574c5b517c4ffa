"""What a check of a stopped store found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

# Of each kind so many are kept; a store of a million entries may have a million of one kind.
LISTED_PER_KIND: Final = 1000

# Told while something long is under way: what it is, how far it is, and how far it will go.
Progress = Callable[[str, int, int], None]


def no_progress(_what: str, _done: int, _total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or worth knowing: what kind, where, and what to do. Has no secrets."""

    kind: str
    place: str
    message: str
    remedy: str = ""


@dataclass(slots=True)
class TierTotals:
    """What one tier holds."""

    tier: str
    backend: str
    path: str
    exists: bool = False
    entries: int = 0
    credentials: int = 0
    set_aside: int = 0


@dataclass(slots=True)
class Report:
    """The result of a check. A store with notes only is consistent: its next start needs no help.

    `counts` has the number of findings of each kind, also of those beyond the LISTED_PER_KIND that are kept.
    """

    faults: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    tiers: list[TierTotals] = field(default_factory=list)

    @property
    def consistent(self) -> bool:
        """Whether no fault was found."""
        return not self.faults

    def fault(self, kind: str, place: str, message: str, remedy: str = "") -> None:
        """Add something that must not be."""
        self._add(self.faults, Finding(kind, place, message, remedy))

    def note(self, kind: str, place: str, message: str, remedy: str = "") -> None:
        """Add something that the next start heals, or that does no harm."""
        self._add(self.notes, Finding(kind, place, message, remedy))

    def unreadable_credential(self, place: str, key: object) -> None:
        """Add a fault: no key at hand opens the credential of `key`."""
        remedy = "give its key in PROXYSTASH_ENCRYPTION_KEY_PREVIOUS, or --repair sets it aside"
        self.fault("unreadable_credential", place, f"the credential of {key!r} cannot be opened", remedy)

    def note_older_format(self, place: str, version: int, current: int) -> None:
        """Add that a store has the format `version`, if that is an earlier one."""
        if version < current:
            remedy = f"the next start brings it to format {current}"
            self.note("older_format", place, f"the format is {version}", remedy)

    def omitted(self) -> dict[str, int]:
        """Kinds of which more were found than are kept, and how many more."""
        kept = Counter(finding.kind for finding in (*self.faults, *self.notes))
        return {kind: count - kept[kind] for kind, count in self.counts.items() if count > kept[kind]}

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {
            "consistent": self.consistent,
            "faults": [asdict(finding) for finding in self.faults],
            "notes": [asdict(finding) for finding in self.notes],
            "counts": dict(self.counts),
            "tiers": [asdict(totals) for totals in self.tiers],
        }

    def _add(self, findings: list[Finding], finding: Finding) -> None:
        self.counts[finding.kind] += 1
        if self.counts[finding.kind] <= LISTED_PER_KIND:
            findings.append(finding)
