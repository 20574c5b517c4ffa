"""The commands that borrow, and that look at what is lent and learned: acquire, release, report, ..."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxystash._defaults import DEFAULT_TARGET, DEFAULT_TIMEOUT
from proxystash.cli import options, output
from proxystash.cli.failures import CommandError, ExitCode, report_missing
from proxystash.cli.failures import report as say
from proxystash.cli.listing import Columns, Output, OutputOption, print_list
from proxystash.cli.tables import Column
from proxystash.models import EntryError
from proxystash.pool_models import (
    HealthEffect,
    Lease,
    LeaseRelease,
    Outcome,
    SelectionPolicy,
    Session,
    Standing,
    TargetStanding,
    TargetSummary,
    UseReport,
    UseResult,
)

if TYPE_CHECKING:
    from proxystash.pool_models import AcquireResult

_Duration = partial(typer.Option, parser=options.parse_duration, metavar="DURATION")
_OUTCOMES = f"What became of it: {', '.join(Outcome)}."
Latency = Annotated[timedelta | None, _Duration("--latency", help="How long the use took, such as 400ms.")]
RetryAfter = Annotated[
    timedelta | None,
    _Duration("--retry-after", help="With blocked and rate_limited: how long the target is left alone."),
]
Holder = Annotated[str, typer.Option("--holder", metavar="NAME", help="Who has it, such as a worker's name.")]
SessionId = Annotated[str, typer.Option("--session", metavar="ID", help="The session that it belongs to.")]

_LEASES: Columns[Lease] = (
    (Column("lease_id"), lambda lease: lease.lease_id),
    (Column("key"), lambda lease: lease.key),
    (Column("target", rank=1, cuttable=True), lambda lease: lease.target),
    (Column("holder", rank=2, cuttable=True), lambda lease: lease.holder),
    (Column("expires_in", rank=1, right=True), lambda lease: output.time_left(lease.expires_at)),
    (Column("session", rank=4, cuttable=True), lambda lease: lease.session_id),
    (Column("trial", rank=5), lambda lease: "yes" if lease.trial else ""),
    (Column("score", rank=3, right=True), lambda lease: f"{lease.score:.2f}"),
)
_TARGETS: Columns[TargetSummary] = (
    (Column("target"), lambda one: one.target or "(none)"),
    (Column("success_rate", right=True), lambda one: f"{one.success_rate:.1%}"),
    (Column("resting", right=True), lambda one: f"{one.resting:,}"),
    (Column("leases", right=True), lambda one: f"{one.leases:,}"),
    (Column("successes", rank=1, right=True), lambda one: f"{one.successes:,.1f}"),
    (Column("failures", rank=1, right=True), lambda one: f"{one.failures:,.1f}"),
    (Column("last_result", rank=2), lambda one: output.short_time(one.last_result)),
)
_STANDINGS: Columns[TargetStanding] = (
    (Column("target"), lambda one: one.target),
    (Column("score", right=True), lambda one: f"{one.standing.score:.2f}"),
    (Column("breaker"), lambda one: one.standing.breaker.value),
    (Column("rests_for", right=True), lambda one: output.time_left(one.standing.resting_until)),
    (Column("rests", rank=3, right=True), lambda one: str(one.standing.rests)),
    (Column("last_outcome", rank=1), lambda one: one.standing.last_outcome or ""),
    (Column("successes", rank=2, right=True), lambda one: f"{one.standing.successes:,.1f}"),
    (Column("failures", rank=2, right=True), lambda one: f"{one.standing.failures:,.1f}"),
    (Column("latency", rank=4, right=True), lambda one: _latency(one.standing)),
    (Column("last_result", rank=5), lambda one: output.short_time(one.standing.last_result)),
)


def acquire(
    for_: options.For = "",
    count: Annotated[int, typer.Option("--count", min=1, help="At most this many, all different.")] = 1,
    source: Annotated[str, typer.Option("--source", help="Only proxies from this source.")] = "",
    health: options.FilterHealth = None,
    scheme: options.FilterScheme = None,
    label: options.EqualLabel = None,
    policy: Annotated[
        SelectionPolicy | None,
        typer.Option("--policy", metavar="POLICY", help=f"How to choose: {', '.join(SelectionPolicy)}."),
    ] = None,
    lease_duration: Annotated[
        timedelta | None, _Duration("--lease-duration", help="How long to have it, 1s to 1h. Default: 1m.")
    ] = None,
    wait: Annotated[
        timedelta | None, _Duration("--wait", help="How long to wait if there is none, at most 1m.")
    ] = None,
    max_leases: Annotated[
        int,
        typer.Option("--max-leases", min=0, help="Only proxies with fewer leases than this."),
    ] = 0,
    reuse_delay: Annotated[
        timedelta | None,
        _Duration("--reuse-delay", help="Only proxies that nobody was lent for the target in this long."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="KEY", help="Not this one; may be repeated.")
    ] = None,
    holder: Holder = "",
    session: Annotated[
        str, typer.Option("--session", metavar="ID", help="Keep to the proxy of this session.")
    ] = "",
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail if the session's proxy cannot be had.")
    ] = False,
    request_id: Annotated[
        str, typer.Option("--request-id", metavar="ID", help="The same id gets the same leases again.")
    ] = "",
    format_: OutputOption = Output.TABLE,
    show_credentials: options.ShowCredentials = False,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Borrow proxies; each lease ends by itself, or by release."""
    asked: dict[str, Any] = {
        **options.equal_filters(source, health, scheme, label),
        "policy": policy,
        "lease_duration": lease_duration,
        "wait": wait,
        "max_leases": max_leases,
        "reuse_delay": reuse_delay,
        "exclude_keys": options.resolve_keys(exclude or [], None),
        "holder": holder,
        "session": Session(session, strict=strict) if session else None,
        "request_id": request_id,
    }
    with options.connect(target, timeout) as client:
        result = client.pool.acquire_many(
            count, for_, **{name: value for name, value in asked.items() if value is not None}
        )
    if not result.leases:
        raise CommandError(_why_none(result), ExitCode.NOT_DONE)
    proxy = (Column("proxy_url"), partial(_proxy_url, show_credentials=show_credentials))
    print_list(
        result.leases,
        [*_LEASES[:2], proxy, *_LEASES[2:]],
        partial(_lease_record, show_credentials=show_credentials),
        Output.JSONL if json else format_,
        "no leases",
    )


