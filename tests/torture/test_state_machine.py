"""Whatever is asked of a cache in whatever order, and whatever fails meanwhile, its answers fit the model."""

from __future__ import annotations

from unittest import mock

import pytest

from proxystash_server.cache import disk
from tests.torture.machines import NAMES, run_machine
from tests.torture.tally import Tally

_EXAMPLES = {"library": 50, "grpc": 15}


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_keeps_to_the_model(name: str) -> None:
    """Every operation, clock steps, faults under one tier at a time, maintenance, restarts and crashes."""
    tally = Tally()

    run_machine(name, tally, examples=_EXAMPLES[name.split("-", maxsplit=1)[0]])

    assert tally["operations"]


def test_a_planted_bug_is_found() -> None:
    """Given a cache that does not note on disk what a tier misses: the machine sees that they disagree."""
    with (
        mock.patch.object(disk, "_for_backlog", list),
        pytest.raises(AssertionError),
    ):
        run_machine("library-jsonl", Tally(), examples=200, shrink=False)
