"""The near cache of both clients: its rules, run from tests/near, and how it does beside a real server."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from proxystash._copies import Copies

from .fake_service import serving
from .near_script import CASES, SUBJECTS, Clocks, Script, ScriptedService

pytestmark = pytest.mark.usefixtures("_resumes_quickly")


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    """Clocks that every near cache of the test goes by."""
    clocks = Clocks()
    copies = partial(Copies, steady=lambda: clocks.steady, wall=lambda: clocks.wall)
    monkeypatch.setattr("proxystash.near.Copies", copies)
    return clocks


@pytest.mark.parametrize("kind", SUBJECTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_rule(case: dict[str, Any], kind: str, clocks: Clocks) -> None:
    settings: dict[str, Any] = {
        "max_entries": case.get("max_entries", 3),
        "max_silence": timedelta(seconds=case.get("max_silence", 20)),
    }
    service = ScriptedService()
    with serving(service) as target, SUBJECTS[kind](target, **settings) as subject:
        Script(service, subject, clocks, settings["max_silence"] / 2).run(case["steps"])
