"""The commands on proxies: get, put, delete, clear, invalidate and list."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from proxystash._defaults import DEFAULT_TARGET, DEFAULT_TIMEOUT
from proxystash.cli import options, output
from proxystash.cli.failures import CommandError, ExitCode
from proxystash.models import CacheEntry, HealthStatus, PutMode
from proxystash.proxies import InvalidProxyUrl, parse_proxy_url
from proxystash.times import time_text

if TYPE_CHECKING:
    from rich.table import Table

    from proxystash.client import Client

_Item = TypeVar("_Item")

_TABLE_ROWS = 500


def get(
    key: options.Key,
    username: options.KeyUsername = None,
    show_credentials: options.ShowCredentials = False,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Look one proxy up and show it."""
    key = options.resolve_key(key, username)
    with options.connect(target, timeout) as client:
        hit = client.get(key)
    if hit is None:
        raise _no_such_proxy(key)
    if json:
        record = output.entry_record(hit.entry, show_credentials=show_credentials)
        output.print_json(record | {"served_by": hit.served_by.value})
    else:
        output.print_entry(hit.entry, served_by=hit.served_by.value, show_credentials=show_credentials)


def put(
    proxy_url: Annotated[
        str, typer.Argument(metavar="PROXY_URL", help="scheme://host:port, with user:password@ if need be.")
    ],
    username: Annotated[
        str | None, typer.Option("--username", help="The username the proxy asks for.")
    ] = None,
    password_stdin: Annotated[
        bool,
        typer.Option(
            "--password-stdin",
            help="Read the password from standard input, not from PROXYSTASH_PASSWORD or, on a terminal, "
            "by asking. What stands in the URL can be read by everybody on this machine.",
        ),
    ] = False,
    source: Annotated[str, typer.Option("--source", help="Where the proxy came from.")] = "",
    ttl: Annotated[
        timedelta | None,
        typer.Option(
            "--ttl",
            parser=options.parse_duration,
            metavar="DURATION",
            help="How long it lives, such as 90s, 15m, 2h or 7d. Default: its source's, else the server's.",
        ),
    ] = None,
    health: Annotated[
        HealthStatus,
        typer.Option("--health", metavar="STATUS", help=f"How it is doing: {', '.join(HealthStatus)}."),
    ] = HealthStatus.UNKNOWN,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", metavar="NAME=VALUE", help="A fact to select it by; may be given several times."
        ),
    ] = None,
    merge: options.Merge = False,
    replace: options.Replace = False,
    if_absent: options.IfAbsent = False,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Store one proxy, replacing what has its key unless told otherwise."""
    mode = options.put_mode(merge=merge, replace=replace, if_absent=if_absent, default=PutMode.REPLACE)
    try:
        address = parse_proxy_url(proxy_url)
    except InvalidProxyUrl as error:
        raise typer.BadParameter(str(error), param_hint="PROXY_URL") from None
    if username is not None and address.username not in {None, username}:
        raise typer.BadParameter("the URL has another username", param_hint="--username")
    if password_stdin and address.password is not None:
        raise typer.BadParameter("the URL has a password, too", param_hint="--password-stdin")
    entry = CacheEntry(
        proxy_url=address.url,
        username=username or address.username,
        password=address.password or _password(username or address.username, password_stdin),
        source=source,
        ttl=ttl,
        health_status=health,
        labels=options.parse_labels(label),
    )
    with options.connect(target, timeout) as client:
        stored = client.put(entry, mode=mode)
    tiers = [tier.value for tier in stored.stored_in]
    if json:
        expires_at = time_text(stored.expires_at)
        banned_until = time_text(stored.banned_until)
        output.print_json(
            {
                "key": stored.key,
                "expires_at": expires_at,
                "stored_in": tiers,
                "kept": stored.kept,
                "banned_until": banned_until,
            }
        )
    else:
        done = "kept" if stored.kept else "stored"
        until = output.short_time(stored.expires_at)
        output.print_line(f"{done} {stored.key} in {', '.join(tiers)}, until {until}")
        if stored.banned_until is not None:
            banned_until = output.short_time(stored.banned_until)
            output.print_line(f"banned after its failures until {banned_until}, so stored as unhealthy")


def delete(
    key: options.Key,
    username: options.KeyUsername = None,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Remove one proxy."""
    key = options.resolve_key(key, username)
    with options.connect(target, timeout) as client:
        deleted = client.delete(key)
    if json:
        output.print_json({"key": key, "deleted": deleted})
    if not deleted:
        raise _no_such_proxy(key)
    if not json:
        output.print_line(f"deleted {key}")


