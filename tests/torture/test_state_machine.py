"""Whatever is asked of a cache in whatever order, and whatever fails meanwhile, its answers fit the model."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import pytest

from proxystash_server.cache import JsonlCacheTier
from proxystash_server.cache.tiers.base import Applied, Write
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
    """Given an L2 that keeps what is deleted: the machine sees that the tiers disagree."""
    apply = JsonlCacheTier.apply

    def keeping(tier: JsonlCacheTier, writes: Sequence[Write]) -> list[Applied]:
        stored = iter(apply(tier, [write for write in writes if write.entry is not None]))
        return [Applied(existed=True) if write.entry is None else next(stored) for write in writes]

    with (
        mock.patch.object(JsonlCacheTier, "apply", keeping),
        pytest.raises(AssertionError),
    ):
        run_machine("library-jsonl", Tally(), examples=200, shrink=False)
