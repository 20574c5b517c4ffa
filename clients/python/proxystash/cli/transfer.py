"""The commands that move many proxies: warm reads a file into the server, export writes one."""

from __future__ import annotations

import os
import secrets
import stat
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO, Unpack

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
from proxystash.cli.failures import CommandError, ExitCode, discard_output
from proxystash.errors import ProxystashError
from proxystash.files import (
    CSV_HEADER,
    EXPORT_FORMATS,
    FORMATS,
    LINES,
    ListFile,
    ListReader,
    ReadOptions,
    Rejected,
    read_proxy_file,
    read_proxy_files,
)
from proxystash.models import CacheEntry, EntryError, PutMode, PutResult
from proxystash.proxies import Identity

if TYPE_CHECKING:
    from proxystash.client import Client

_BATCH = 1000
_SHOWN_ONE_BY_ONE = 10
_SHOWN_GROUPS = 20
_STDIO = "-"
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}


def warm(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE",
            help="Lists in any usual format: lines, CSV, JSON, JSON Lines, clash's YAML, also gzipped; "
            "- for standard input.",
        ),
    ],
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme",
            parser=options.parse_scheme,
            metavar="SCHEME",
            help="The scheme of records that say none. Default: that of the header above them, else of the "
            "file's name, else http.",
        ),
    ] = None,
    list_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            parser=parse_format,
            metavar="FORMAT",
            help=f"Take it for this format, or read addresses in this way: {', '.join(FORMATS)}.",
        ),
    ] = None,
    identity: Annotated[
        Identity,
        typer.Option(
            "--identity",
            metavar="WHAT",
            help=f"What tells one proxy from another: {', '.join(Identity)}. A record's own key counts more.",
        ),
    ] = Identity.USER,
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
    """Load the proxies of files, and say what was not loaded and why.

    What is stored of them already and not in the file stays, unless --replace says otherwise.
    Records that are no usable proxy are skipped; those that cannot be read or stored have failed.
    """
    mode = options.put_mode(merge=merge, replace=replace, if_absent=if_absent, default=PutMode.MERGE)
    report = _WarmReport()
    started = time.monotonic()
    try:
        with options.connect_patiently(target, timeout) as client, _progress(quiet=json) as progress:
            shown = Path(files[0]).name if len(files) == 1 else f"{len(files)} files"
            task = progress.add_task(f"warm {shown}", total=1.0)
            records = _open_lists(
                files,
                scheme=scheme,
                format=list_format,
                identity=identity,
                on_progress=lambda part: progress.update(task, completed=part),
            )
            _load(records, client, report, mode, source, ttl)
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
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write; - for standard output.")],
    line_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            parser=parse_export_format,
            metavar="FORMAT",
            help=f"One of {', '.join(EXPORT_FORMATS)}. Only the first two say more than the address, and "
            "host:port says no scheme. Default: by the file's name, else jsonl.",
        ),
    ] = None,
    source: options.FilterSource = None,
    health: options.FilterHealth = None,
    scheme: options.FilterScheme = None,
    label: options.FilterLabel = None,
    expiring_within: options.ExpiringWithin = None,
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
    """Write the stored proxies to a file, as a whole or not at all, or to standard output."""
    to_stdout = str(file) == _STDIO
    line_format = line_format or _format_of(file)
    if line_format == "host:port" and include_credentials:
        raise typer.BadParameter(
            "host:port has no place for them; url has", param_hint="--include-credentials"
        )
    line_of = LINES[line_format]
    wanted = options.filters(source, health, scheme, label, expiring_within)
    written = 0
    schemes: Counter[str] = Counter()
    with (
        options.connect_patiently(target, timeout) as client,
        _progress(quiet=json, counts=True) as progress,
        _standard_output() if to_stdout else _replacing(file, private=include_credentials) as text,
    ):
        if line_format == "csv":
            text.write(f"{CSV_HEADER}\n")
        # How many a filter leaves is not known beforehand.
        task = progress.add_task(f"export {file.name}", total=None if wanted else client.stats().entries)
        for entry in wanted.entries(client, 500, include_credentials):
            text.write(line_of(entry, include_credentials=include_credentials) + "\n")
            schemes[entry.proxy_url.partition("://")[0]] += 1
            written += 1
            progress.update(task, completed=written)
    if json:
        output.print_json({"exported": written, "file": str(file), "format": line_format}, err=to_stdout)
    else:
        to = "standard output" if to_stdout else file
        output.print_line(f"exported {written:,} to {to}", err=to_stdout)
    if line_format == "host:port" and len(schemes) > 1:
        counts = ", ".join(f"{count:,} {name}" for name, count in schemes.most_common())
        output.print_line(f"  note: host:port does not say which is which: {counts}; see --scheme", err=True)


