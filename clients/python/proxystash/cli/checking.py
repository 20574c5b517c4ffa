"""The command that checks proxies: check-proxies."""

from __future__ import annotations

import os
import socket
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer
from rich.progress import Progress

from proxystash._defaults import DEFAULT_TARGET, DEFAULT_TIMEOUT
from proxystash.cli import options, output
from proxystash.cli.failures import CommandError, ExitCode, report, report_lost
from proxystash.cli.stopping import run_until_stopped
from proxystash.pool_models import Outcome, ProxyFilter
from proxystash.times import time_text

if TYPE_CHECKING:
    from proxystash.checking.checker import Check

_SUMMARY_SECONDS = 10.0


def check_proxies(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL",
            help="What to fetch through each proxy, with http or https; it must answer with status 200. One "
            "that shows the request's address and headers also tells the exit address and the anonymity.",
        ),
    ],
    every: Annotated[
        timedelta,
        typer.Option(
            "--every",
            parser=options.parse_duration,
            metavar="DURATION",
            help="How long after it worked a proxy is checked again; after failures later and later. "
            "Default: 15m.",
            show_default=False,
        ),
    ] = timedelta(minutes=15),
    once: Annotated[bool, typer.Option("--once", help="Stop when nothing more is due.")] = False,
    expect: Annotated[str, typer.Option("--expect", help="A text that the answer must hold.")] = "",
    check_timeout: Annotated[
        float,
        typer.Option("--check-timeout", min=0.001, metavar="SECONDS", help="How long a check may take."),
    ] = 10.0,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, help="How many checks may run at once.")
    ] = 50,
    rate: Annotated[
        float,
        typer.Option("--rate", min=0.01, metavar="PER_SECOND", help="How many checks may begin in a second."),
    ] = 20.0,
    source: options.FilterSource = None,
    health: options.FilterHealth = None,
    scheme: options.FilterScheme = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", metavar="NAME=VALUE", help="Only proxies with this label; of several, with all."
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A line for each check.")] = False,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Try the proxies that are due, again and again, and store what came of it, until stopped.

    Several of these share the work. While the URL itself does not answer, no proxy is to blame, and nothing
    is checked.
    """
    host = _host(url)
    if every < timedelta(seconds=1):
        raise typer.BadParameter("at least 1s", param_hint="--every")
    asked: dict[str, object] = {
        "source": source, "health": health, "schemes": scheme, "labels": options.parse_labels(label),
    }  # fmt: skip
    wanted = ProxyFilter(**{name: value for name, value in asked.items() if value})  # type: ignore[typeddict-item]  # as named
    _require_libraries()
    from proxystash.aio import AsyncClient
    from proxystash.checking.checker import Checker
    from proxystash.checking.probe import Prober
    from proxystash.checking.target import Target

    with output.progress(quiet=json) as progress:
        shown = _Shown(progress, verbose=verbose, json=json)

        async def run() -> None:
            prober = Prober(url, timeout=check_timeout, expect=expect)
            site = Target(prober.direct, shown.target_changed)
            async with AsyncClient(target, timeout=timeout) as client:
                if once and not await site.works_since(float("-inf")):
                    raise CommandError(f"the URL itself does not answer: {site.reason}", ExitCode.NOT_DONE)
                checker = Checker(
                    client, prober, site, f"check:{host}", every, check_timeout, concurrency, rate,
                    f"{socket.gethostname()}:{os.getpid()}"[-128:], wanted, shown.checked, report_lost,
                )  # fmt: skip
                await checker.run(once=once)

        try:
            run_until_stopped(run())
        finally:
            shown.summarize()


def _host(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username or parts.password:
        raise typer.BadParameter("write a URL with http or https, without credentials", param_hint="URL")
    return parts.hostname if port is None else f"{parts.hostname}:{port}"


def _require_libraries() -> None:
    try:
        import aiohttp_socks  # noqa: F401 -- brings aiohttp along
    except ModuleNotFoundError as error:
        if error.name not in {"aiohttp", "aiohttp_socks"}:
            raise
        raise CommandError(
            "proxies are tried with aiohttp and aiohttp-socks; install proxystash[check]", ExitCode.USAGE
        ) from None


class _Shown:
    """A line for each check, or every ten seconds one for all; on a terminal what is under way."""

    def __init__(self, progress: Progress, *, verbose: bool, json: bool) -> None:
        self._progress, self._verbose, self._json = progress, verbose, json
        self._task = progress.add_task("check", total=None)
        self._counts: Counter[Outcome] = Counter()
        self._told, self._told_at = 0, datetime.now(UTC)

    def checked(self, check: Check) -> None:
        probe = check.probe
        self._counts[probe.outcome] += 1
        self._progress.update(self._task, description=f"check: {self._summary()}")
        if self._json:
            seen = probe.seen
            output.print_json(
                {
                    "at": time_text(datetime.now(UTC)),
                    "key": check.entry.key,
                    "proxy_url": check.entry.proxy_url,
                    "outcome": probe.outcome.value,
                    "reason": probe.reason or None,
                    "latency_ms": round(probe.latency / timedelta(milliseconds=1), 1),
                    "exit_address": seen.address if seen else None,
                    "anonymity": probe.anonymity.value if probe.anonymity else None,
                    "next_check_time": time_text(check.next_check_time),
                }
            )
        elif self._verbose:
            cells = [
                output.short_time(datetime.now(UTC)), check.entry.proxy_url, probe.outcome.value,
                f"{probe.latency.total_seconds():.2f} s", probe.anonymity or "",
                (probe.seen.address or "") if probe.seen else "", probe.reason,
            ]  # fmt: skip
            output.print_line("  ".join(cell for cell in cells if cell))
        elif (datetime.now(UTC) - self._told_at).total_seconds() >= _SUMMARY_SECONDS:
            self.summarize()

    def target_changed(self, reason: str) -> None:
        """The URL itself fails, or works again."""
        report(
            f"the URL itself does not answer ({reason}); waiting for it"
            if reason
            else "the URL answers again"
        )

    def summarize(self) -> None:
        """Say what was checked, unless that was said already."""
        total = self._counts.total()
        if not self._json and total > self._told:
            output.print_line(f"{output.short_time(datetime.now(UTC))}  {self._summary()}")
            self._told, self._told_at = total, datetime.now(UTC)
            sys.stdout.flush()

    def _summary(self) -> str:
        parts = [f"{outcome.value} {count:,}" for outcome, count in sorted(self._counts.items())]
        return f"checked {self._counts.total():,}" + (f": {', '.join(parts)}" if parts else "")
