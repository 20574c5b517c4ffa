"""A short version of every attack: the other clients notice nothing worse than waiting."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.attacks import ATTACKS
from tests.hostile.cases import run_case
from tests.hostile.others import Others
from tests.server.cache.support import wait_until
from tests.support.server import running_server


# A log that nobody reads is no matter of connections: scripts/hostile tries it, its tests are elsewhere.
@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if not attack.holds_log])
def test_an_attack_costs_the_others_no_call_and_no_write(name: str) -> None:
    outcome = run_case(ATTACKS[name], seconds=1)

    assert not outcome.breaches
    assert outcome.times
    assert outcome.seconds


def test_what_others_cannot_do_is_noticed(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        others = Others(server.target)
        with others.at_work():
            wait_until(lambda: bool(others.acknowledged))
            assert not others.failures
            server.kill()
            wait_until(lambda: others.failures["UNAVAILABLE"] > 1)
