"""The commands on proxies: get, put, delete, clear, invalidate and list."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from proxystash._defaults import DEFAULT_TARGET, DEFAULT_TIMEOUT
from proxystash.cli import options, output
from proxystash.cli.failures import CommandError, ExitCode, report_missing
from proxystash.models import CacheEntry, HealthStatus, PutMode
from proxystash.proxies import InvalidProxyUrl, parse_proxy_url
from proxystash.times import time_text

if TYPE_CHECKING:
    from proxystash.client import Client


def get(
    keys: options.Keys,
    username: options.KeyUsername = None,
    show_credentials: options.ShowCredentials = False,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Look proxies up and show them."""
    resolved = options.resolve_keys(keys, username)
    with options.connect(target, timeout) as client:
        hits = client.get_many(resolved)
    for place, hit in enumerate(hits):
        if hit is None:
            continue
        if json:
            record = output.entry_record(hit.entry, show_credentials=show_credentials)
            output.print_json(record | {"served_by": hit.served_by.value})
            continue
        if any(hits[:place]):
            output.print_line("")
        output.print_entry(hit.entry, served_by=hit.served_by.value, show_credentials=show_credentials)
    report_missing(key for key, hit in zip(resolved, hits, strict=True) if hit is None)


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
    keys: options.SomeKeys = None,
    username: options.KeyUsername = None,
    source: options.FilterSource = None,
    health: options.FilterHealth = None,
    scheme: options.FilterScheme = None,
    label: options.FilterLabel = None,
    expiring_within: options.ExpiringWithin = None,
    yes: options.Yes = False,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Remove proxies: those that are named, or all that the options want, after asking."""
    wanted = options.filters(source, health, scheme, label, expiring_within)
    with options.connect(target, timeout) as client:
        missing = []
        for key in _named_or_wanted(client, keys, username, wanted, "Remove", yes=yes):
            deleted = client.delete(key)
            if json:
                output.print_json({"key": key, "deleted": deleted})
            elif deleted:
                output.print_line(f"deleted {key}")
            if not deleted:
                missing.append(key)
    # What another one was faster to remove is gone as it should be.
    report_missing(missing if keys else ())


def clear(
    yes: options.Yes = False,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Remove every proxy, after asking."""
    with options.connect(target, timeout) as client:
        if not yes:
            entries = client.stats().entries
            _ask(f"Remove all {entries:,} {_proxies(entries)} from {client.target}?")
        cleared = client.clear()
    if json:
        output.print_json({"cleared": cleared})
    else:
        output.print_line(f"removed {cleared:,} {_proxies(cleared)}")


def invalidate(
    keys: options.SomeKeys = None,
    username: options.KeyUsername = None,
    source: options.FilterSource = None,
    health: options.FilterHealth = None,
    scheme: options.FilterScheme = None,
    label: options.FilterLabel = None,
    expiring_within: options.ExpiringWithin = None,
    yes: options.Yes = False,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Report one failure of each proxy that is named or wanted; with enough of them the server evicts it."""
    wanted = options.filters(source, health, scheme, label, expiring_within)
    with options.connect(target, timeout) as client:
        missing = []
        for key in _named_or_wanted(client, keys, username, wanted, "Report a failure of", yes=yes):
            result = client.invalidate_by_health(key)
            if not result.found:
                missing.append(key)
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
            elif result.found:
                counted = f"failure {result.failure_count} of {result.failure_threshold}"
                outcome = "evicted" if result.evicted else result.health_status.value
                if result.banned_until is not None:
                    outcome += f", banned until {output.short_time(result.banned_until)}"
                output.print_line(f"{key}: {counted}, {outcome}")
    report_missing(missing if keys else ())


def unban(
    keys: options.Keys,
    username: options.KeyUsername = None,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Forget the failures of proxies."""
    missing = []
    with options.connect(target, timeout) as client:
        for key in options.resolve_keys(keys, username):
            unbanned = client.unban(key)
            if json:
                output.print_json({"key": key, "unbanned": unbanned})
            elif unbanned:
                output.print_line(f"unbanned {key}")
            if not unbanned:
                missing.append(key)
    report_missing(missing, "no ban of a proxy with key")


def ping(
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """See whether a server answers, and how fast."""
    with options.connect(target, timeout) as client:
        # The first call connects.
        client.stats()
        started = time.perf_counter()
        statistics = client.stats()
        milliseconds = (time.perf_counter() - started) * 1000
        tiers = {tier.tier.value: tier.state.value for tier in statistics.tiers}
        if json:
            output.print_json({"target": client.target, "milliseconds": milliseconds, "tiers": tiers})
        else:
            states = ", ".join(f"{tier} {state}" for tier, state in tiers.items())
            output.print_line(f"{client.target} answers in {milliseconds:.1f} ms; {states}")


def _named_or_wanted(
    client: Client,
    keys: list[str] | None,
    username: str | None,
    wanted: options.Filters,
    verb: str,
    *,
    yes: bool,
) -> list[str]:
    """The keys that were named, or those of all that are wanted, after asking."""
    if keys:
        if wanted:
            raise typer.BadParameter("either keys or options say which proxies, not both", param_hint="KEY")
        return options.resolve_keys(keys, username)
    if not wanted:
        raise typer.BadParameter("say which proxies, by keys or by options", param_hint="KEY")
    found = [entry.key for entry in wanted.entries(client, 1000, show_credentials=False)]
    if found and not yes:
        _ask(f"{verb} {len(found):,} {_proxies(len(found))}?")
    if not found:
        raise CommandError("no proxy is like that", ExitCode.NOT_DONE)
    return found


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise CommandError("this asks first; pass --yes to do it without a terminal", ExitCode.USAGE)
    if not typer.confirm(question, err=True):
        raise CommandError("nothing was changed", ExitCode.NOT_DONE)


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


def _proxies(count: int) -> str:
    return "proxy" if count == 1 else "proxies"
