"""The commands for a stopped store: `check` and `rotate-key`."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from proxystash_server.settings import LoadedSettings, Settings, refuse_empty_path

if TYPE_CHECKING:
    from proxystash_server.cache.stopped.report import Finding, Progress, Report

_FAULTS: Final = 1
_REFUSED: Final = 2


def given_path(text: str) -> Path:
    """A path of the command line; raises BadParameter if it is empty."""
    try:
        refuse_empty_path(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return Path(text)


_Directory = Annotated[
    Path | None,
    typer.Argument(
        parser=given_path,
        metavar="DATA_DIR",
        show_default=False,
        help="The data directory; without it, the one of the settings.",
    ),
]
_Repair = Annotated[
    bool,
    typer.Option(
        "--repair",
        help="Set bad records aside, bring L3 what L2 has of them, empty an L2 that still differs from it, "
        "and check again.",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_NewKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--new-key-file",
        parser=given_path,
        metavar="FILE",
        show_default=False,
        help="File with the new key. Without it, a new key is generated and kept in the data directory's key "
        "file; where the key is given in PROXYSTASH_ENCRYPTION_KEY, that is the new one, and "
        "PROXYSTASH_ENCRYPTION_KEY_PREVIOUS must be the old one.",
    ),
]


def check(
    loaded: LoadedSettings, directory: _Directory = None, repair: _Repair = False, as_json: _Json = False
) -> None:
    """Prove that the store of a stopped server is consistent, and say what is not.

    Checks every checksum, seal, count and index, and L2 against L3 where the next start would take L2 as it
    is. Changes nothing unless told to repair. What a crash left behind and the next start puts in order is
    told as a note.

    Exit code: 0 if the store is consistent, 1 if it has faults, 2 if it could not be checked.
    """
    from proxystash_server.app import cache_config
    from proxystash_server.cache.errors import CacheError
    from proxystash_server.cache.stopped.check import check_store
    from proxystash_server.cache.stopped.repair import repair_store
    from proxystash_server.cache.store_lock import caches_kept_out

    settings = _settings(loaded, directory)
    config = cache_config(settings)
    done: Mapping[str, int] = {}
    try:
        with _progress(quiet=as_json) as progress:
            if repair:
                done, report = repair_store(config, progress=progress)
            else:
                with caches_kept_out(settings.data_dir):
                    report = check_store(config, progress=progress)
    except (CacheError, OSError, sqlite3.Error) as error:
        _refuse(error)
    if as_json:
        typer.echo(json.dumps({**report.to_json(), "repaired": dict(done)}))
    else:
        _print_report(report, done)
    raise typer.Exit(0 if report.consistent else _FAULTS)


def rotate_key(
    loaded: LoadedSettings, directory: _Directory = None, new_key_file: _NewKeyFile = None
) -> None:
    """Seal every stored username and password under a new key. The server must be stopped.

    Changes that the slowest tier has missed are brought to it first. May be interrupted at any moment: run
    again, it finishes, and until then the old key stays where it is.

    Exit code: 0 if everything is sealed under the new key, 1 if something failed on the way (run it again), 2
    if it was refused and no key was changed.
    """
    from proxystash_server.app import cache_config
    from proxystash_server.cache.errors import CacheError, StoreError
    from proxystash_server.cache.stopped.rotation import rotate_key

    config = cache_config(_settings(loaded, directory))
    try:
        with _progress(quiet=False) as progress:
            rotation = rotate_key(config, new_key_file, progress=progress)
    except StoreError as error:
        _refuse(error)
    except (CacheError, OSError, sqlite3.Error) as error:
        _tell_error(f"{error}. Every credential can still be opened; run rotate-key again to finish")
        raise typer.Exit(_FAULTS) from None
    if rotation.was_unfinished:
        typer.echo("Finished a change of key that had been interrupted.")
    for store, credentials in rotation.credentials.items():
        resealed = rotation.resealed.get(store, 0)
        typer.echo(f"{store}: {resealed:,} of {credentials:,} credentials sealed anew")
    typer.echo("Everything is sealed under the new key, and nothing is left of the old seals.")
    for advice in rotation.advice:
        typer.echo(f"To do: {advice}")


def _settings(loaded: LoadedSettings, directory: Path | None) -> Settings:
    settings = loaded.settings
    if directory is not None:
        settings = settings.model_copy(update={"data_dir": directory})
    if not settings.data_dir.is_dir():
        _refuse(f"data directory {settings.data_dir} does not exist")
    return settings


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Progress]:
    """A progress bar on standard error; none for scripts, nor where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    bar = Bar(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=None)
        current = ""

        def show(what: str, done: int, total: int) -> None:
            nonlocal current
            # A million calls: only every thousandth step is worth drawing.
            if what != current or not done % 1000 or done == total:
                current = what
                bar.update(task, description=what, completed=done, total=total or None)

        def ignore(_what: str, _done: int, _total: int) -> None:
            pass

        yield ignore if bar.disable else show


def _print_report(report: Report, done: Mapping[str, int]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("tier", "backend", "entries", "with credentials", "set aside", box=box.SIMPLE)
    for column in table.columns[2:]:
        column.justify = "right"
    for totals in report.tiers:
        numbers = (totals.entries, totals.credentials, totals.set_aside)
        cells = [f"{number:,}" for number in numbers] if totals.exists else ["nothing stored yet", "", ""]
        table.add_row(totals.tier, totals.backend, *cells)
    Console().print(table)
    for what, count in done.items():
        typer.echo(f"repaired: {what}: {count:,}")
    for word, findings in (("note", report.notes), ("fault", report.faults)):
        for finding in findings:
            typer.echo(_line(word, finding))
    for kind, count in report.omitted().items():
        typer.echo(f"and {count:,} more of the kind {kind}")
    verdict = "The store is consistent" if report.consistent else "The store has faults"
    faults = sum(report.counts[kind] for kind in {fault.kind for fault in report.faults})
    notes = sum(report.counts[kind] for kind in {note.kind for note in report.notes})
    typer.echo(f"{verdict}: {faults:,} faults, {notes:,} notes.")


def _line(word: str, finding: Finding) -> str:
    remedy = f". {finding.remedy[0].upper()}{finding.remedy[1:]}." if finding.remedy else "."
    return _printable(f"{word}: {finding.place}: {finding.message}{remedy}")


def _printable(text: str) -> str:
    """A line without what a file's name could drive a terminal with."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def _refuse(error: object) -> NoReturn:
    _tell_error(str(error))
    raise typer.Exit(_REFUSED)


def _tell_error(message: str) -> None:
    print(f"proxystash-server: {_printable(message)}", file=sys.stderr)  # noqa: T201 -- the command's own voice
