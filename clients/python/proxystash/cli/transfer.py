"""The commands that move many proxies: warm reads a file into the server, export writes one."""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
)

from proxystash._defaults import DEFAULT_TARGET, DEFAULT_TIMEOUT
from proxystash.cli import options, output
from proxystash.cli.failures import CommandError, ExitCode
from proxystash.errors import ProxystashError
from proxystash.files import Rejected, entry_to_json, read_proxy_file
from proxystash.models import CacheEntry, EntryError, PutMode, PutResult

if TYPE_CHECKING:
    from proxystash.client import Client

_BATCH = 1000
_SHOWN_ONE_BY_ONE = 10
_JSON_LINES = (".jsonl", ".ndjson")
_VARYING = re.compile(r"\d[\d:.TZ+-]*")


def warm(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A .json, .jsonl or .csv file, or any other with a host:port or URL on each line.",
        ),
    ],
    source: Annotated[
        str | None,
        typer.Option("--source", help="Where all of them came from, instead of what the file says."),
    ] = None,
    ttl: Annotated[
        timedelta | None,
        typer.Option(
            "--ttl",
            parser=options.parse_duration,
            metavar="DURATION",
            help="How long all of them live from now, such as 90s or 2h, instead of what the file says.",
        ),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Say of each record why it was not loaded, however many there are."
        ),
    ] = False,
    merge: options.Merge = False,
    replace: options.Replace = False,
    if_absent: options.IfAbsent = False,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Load the proxies of a file, and say what was not loaded and why.

    What is stored of them already and not in the file stays, unless --replace says otherwise.
    Records that are no usable proxy are skipped; those that cannot be read or stored have failed.
    """
    mode = options.put_mode(merge=merge, replace=replace, if_absent=if_absent, default=PutMode.MERGE)
    report = _WarmReport()
    started = time.monotonic()
    try:
        with options.connect_patiently(target, timeout) as client, _progress(quiet=json) as progress:
            task = progress.add_task(f"warm {file.name}", total=1.0)
            _load(file, client, report, mode, source, ttl, lambda part: progress.update(task, completed=part))
    except ProxystashError as error:
        if report.loaded:
            error.add_note(f"{report.loaded:,} were loaded before that, and loading them again does no harm")
        raise
    if json:
        output.print_json(report.record())
    else:
        report.print(verbose=verbose, seconds=time.monotonic() - started)
    if report.count("failed") or not report.loaded:
        raise typer.Exit(ExitCode.NOT_DONE)


def export(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The .jsonl file to write, which `warm` reads back.")
    ],
    source: options.FilterSource = "",
    health: options.FilterHealth = None,
    scheme: options.FilterScheme = None,
    label: options.FilterLabel = None,
    include_credentials: Annotated[
        bool,
        typer.Option(
            "--include-credentials", help="Write usernames and passwords, too; only you can read the file."
        ),
    ] = False,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Write the stored proxies to a file, as a whole or not at all."""
    if file.suffix.lower() not in _JSON_LINES:
        raise typer.BadParameter(
            "export writes JSON lines; name the file .jsonl or .ndjson", param_hint="FILE"
        )
    labels = options.parse_labels(label)
    filtered = bool(source or health or scheme or labels)
    written = 0
    with (
        options.connect_patiently(target, timeout) as client,
        _progress(quiet=json, counts=True) as progress,
        _replacing(file, private=include_credentials) as text,
    ):
        # How many a filter leaves is not known beforehand.
        task = progress.add_task(f"export {file.name}", total=None if filtered else client.stats().entries)
        for entry in client.list(
            source=source,
            health=health or (),
            schemes=scheme or (),
            labels=labels,
            include_credentials=include_credentials,
        ):
            text.write(entry_to_json(entry, include_credentials=include_credentials) + "\n")
            written += 1
            progress.update(task, completed=written)
    if json:
        output.print_json({"exported": written, "file": str(file)})
    else:
        output.print_line(f"exported {written:,} to {file}")