def clear(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Remove every proxy, after asking."""
    with options.connect(target, timeout) as client:
        if not yes:
            _ask_before_clearing(client)
        cleared = client.clear()
    if json:
        output.print_json({"cleared": cleared})
    else:
        output.print_line(f"removed {cleared:,} {_proxies(cleared)}")


def invalidate(
    key: options.Key,
    username: options.KeyUsername = None,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Report one failure of a proxy; with enough of them the server evicts it."""
    key = options.resolve_key(key, username)
    with options.connect(target, timeout) as client:
        result = client.invalidate_by_health(key)
    if json:
        output.print_json(
            {
                "key": key,
                "found": result.found,
                "evicted": result.evicted,
                "health_status": result.health_status.value,
                "failure_count": result.failure_count,
                "failure_threshold": result.failure_threshold,
                "banned_until": time_text(result.banned_until),
            }
        )
    if not result.found:
        raise _no_such_proxy(key)
    if not json:
        counted = f"failure {result.failure_count} of {result.failure_threshold}"
        outcome = "evicted" if result.evicted else result.health_status.value
        if result.banned_until is not None:
            outcome += f", banned until {output.short_time(result.banned_until)}"
        output.print_line(f"{key}: {counted}, {outcome}")


def unban(
    key: options.Key,
    username: options.KeyUsername = None,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Forget the failures of one proxy."""
    key = options.resolve_key(key, username)
    with options.connect(target, timeout) as client:
        unbanned = client.unban(key)
    if json:
        output.print_json({"key": key, "unbanned": unbanned})
    if not unbanned:
        raise CommandError(f"no ban of a proxy with key {output.printable(key)}", ExitCode.NOT_DONE)
    if not json:
        output.print_line(f"unbanned {key}")


def list_proxies(
    source: options.FilterSource = "",
    health: options.FilterHealth = None,
    scheme: options.FilterScheme = None,
    label: options.FilterLabel = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most this many. Default: all.")
    ] = None,
    banned: Annotated[
        bool,
        typer.Option("--banned", help="List the proxies that were evicted for failures and are banned."),
    ] = False,
    show_credentials: options.ShowCredentials = False,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """List the stored proxies in key order."""
    labels = options.parse_labels(label)
    if banned:
        if source or health or scheme or labels or show_credentials:
            message = (
                "of banned proxies nothing is known but their keys and failures: it goes with --limit alone"
            )
            raise typer.BadParameter(message, param_hint="--banned")
        _list_bans(limit, target, timeout, json)
        return
    with options.connect(target, timeout) as client:
        found = client.list(
            source=source,
            health=health or (),
            schemes=scheme or (),
            labels=labels,
            include_credentials=show_credentials,
            page_size=min(limit or _TABLE_ROWS, _TABLE_ROWS),
        )
        entries = islice(found, limit)
        if json:
            for entry in entries:
                output.print_json(output.entry_record(entry, show_credentials=show_credentials))
        else:
            table = partial(output.entry_table, show_credentials=show_credentials)
            _print_tables(entries, table, "no proxies")


def _list_bans(limit: int | None, target: str, timeout: float, json: bool) -> None:
    with options.connect(target, timeout) as client:
        bans = islice(client.bans(), limit)
        if not json:
            _print_tables(bans, output.ban_table, "no bans")
        for ban in bans:
            output.print_json(output.ban_record(ban))


def _print_tables(items: Iterator[_Item], table: Callable[[list[_Item]], Table], nothing: str) -> None:
    """One table, or several when there are too many items to hold in memory."""
    console = output.console()
    empty = True
    while rows := [*islice(items, _TABLE_ROWS)]:
        console.print(table(rows))
        empty = False
    if empty:
        typer.echo(nothing, err=True)


def _password(username: str | None, from_stdin: bool) -> str | None:
    """The password that was given in a way that no process list shows."""
    if from_stdin:
        return sys.stdin.readline().rstrip("\r\n") or None
    if username is None:
        return None
    password = os.environ.get("PROXYSTASH_PASSWORD")
    if password is None and sys.stdin.isatty():
        password = typer.prompt(
            "Password (empty for none)", default="", hide_input=True, show_default=False, err=True
        )
    return password or None


def _ask_before_clearing(client: Client) -> None:
    if not sys.stdin.isatty():
        raise CommandError("clear asks first; pass --yes to do it without a terminal", ExitCode.USAGE)
    entries = client.stats().entries
    if not typer.confirm(f"Remove all {entries:,} {_proxies(entries)} from {client.target}?", err=True):
        raise CommandError("nothing was removed", ExitCode.NOT_DONE)


def _no_such_proxy(key: str) -> CommandError:
    return CommandError(f"no proxy with key {output.printable(key)}", ExitCode.NOT_DONE)


def _proxies(count: int) -> str:
    return "proxy" if count == 1 else "proxies"
