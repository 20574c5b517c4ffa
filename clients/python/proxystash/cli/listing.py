"""The commands that look at many proxies: list and count."""

from __future__ import annotations

import csv
import json as json_text
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from functools import partial
from itertools import islice
from typing import Annotated, TypeVar

import typer

from proxystash._defaults import DEFAULT_TARGET, DEFAULT_TIMEOUT
from proxystash.cli import options, output, tables
from proxystash.cli.tables import Column
from proxystash.models import Ban, CacheEntry

Item = TypeVar("Item")
# Each with what it shows of an item.
Columns = Sequence[tuple[Column, Callable[[Item], str]]]

_PAGE = 500
_LABEL = "labels."


class Output(StrEnum):
    """How a list is written."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"


OutputOption = Annotated[
    Output,
    typer.Option(
        "--output",
        "-o",
        help="table fits the terminal, wide does not; json is one array, jsonl an object on each line.",
    ),
]


def _expires_in(entry: CacheEntry) -> str:
    return output.time_left(entry.expires_at)


_BANS: Columns[Ban] = (
    (Column("key"), lambda ban: ban.key),
    (Column("failures", right=True), lambda ban: str(ban.failure_count)),
    (Column("last_failure"), lambda ban: output.short_time(ban.last_failure_time)),
    (Column("bans", right=True), lambda ban: str(ban.bans)),
    (Column("banned_until"), lambda ban: output.short_time(ban.banned_until)),
)
# What a column shows, and what becomes of it on a narrow terminal.
_COLUMNS: dict[str, tuple[Column, Callable[[CacheEntry], str]]] = {
    column.name: (column, show)
    for column, show in (
        (Column("key"), lambda entry: entry.key),
        (Column("proxy_url"), lambda entry: entry.proxy_url),
        (Column("username"), lambda entry: entry.username or ""),
        (Column("password"), lambda entry: entry.password or ""),
        (Column("health", rank=1), lambda entry: entry.health_status.value),
        (Column("expires_in", rank=2, right=True), _expires_in),
        (Column("failures", rank=3, right=True), lambda entry: str(entry.failure_count)),
        (Column("source", rank=4, cuttable=True), lambda entry: entry.source),
        (Column("labels", rank=5, cuttable=True), lambda entry: output.labels_text(entry.labels)),
        (Column("expires_at", rank=6), lambda entry: output.short_time(entry.expires_at)),
        (Column("fetch_time", rank=6), lambda entry: output.short_time(entry.fetch_time)),
        (Column("last_accessed", rank=6), lambda entry: output.short_time(entry.last_accessed)),
        (Column("access_count", rank=6, right=True), lambda entry: str(entry.access_count)),
    )
}
_TABLE = ("key", "proxy_url", "health", "expires_in", "failures", "source", "labels")
_CSV = ("key", "proxy_url", "health", "failures", "source", "labels", "fetch_time", "expires_at")


def list_proxies(
    source: options.FilterSource = None,
    health: options.FilterHealth = None,
    scheme: options.FilterScheme = None,
    label: options.FilterLabel = None,
    expiring_within: options.ExpiringWithin = None,
    limit: options.Limit = None,
    banned: Annotated[
        bool,
        typer.Option("--banned", help="List the proxies that were evicted for failures and are banned."),
    ] = False,
    format_: OutputOption = Output.TABLE,
    columns: Annotated[
        str,
        typer.Option(
            "--columns",
            metavar="NAMES",
            help=f"Which columns, separated by commas: {', '.join(_COLUMNS)}, {_LABEL}NAME.",
        ),
    ] = "",
    show_credentials: options.ShowCredentials = False,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """List the stored proxies in key order."""
    format_ = Output.JSONL if json else format_
    wanted = options.filters(source, health, scheme, label, expiring_within)
    if banned and (wanted or show_credentials or columns):
        message = "of banned proxies only keys and failures are known: no filter or column goes with it"
        raise typer.BadParameter(message, param_hint="--banned")
    shown = _columns(columns, format_, show_credentials)
    with options.connect(target, timeout) as client:
        if banned:
            print_list(islice(client.bans(), limit), _BANS, output.plain_record, format_, "no bans")
            return
        entries = islice(wanted.entries(client, min(limit or _PAGE, _PAGE), show_credentials), limit)
        record = partial(output.entry_record, show_credentials=show_credentials)
        print_list(entries, shown, record, format_, "no proxies")


def count(
    by: Annotated[
        str | None,
        typer.Option(
            "--by", metavar="NAME", help=f"Count for each value of source, health, scheme or {_LABEL}NAME."
        ),
    ] = None,
    source: options.FilterSource = None,
    health: options.FilterHealth = None,
    scheme: options.FilterScheme = None,
    label: options.FilterLabel = None,
    expiring_within: options.ExpiringWithin = None,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Count the stored proxies, all or by what they have in common."""
    wanted = options.filters(source, health, scheme, label, expiring_within)
    value_of = _value_of(by)
    with options.connect(target, timeout) as client:
        counts = Counter(map(value_of, wanted.entries(client, _PAGE, show_credentials=False)))
    if by is None:
        total = counts.total()
        output.print_json({"count": total}) if json else output.print_line(f"{total:,}")
        return
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if json:
        for value, number in ordered:
            output.print_json({by: value, "count": number})
        return
    rows = ([output.printable(value) or "(none)", f"{number:,}"] for value, number in ordered)
    _print_rows(rows, [Column(by), Column("count", right=True)], Output.TABLE, "no proxies")


