"""The commands that show statistics: stats once, watch-stats for as long as one looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import Annotated

import typer
from rich.live import Live

from proxystash._defaults import DEFAULT_TARGET, DEFAULT_TIMEOUT
from proxystash.cli import options, output
from proxystash.cli.failures import report_lost
from proxystash.cli.rates import RateMeter, Rates
from proxystash.models import StatsUpdate


def stats(
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Show one snapshot of the server's statistics."""
    with options.connect(target, timeout) as client:
        statistics = client.stats()
    if json:
        output.print_json(output.statistics_record(statistics))
    else:
        output.console().print(output.statistics_table(statistics))


def watch_stats(
    interval: Annotated[
        timedelta,
        typer.Option(
            "--interval",
            parser=options.parse_duration,
            metavar="DURATION",
            help="Time between snapshots, 100ms to 1h.",
        ),
    ] = timedelta(seconds=1),
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="Stop after this many snapshots. Default: go on.")
    ] = None,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Show the server's statistics as they change; resumes after a lost connection."""
    with (
        options.connect(target, timeout) as client,
        client.stream_stats(interval, on_lost=report_lost) as stream,
        _display(json) as show,
    ):
        for update in islice(stream, count):
            show(update)


@contextmanager
def _display(json: bool) -> Iterator[Callable[[StatsUpdate], None]]:
    """How a snapshot is shown, with rates: as JSON, in place on a terminal, or as a line."""
    console, rates_of = output.console(), RateMeter()
    if json:
        yield lambda update: _print_json(update, rates_of(update.statistics))
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda update: live.update(
                output.statistics_table(update.statistics, rates_of(update.statistics)), refresh=True
            )
    else:
        yield lambda update: output.print_line(
            output.statistics_line(update.statistics, rates_of(update.statistics))
        )


def _print_json(update: StatsUpdate, rates: Rates | None) -> None:
    output.print_json(
        {
            "sequence": update.sequence,
            "missed": update.missed,
            "resumed": update.resumed,
            "statistics": output.statistics_record(update.statistics),
            "per_second": rates,
        }
    )
