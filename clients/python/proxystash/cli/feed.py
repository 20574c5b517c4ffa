"""The command that keeps a server filled: feed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer
from rich.progress import Progress, TaskID

from proxystash._defaults import DEFAULT_TARGET, DEFAULT_TIMEOUT
from proxystash.cli import options, output, reports
from proxystash.cli.failures import CommandError, ExitCode
from proxystash.cli.stopping import run_until_stopped
from proxystash.feeding.rounds import Feed, Round
from proxystash.feeding.sources import InvalidSourceError, Source, parse_sources
from proxystash.files import read_proxy_file
from proxystash.loading import Loader, LoadReport
from proxystash.models import PutMode
from proxystash.proxies import Identity
from proxystash.times import time_text

if TYPE_CHECKING:
    from proxystash.feeding.download import Downloader

_MEGABYTE = 1 << 20
# So many records without a proxy are no list of proxies.
_GIVE_UP_AFTER = 10_000
_MAX_SOURCE_LENGTH = 128


def feed(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Files and URLs of lists in any format that `warm` reads; - reads some from standard input, "
            "where credentials in a URL are not to be seen by everybody on this machine.",
        ),
    ],
    every: Annotated[
        timedelta,
        typer.Option(
            "--every",
            parser=options.parse_duration,
            metavar="DURATION",
            help="How long after a round of a source its next begins, give or take a tenth. Default: 10m.",
            show_default=False,
        ),
    ] = timedelta(minutes=10),
    once: Annotated[bool, typer.Option("--once", help="One round of each source, and no more.")] = False,
    max_size: Annotated[
        int,
        typer.Option("--max-size", min=1, metavar="MB", help="How large a list may be, packed and unpacked."),
    ] = 64,
    fetch_timeout: Annotated[
        float,
        typer.Option(
            "--fetch-timeout", min=0.001, metavar="SECONDS", help="How long it may take to fetch a list."
        ),
    ] = 60,
    max_redirects: Annotated[
        int, typer.Option("--max-redirects", min=0, help="How often a URL may lead to another.")
    ] = 5,
    scheme: options.ListScheme = None,
    list_format: options.ListFormat = None,
    identity: options.ListIdentity = Identity.USER,
    source: Annotated[
        str | None,
        typer.Option(
            "--source", help="Where all of them came from. Default: what their file or URL is called here."
        ),
    ] = None,
    ttl: options.ListTtl = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say of the first ten records why they were not loaded.")
    ] = False,
    merge: options.Merge = False,
    replace_stored: options.Replace = False,
    if_absent: options.IfAbsent = False,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Load lists again and again, each when it has changed, until it is stopped.

    A source that fails is tried again after longer and longer pauses, and the others go on.
    """
    if every < timedelta(seconds=1):
        raise typer.BadParameter("at least 1s", param_hint="--every")
    parsed = _parse(sources)
    mode = options.put_mode(merge=merge, replace=replace_stored, if_absent=if_absent, default=PutMode.MERGE)
    with (
        options.connect_patiently(target, timeout) as client,
        output.progress(quiet=json) as progress,
        ThreadPoolExecutor(1, "proxystash-feed") as executor,
    ):
        loader = Loader(
            client, mode, source, ttl, give_up_after=_GIVE_UP_AFTER, guarded=mode is PutMode.MERGE
        )

        def load(
            origin: Source, file: BinaryIO, on_progress: Callable[[float], None], report: LoadReport
        ) -> None:
            records = read_proxy_file(
                file,
                name=origin.list_name,
                scheme=scheme,
                format=list_format,
                identity=identity,
                on_progress=on_progress,
            )
            named = replace(loader, source=origin.name[:_MAX_SOURCE_LENGTH] if source is None else source)
            named.load(records, report)

        async def run() -> list[Round]:
            downloader = None
            if any(origin.path is None for origin in parsed):
                downloader = _downloader(fetch_timeout, max_size * _MEGABYTE, max_redirects)
            observer = _Observer(progress, json=json, verbose=verbose or once)
            work = Feed(every, max_size * _MEGABYTE, load, client.close, executor, observer, downloader)
            try:
                if once:
                    return await work.once(parsed)
                await work.forever(parsed)
                raise AssertionError("a feed does not end by itself")
            finally:
                if downloader is not None:
                    await downloader.close()

        results = run_until_stopped(run())
    if any(result.server_failed for result in results):
        raise typer.Exit(ExitCode.SERVER)
    if any(result.failure or (result.report and result.report.count("failed")) for result in results):
        raise typer.Exit(ExitCode.NOT_DONE)


def _parse(texts: Sequence[str]) -> list[Source]:
    lines: list[str] = []
    for text in texts:
        lines += (line.strip() for line in sys.stdin) if text == "-" else [text]
    try:
        sources = parse_sources([line for line in lines if line and not line.startswith("#")])
    except InvalidSourceError as error:
        raise typer.BadParameter(str(error), param_hint="SOURCE") from None
    if not sources:
        raise typer.BadParameter("there is none", param_hint="SOURCE")
    return sources


def _downloader(timeout: float, limit: int, max_redirects: int) -> Downloader:
    try:
        from proxystash.feeding.download import Downloader
    except ModuleNotFoundError as error:
        if error.name != "aiohttp":
            raise
        raise CommandError(
            "URLs are fetched with aiohttp; install proxystash[feed]", ExitCode.USAGE
        ) from None
    return Downloader(timeout=timeout, limit=limit, max_redirects=max_redirects)


class _Observer:
    """Prints a line for each round, and shows on a terminal what is under way."""

    def __init__(self, progress: Progress, *, json: bool, verbose: bool) -> None:
        self._progress, self._json, self._verbose = progress, json, verbose
        self._tasks: dict[str, TaskID] = {}

    def begins(self, source: Source) -> None:
        self._tasks[source.name] = self._progress.add_task(output.printable(source.name), total=None)

    def progresses(self, source: Source, part: float) -> None:
        self._progress.update(self._tasks[source.name], total=1.0, completed=part)

    def ended(self, result: Round, pause: timedelta | None) -> None:
        self._progress.remove_task(self._tasks.pop(result.source.name))
        at = datetime.now(UTC)
        if self._json:
            output.print_json(_record(result, at, pause))
        else:
            output.print_line(_line(result, at, pause))
            if self._verbose and result.report is not None:
                reports.print_rejected(result.report)
                reports.print_notices(result.report)


def _counts(report: LoadReport) -> dict[str, int]:
    return {
        "loaded": report.loaded - report.kept,
        "kept": report.kept,
        "skipped": report.count("skipped"),
        "failed": report.count("failed"),
    }


def _line(result: Round, at: datetime, pause: timedelta | None) -> str:
    parts = []
    if result.failure:
        parts.append(f"failed: {result.failure}")
    if result.report is None:
        parts.append("unchanged")
    elif result.report.loaded or result.report.rejected or not result.failure:
        parts.append(", ".join(f"{name} {count:,}" for name, count in _counts(result.report).items()))
    if pause is not None:
        parts.append(f"next in {output.short_duration(pause)}")
    return f"{output.short_time(at)}  {result.source.name}: {'; '.join(parts)}"


def _record(result: Round, at: datetime, pause: timedelta | None) -> dict[str, object]:
    report = result.report
    outcome = "failed" if result.failure else "unchanged" if report is None else "loaded"
    return {
        "at": time_text(at),
        "source": result.source.name,
        "outcome": outcome,
        **_counts(report or LoadReport()),
        "error": result.failure or None,
        "next_in_seconds": None if pause is None else pause.total_seconds(),
    }