def _value_of(by: str | None) -> Callable[[CacheEntry], str]:
    values: dict[str | None, Callable[[CacheEntry], str]] = {
        None: lambda _entry: "",
        "source": lambda entry: entry.source,
        "health": lambda entry: entry.health_status.value,
        "scheme": lambda entry: entry.proxy_url.partition("://")[0],
    }
    if by is not None and by.startswith(_LABEL):
        return lambda entry: entry.labels.get(by.removeprefix(_LABEL), "")
    if by not in values:
        raise typer.BadParameter(f"count by source, health, scheme or {_LABEL}NAME", param_hint="--by")
    return values[by]


def _columns(
    names: str, format_: Output, show_credentials: bool
) -> list[tuple[Column, Callable[[CacheEntry], str]]]:
    """The columns that were asked for; raises BadParameter."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if not chosen:
        chosen = [*(_CSV if format_ is Output.CSV else _TABLE)]
        chosen[2:2] = ["username", "password"] if show_credentials else []
    elif not show_credentials and not {"username", "password"}.isdisjoint(chosen):
        raise typer.BadParameter("they are shown with --show-credentials alone", param_hint="--columns")
    return [_column(name) for name in chosen]


def _column(name: str) -> tuple[Column, Callable[[CacheEntry], str]]:
    if name.startswith(_LABEL):
        label = name.removeprefix(_LABEL)
        return Column(name, rank=5, cuttable=True), lambda entry: entry.labels.get(label, "")
    if name not in _COLUMNS:
        known = ", ".join([*_COLUMNS, f"{_LABEL}NAME"])
        raise typer.BadParameter(f"there is no column {name!r}; there are {known}", param_hint="--columns")
    return _COLUMNS[name]


def print_list(
    items: Iterable[Item],
    columns: Columns[Item],
    record: Callable[[Item], dict[str, object]],
    format_: Output,
    nothing: str,
) -> None:
    """Write items as they come: as JSON has them, or as rows; `nothing` is what people read of none."""
    if format_ in {Output.JSON, Output.JSONL}:
        _print_json(map(record, items), format_)
        return
    rows = ([output.printable(show(item)) for _, show in columns] for item in items)
    _print_rows(rows, [column for column, _ in columns], format_, nothing)


def _print_json(records: Iterator[dict[str, object]], format_: Output) -> None:
    """An object on each line, or all of them as one array, also on a line each."""
    if format_ is Output.JSONL:
        for record in records:
            output.print_json(record)
        return
    separator = "["
    for record in records:
        typer.echo(f"{separator}\n{json_text.dumps(record)}", nl=False)
        separator = ","
    typer.echo("[]" if separator == "[" else "\n]")


def _print_rows(
    rows: Iterator[Sequence[str]], columns: Sequence[Column], format_: Output, nothing: str
) -> None:
    if format_ is Output.CSV:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow([column.name for column in columns])
        writer.writerows(rows)
        return
    width = tables.terminal_width() if format_ is Output.TABLE else None
    empty = True
    for line in tables.lines(rows, columns, width):
        typer.echo(line)
        empty = False
    if empty:
        typer.echo(nothing, err=True)
