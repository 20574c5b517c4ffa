"""What commands print: JSON for scripts, tables and short lines for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
)
from rich.table import Table

from proxystash.cli.rates import Rates
from proxystash.lists.writing import record_from_entry, whole_record
from proxystash.models import CacheEntry, CacheStatistics, LatencySummary, PoolStatistics
from proxystash.times import time_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_WIDE = 1000
# The pool's counts, as they are told.
_POOL_COUNTS = (
    "leases", "sessions", "waiting", "ready", "leased_out", "resting", "granted", "released", "expired",
    "shortages", "results", "successes",
)  # fmt: skip


def print_json(record: Mapping[str, object], *, err: bool = False) -> None:
    """Print one object as a line of JSON; on standard error where the other is taken."""
    typer.echo(json.dumps(record), err=err)


def print_line(text: str, *, err: bool = False) -> None:
    """Print one line for people; on standard error where the other is taken."""
    typer.echo(printable(text), err=err)


class _Console(Console):
    """A console that leaves a closed pipe to its caller, instead of exiting."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console() -> Console:
    """Standard output; a pipe or a file gets its tables as wide as they are."""
    return _Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False, markup=False, emoji=False)


def progress_console() -> Console:
    """Standard error, where progress bars go."""
    return Console(stderr=True)


def progress(*, quiet: bool, counts: bool = False) -> Progress:
    """A progress bar on stderr; none for scripts, nor where stderr is no terminal.

    What is printed meanwhile on standard output goes where it belongs, also if that is no terminal.
    """
    console = progress_console()
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn() if counts else TaskProgressColumn(),
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        disable=quiet or not console.is_terminal,
    )


