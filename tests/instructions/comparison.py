"""Counts against a baseline: what grew, what that means, and how it is shown."""

from __future__ import annotations

import json
import platform
import sqlite3
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final, Self

from tests.instructions.callgrind import valgrind_version

BASELINE: Final = Path(__file__).with_name("baseline.json")
# In percent. Counts of the same code differ by up to 0.3. An edit that has nothing to do with a path moves it
# by about 1: CPython finds attributes in a cache of 4,096 places, which it chooses by addresses in memory.
TOLERANCE: Final = 3.0
_LIBRARIES: Final = ("cryptography", "grpcio", "protobuf", "pydantic", "pydantic-core", "structlog")


def this_environment() -> dict[str, str]:
    """What the counts depend on besides the code."""
    return {
        "python": " ".join(sys.version.split()),
        "machine": f"{platform.system()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "sqlite": sqlite3.sqlite_version,
        "valgrind": valgrind_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


@dataclass(frozen=True)
class Baseline:
    """Counts to compare with, and where they come from."""

    environment: Mapping[str, str]
    instructions: Mapping[str, int]

    @classmethod
    def read(cls, file: Path | None = None) -> Self:
        """The baseline in a file, by default the committed one; an empty one if there is no file."""
        file = BASELINE if file is None else file
        if not file.exists():
            return cls({}, {})
        return cls(**json.loads(file.read_text()))

    def write(self, file: Path | None = None) -> None:
        """Keep it in a file that shows, in a diff, what changed."""
        content = {"environment": self.environment, "instructions": self.instructions}
        file = BASELINE if file is None else file
        file.write_text(json.dumps(content, indent=2) + "\n")

    def differences(self, environment: Mapping[str, str]) -> list[str]:
        """In what the baseline was counted elsewhere, so that no comparison with it means anything."""
        return [
            f"{name}: here {here or 'none'}, in the baseline {self.environment.get(name) or 'unknown'}"
            for name, here in environment.items()
            if here != self.environment.get(name)
        ]


@dataclass(frozen=True)
class Comparison:
    """Counts beside those they are compared with. `tolerance` is in percent."""

    counted: Mapping[str, int]
    before: Mapping[str, int]
    tolerance: float

    def change(self, name: str) -> float | None:
        """By how many percent a path grew; None if it is new."""
        before = self.before.get(name)
        return None if before is None else (self.counted[name] - before) * 100 / before

    @property
    def grown(self) -> list[str]:
        """The paths that grew by more than the tolerance."""
        return [name for name in self.counted if (self.change(name) or 0.0) > self.tolerance]

    @property
    def unknown(self) -> list[str]:
        """The paths that there is nothing to compare with."""
        return [name for name in self.counted if name not in self.before]

    def table(self, title: str) -> str:
        """A line for each path; `title` names what it is compared with."""
        rows = [("path", "instructions", title, "change", "")]
        for name, now in self.counted.items():
            change = self.change(name)
            if change is None:
                rows.append((name, f"{now:,}", "-", "-", "new"))
                continue
            remark = "grew" if change > self.tolerance else "shrank" if change < -self.tolerance else ""
            rows.append((name, f"{now:,}", f"{self.before[name]:,}", f"{change:+.2f}%", remark))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if 0 < place < 4 else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )
