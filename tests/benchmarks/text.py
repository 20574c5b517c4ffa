"""Figures as text."""

from __future__ import annotations

from collections.abc import Sequence


def number(value: float, unit: str) -> str:
    """A figure with as many digits as mean something."""
    size = abs(value)
    text = f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
    return f"{text} {unit}" if unit[0].isalpha() else f"{text}{unit}"


def beside(ours: float, theirs: float, unit: str) -> str:
    """Two figures that a row compares."""
    return f"{number(ours, unit)} beside {number(theirs, unit)}"


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table under the first line, its columns aligned so that it also reads well in a terminal."""
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(lines[0]))]
    rendered = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rendered.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(rendered)
