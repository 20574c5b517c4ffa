"""The command that shows changes as they happen: watch."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer

from proxystash._defaults import DEFAULT_TARGET, DEFAULT_TIMEOUT
from proxystash.cli import options, output
from proxystash.cli.failures import report_lost
from proxystash.models import Change, ChangeKind
from proxystash.times import time_text

# What is asked for by an option, comes whatever is asked for, or is never shown.
_NOT_ASKED_FOR = {ChangeKind.EXISTING, ChangeKind.SYNCED, ChangeKind.RESET, ChangeKind.PROGRESS}
_KINDS = [kind.value for kind in ChangeKind if kind not in _NOT_ASKED_FOR]


def _parse_kind(text: str) -> str:
    if text not in _KINDS:
        raise typer.BadParameter(f"the kinds are {', '.join(_KINDS)}")
    return text


def watch(
    source: Annotated[str, typer.Option("--source", help="Only proxies from this source.")] = "",
    health: options.FilterHealth = None,
    scheme: options.FilterScheme = None,
    label: options.EqualLabel = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            parser=_parse_kind,
            metavar="KIND",
            help=f"Only changes of this kind ({', '.join(_KINDS)}); of several, of any.",
        ),
    ] = None,
    existing: Annotated[
        bool, typer.Option("--existing", help="Begin with every proxy that matches now.")
    ] = False,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="Stop after this many lines. Default: go on.")
    ] = None,
    show_credentials: options.ShowCredentials = False,
    target: options.Target = DEFAULT_TARGET,
    timeout: options.Timeout = DEFAULT_TIMEOUT,
    json: options.Json = False,
) -> None:
    """Show each change of the proxies as it happens; resumes after a lost connection."""
    wanted = options.equal_filters(source, health, scheme, label)
    kinds = set(kind or [])
    if kinds and existing:
        kinds.add(ChangeKind.EXISTING.value)
    with (
        options.connect(target, timeout) as client,
        client.watch(
            **wanted,
            kinds=sorted(kinds),
            include_existing=existing,
            include_credentials=show_credentials,
            on_lost=report_lost,
        ) as stream,
    ):
        for change in islice(stream, count):
            if json:
                output.print_json(_record(change, show_credentials=show_credentials))
            else:
                output.print_line(_line(change))


def _record(change: Change, *, show_credentials: bool) -> dict[str, object]:
    """A change as JSON has it; what it does not have is null."""
    entry, position = change.entry, change.position
    return {
        "kind": change.kind.value,
        "key": change.key,
        "version": change.version,
        "happened_at": time_text(change.happened_at),
        "entry": output.entry_record(entry, show_credentials=show_credentials) if entry else None,
        "position": {"history": position.history, "revision": position.revision} if position else None,
    }


def _line(change: Change) -> str:
    """A change for people, in one line."""
    time = output.short_time(change.happened_at) or "-" * len("2026-01-01T00:00:00Z")
    cells = [time, f"{change.kind.value:<{max(map(len, ChangeKind))}}", change.key]
    if change.kind is ChangeKind.RESET:
        cells.append("changes may have been missed: what came before counts no more")
    if change.entry is not None:
        entry = change.entry
        cells += [entry.proxy_url, entry.health_status.value, f"failures={entry.failure_count}"]
        cells += [f"{name}={value}" for name, value in sorted(entry.labels.items())]
    return "  ".join(cell for cell in cells if cell).rstrip()
