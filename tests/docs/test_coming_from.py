"""The page for those who come from other pools names commands and options that there are."""

from __future__ import annotations

import re
import shlex

import pytest
import typer.main

from proxystash.cli import app
from proxystash.importing.pools import Pool
from tests.support.scripts import ROOT

_PAGE = (ROOT / "docs/coming-from.md").read_text()
_COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # typed as a plain command


@pytest.mark.parametrize("line", re.findall(r"(?:^|`)(proxystash [a-z][^`\n#]*)", _PAGE, re.MULTILINE))
def test_every_command_of_the_page_is_one(line: str) -> None:
    _, name, *words = shlex.split(line)

    known = {option for parameter in _COMMANDS[name].params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known
    if name == "import" and words:
        assert words[0] in list(Pool)


def test_every_pool_has_its_commands() -> None:
    assert set(re.findall(r"proxystash import ([\w-]+) ", _PAGE)) == set(Pool)


def test_the_options_of_the_page_are_those_of_import() -> None:
    known = {option for parameter in _COMMANDS["import"].params for option in parameter.opts}
    head = _PAGE.partition("## jhao104")[0]

    named = set(re.findall(r"`(--[a-z-]+)`", head))
    assert {"--source", "--scheme", "--if-absent"} <= named <= known
