"""Log lines: two forms, one content, no credentials."""

from __future__ import annotations

import fcntl
import gc
import json
import logging
import os
import pty
import select
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import structlog

from proxystash_server.logs import configure_logging

Format = Literal["auto", "human", "json"]


DEADLINE = 30


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Logging is the process's: leave it as it was."""
    root = logging.getLogger()
    handlers, level, hooks = list(root.handlers), root.level, (threading.excepthook, sys.unraisablehook)
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers, (threading.excepthook, sys.unraisablehook) = handlers, hooks
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


def logged(log_format: Format, *lines: Any, terminal: bool = False) -> str:
    """What is written to a pipe or a terminal by each of these functions."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    configure_logging("info", log_format, writer)
    for line in lines:
        line()
    (handler,) = logging.getLogger().handlers
    # Let nothing of it be left when the file is closed.
    handler.flush()
    handler.close()
    output = os.read(reader, 1_000_000) if select.select([reader], [], [], 0)[0] else b""
    os.close(writer)
    os.close(reader)
    return output.decode()


def test_both_kinds_of_logger_write_the_same_kind_of_line() -> None:
    output = logged(
        "json",
        lambda: structlog.stdlib.get_logger("a").warning("tier degraded", tier="l2"),
        lambda: logging.getLogger("b").warning("tier degraded", extra={"tier": "l2"}),
    )
    one, other = map(json.loads, output.splitlines())
    assert one.pop("timestamp") <= other.pop("timestamp")
    assert one == other == {"event": "tier degraded", "level": "warning", "tier": "l2"}


def test_a_terminal_gets_lines_for_people_and_anything_else_json() -> None:
    def say() -> None:
        structlog.stdlib.get_logger("a").info("server started", address="127.0.0.1:1")

    assert json.loads(logged("auto", say))["address"] == "127.0.0.1:1"
    on_terminal = logged("auto", say, terminal=True)
    assert "server started" in on_terminal
    assert "\x1b[" in on_terminal
    assert not on_terminal.lstrip().startswith("{")
    assert "\x1b[" not in logged("human", say)


def test_what_is_below_the_level_is_not_logged() -> None:
    assert (
        logged(
            "json",
            lambda: structlog.stdlib.get_logger("a").debug("x"),
            lambda: logging.getLogger("b").debug("y"),
        )
        == ""
    )


@pytest.mark.parametrize("log_format", ["human", "json"])
@pytest.mark.parametrize(
    "fields",
    [
        {"url": "http://user:planted@192.0.2.1:80"},
        {"url": "http://user:pla/planted@x@192.0.2.1:80/path"},
        {"password": "planted"},
        {"Username": "planted"},
        {"auth_token": "planted"},
        {"encryption_key": "planted"},
        {"request": {"entry": {"password": "planted", "url": "socks5://planted@h:1"}}},
        {"urls": ["http://planted@h:1"]},
        {"key": "user:planted@192.0.2.1"},
        {"key": "user:planted with spaces@192.0.2.1"},
        {"entry": {"key": "planted one:planted two@192.0.2.1"}},
        {"keys": ["user:planted@192.0.2.1"]},
        {"error": ValueError("no tier has 'user:planted@192.0.2.1'")},
        {"error": ValueError("cannot reach http://u:planted@h:1")},
    ],
    ids=str,
)
def test_a_credential_does_not_reach_the_log(log_format: Format, fields: dict[str, Any]) -> None:
    output = logged(
        log_format,
        lambda: structlog.stdlib.get_logger("a").info("said", **fields),
        lambda: logging.getLogger("b").info("said", extra=fields),
        lambda: logging.getLogger("b").info("said %s", "http://planted@h:1"),
    )
    assert output.count("said") == 3
    assert "planted" not in output


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_a_traceback_shows_no_credential_and_no_variables(log_format: Format) -> None:
    def fail() -> None:
        password = "planted"
        try:
            raise ValueError(f"http://user:{password}@192.0.2.1:80")
        except ValueError:
            structlog.stdlib.get_logger("a").exception("failed")
            logging.getLogger("b").exception("failed")

    output = logged(log_format, fail)
    assert output.count("ValueError") >= 2
    assert "planted" not in output.replace('password = "planted"', "")


def test_a_thread_that_fails_is_logged() -> None:
    def fail() -> None:
        raise ValueError("gone")

    def run() -> None:
        thread = threading.Thread(target=fail, name="worker")
        thread.start()
        thread.join()

    line = json.loads(logged("json", run))
    assert (line["event"], line["thread"], line["level"]) == ("thread failed", "worker", "error")
    assert "ValueError: gone" in line["exception"]


def test_what_python_would_print_itself_is_logged_too() -> None:
    class Falls:
        def __del__(self) -> None:
            raise ValueError("gone")

    def fall() -> None:
        Falls()
        gc.collect()

    def warn() -> None:
        warnings.warn("planned for removal", stacklevel=2)

    fallen, warned = map(json.loads, logged("json", fall, warn).splitlines())
    assert (fallen["event"], fallen["place"]) == (
        "finalizer failed",
        "test_what_python_would_print_itself_is_logged_too.<locals>.Falls.__del__",
    )
    assert "ValueError: gone" in fallen["exception"]
    assert warned["level"] == "warning"
    assert "planned for removal" in warned["event"]


def test_a_value_that_cannot_be_shown_costs_its_line_and_nothing_else() -> None:
    class Hides:
        def __str__(self) -> str:
            raise ValueError("planted")

    def say() -> None:
        structlog.stdlib.get_logger("a").info("said", value=Hides())

    output = logged("json", say)
    line = json.loads(output)
    assert (line["event"], line["logger"], line["error"]) == ("log line failed", "a", "ValueError")
    assert "planted" not in output


class TestAReaderWhoStops:
    """What reads the log is another program, which may hang."""

    LINES = 20_000

    @pytest.fixture
    def pipe(self) -> Iterator[tuple[int, int]]:
        reader, writer = os.pipe()
        yield reader, writer
        os.close(writer)
        os.close(reader)

    def log_much(self) -> None:
        log = structlog.stdlib.get_logger("a")
        for number in range(self.LINES):
            log.info("said", number=number, padding="x" * 200)

    def test_holds_up_nobody_and_is_told_how_much_is_missing(self, pipe: tuple[int, int]) -> None:
        reader, writer = pipe
        configure_logging("info", "json", writer)
        logging_thread = threading.Thread(target=self.log_much, daemon=True)
        logging_thread.start()
        logging_thread.join(DEADLINE)
        assert not logging_thread.is_alive()
        with os.fdopen(os.dup(reader)) as log:
            lines: list[dict[str, Any]] = []
            while not lines or lines[-1]["event"] == "said":
                lines.append(json.loads(log.readline()))
            told = lines.pop()
            assert (told["event"], told["level"]) == ("log lines dropped", "warning")
            # The first ones are there, in their order, and none is missing that nobody speaks of.
            assert [line["number"] for line in lines] == list(range(len(lines)))
            assert len(lines) + told["lines"] == self.LINES
            structlog.stdlib.get_logger("a").info("said", number=0)
            assert json.loads(log.readline())["number"] == 0

    def test_does_not_keep_the_process_from_ending(self) -> None:
        script = (
            "import logging, sys\n"
            "from proxystash_server.logs import configure_logging\n"
            "configure_logging('info', 'json')\n"
            "for number in range(20_000): logging.getLogger('a').info('said')\n"
            "print('said all', flush=True)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"said all\n"
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()
            process.communicate()

    def test_may_have_gone_for_good(self, pipe: tuple[int, int], tmp_path: Path) -> None:
        """Nothing can be written, and it is told of as soon as something can."""
        _, writer = pipe
        reader, broken = os.pipe()
        os.close(reader)
        os.dup2(broken, writer)
        os.close(broken)
        configure_logging("info", "json", writer)
        (handler,) = logging.getLogger().handlers
        for _ in range(3):
            logging.getLogger("a").info("lost")
        handler.flush()
        with (tmp_path / "log").open("w") as file:
            os.dup2(file.fileno(), writer)
        logging.getLogger("a").info("said")
        handler.flush()
        lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        assert [line["event"] for line in lines] == ["said", "log lines dropped"]
        assert lines[-1]["lines"] == 3

    def test_may_have_made_the_file_one_that_does_not_wait(self, pipe: tuple[int, int]) -> None:
        """The mode belongs to the file, and so to every process that has it open."""
        reader, writer = pipe
        os.set_blocking(writer, False)
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        configure_logging("info", "json", writer)
        for number in range(200):
            logging.getLogger("a").info("said", extra={"number": number})
        with os.fdopen(os.dup(reader)) as log:
            assert [json.loads(log.readline())["number"] for _ in range(200)] == list(range(200))
