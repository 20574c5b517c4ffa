"""Figures as text."""

from __future__ import annotations


def number(value: float, unit: str) -> str:
    """A figure with as many digits as mean something."""
    size = abs(value)
    text = f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
    return f"{text} {unit}" if unit[0].isalpha() else f"{text}{unit}"


def beside(ours: float, theirs: float, unit: str) -> str:
    """Two figures that a row compares."""
    return f"{number(ours, unit)} beside {number(theirs, unit)}"
