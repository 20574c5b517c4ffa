"""Interleaved rounds, and the ratio that they amount to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

# What one action measured in one round, by the name of the figure, such as {"per_second": 3000.0}.
Figures = Mapping[str, float]
# The same over all rounds.
Series = dict[str, list[float]]


@dataclass(frozen=True)
class Spread:
    """A figure, and the least and the greatest that a single round gave."""

    value: float
    low: float
    high: float


def interleave(actions: Mapping[str, Callable[[], Figures]], rounds: int) -> dict[str, Series]:
    """Run every action once in each round, A B C A B C, so that what disturbs one disturbs all."""
    measured: dict[str, Series] = {name: {} for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            for figure, value in action().items():
                measured[name].setdefault(figure, []).append(value)
    return measured


def ratio(ours: Sequence[float], theirs: Sequence[float], factor: float = 1) -> Spread:
    """The median of one series over that of another, times `factor`; the extremes are those of the rounds."""
    rounds = [factor * one / other for one, other in zip(ours, theirs, strict=True)]
    return Spread(factor * median(ours) / median(theirs), min(rounds), max(rounds))


def spread(values: Sequence[float], factor: float = 1) -> Spread:
    """The median of a series, times `factor`, with its extremes."""
    return Spread(factor * median(values), factor * min(values), factor * max(values))
