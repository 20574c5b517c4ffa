"""A real server for tests: the process that its users start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_START_SECONDS = 60
_STOP_SECONDS = 60


class ServerProcess:
    """`python -m proxystash_server serve` on a free port, and everything it has logged."""

    def __init__(
        self,
        data_dir: Path,
        extra_args: tuple[str, ...],
        env: Mapping[str, str] | None,
        open_files: int | None = None,
    ) -> None:
        arguments = ["serve", "--listen", "127.0.0.1:0", "--data-dir", str(data_dir), *extra_args]
        self.process = subprocess.Popen(
            _command(arguments, open_files),
            env={**_environment(), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.target = ""
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._reading = threading.Event()
        self._reading.set()
        self._reader = threading.Thread(target=self._read, name="server-log", daemon=True)
        self._reader.start()

    def log_lines(self) -> list[dict[str, Any]]:
        """What was logged so far; a line that is not JSON has it under `text`."""
        with self._changed:
            lines = list(self._lines)
        return [_parse(line) for line in lines]

    def log_text(self) -> str:
        """The log as it was written."""
        with self._changed:
            return "".join(self._lines)

    def wait_for_log(self, event: str, timeout: float = 30) -> dict[str, Any]:
        """The first line with this event, as soon as it is there."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._find(event) is not None, timeout)
            line = self._find(event)
        assert line is not None, f"no {event!r} in the server's log:\n{self.log_text()}"
        return line

    def wait_until_serving(self) -> None:
        self.target = self.wait_for_log("server started", _START_SECONDS)["address"]

    def hold_log(self) -> None:
        """Read no more of what the server logs, as a pipe does whose reader has stopped, until `read_log`."""
        self._reading.clear()

    def read_log(self) -> None:
        """Read the log on."""
        self._reading.set()

    def stop(self) -> int:
        """Ask the server to stop, wait for it, and return its exit code."""
        self.process.terminate()
        return self._wait()

    def kill(self) -> None:
        """End the server as a crash would."""
        self.process.kill()
        self._wait()

    def _wait(self) -> int:
        code = self.process.wait(_STOP_SECONDS)
        self._reader.join(_STOP_SECONDS)
        return code

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            for line in stderr:
                self._reading.wait()
                with self._changed:
                    self._lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _find(self, event: str) -> dict[str, Any] | None:
        return next((line for line in map(_parse, self._lines) if line.get("event") == event), None)


@contextmanager
def running_server(
    data_dir: Path | str,
    *extra_args: str,
    env: Mapping[str, str] | None = None,
    open_files: int | None = None,
) -> Iterator[ServerProcess]:
    """A server that serves `data_dir` with more arguments and environment variables; stopped at the end.

    `open_files` is how many files it may have open, connections among them.
    """
    server = ServerProcess(Path(data_dir), extra_args, env, open_files)
    try:
        server.wait_until_serving()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.terminate()
            try:
                server._wait()
            except subprocess.TimeoutExpired:
                server.kill()
                raise
        else:
            server._wait()


def start_and_fail(
    *arguments: str, env: Mapping[str, str] | None = None, open_files: int | None = None
) -> tuple[int, str]:
    """Exit code and standard error of a server that cannot start."""
    result = subprocess.run(
        _command(("serve", *arguments), open_files),
        env={**_environment(), **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stdout == ""
    return result.returncode, result.stderr


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PROXYSTASH_")}


def _command(arguments: Sequence[str], open_files: int | None) -> list[str]:
    command = [sys.executable, "-m", "proxystash_server", *arguments]
    if open_files is None:
        return command
    return ["sh", "-c", 'ulimit -n "$0" && exec "$@"', str(open_files), *command]


def _parse(line: str) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError:
        parsed = None
    return parsed if isinstance(parsed, dict) else {"text": line.rstrip("\n")}
