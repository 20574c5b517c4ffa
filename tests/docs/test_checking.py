"""The page on checking names options and outcomes that there are."""

from __future__ import annotations

import re

import typer.main

from proxystash.cli import app
from proxystash.pool_models import Outcome
from tests.support.scripts import ROOT

_PAGE = (ROOT / "docs/checking.md").read_text()


def test_the_options_of_the_page_are_the_commands() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # typed as a plain command
    known = {option for parameter in commands["check-proxies"].params for option in parameter.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", _PAGE))

    assert {"--every", "--once", "--expect", "--check-timeout", "--concurrency", "--rate"} <= named <= known


def test_the_outcomes_of_the_page_are_the_pools() -> None:
    named = set(re.findall(r"`([A-Z]+_?[A-Z]+)`", _PAGE))

    assert named == {outcome.name for outcome in Outcome} - {"ABANDONED"}
