"""The application: its commands put together, and how every run of it ends."""

from __future__ import annotations

import signal
import sys
from importlib.metadata import version
from io import TextIOWrapper
from typing import Annotated

import typer
from typer.core import TyperGroup

from proxystash.cli import (
    changes,
    checking,
    entries,
    feed,
    importing,
    leases,
    listing,
    statistics,
    transfer,
)
from proxystash.cli.failures import ExitCode, exit_codes_help, failing_in_one_line, report

# The base of all that the parser raises. Typer exports only this descendant of it.
_ParserError: type[Exception] = next(
    cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException"
)


class _Commands(TyperGroup):
    """Commands whose failures are one line on stderr and an exit code."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]  # typer's is click's Context
        with failing_in_one_line():
            return super().invoke(ctx)

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]  # as above
        # Writes the help, too.
        with failing_in_one_line():
            return super().parse_args(ctx, _behind_the_command(args))

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]  # as above
        return list(self.commands)


# Options of the commands that may stand before the command as well.
_OF_COMMANDS = ("--target", "--timeout")


def _behind_the_command(args: list[str]) -> list[str]:
    """The arguments with what stands before the command and belongs to it moved behind it."""
    count = 0
    while count < len(args):
        name, has_value, _ = args[count].partition("=")
        if name not in _OF_COMMANDS:
            break
        count += 1 if has_value else 2
    before, rest = args[:count], args[count:]
    # Without a command they stay, for the help.
    return [rest[0], *before, *rest[1:]] if rest and not rest[0].startswith("-") else args


app = typer.Typer(
    name="proxystash",
    cls=_Commands,
    help="Keep a fleet's proxies in a proxystash server: store, find, borrow, report and watch them.",
    epilog=exit_codes_help(),
    # Options to install and to show it, for bash, zsh, fish and PowerShell.
    add_completion=True,
    rich_markup_mode="rich",
    # A traceback with local variables would show passwords.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(entries.get)
app.command()(entries.put)
app.command()(entries.delete)
app.command()(entries.clear)
app.command()(entries.invalidate)
app.command()(entries.unban)
app.command()(entries.ping)
app.command("list")(listing.list_proxies)
app.command()(listing.count)
app.command()(transfer.warm)
app.command()(transfer.export)
app.command("import")(importing.import_pool)
app.command()(feed.feed)
app.command("check-proxies")(checking.check_proxies)
app.command()(statistics.stats)
app.command("watch-stats")(statistics.watch_stats)
app.command()(changes.watch)
app.command()(leases.acquire)
app.command()(leases.release)
app.command()(leases.report)
app.command()(leases.leases)
app.command()(leases.targets)
app.command()(leases.health)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"proxystash {version('proxystash')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
    _target: Annotated[
        str | None,
        typer.Option("--target", metavar="HOST:PORT", help="Address of the server; also behind the command."),
    ] = None,
    _timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="SECONDS", help="How long to wait for each answer; likewise."),
    ] = None,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(ExitCode.USAGE)


def main() -> None:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        # Once more, for what is printed by no command, such as the help.
        with failing_in_one_line():
            code = app(standalone_mode=False)
    except typer.Exit as error:
        code = error.exit_code
    except _ParserError as error:
        report(_describe(error))
        code = ExitCode.USAGE
    except typer.Abort:
        # Ctrl-C before there was a command.
        code = ExitCode.INTERRUPTED
    sys.exit(code if isinstance(code, int) else ExitCode.OK)


def _terminate(_signal: int, _frame: object) -> None:
    """End the orderly way, so that no half-written file is left."""
    sys.exit(ExitCode.TERMINATED)


def _describe(error: Exception) -> str:
    """A parser's error in one line, with where to look."""
    message = str(error.format_message() if hasattr(error, "format_message") else error)
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "proxystash"
    return f"{' '.join(message.split()).rstrip('.')}; see `{command} --help`"