def release(
    lease_ids: Annotated[list[str], typer.Argument(metavar="LEASE_ID...", help="Leases, by their ids.")],
    outcome: Annotated[
        Outcome | None,
        typer.Option("--outcome", metavar="OUTCOME", help=f"{_OUTCOMES} Default: nothing is learned."),
    ] = None,
    latency: Latency = None,
    retry_after: RetryAfter = None,
    end_session: Annotated[
        bool, typer.Option("--end-session", help="Also forget which proxy the lease's session has.")
    ] = False,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """End leases, with what became of their uses."""
    if outcome is None and (latency is not None or retry_after is not None):
        raise typer.BadParameter("it goes with --outcome alone", param_hint="--latency or --retry-after")
    result = None if outcome is None else UseResult(outcome, latency, retry_after=retry_after)
    with options.connect(target, timeout) as client:
        released = client.pool.release_many(
            LeaseRelease(lease_id, result, end_session) for lease_id in lease_ids
        )
    for lease_id, one in zip(lease_ids, released, strict=True):
        if json:
            output.print_json({"lease_id": lease_id, **output.plain_record(one)})
        elif one.released or one.effect is not None:
            done = "released" if one.released else "had ended by itself:"
            effect = "" if one.effect is None else f"; {_effect(one.effect)}"
            output.print_line(f"{done} {lease_id}{effect}")
    report_missing(
        (
            lease_id
            for lease_id, one in zip(lease_ids, released, strict=True)
            if not one.released and one.effect is None
        ),
        "no lease with id",
    )


def report(
    outcome: Annotated[Outcome, typer.Argument(metavar="OUTCOME", help=_OUTCOMES)],
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY...]", help="Keys or URLs of proxies; - reads some from standard input."),
    ] = None,
    lease: Annotated[
        list[str] | None,
        typer.Option("--lease", metavar="LEASE_ID", help="Of this lease, which goes on; may be repeated."),
    ] = None,
    for_: options.For = "",
    latency: Latency = None,
    retry_after: RetryAfter = None,
    count: Annotated[
        int, typer.Option("--count", min=1, help="How many uses ended like this, at most 1000.")
    ] = 1,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Say what became of uses of proxies, by their keys or leases."""
    result = UseResult(outcome, latency, for_, count=count, retry_after=retry_after)
    reports = [UseReport(result, key=key) for key in options.resolve_keys(keys or [], None)]
    reports += [UseReport(result, lease_id=lease_id) for lease_id in lease or []]
    if not reports:
        raise typer.BadParameter("say of which proxies, by keys or by --lease", param_hint="KEY")
    with options.connect(target, timeout) as client:
        effects = client.pool.report_many(reports)
    missing: list[str] = []
    refused: list[EntryError] = []
    for one, effect in zip(reports, effects, strict=True):
        name = one.lease_id or str(one.key)
        if isinstance(effect, EntryError):
            refused.append(effect)
            say(f"{name}: {effect.message}")
            continue
        if not effect.found:
            missing.append(name)
        if json:
            output.print_json({"lease_id" if one.lease_id else "key": name, **output.plain_record(effect)})
        elif effect.found:
            output.print_line(f"{name}: {_effect(effect)}")
    if any(error.code != "NOT_FOUND" for error in refused):
        raise typer.Exit(ExitCode.USAGE)
    report_missing(missing)
    if refused:
        raise typer.Exit(ExitCode.NOT_DONE)


def leases(
    key: Annotated[str, typer.Option("--key", metavar="KEY", help="Only of this proxy, by key or URL.")] = "",
    holder: Holder = "",
    for_: options.For = "",
    session: SessionId = "",
    limit: options.Limit = None,
    format_: OutputOption = Output.TABLE,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """List the leases that are held, oldest first."""
    key = options.resolve_key(key, None) if key else ""
    with options.connect(target, timeout) as client:
        found = client.pool.leases(key=key, holder=holder, target=for_, session_id=session)
        record = partial(_lease_record, show_credentials=False)
        print_list(islice(found, limit), _LEASES, record, Output.JSONL if json else format_, "no leases")


def targets(
    limit: options.Limit = None,
    format_: OutputOption = Output.TABLE,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """List the targets, and how each fares with all proxies together."""
    with options.connect(target, timeout) as client:
        found = islice(client.pool.targets(), limit)
        print_list(found, _TARGETS, output.plain_record, Output.JSONL if json else format_, "no targets")


def health(
    key: options.Key,
    username: options.KeyUsername = None,
    format_: OutputOption = Output.TABLE,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Show what is known of a proxy, everywhere and at each target, and whether it rests."""
    key = options.resolve_key(key, username)
    with options.connect(target, timeout) as client:
        known = client.pool.health(key)
    if known is None:
        report_missing([key])
        return
    if json or format_ in {Output.JSON, Output.JSONL}:
        output.print_json(output.plain_record(known))
        return
    standings = [TargetStanding("(everywhere)", known.overall), *known.targets]
    print_list(standings, _STANDINGS, output.plain_record, format_, "nothing")
    if format_ is not Output.CSV:
        lent = f"last lent {output.short_time(known.last_leased)}" if known.last_leased else "never lent"
        output.print_line(f"{known.leases} of {known.max_leases} leases held, {lent}")


