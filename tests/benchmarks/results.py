"""Rows: what is compared, what it must reach, and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tests.benchmarks.rounds import Spread


class State(StrEnum):
    """What became of a row."""

    MET = "met"
    NOT_MET = "not met"
    NO_GOAL = "no goal"
    CANNOT_RUN = "cannot run"


class CannotRunError(Exception):
    """Something that rows need is not on this machine; the message says what, and what to do."""


@dataclass(frozen=True)
class Goal:
    """A bound that a figure must not fall below, or not exceed."""

    bound: float
    at_least: bool

    def is_met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def at_least(bound: float) -> Goal:
    """The figure must not fall below `bound`."""
    return Goal(bound, at_least=True)


def at_most(bound: float) -> Goal:
    """The figure must not exceed `bound`."""
    return Goal(bound, at_least=False)


@dataclass(frozen=True)
class Row:
    """One line of the table, before it is measured. `unit` is × for a ratio."""

    name: str
    what: str
    against: str
    how: str
    goal: Goal | None = None
    unit: str = "×"
    # Programs that it cannot be measured without; see tools.py.
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """The figure of a row, what stands behind it, and a remark for the table."""

    spread: Spread
    raw: Mapping[str, Any] = field(default_factory=dict)
    remark: str = ""


@dataclass(frozen=True)
class Result:
    """A row, and what was measured or why it was not."""

    row: Row
    measurement: Measurement | None = None
    reason: str = ""

    @property
    def state(self) -> State:
        """Whether the goal was met."""
        if self.measurement is None:
            return State.CANNOT_RUN
        if self.row.goal is None:
            return State.NO_GOAL
        return State.MET if self.row.goal.is_met(self.measurement.spread.value) else State.NOT_MET
