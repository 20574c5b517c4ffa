"""Runs the command `proxystash` as a process, with and without a terminal."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = str(Path(sys.executable).with_name("proxystash"))
_SECONDS = 60


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def json_lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


def environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of its own for proxystash, and with more."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PROXYSTASH_")}
    return {**inherited, "TERM": "xterm", "COLUMNS": "120", **(env or {})}


class Commands:
    """Runs commands against one server."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __call__(self, *arguments: str, stdin: str = "", env: Mapping[str, str] | None = None) -> Outcome:
        """Run a command without a terminal."""
        result = subprocess.run(
            [PROGRAM, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
            env=environment({"PROXYSTASH_TARGET": self.target, **(env or {})}),
        )
        return Outcome(result.returncode, result.stdout, result.stderr)

    def on_terminal(
        self, *arguments: str, prompt: str = "", answer: str = "", env: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        """Run a command on a terminal; its exit code and everything that was to be seen there.

        The answer is typed when the prompt is shown: what was typed before a password is asked for is lost.
        """
        controller, terminal = pty.openpty()
        try:
            # The shell opens it as the terminal of its session, whose Ctrl-C is a signal.
            opened = ["/bin/sh", "-c", 'exec "$@" <"$0"', os.ttyname(terminal)]
            process = subprocess.Popen(
                [*opened, PROGRAM, *arguments],
                stdout=terminal,
                stderr=terminal,
                env=environment({"PROXYSTASH_TARGET": self.target, **(env or {})}),
                start_new_session=True,
            )
            os.close(terminal)
            shown, answered = b"", not prompt
            while True:
                try:
                    data = os.read(controller, 65536)
                except OSError:  # how Linux tells that nobody has the terminal open any more
                    break
                if not data:
                    break
                shown += data
                if not answered and prompt.encode() in shown:
                    os.write(controller, f"{answer}\n".encode())
                    answered = True
            return process.wait(_SECONDS), shown.decode()
        finally:
            os.close(controller)


class Running:
    """A command that goes on, and the lines of JSON that it has written so far."""

    def __init__(self, process: subprocess.Popen[str], out: Path) -> None:
        self.process, self._out = process, out

    def lines(self) -> list[dict[str, Any]]:
        text = self._out.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Its exit code and standard error after a signal."""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=_SECONDS)
        return self.process.returncode, err


@contextmanager
def going_on(target: str, out: Path, *arguments: str) -> Iterator[Running]:
    """A command that writes to the file `out`, killed at the end."""
    with (
        out.open("w") as file,
        subprocess.Popen(
            [PROGRAM, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            env=environment({"PROXYSTASH_TARGET": target}),
        ) as process,
    ):
        try:
            yield Running(process, out)
        finally:
            process.kill()
