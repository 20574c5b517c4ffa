"""The command `import-proxywhirl`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from proxystash_server.settings import LoadedSettings
from proxystash_server.store_commands import given_path

if TYPE_CHECKING:
    from proxystash_server.proxywhirl_import.importer import OnProgress

_NOT_DONE = 1
_USAGE = 2

_Sources = Annotated[
    list[Path],
    typer.Argument(
        parser=given_path,
        metavar="SOURCE",
        show_default=False,
        help="Directory with what proxywhirl has stored, at any depth, such as .cache; or one of its files.",
    ),
]
_KeyFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--proxywhirl-key-file",
        parser=given_path,
        metavar="FILE",
        show_default=False,
        help="File with Fernet keys of proxywhirl's, one on a line, beside those in the variables "
        "PROXYWHIRL_CACHE_ENCRYPTION_KEY and PROXYWHIRL_CACHE_KEY_PREVIOUS.",
    ),
]
_WithoutCredentials = Annotated[
    bool,
    typer.Option(
        "--without-credentials",
        help="Import a proxy whose credentials no key opens without them, instead of skipping it.",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")]


def import_proxywhirl(
    loaded: LoadedSettings,
    sources: _Sources,
    proxywhirl_key_file: _KeyFiles = None,
    without_credentials: _WithoutCredentials = False,
    as_json: _Json = False,
) -> None:
    """Import what proxywhirl 0.3.3 has stored. The server must be stopped; what is imported stays as it is.

    Reads JSONL shards, l2_cache.db and the L3 database. Of copies of a proxy the newest counts, and importing
    again does no harm. Where proxywhirl had no key in its environment, it made a new one at each start and
    kept it nowhere: nobody can open the credentials of such a run any more.

    Exit code: 0 if everything of use was imported, 1 if something failed, 2 if the command was given wrongly.
    """
    # Imported late: the other commands have no use for it, and the first brings the whole server with it.
    from proxystash_server.app import cache_config
    from proxystash_server.cache import CacheError
    from proxystash_server.logs import configure_logging
    from proxystash_server.proxywhirl_import.importer import import_stores
    from proxystash_server.proxywhirl_import.keyring import KeyringError, load_keyring
    from proxystash_server.proxywhirl_import.stores import SourceError, find_stores

    settings = loaded.settings
    configure_logging(settings.log_level, settings.log_format)
    try:
        stores = find_stores(sources)
        keyring = load_keyring(os.environ, proxywhirl_key_file or [])
        _refuse_overlap([store.path for store in stores], settings.data_dir)
        with _progress(quiet=as_json) as progress:
            report = import_stores(
                stores,
                cache_config(settings),
                keyring,
                without_credentials=without_credentials,
                on_progress=progress,
            )
    except (SourceError, KeyringError) as error:
        _fail(str(error), _USAGE)
    except CacheError as error:
        _fail(str(error), _NOT_DONE)
    if as_json:
        typer.echo(json.dumps(report.as_json()))
    else:
        for line in report.lines():
            typer.echo(_printable(line))
    if not report.complete:
        raise typer.Exit(_NOT_DONE)


def _refuse_overlap(files: list[Path], data_dir: Path) -> None:
    for file in files:
        if file.resolve().is_relative_to(data_dir.resolve()):
            _fail(f"{file} is in the data directory, which must be another place than the source", _USAGE)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[OnProgress]:
    """A progress bar on standard error; none for scripts, nor where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    console = Console(stderr=True)
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    with bar:
        tasks = {step: bar.add_task(step, total=None) for step in ("read", "import")}

        def show(step: Literal["read", "import"], done: int, total: int | None) -> None:
            bar.update(tasks[step], completed=done, total=total)

        yield show


def _printable(text: str) -> str:
    """A line without what a file's name could drive a terminal with."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def _fail(message: str, exit_code: int) -> NoReturn:
    print(f"proxystash-server: {_printable(message)}", file=sys.stderr)  # noqa: T201 -- the command's own voice
    raise typer.Exit(exit_code)