def printable(text: str) -> str:
    """A text from the server without what could drive a terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def short_time(time: datetime | None) -> str:
    """A time for people, to the second."""
    return "" if time is None else time.isoformat(timespec="seconds").replace("+00:00", "Z")


def short_duration(duration: timedelta) -> str:
    """A duration for people, in its two greatest units, such as 2h15m."""
    seconds = int(duration.total_seconds())
    for (large, name), (small, small_name) in pairwise(((86_400, "d"), (3_600, "h"), (60, "m"), (1, "s"))):
        if seconds >= large:
            rest = seconds % large // small
            return f"{seconds // large}{name}" + (f"{rest}{small_name}" if rest else "")
    return f"{seconds}s"


def time_left(time: datetime | None) -> str:
    """How long it is until a moment, for people."""
    if time is None:
        return ""
    left = time - datetime.now(UTC)
    return "now" if left <= timedelta(0) else short_duration(left)


def entry_record(entry: CacheEntry, *, show_credentials: bool) -> dict[str, object]:
    """An entry as JSON has it: every field of an exported line, and what only the server says."""
    record = whole_record(entry, include_credentials=show_credentials)
    if not show_credentials:
        del record["username"], record["password"]
    return record | {"evicted_from_l1": entry.evicted_from_l1, "version": entry.version}


def print_entry(entry: CacheEntry, *, served_by: str, show_credentials: bool) -> None:
    """An entry for people, one field on a line."""
    record = record_from_entry(entry, include_credentials=show_credentials)
    record["evicted_from_l1"] = entry.evicted_from_l1
    record["version"] = entry.version
    if not show_credentials and (entry.username or entry.password):
        record["credentials"] = "hidden; --show-credentials shows them"
    lines = [*_flatten(record | {"served_by": served_by})]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print_line(f"{name:<{width}}  {value}")


def plain_record(model: DataclassInstance) -> dict[str, object]:
    """A model as JSON has it: times in ISO 8601, durations in seconds, under a name that says so."""
    record: dict[str, object] = {}
    for item in fields(model):
        value = getattr(model, item.name)
        # What may be a duration says so also where there is none.
        is_duration = "timedelta" in str(item.type)
        record[f"{item.name}_seconds" if is_duration else item.name] = _plain(value)
    return record


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return time_text(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return plain_record(value)
    return value


def statistics_record(statistics: CacheStatistics) -> dict[str, object]:
    """A snapshot as JSON has it: times in ISO 8601, latencies in microseconds."""
    return {
        "observed_at": time_text(statistics.observed_at),
        "started_at": time_text(statistics.started_at),
        "entries": statistics.entries,
        "hits": statistics.hits,
        "misses": statistics.misses,
        "hit_rate": statistics.hit_rate,
        "promotions": statistics.promotions,
        "demotions": statistics.demotions,
        "removals": statistics.removals,
        "stats_subscribers": statistics.stats_subscribers,
        "watch_subscribers": statistics.watch_subscribers,
        "pool": None if statistics.pool is None else _pool_record(statistics.pool),
        "tiers": [
            {
                "tier": tier.tier.value,
                "backend": tier.backend,
                "state": tier.state.value,
                "entries": tier.entries,
                "max_entries": tier.max_entries,
                "hits": tier.hits,
                "misses": tier.misses,
                "hit_rate": tier.hit_rate,
                "evictions_capacity": tier.evictions_capacity,
                "evictions_ttl": tier.evictions_ttl,
                "evictions_health": tier.evictions_health,
                "evictions_corruption": tier.evictions_corruption,
                "errors": tier.errors,
                "read_latency": _latency_record(tier.read_latency),
                "write_latency": _latency_record(tier.write_latency),
                "log_bytes": tier.log_bytes,
            }
            for tier in statistics.tiers
        ],
    }


def _pool_record(pool: PoolStatistics) -> dict[str, object]:
    return {
        **{name: getattr(pool, name) for name in _POOL_COUNTS},
        "acquire_latency": _latency_record(pool.acquire_latency),
        "loading": pool.loading,
        "journal_degraded": pool.journal_degraded,
    }


def statistics_table(statistics: CacheStatistics, rates: Rates | None = None) -> Table:
    """A snapshot for people: a column for each tier, one for the cache as a whole, and one for its rates."""
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        caption=f"at {short_time(statistics.observed_at)}, up since {short_time(statistics.started_at)}",
        caption_justify="left",
    )
    table.add_column("")
    for tier in statistics.tiers:
        table.add_column(f"{tier.tier.value} {printable(tier.backend)}", justify="right")
    table.add_column("cache", justify="right")
    if rates is not None:
        table.add_column("a second", justify="right")
    tiers = statistics.tiers
    rows: list[tuple[str, list[str], str]] = [
        ("state", [tier.state.value for tier in tiers], ""),
        ("entries", [f"{tier.entries:,}" for tier in tiers], f"{statistics.entries:,}"),
        ("at most", [f"{tier.max_entries:,}" if tier.max_entries else "unlimited" for tier in tiers], ""),
        ("hits", [f"{tier.hits:,}" for tier in tiers], f"{statistics.hits:,}"),
        ("misses", [f"{tier.misses:,}" for tier in tiers], f"{statistics.misses:,}"),
        ("hit rate", [f"{tier.hit_rate:.1%}" for tier in tiers], f"{statistics.hit_rate:.1%}"),
        ("evicted: capacity", [f"{tier.evictions_capacity:,}" for tier in tiers], ""),
        ("evicted: TTL", [f"{tier.evictions_ttl:,}" for tier in tiers], ""),
        ("evicted: health", [f"{tier.evictions_health:,}" for tier in tiers], ""),
        ("evicted: corrupt", [f"{tier.evictions_corruption:,}" for tier in tiers], ""),
        ("errors", [f"{tier.errors:,}" for tier in tiers], ""),
        *_latency_rows("read", [tier.read_latency for tier in tiers]),
        *_latency_rows("write", [tier.write_latency for tier in tiers]),
        ("promotions", [""] * len(tiers), f"{statistics.promotions:,}"),
        ("demotions", [""] * len(tiers), f"{statistics.demotions:,}"),
        ("removals", [""] * len(tiers), f"{statistics.removals:,}"),
        ("stats subscribers", [""] * len(tiers), f"{statistics.stats_subscribers:,}"),
        ("watch subscribers", [""] * len(tiers), f"{statistics.watch_subscribers:,}"),
    ]
    if statistics.pool is not None:
        rows += _pool_rows(statistics.pool, [""] * len(tiers))
    for name, cells, total in rows:
        speed = [] if rates is None else [f"{rates[name]:,.1f}" if name in rates else ""]
        table.add_row(name, *cells, total, *speed)
    return table


def _pool_rows(pool: PoolStatistics, no_cells: list[str]) -> list[tuple[str, list[str], str]]:
    state = "loading" if pool.loading else "ready"
    latency = pool.acquire_latency
    return [
        ("pool", no_cells, f"{state}, journal degraded" if pool.journal_degraded else state),
        *((f"pool: {name.replace('_', ' ')}", no_cells, f"{getattr(pool, name):,}") for name in _POOL_COUNTS),
        *(
            (f"pool: acquire {name}", no_cells, _duration_text(getattr(latency, name)))
            for name in ("p50", "p99", "max")
        ),
    ]


def statistics_line(statistics: CacheStatistics, rates: Rates | None = None) -> str:
    """A snapshot in one line."""
    speed = "" if rates is None else f", {rates['hits']:,.1f} and {rates['misses']:,.1f} a second"
    tiers = ", ".join(f"{tier.tier.value} {tier.entries:,} {tier.state.value}" for tier in statistics.tiers)
    return (
        f"{short_time(statistics.observed_at)}  {statistics.entries:,} entries, {statistics.hits:,} hits, "
        f"{statistics.misses:,} misses ({statistics.hit_rate:.1%}){speed}; {tiers}"
    )


def _flatten(record: Mapping[str, object]) -> Iterable[tuple[str, object]]:
    for name, value in record.items():
        if isinstance(value, dict) and name == "labels":
            yield name, labels_text(value)
        elif isinstance(value, dict):
            yield from _flatten(value)
        elif isinstance(value, bool):
            yield name, "yes" if value else "no"
        else:
            yield name, value


def labels_text(labels: Mapping[str, str]) -> str:
    """Labels for people, by name."""
    return ", ".join(f"{name}={value}" for name, value in sorted(labels.items()))


def _latency_record(latency: LatencySummary) -> dict[str, float]:
    return {"p50_us": _us(latency.p50), "p99_us": _us(latency.p99), "max_us": _us(latency.max)}


def _us(duration: timedelta) -> float:
    return duration / timedelta(microseconds=1)


def _latency_rows(name: str, latencies: list[LatencySummary]) -> list[tuple[str, list[str], str]]:
    return [
        (f"{name} p50", [_duration_text(latency.p50) for latency in latencies], ""),
        (f"{name} p99", [_duration_text(latency.p99) for latency in latencies], ""),
        (f"{name} max", [_duration_text(latency.max) for latency in latencies], ""),
    ]


def _duration_text(duration: timedelta) -> str:
    microseconds = _us(duration)
    if microseconds < 1000:
        return f"{microseconds:.0f} µs"
    if microseconds < 1_000_000:
        return f"{microseconds / 1000:.1f} ms"
    return f"{microseconds / 1_000_000:.1f} s"
