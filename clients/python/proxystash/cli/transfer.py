"""The commands that move many proxies: warm reads a file into the server, export writes one."""

from __future__ import annotations

import os
import secrets
import stat
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TextIO, Unpack

import typer

from proxystash._defaults import DEFAULT_TARGET, DEFAULT_TIMEOUT
from proxystash.cli import failures, options, output, reports
from proxystash.cli.failures import CommandError, ExitCode, discard_output
from proxystash.errors import ProxystashError
from proxystash.files import (
    CSV_HEADER,
    EXPORT_FORMATS,
    LINES,
    ListFile,
    ListReader,
    ReadOptions,
    read_proxy_file,
    read_proxy_files,
)
from proxystash.loading import Loader, LoadReport
from proxystash.models import PutMode
from proxystash.proxies import Identity

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
    scheme: options.ListScheme = None,
    list_format: options.ListFormat = None,
    identity: options.ListIdentity = Identity.USER,
    source: options.ListSource = None,
    ttl: options.ListTtl = None,
    verbose: options.Verbose = False,
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
    report = LoadReport()
    started = time.monotonic()
    try:
        with options.connect_patiently(target, timeout) as client, output.progress(quiet=json) as progress:
            shown = Path(files[0]).name if len(files) == 1 else f"{len(files)} files"
            task = progress.add_task(f"warm {shown}", total=1.0)
            records = _open_lists(
                files,
                scheme=scheme,
                format=list_format,
                identity=identity,
                on_progress=lambda part: progress.update(task, completed=part),
            )
            Loader(client, mode, source, ttl).load(records, report)
    except ProxystashError as error:
        if report.loaded:
            error.add_note(f"{report.loaded:,} were loaded before that, and loading them again does no harm")
        raise
    except KeyboardInterrupt:
        failures.report(f"interrupted; {report.loaded:,} were loaded, and loading them again does no harm")
        raise
    if json:
        output.print_json(report.record())
    else:
        reports.print_report(report, verbose=verbose, seconds=time.monotonic() - started)
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
    written = left_out = 0
    schemes: Counter[str] = Counter()
    with (
        options.connect_patiently(target, timeout) as client,
        output.progress(quiet=json, counts=True) as progress,
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
            left_out += entry.credentials_omitted
            progress.update(task, completed=written)
    if json:
        output.print_json(
            {
                "exported": written,
                "credentials_omitted": left_out,
                "file": str(file),
                "format": line_format,
            },
            err=to_stdout,
        )
    else:
        to = "standard output" if to_stdout else file
        output.print_line(f"exported {written:,} to {to}", err=to_stdout)
        if left_out:
            hint = "" if line_format == "host:port" else "; --include-credentials writes them"
            output.print_line(f"  note: {left_out:,} without their credentials{hint}", err=to_stdout)
    if line_format == "host:port" and len(schemes) > 1:
        counts = ", ".join(f"{count:,} {name}" for name, count in schemes.most_common())
        output.print_line(f"  note: host:port does not say which is which: {counts}; see --scheme", err=True)


def _open_lists(files: Sequence[str], **how: Unpack[ReadOptions]) -> ListReader:
    """One file is read, or refused as a whole; of several, each that cannot be read is one failure."""
    lists: list[tuple[ListFile, str]] = [
        (sys.stdin.buffer, "standard input") if file == _STDIO else (file, file) for file in files
    ]
    if len(lists) > 1:
        return read_proxy_files(lists, **how)
    [(file, name)] = lists
    return read_proxy_file(file, name=name, **how)


def parse_export_format(text: str) -> str:
    """Read one of the formats that `export` writes."""
    return options.one_of(text, EXPORT_FORMATS)


def _format_of(file: Path) -> str:
    """The format that a file is to be written in, by its name."""
    line_format = "jsonl" if str(file) == _STDIO else _SUFFIXES.get(file.suffix.lower())
    if line_format is None:
        raise typer.BadParameter(f"name the file {', '.join(_SUFFIXES)}, or say --format", param_hint="FILE")
    return line_format


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