@dataclass
class _WarmReport:
    """What became of a file's records."""

    loaded: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    notices: Mapping[str, int] = field(default_factory=dict)

    def add(self, where: str, outcome: PutResult | EntryError) -> None:
        if isinstance(outcome, EntryError):
            refused = outcome.code == "INVALID_ARGUMENT"
            group = f"{outcome.reason} {outcome.field}"
            self.rejected.append(Rejected(where, outcome.message, "skipped" if refused else "failed", group))
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
            "notices": [{"notice": notice, "records": count} for notice, count in self.notices.items()],
        }

    def print(self, *, verbose: bool, seconds: float) -> None:
        skipped, failed = self.count("skipped"), self.count("failed")
        output.print_line(
            f"loaded {self.loaded:,}, skipped {skipped:,}, failed {failed:,} in {seconds:.1f} s"
        )
        if verbose or len(self.rejected) <= _SHOWN_ONE_BY_ONE:
            for rejected in self.rejected:
                output.print_line(f"  {rejected.kind} {rejected.where}: {rejected.reason}")
        else:
            self._print_groups()
        for notice, count in self.notices.items():
            output.print_line(f"  note: {notice} ({count:,} {'record' if count == 1 else 'records'})")

    def _print_groups(self) -> None:
        """How many were rejected for each reason, with the first of them in its own words."""
        first: dict[tuple[str, str], Rejected] = {}
        counts: Counter[tuple[str, str]] = Counter()
        for rejected in self.rejected:
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


def _open_lists(files: Sequence[str], **how: Unpack[ReadOptions]) -> ListReader:
    """One file is read, or refused as a whole; of several, each that cannot be read is one failure."""
    lists: list[tuple[ListFile, str]] = [
        (sys.stdin.buffer, "standard input") if file == _STDIO else (file, file) for file in files
    ]
    if len(lists) > 1:
        return read_proxy_files(lists, **how)
    [(file, name)] = lists
    return read_proxy_file(file, name=name, **how)


def _load(
    records: ListReader,
    client: Client,
    report: _WarmReport,
    mode: PutMode,
    source: str | None,
    ttl: timedelta | None,
) -> None:
    """Store what the lists hold, a batch at a time."""
    report.notices = records.notices
    while chunk := [*islice(records, _BATCH)]:
        report.rejected += [record for record in chunk if isinstance(record, Rejected)]
        entries = [_override(record, source, ttl) for record in chunk if isinstance(record, CacheEntry)]
        for entry, outcome in zip(entries, client.put_many(entries, mode=mode), strict=True):
            report.add(records.place_of(entry), outcome)


def parse_format(text: str) -> str:
    """Read one of the formats that `warm` reads."""
    return _one_of(text, FORMATS)


def parse_export_format(text: str) -> str:
    """Read one of the formats that `export` writes."""
    return _one_of(text, EXPORT_FORMATS)


def _one_of(text: str, formats: Sequence[str]) -> str:
    if text.lower() not in formats:
        raise typer.BadParameter(f"the formats are {', '.join(formats)}")
    return text.lower()


def _format_of(file: Path) -> str:
    """The format that a file is to be written in, by its name."""
    line_format = "jsonl" if str(file) == _STDIO else _SUFFIXES.get(file.suffix.lower())
    if line_format is None:
        raise typer.BadParameter(f"name the file {', '.join(_SUFFIXES)}, or say --format", param_hint="FILE")
    return line_format


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
def _standard_output() -> Iterator[TextIO]:
    """Standard output, with all of it written at the end."""
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        reason = error.strerror or error
        raise CommandError(f"cannot write to standard output: {reason}", ExitCode.USAGE) from error


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
