"""The steps by which a process changes files, so that a test can look at it, or end it, between any two."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

OnStep = Callable[[str], None]

# SQLite itself is trusted to commit whole or not at all; so these are the moments there are.
_CHANGING = ("COMMIT", "VACUUM", "INSERT", "UPDATE", "DELETE", "PRAGMA WAL_CHECKPOINT", "PRAGMA JOURNAL_MODE")


@contextmanager
def stepping(on_step: OnStep) -> Iterator[None]:
    """Have `on_step` called before every change of a file, also in the middle of each write.

    What `on_step` does itself is left alone.
    """
    busy = False

    def step(name: str) -> None:
        nonlocal busy
        if not busy:
            busy = True
            try:
                on_step(name)
            finally:
                busy = False

    class SteppingConnection(sqlite3.Connection):
        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            alone = not self.in_transaction or statement == "COMMIT"
            if alone and statement.upper().startswith(_CHANGING):
                step(statement)
            return super().execute(statement, *values)

        def executescript(self, script: str) -> sqlite3.Cursor:
            step(script)
            return super().executescript(script)

    pwrite, connect = os.pwrite, sqlite3.connect

    def torn_pwrite(descriptor: int, data: bytes, offset: int) -> int:
        step("pwrite")
        if not busy and len(data) > 1:
            pwrite(descriptor, data[: len(data) // 2], offset)
            step("half a pwrite")
        return pwrite(descriptor, data, offset)

    def stepped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            step(f"{name} {arguments[0]}")
            return function(*arguments, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sqlite3,
            "connect",
            lambda *args, **named: connect(*args, **{"factory": SteppingConnection, **named}),
        )
        patch.setattr(os, "pwrite", torn_pwrite)
        patch.setattr(os, "ftruncate", stepped("ftruncate", os.ftruncate))
        for name in ("rename", "replace", "unlink", "hardlink_to", "mkdir"):
            patch.setattr(Path, name, stepped(name, getattr(Path, name)))
        yield


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do `work` in a child process that is killed before its step `number`; False if it had fewer steps."""
    child = os.fork()
    if not child:
        left = number

        def count_down(_name: str) -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        code = 1
        try:
            with stepping(count_down):
                work()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in {0, -signal.SIGKILL}, "the child failed instead of being killed"
    return code != 0
