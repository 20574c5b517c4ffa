"""What something costs, in numbers that are the same on every machine."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from proxystash_server.cache.tiers.sqlite.database import Database


class Meter:
    """Counts the steps of SQLite's virtual machine and the calls of Python functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sqlite_steps = 0
        connect = Database._new_connection

        def counting_connection(database: Database, path: Path) -> sqlite3.Connection:
            connection = connect(database, path)
            connection.set_progress_handler(self._step, 1)
            return connection

        monkeypatch.setattr(Database, "_new_connection", counting_connection)

    def cost(self, action: Callable[[], object]) -> tuple[int, int]:
        """SQLite steps and Python calls of `action`."""
        calls = 0

        def count(_frame: FrameType, event: str, _argument: object) -> None:
            nonlocal calls
            calls += event == "call"

        before = self.sqlite_steps
        sys.setprofile(count)
        try:
            action()
        finally:
            sys.setprofile(None)
        return self.sqlite_steps - before, calls

    def _step(self) -> int:
        self.sqlite_steps += 1
        return 0
