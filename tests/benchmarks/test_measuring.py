"""The code that measures runs, at a size that takes no time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from proxystash.proxies import cache_key
from proxystash.v1 import cache_service_pb2 as pb
from tests.benchmarks import __main__ as program
from tests.benchmarks import rows_growth, tools
from tests.benchmarks.bench import Bench, Theme
from tests.benchmarks.catalogue import THEMES
from tests.benchmarks.growth_operations import CALLS, CLEAR, RARE, TITLES
from tests.benchmarks.made_up import key_of, proxy_url
from tests.benchmarks.messages import entry_message, write_framed
from tests.benchmarks.processes import CpuMeter, memory_mb, running
from tests.benchmarks.results import CannotRunError, Measurement, Row, State
from tests.benchmarks.selection_side import SelectionSide
from tests.benchmarks.servers import noop, proxystash
from tests.benchmarks.worker import measure
from tests.benchmarks.workers import WorkerError, open_worker


def test_every_row_has_a_name_of_its_own() -> None:
    names = [row.name for theme in THEMES for row in theme.rows]

    assert len(names) == len(set(names))


def test_made_up_proxies_have_the_keys_that_a_client_computes() -> None:
    assert [key_of(number) for number in (0, 70_000)] == [
        cache_key(proxy_url(number)) for number in (0, 70_000)
    ]


@pytest.mark.parametrize("backend", ["jsonl", "sqlite"])
def test_a_worker_measures_every_operation(tmp_path: Path, backend: str) -> None:
    with open_worker("proxystash", tmp_path, 300, backend) as worker:
        worker.fill()
        for operation in (*CALLS, *RARE, CLEAR):
            figures = worker.measure(operation, 3)
            # A store this small is all in memory.
            assert set(figures) == (set() if operation in {"below_get", "l3_get"} else {"wall_us", "cpu_us"})
            assert all(value >= 0 for value in figures.values())


@pytest.mark.parametrize("operation", ["any", "banned"])
def test_a_selection_is_measured_and_left_as_it_was(operation: str) -> None:
    side = SelectionSide("", "", 1000)
    side.fill()

    for _ in range(2):
        assert measure(side, operation, 10).keys() == {"wall_us", "cpu_us"}
        assert side._index.sizes() == (1000, 0, 0)
        assert not side._index.blocked(1)


def test_a_worker_tells_what_its_store_takes_of_memory(tmp_path: Path) -> None:
    with open_worker("selection", tmp_path, 20_000) as worker:
        assert 100 < worker.fill() / 20_000 < 1000


def test_a_worker_gets_from_each_tier_of_a_larger_store(tmp_path: Path) -> None:
    with open_worker("proxystash", tmp_path, 5_500) as worker:
        worker.fill()

        # The worker itself checks which tier has answered.
        assert worker.measure("l1_get", 10)
        assert worker.measure("below_get", 10)
        assert worker.measure("l3_get", 10)
        assert worker.measure("miss", 10)


def test_a_request_that_a_worker_cannot_do_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with open_worker("proxystash", tmp_path, 1) as worker, pytest.raises(WorkerError):
        worker.measure("unheard_of", 1)

    assert "unheard_of" in capfd.readouterr().err


def test_growth_is_measured_and_the_worst_operation_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_growth, "BASE", 20)
    monkeypatch.setattr(rows_growth, "_QUICK_LARGE", 40)
    monkeypatch.setattr(rows_growth, "CALLS", {"l1_get": 5, "put": 2})

    found = rows_growth.THEME.measure(Bench(tmp_path, quick=True), frozenset({"growth"}))

    growth = found["growth"]
    assert set(growth.raw) == {"l1_get", "put", CLEAR}
    assert set(growth.raw["put"]) == {"10", "20", "40"}
    assert any(growth.remark.startswith(TITLES[operation]) for operation in growth.raw)
    assert growth.spread.value > 0


def test_the_no_op_server_gives_the_answers_of_ours(tmp_path: Path) -> None:
    request = pb.GetRequest(key=key_of(1))
    with proxystash(tmp_path / "data") as ours:
        ours.stub.Put(pb.PutRequest(entry=entry_message(1)))
        answer = ours.stub.Get(request)
        assert ours.l1_hits() == 1
        assert ours.entries() == 1

    with noop(tmp_path / "answers", {"Get": answer}) as theirs:
        assert theirs.stub.Get(pb.GetRequest(key="another")) == answer
        assert memory_mb(theirs.pid) > 1
        assert CpuMeter(theirs.pid).used() >= 0


def test_a_framed_request_is_what_grpc_sends(tmp_path: Path) -> None:
    message = pb.GetRequest(key="k" * 300)

    data = write_framed(tmp_path / "get.bin", message).read_bytes()

    assert data[0] == 0
    assert int.from_bytes(data[1:5]) == len(data) - 5
    assert pb.GetRequest.FromString(data[5:]) == message


def test_processes_end_with_what_they_were_started_for() -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        running([sys.executable, "-c", "import time; time.sleep(600)"]) as one,
    ):
        raise KeyboardInterrupt

    assert one.returncode is not None


def test_processes_that_nobody_owns_are_ended_too() -> None:
    program = """
import subprocess, sys
from tests.benchmarks.processes import children, stop_children

subprocess.Popen(["sleep", "600"])
print(len(children()))
stop_children()
print(len(children()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tools.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert done.stdout.split() == ["1", "0"]


def test_rows_without_their_tool_say_so_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    rows = (Row("with", "a", "", "", needs=("h2load",)), Row("without", "b", "", ""))
    asked: list[frozenset[str]] = []

    def measure(bench: Bench, wanted: frozenset[str]) -> Mapping[str, Measurement]:
        asked.append(wanted)
        raise CannotRunError("the disk is full")

    results = program._results(
        Bench(tmp_path, quick=True), Theme("theme", rows, measure), {"with", "without"}
    )

    assert asked == [{"without"}]
    assert [result.state for result in results] == [State.CANNOT_RUN] * 2
    assert [result.reason for result in results] == [
        "h2load not found; install nghttp2-client",
        "the disk is full",
    ]


def test_the_program_lists_its_rows() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "--list"],
        cwd=tools.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert all(row.name in done.stdout for theme in THEMES for row in theme.rows)
