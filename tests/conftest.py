"""Options of the whole test suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-bit",
        action="store_true",
        help="flip every bit of the first 16 KiB of each file of a store, instead of some (hours)",
    )
