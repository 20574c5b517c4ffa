"""What became of the records of lists, for people."""

from __future__ import annotations

from collections import Counter

from proxystash.cli import output
from proxystash.files import Rejected
from proxystash.loading import LoadReport

_SHOWN_ONE_BY_ONE = 10
_SHOWN_GROUPS = 20


def print_report(report: LoadReport, *, verbose: bool, seconds: float) -> None:
    """How many were loaded and why the others were not: each of them, or one of each kind."""
    skipped, failed = report.count("skipped"), report.count("failed")
    kept = f" ({report.kept:,} of them kept as they were)" if report.kept else ""
    output.print_line(
        f"loaded {report.loaded:,}{kept}, skipped {skipped:,}, failed {failed:,} in {seconds:.1f} s"
    )
    if verbose or len(report.rejected) <= _SHOWN_ONE_BY_ONE:
        print_rejected(report)
    else:
        _print_groups(report)
    print_notices(report)


def print_rejected(report: LoadReport) -> None:
    """Why each record that is told was not loaded."""
    for rejected in report.rejected:
        output.print_line(f"  {rejected.kind} {rejected.where}: {rejected.reason}")


def print_notices(report: LoadReport) -> None:
    """What was guessed, or left out of what was loaded."""
    for notice, count in report.notices.items():
        output.print_line(f"  note: {notice} ({count:,} {'record' if count == 1 else 'records'})")


def _print_groups(report: LoadReport) -> None:
    """How many were rejected for each reason, with the first of them in its own words."""
    first: dict[tuple[str, str], Rejected] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for rejected in report.rejected:
        kind: str = rejected.kind
        group = kind, rejected.group or rejected.reason
        first.setdefault(group, rejected)
        counts[group] += 1
    for group, count in counts.most_common(_SHOWN_GROUPS):
        example = first[group]
        like = f"{count:,} like " if count > 1 else ""
        output.print_line(f"  {example.kind} {like}{example.where}: {example.reason}")
    if len(counts) > _SHOWN_GROUPS:
        output.print_line(f"  and {len(counts) - _SHOWN_GROUPS:,} other reasons")
    output.print_line("  --verbose lists each of them")
