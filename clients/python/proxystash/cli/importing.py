"""The command that takes over what other pools have stored: import."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from proxystash._defaults import DEFAULT_TARGET, DEFAULT_TIMEOUT
from proxystash.cli import options, output, reports
from proxystash.cli.failures import ExitCode
from proxystash.importing.pools import Pool, read_pool
from proxystash.loading import Loader, LoadReport
from proxystash.models import PutMode
from proxystash.proxies import Identity, redact_url


def _parse_pool(text: str) -> Pool:
    # As in the name of its repository, too.
    name = text.rpartition("/")[2].lower()
    if name not in list(Pool):
        raise typer.BadParameter(f"the pools are {', '.join(Pool)}")
    return Pool(name)


def import_pool(
    pool: Annotated[
        Pool,
        typer.Argument(
            metavar="POOL",
            parser=_parse_pool,
            help="proxy_pool (jhao104), proxypool (Python3WebSpider), scrapy-rotating-proxies or scylla.",
        ),
    ],
    place: Annotated[
        str,
        typer.Argument(
            metavar="PLACE",
            help="For the first two the URL of their Redis, redis://host:port/db, or a dump as JSON; for the "
            "others their list, their settings.py, or their SQLite file; - for standard input. Of Redis, "
            "the password may be in REDISCLI_AUTH.",
        ),
    ],
    key: Annotated[
        str | None,
        typer.Option("--key", help="The key in Redis, if it is not the usual one of the pool."),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme",
            parser=options.parse_scheme,
            metavar="SCHEME",
            help="The scheme of proxies that say none. Default: http.",
        ),
    ] = None,
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
    """Load what another pool has stored, and leave that as it is.

    docs/coming-from.md says for each pool what becomes of its fields, and which of our calls replace its own.
    """
    mode = options.put_mode(merge=merge, replace=replace, if_absent=if_absent, default=PutMode.MERGE)
    report = LoadReport()
    started = time.monotonic()
    with options.connect_patiently(target, timeout) as client, output.progress(quiet=json) as progress:
        progress.add_task(f"import from {redact_url(place)}", total=None)
        records = read_pool(
            pool,
            sys.stdin.buffer if place == "-" else place,
            "standard input" if place == "-" else place,
            key=key,
            scheme=scheme,
            identity=identity,
            timeout=timeout,
        )
        Loader(client, mode, source, ttl).load(records, report)
    if json:
        output.print_json(report.record())
    else:
        reports.print_report(report, verbose=verbose, seconds=time.monotonic() - started)
    if report.count("failed") or not report.loaded:
        raise typer.Exit(ExitCode.NOT_DONE)
