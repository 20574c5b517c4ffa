"""The page on feeding names options that there are."""

from __future__ import annotations

import re

import typer.main

from proxystash.cli import app
from tests.support.scripts import ROOT


def test_the_options_of_the_page_are_the_commands() -> None:
    page = (ROOT / "docs/feeding.md").read_text()
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # typed as a plain command
    known = {option for parameter in commands["feed"].params for option in parameter.opts}
    named = {match for match in re.findall(r"(?<![\w-])--[a-z][a-z-]*", page) if match != "--proxy"}

    assert {"--every", "--once", "--max-size", "--fetch-timeout", "--max-redirects"} <= named
    assert named <= known
