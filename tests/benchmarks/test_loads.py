"""What the load generators print is believed only if every request was answered."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.loads import Load, LoadError, h2load_command, read_ghz, read_h2load

H2LOAD = """starting benchmark...
finished in 2.51s, 3187.25 req/s, 1.01MB/s
requests: 8000 total, 8000 started, 8000 done, {succeeded} succeeded, {failed} failed, 0 errored, 0 timeout
status codes: 8000 2xx, 0 3xx, 0 4xx, 0 5xx
"""


def test_h2load_gives_a_rate() -> None:
    assert read_h2load(H2LOAD.format(succeeded=8000, failed=0), 8000) == Load(3187.25)


@pytest.mark.parametrize(
    "output",
    [H2LOAD.format(succeeded=7999, failed=1), H2LOAD.format(succeeded=7000, failed=0), "could not connect"],
)
def test_h2load_that_lost_requests_is_an_error(output: str) -> None:
    with pytest.raises(LoadError):
        read_h2load(output, 8000)


def ghz(**statuses: int) -> str:
    latencies = [{"percentage": 50, "latency": 1_000_000}, {"percentage": 99, "latency": 5_000_000}]
    return json.dumps({"rps": 2500.5, "statusCodeDistribution": statuses, "latencyDistribution": latencies})


def test_ghz_gives_a_rate_and_a_tail() -> None:
    assert read_ghz(ghz(OK=100), 100) == Load(2500.5, 0.005)


@pytest.mark.parametrize("output", [ghz(OK=99, Unavailable=1), ghz(OK=50), ghz(InvalidArgument=100)])
def test_ghz_with_errors_is_an_error(output: str) -> None:
    with pytest.raises(LoadError):
        read_ghz(output, 100)


def test_a_load_is_of_the_service_that_its_method_names() -> None:
    assert h2load_command("t:1", "Get", Path("f"))[-1] == "http://t:1/proxystash.v1.CacheService/Get"
    acquire = h2load_command("t:1", "PoolService/Acquire", Path("f"))
    assert acquire[-1] == "http://t:1/proxystash.v1.PoolService/Acquire"
