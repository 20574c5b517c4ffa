"""Counts are read from callgrind's dumps, and what grew is flagged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from tests.instructions import __main__ as command
from tests.instructions import comparison
from tests.instructions.callgrind import ROOT, CountingError, read_counts
from tests.instructions.comparison import Baseline, Comparison, this_environment
from tests.instructions.paths import PATHS

# The beginning and the end of a real dump.
DUMP = """\
# callgrind format
version: 1
creator: callgrind-3.19.0
pid: 4711
cmd:  python -m tests.instructions.measured
part: 2

desc: I1 cache:
desc: D1 cache:
desc: LL cache:

desc: Timerange: Basic block 13126583 - 13182430
desc: Trigger: --dump-before=ctermid

positions: line
events: Ir
summary: 396160

ob=(3) /usr/lib/libc.so.6
fl=(7) ???
fn=(12) malloc
0 1234
cfn=(14) _int_malloc
calls=12 0
0 567

totals: 396160
"""

Run = Callable[..., int]


def test_a_count_is_the_total_of_the_second_dump_of_the_paths_process(tmp_path: Path) -> None:
    (tmp_path / "dump.4711.1").write_text(DUMP.replace("396160", "1"))
    (tmp_path / "dump.4711.2").write_text(DUMP)
    (tmp_path / "dump.4711").write_text(DUMP.replace("396160", "2"))
    (tmp_path / "dump.4712.2").write_text(DUMP.replace("396160", "3001"))

    counts = read_counts(
        '{"path": "a", "pid": 4711, "operations": 100}\n{"path": "b", "pid": 4712, "operations": 3}\n',
        tmp_path,
    )

    assert counts == {"a": 3962, "b": 1000}


@pytest.mark.parametrize("content", [None, "", "events: Ir\nsummary: 12\n"])
def test_a_dump_that_is_missing_or_cut_off_is_no_count(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "dump.4711.2").write_text(content)

    with pytest.raises(CountingError, match="ctermid"):
        read_counts('{"path": "a", "pid": 4711, "operations": 100}', tmp_path)


def test_growth_beyond_the_tolerance_is_flagged_and_nothing_else() -> None:
    before = {"grown": 10_000, "at the limit": 10_000, "equal": 10_000, "shrunk": 10_000}
    now = {"grown": 10_201, "at the limit": 10_200, "equal": 10_000, "shrunk": 5_000, "new": 7}

    found = Comparison(now, before, tolerance=2.0)

    assert found.grown == ["grown"]
    assert found.unknown == ["new"]
    assert found.table("baseline").splitlines() == [
        "path          instructions  baseline   change",
        "grown               10,201    10,000   +2.01%  grew",
        "at the limit        10,200    10,000   +2.00%",
        "equal               10,000    10,000   +0.00%",
        "shrunk               5,000    10,000  -50.00%  shrank",
        "new                      7         -        -  new",
    ]


# -- the command, with counts that need no valgrind


@pytest.fixture
def baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a baseline that was counted here, with 1,000 instructions for each path."""
    file = tmp_path / "baseline.json"
    Baseline(this_environment(), dict.fromkeys(PATHS, 1000)).write(file)
    monkeypatch.setattr(comparison, "BASELINE", file)
    return file


def counting(monkeypatch: pytest.MonkeyPatch, counts: Mapping[str, int]) -> None:
    """Let a path count 1,000, or what `counts` says."""

    def count(names: Sequence[str], tree: Path = ROOT) -> dict[str, int]:
        return {name: counts.get(name, 1000) if tree == ROOT else 1000 for name in names}

    monkeypatch.setattr(command, "count", count)


def test_equal_counts_pass(
    baseline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counting(monkeypatch, {})

    assert command.main([]) == 0
    assert [line.rsplit("  ", 1)[1] for line in capsys.readouterr().out.splitlines()[1:]] == ["+0.00%"] * len(
        PATHS
    )


@pytest.mark.parametrize(
    "options", [[], ["--against", "HEAD"], ["--only", "^delete$"], ["--tolerance", "9.9"]]
)
def test_a_path_that_grew_fails_the_command(
    options: list[str], baseline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counting(monkeypatch, {"delete": 1100})

    assert command.main(options) == command.GREW
    assert capsys.readouterr().err.rstrip().endswith("%: delete")


@pytest.mark.parametrize("options", [["--only", "put"], ["--tolerance", "11"]])
def test_growth_that_was_not_asked_about_passes(
    options: list[str], baseline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting(monkeypatch, {"delete": 1100})

    assert command.main(options) == 0


def test_an_update_of_some_paths_keeps_the_others(baseline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting(monkeypatch, dict.fromkeys(PATHS, 1100))

    assert command.main(["--update", "--only", "^delete$"]) == 0
    assert Baseline.read(baseline).instructions == {**dict.fromkeys(PATHS, 1000), "delete": 1100}


def test_counts_of_other_software_are_shown_without_a_verdict(
    baseline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Baseline({**this_environment(), "sqlite": "3.1"}, dict.fromkeys(PATHS, 1000)).write(baseline)
    counting(monkeypatch, {"delete": 1100})

    assert command.main([]) == command.NO_VERDICT
    printed = capsys.readouterr()
    assert "+10.00%" in printed.out
    assert "in the baseline 3.1" in printed.err
    assert command.main(["--update", "--only", "^delete$"]) == command.NO_VERDICT
    assert command.main(["--update"]) == 0
    assert command.main([]) == 0


def test_a_path_without_a_baseline_fails_the_command(
    baseline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = dict.fromkeys(PATHS, 1000)
    del known["delete"]
    Baseline(this_environment(), known).write(baseline)
    counting(monkeypatch, {})

    assert command.main([]) == command.GREW
    assert "not in the baseline: delete" in capsys.readouterr().err


def test_an_unknown_revision_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counting(monkeypatch, {})

    assert command.main(["--against", "no-such-revision"]) == command.NO_VERDICT
    assert "no-such-revision" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["no such path", "("])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["--only", pattern])

    assert caught.value.code == 2
    assert "--only" in capsys.readouterr().err
