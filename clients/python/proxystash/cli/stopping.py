"""How a command that goes on is stopped."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import typer

from proxystash.cli.failures import ExitCode

_T = TypeVar("_T")


def run_until_stopped(work: Coroutine[Any, Any, _T]) -> _T:
    """What the work gives; SIGTERM cancels it, as Ctrl-C does, and ends this process afterwards."""

    async def run() -> _T:
        task = asyncio.current_task()
        assert task is not None
        with _on_terminate(asyncio.get_running_loop(), task):
            return await work

    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        raise typer.Exit(ExitCode.TERMINATED) from None


@contextmanager
def _on_terminate(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> Iterator[None]:
    # Not the loop's own way, which is not everywhere.
    before = signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(task.cancel))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
