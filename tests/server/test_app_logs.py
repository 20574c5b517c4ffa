"""Log lines: two forms, one content, no credentials."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import structlog

from proxystash_server.logs import configure_logging

Format = Literal["auto", "human", "json"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Logging is the process's: leave it as it was."""
    root = logging.getLogger()
    handlers, level, hook = list(root.handlers), root.level, threading.excepthook
    yield
    root.handlers, threading.excepthook = handlers, hook
    root.setLevel(level)
    structlog.reset_defaults()


def logged(log_format: Format, *lines: Any, stream: io.StringIO | None = None) -> str:
    stream = stream or io.StringIO()
    configure_logging("info", log_format, stream)
    for line in lines:
        line()
    return stream.getvalue()


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
    on_terminal = logged("auto", say, stream=Terminal())
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
