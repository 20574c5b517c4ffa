"""How a command fails: one line on stderr that says what to do, and an exit code that means something."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Final

import typer

from proxystash.cli import output
from proxystash.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    ProxystashError,
    UnavailableError,
)
from proxystash.files import ProxyFileError
from proxystash.proxies import InvalidProxyUrl


class ExitCode(IntEnum):
    """What a command's exit code means."""

    OK = 0
    NOT_DONE = 1
    USAGE = 2
    SERVER = 3
    INTERRUPTED = 130
    PIPE_CLOSED = 141
    TERMINATED = 143


_MEANINGS = {
    ExitCode.OK: "done",
    ExitCode.NOT_DONE: "no such proxy or lease, none to lend, records that failed, nothing loaded, or "
    "a question answered with no",
    ExitCode.USAGE: "wrong arguments, refused values, or a file that cannot be read or written",
    ExitCode.SERVER: "the server cannot be reached, did not answer in time, or failed",
    ExitCode.INTERRUPTED: "interrupted with Ctrl-C",
    ExitCode.PIPE_CLOSED: "nobody reads the output any more",
    ExitCode.TERMINATED: "terminated",
}


# What happens to whoever writes, and to nobody else.
CANNOT_WRITE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def exit_codes_help() -> str:
    """The exit codes as the end of the help text, one paragraph each."""
    lines = [f"{code.value}: {meaning}" for code, meaning in _MEANINGS.items()]
    return "\n\n".join(["Exit codes:", *lines])


class CommandError(Exception):
    """A failure that a command found itself; the message is for the user."""

    def __init__(self, message: str, code: ExitCode) -> None:
        super().__init__(message)
        self.code = code


def report(message: str) -> None:
    """Say what went wrong, in one line."""
    typer.echo(f"proxystash: {' '.join(message.split())}", err=True)


def report_missing(keys: Iterable[str], what: str = "no proxy with key") -> None:
    """Say of what nothing was found; raises CommandError if there is any of it."""
    missing = [output.printable(key) for key in keys]
    for key in missing[:-1]:
        report(f"{what} {key}")
    if missing:
        raise CommandError(f"{what} {missing[-1]}", ExitCode.NOT_DONE)


def report_lost(failure: ProxystashError) -> None:
    """Say that a stream goes on in spite of a failure."""
    report(f"connection lost ({failure.message}); trying again")


@contextmanager
def failing_in_one_line() -> Iterator[None]:
    """Turn what a command raises into a line on stderr and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except CommandError as error:
        report(str(error))
        raise typer.Exit(error.code) from None
    except (InvalidProxyUrl, ProxyFileError) as error:
        report(str(error))
        raise typer.Exit(ExitCode.USAGE) from None
    except ProxystashError as error:
        report(_describe(error))
        code = ExitCode.USAGE if isinstance(error, InvalidArgumentError) else ExitCode.SERVER
        raise typer.Exit(code) from None
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except typer.Abort as error:
        # A question that was left with Ctrl-C, or with the end of the input.
        typer.echo(err=True)
        report("nothing was changed")
        was_interrupted = isinstance(error.__context__, KeyboardInterrupt)
        raise typer.Exit(ExitCode.INTERRUPTED if was_interrupted else ExitCode.NOT_DONE) from None
    except BrokenPipeError:
        discard_output()
        raise typer.Exit(ExitCode.PIPE_CLOSED) from None
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        discard_output()
        report(f"cannot write the output: {error.strerror}")
        raise typer.Exit(ExitCode.USAGE) from None


def _describe(error: ProxystashError) -> str:
    return "; ".join([_advise(error), *getattr(error, "__notes__", [])])


def _advise(error: ProxystashError) -> str:
    if isinstance(error, DeadlineExceededError):
        return f"{error.message}; a longer --timeout may help"
    if isinstance(error, UnavailableError) and not error.sent:
        return f"{error.message}; start a server with `proxystash-server serve`, or pass --target"
    if error.field and error.field not in error.message:
        return f"{error.field}: {error.message}"
    return error.message


def discard_output() -> None:
    """Let the interpreter's last flush go nowhere, so that it does not complain about what failed already."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