@dataclass
class _WarmReport:
    """What became of a file's records."""

    loaded: int = 0
    rejected: list[Rejected] = field(default_factory=list)

    def add(self, entries: list[CacheEntry], outcomes: Sequence[PutResult | EntryError]) -> None:
        for entry, outcome in zip(entries, outcomes, strict=True):
            if isinstance(outcome, EntryError):
                refused = outcome.code == "INVALID_ARGUMENT"
                self.rejected.append(
                    Rejected(entry.proxy_url, outcome.message, "skipped" if refused else "failed")
                )
            else:
                self.loaded += 1

    def count(self, kind: str) -> int:
        return sum(rejected.kind == kind for rejected in self.rejected)

    def record(self) -> dict[str, object]:
        return {
            "loaded": self.loaded,
            "skipped": self.count("skipped"),
            "failed": self.count("failed"),
            "rejected": [
                {"where": rejected.where, "kind": rejected.kind, "reason": rejected.reason}
                for rejected in self.rejected
            ],
        }

    def print(self, *, verbose: bool, seconds: float) -> None:
        skipped, failed = self.count("skipped"), self.count("failed")
        output.print_line(
            f"loaded {self.loaded:,}, skipped {skipped:,}, failed {failed:,} in {seconds:.1f} s"
        )
        if verbose or len(self.rejected) <= _SHOWN_ONE_BY_ONE:
            for rejected in self.rejected:
                output.print_line(f"  {rejected.kind} {rejected.where}: {rejected.reason}")
            return
        first: dict[tuple[str, str], str] = {}
        counts: Counter[tuple[str, str]] = Counter()
        for rejected in self.rejected:
            group = (rejected.kind, _VARYING.sub("…", rejected.reason))
            first.setdefault(group, rejected.where)
            counts[group] += 1
        for (kind, reason), count in counts.most_common():
            output.print_line(f"  {kind} {count:,}: {reason} (first: {first[kind, reason]})")
        output.print_line("  --verbose lists each of them")


def _load(
    file: Path,
    client: Client,
    report: _WarmReport,
    mode: PutMode,
    source: str | None,
    ttl: timedelta | None,
    on_progress: Callable[[float], None],
) -> None:
    """Store what the file holds, a batch at a time."""
    records = read_proxy_file(file, on_progress=on_progress)
    while chunk := [*islice(records, _BATCH)]:
        report.rejected += [record for record in chunk if isinstance(record, Rejected)]
        entries = [_override(record, source, ttl) for record in chunk if isinstance(record, CacheEntry)]
        report.add(entries, client.put_many(entries, mode=mode))


def _override(entry: CacheEntry, source: str | None, ttl: timedelta | None) -> CacheEntry:
    if source is not None:
        entry = replace(entry, source=source)
    if ttl is not None:
        entry = replace(entry, ttl=ttl, fetch_time=None, expires_at=None)
    return entry


def _progress(*, quiet: bool, counts: bool = False) -> Progress:
    """A progress bar on stderr; none for scripts, nor where stderr is no terminal."""
    console = output.progress_console()
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn() if counts else TaskProgressColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )


@contextmanager
def _replacing(file: Path, *, private: bool) -> Iterator[TextIO]:
    """A text file that takes the place of `file` once it is complete and on the disk; else nothing is."""
    target = file.resolve()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        if target.exists() and not stat.S_ISREG(target.stat().st_mode):
            raise CommandError(f"{file} is not a regular file", ExitCode.USAGE)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(temporary, flags, 0o600 if private else 0o666)
        try:
            with open(descriptor, "w", encoding="utf-8") as text:  # noqa: PTH123 -- a descriptor has no path
                yield text
                text.flush()
                os.fsync(descriptor)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write {file}: {error.strerror or error}", ExitCode.USAGE) from error
