"""The table says of every row what was measured, and whether that is enough."""

import re
from pathlib import Path

import pytest

from tests.benchmarks.publish import PublishError, fill_in, growth_table
from tests.benchmarks.report import summary, table
from tests.benchmarks.results import Measurement, Result, Row, State, at_least, at_most
from tests.benchmarks.rounds import Spread
from tests.benchmarks.run_file import Run, find, read_run, write_run

FAST = Row("fast", "Get", "a no-op", "h2load", at_least(0.9))
SMALL = Row("small", "memory", "", "resident", at_most(400), unit="MB")
FREE = Row("free", "put", "Redis", "a client")


def measured(row: Row, value: float, remark: str = "") -> Result:
    return Result(row, Measurement(Spread(value, value / 2, value * 2), {"raw": [value]}, remark))


@pytest.mark.parametrize(
    ("result", "state"),
    [
        (measured(FAST, 0.9), State.MET),
        (measured(FAST, 0.89), State.NOT_MET),
        (measured(SMALL, 400), State.MET),
        (measured(SMALL, 401), State.NOT_MET),
        (measured(FREE, 0.1), State.NO_GOAL),
        (Result(FAST, reason="h2load not found"), State.CANNOT_RUN),
    ],
)
def test_a_row_is_met_if_its_figure_is_within_its_goal(result: Result, state: State) -> None:
    assert result.state is state


def test_the_table_has_a_line_for_each_row() -> None:
    text = table(
        [
            measured(FAST, 0.5, "1/s beside 2/s"),
            measured(SMALL, 83.4),
            measured(FREE, 1234.5),
            Result(FAST, reason="h2load not found; install nghttp2-client"),
        ]
    )

    lines = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in text.splitlines()]
    assert lines[2:] == [
        ["Get", "a no-op", "h2load", "≥ 0.9×", "0.50×", "0.25× .. 1.00×", "not met", "1/s beside 2/s"],
        ["memory", "", "resident", "≤ 400 MB", "83.4 MB", "41.7 MB .. 167 MB", "met", ""],
        ["put", "Redis", "a client", "–", "1,234×", "617× .. 2,469×", "no goal", ""],
        [
            "Get",
            "a no-op",
            "h2load",
            "≥ 0.9×",
            "",
            "",
            "cannot run",
            "h2load not found; install nghttp2-client",
        ],
    ]
    assert len({len(line) for line in text.splitlines()}) == 1


def test_the_summary_counts_states() -> None:
    results = [measured(FAST, 1), measured(FAST, 0), measured(SMALL, 1), Result(FREE, reason="no Redis")]

    assert summary(results) == "2 met, 1 not met, 1 cannot run"


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = Run({"quick": True}, (measured(FAST, 1.5, "remark"), Result(SMALL, reason="no server")))

    write_run(tmp_path / "new folder" / "run.json", run)

    assert read_run(tmp_path / "new folder" / "run.json") == run
    assert find(run.results, "fast") == run.results[0].measurement
    assert find(run.results, "small") is None


def test_a_page_keeps_its_prose_and_gets_its_parts() -> None:
    page = "before\n<!-- bench: table -->\nold\n<!-- bench: end of table -->\nafter\n"

    filled = fill_in(page, {"table": "new \\1"})

    assert filled == ("before\n<!-- bench: table -->\n\nnew \\1\n\n<!-- bench: end of table -->\nafter\n")
    assert fill_in(filled, {"table": "new \\1"}) == filled


def test_a_page_without_a_place_for_a_part_is_refused() -> None:
    with pytest.raises(PublishError, match="bench: growth"):
        fill_in("no markers", {"growth": "text"})


def test_growth_is_told_of_each_operation_and_size() -> None:
    raw = {
        "put": {
            "10": {"wall_us": [1.0, 2.0, 3.0], "cpu_us": [1.0, 1.0, 1.0]},
            "10000": {"wall_us": [4.0, 4.0, 4.0], "cpu_us": [2.0, 2.0, 2.0]},
            "1000000": {"wall_us": [6.0, 6.0, 6.0], "cpu_us": [2.0, 2.0, 2.0]},
        },
        "clear": {
            "10000": {"wall_us": [2.0], "cpu_us": [2.0]},
            "1000000": {"wall_us": [1.0], "cpu_us": [1.0]},
        },
    }
    result = Result(Row("growth", "", "", ""), Measurement(Spread(1, 1, 1), raw))

    lines = [line.strip("| ") for line in growth_table(Run({}, (result,))).splitlines()]

    assert [re.split(r" +\| ", line)[1:] for line in lines[2:]] == [
        ["2.00 µs", "4.00 µs", "6.00 µs", "1.50×", "1.00×"],
        ["–", "2.00 µs", "1.00 µs", "0.50×", "0.50×"],
    ]
