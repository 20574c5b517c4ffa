"""The server that does nothing, beside which ours is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import pool_service_pb2 as pool_pb
from tests.benchmarks.servers import noop
from tests.support.rpc import DEADLINE


@pytest.mark.parametrize("pool", ["stock", "ours"])
def test_it_gives_the_answers_it_has_whosever_threads_it_uses(
    tmp_path: Path, pool: Literal["stock", "ours"]
) -> None:
    answer = pb.GetResponse(entry=pb.CacheEntry(key="k"), served_by=pb.TIER_L1)
    with noop(tmp_path / "answers", {"Get": answer}, pool) as server:
        assert server.stub.Get(pb.GetRequest(key="k"), timeout=DEADLINE) == answer


def test_it_also_lends(tmp_path: Path) -> None:
    answer = pool_pb.AcquireResponse(leases=[pool_pb.Lease(lease_id="l", key="k")])
    with noop(tmp_path / "answers", {"Acquire": answer}) as server:
        assert server.pool.Acquire(pool_pb.AcquireRequest(), timeout=DEADLINE) == answer
