"""The command `proxystash-server`."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer

from proxystash.cli.failures import CANNOT_WRITE, discard_output
from proxystash_server import __version__
from proxystash_server.proxywhirl_import.command import import_proxywhirl
from proxystash_server.settings import (
    CONFIG_VARIABLE,
    FLAGS,
    LoadedSettings,
    SettingsError,
    choices_of,
    load_settings,
)
from proxystash_server.settings_text import describe_setting, document_settings, show_settings
from proxystash_server.store_commands import check, given_path, rotate_key

_STANDARD_OUTPUT: Final = 1
_STANDARD_ERROR: Final = 2

app = typer.Typer(
    help="A small server that keeps a scraper fleet's proxies in three tiers and shares their health.",
    add_completion=True,
    no_args_is_help=True,
    # The framework's own tracebacks would show the values of variables.
    pretty_exceptions_enable=False,
)

Config = Annotated[
    Path | None,
    typer.Option(
        envvar=CONFIG_VARIABLE,
        parser=given_path,
        help="TOML file with settings.",
        metavar="FILE",
        show_default=False,
    ),
]


def main() -> None:
    """Run the command line."""
    open_standard_files()
    try:
        try:
            app(prog_name="proxystash-server")
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        discard_output()
        print(f"proxystash-server: cannot write the output: {error.strerror}", file=sys.stderr)  # noqa: T201 - the command's own voice
        sys.exit(1)


def open_standard_files() -> None:
    """Open the null device in the place of standard files that whoever started the process has closed.

    The next files to be opened would get their numbers, and with them what is meant for a terminal or a log.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STANDARD_ERROR:
        pass
    os.close(descriptor)
    # Python has none for what was closed, and would print to standard output what is meant for the other.
    sys.stdout = sys.stdout or open(_STANDARD_OUTPUT, "w", closefd=False)  # noqa: SIM115 - never closed
    sys.stderr = sys.stderr or open(_STANDARD_ERROR, "w", closefd=False)  # noqa: SIM115 - as above


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for each setting that may have one, and pass it what was loaded as `loaded`.

    The flags' values are passed on as text: they are checked where those from the environment are.
    """

    @functools.wraps(command)
    def run(config: Path | None, **arguments: Any) -> None:  # noqa: ANN401 - the command's own options are of any type
        flags = {name: arguments.pop(name) for name in FLAGS}
        given = {name: text for name, text in flags.items() if text is not None}
        try:
            loaded = load_settings(given, config)
        except SettingsError as error:
            _fail(error.lines, exit_code=2)
        command(loaded=loaded, **arguments)

    own = [
        parameter
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        if parameter.name != "loaded"
    ]
    parameters = [
        *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
        inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Config),
        *(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_flag_type(name, flag)
            )
            for name, flag in FLAGS.items()
        ),
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer makes options from
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _flag_type(name: str, flag: str) -> object:
    metavar = "|".join(choices_of(name)) or "VALUE"
    return Annotated[
        str | None,
        typer.Option(
            flag,
            help=describe_setting(name),
            metavar=metavar,
            show_default=False,
            rich_help_panel="Settings",
        ),
    ]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"proxystash-server {__version__}")
        raise typer.Exit


@app.command()
@with_settings
def serve(loaded: LoadedSettings) -> None:
    """Serve until told to stop (SIGTERM or SIGINT; a second one stops at once)."""
    # gRPC's core writes to standard error past the log, in its own form; what matters there is told by us.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from proxystash_server import app as server

    try:
        exit_code = server.serve(loaded.settings)
    except server.StartupError as error:
        _fail([str(error)], exit_code=1)
    raise typer.Exit(exit_code)


@app.command()
@with_settings
def settings(
    loaded: LoadedSettings,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the documentation of all settings.")
    ] = False,
) -> None:
    """Show the settings in effect and where each comes from, as TOML. Secrets are not shown."""
    for line in document_settings() if markdown else show_settings(loaded):
        typer.echo(line)


app.command()(with_settings(check))
app.command()(with_settings(rotate_key))
app.command()(with_settings(import_proxywhirl))


def _fail(lines: list[str], exit_code: int) -> NoReturn:
    for line in lines:
        print(f"proxystash-server: {line}", file=sys.stderr)  # noqa: T201 - the command's own voice
    raise typer.Exit(exit_code)
