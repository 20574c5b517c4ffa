"""Under a long mixed load with faults coming and going, nothing is lost and nothing grows."""

from __future__ import annotations

import pytest

from proxystash_server.cache import L2BackendType
from tests.torture.soak import Report, run_soak
from tests.torture.stores import BACKENDS
from tests.torture.tally import Tally


@pytest.mark.parametrize("l2_backend", BACKENDS)
def test_memory_threads_descriptors_and_disk_stay_flat(l2_backend: L2BackendType) -> None:
    """Given clients of the library and of the server, and one of the disk tiers or both failing."""
    tally = Tally()

    report = run_soak(tally, l2_backend, seed=1, seconds=10)

    print("\n".join(report.lines()))
    assert not report.grown(), report.lines()
    assert not report.breaches
    assert tally["operations"] > 100
    assert tally["faults"]


def test_growth_would_be_noticed() -> None:
    """Given quarters of which one shows more and more descriptors, that one is named."""
    flat = [30.0, 31.0, 32.0, 31.0]
    report = Report(quarters={"threads": flat, "descriptors": [30.0, 60.0, 90.0, 120.0]})

    assert report.grown() == ["descriptors grew from 60 to 120"]