def _why_none(result: AcquireResult) -> str:
    from proxystash._pool_operations import no_proxy

    error = no_proxy(result)
    if error.retry_after is None:
        return error.message
    return f"{error.message}; the next may come free in {output.short_duration(error.retry_after)}"


def _effect(effect: HealthEffect) -> str:
    """Where a proxy stands, in a few words."""
    if not effect.found:
        return "its proxy is not in the cache any more"
    words = [f"score {effect.score:.2f}", effect.health_status.value]
    if effect.failure_count:
        words.append(f"failures={effect.failure_count}")
    if effect.evicted:
        words.append("evicted")
    if effect.resting_until is not None:
        words.append(f"rests for {output.time_left(effect.resting_until)}")
    if effect.resting_at_target_until is not None:
        words.append(f"rests at the target for {output.time_left(effect.resting_at_target_until)}")
    return ", ".join(words)


def _proxy_url(lease: Lease, *, show_credentials: bool) -> str:
    return "" if lease.entry is None else lease.entry.url(with_credentials=show_credentials)


def _lease_record(lease: Lease, *, show_credentials: bool) -> dict[str, object]:
    record = output.plain_record(replace(lease, entry=None))
    if lease.entry is None:
        del record["entry"]
    else:
        record["entry"] = output.entry_record(lease.entry, show_credentials=show_credentials)
    return record


def _latency(standing: Standing) -> str:
    return "" if standing.latency is None else f"{standing.latency.total_seconds():.2f}s"
