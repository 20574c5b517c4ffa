"""The thread that writes the log, so that whoever does not read it holds up nobody else."""

from __future__ import annotations

import logging
import os
import select
import threading
from typing import Final

# Lines of about 200 bytes: some five thousand.
_MOST_WAITING_BYTES: Final = 1024 * 1024
# How long the end of the process waits for a reader.
_FLUSH_SECONDS: Final = 1.0


class LogWriter(logging.Handler):
    """Writes each record as a line to a file descriptor, from a thread of its own: nobody waits who logs.

    Lines wait in memory while nobody reads, a megabyte at most. What then comes is dropped and counted, as is
    what cannot be written; once lines can be written again, one of them says how many are missing. Whatever
    waits at the end of the process gets a second.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._changed = threading.Condition()
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._dropped = 0
        self._is_writing = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Have the record written, or count it as dropped. Never waits."""
        try:
            line = self._line(record)
        except Exception as error:  # noqa: BLE001 - a line that cannot be made must not fail who logged it
            # No more of it: what the record holds has not been redacted.
            line = self._line(
                _record(logging.ERROR, "log line failed", logger=record.name, error=type(error).__name__)
            )
        with self._changed:
            if self._waiting_bytes + len(line) > _MOST_WAITING_BYTES:
                self._dropped += 1
                return
            self._waiting.append(line)
            self._waiting_bytes += len(line)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything has been written, a second at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._is_writing, _FLUSH_SECONDS)

    def close(self) -> None:
        """Let the thread go, after what it is writing. Flush first."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        super().close()

    def _line(self, record: logging.LogRecord) -> bytes:
        return (self.format(record) + "\n").encode("utf-8", "backslashreplace")

    def _run(self) -> None:
        lost = 0
        while (taken := self._take()) is not None:
            lines, dropped = taken
            lost += dropped + sum(not self._write(line) for line in lines)
            if lost and self._write(self._line(_record(logging.WARNING, "log lines dropped", lines=lost))):
                lost = 0

    def _take(self) -> tuple[list[bytes], int] | None:
        """All that waits, and how many lines came after it that did not fit; None when closing."""
        with self._changed:
            self._is_writing = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if self._closing:
                return None
            taken = self._waiting, self._dropped
            self._waiting, self._waiting_bytes, self._dropped = [], 0, 0
            self._is_writing = True
            return taken

    def _write(self, line: bytes) -> bool:
        rest = memoryview(line)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                # Another process that has this file open made it so.
                select.select([], [self._descriptor], [])
            except OSError:
                return False
        return True


def _record(level: int, event: str, **fields: object) -> logging.LogRecord:
    name = logging.getLevelName(level)
    return logging.makeLogRecord(
        {"name": __name__, "levelno": level, "levelname": name, "msg": event, **fields}
    )
