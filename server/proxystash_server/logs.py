"""Logging: every line of the process in one form, for people or as JSON, and without credentials."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Mapping
from typing import Final, Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from proxystash.proxies import redact_url
from proxystash_server.log_writer import LogWriter

_SECRET_NAME: Final = re.compile(
    r"password|passwd|username|secret|token|credential|encryption_?key", re.IGNORECASE
)
# Greedy up to the last "@" of a word: a password may contain "/" and "@", and taking too much does no harm
# here. With or without a scheme, since a key is whatever its caller likes.
_USERINFO: Final = re.compile(r"(?<!\S)([a-z][a-z0-9+.-]*://)?\S+@", re.IGNORECASE)
# What grpcio says of a header that is not UTF-8, with all of the header.
_NOT_TEXT: Final = "Invalid encoding on %s"


def configure_logging(
    level: Literal["debug", "info", "warning", "error"],
    log_format: Literal["auto", "human", "json"],
    descriptor: int = 2,
) -> None:
    """Send every log line of the process to a file descriptor (standard error), in one form.

    `auto` means human where that is a terminal, else JSON. What Python itself would print there is logged
    too: exceptions that nobody caught in threads and finalizers, and warnings.
    """
    is_terminal = os.isatty(descriptor)
    human = log_format == "human" or (log_format == "auto" and is_terminal)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        # Tracebacks become text here, so that they pass through redaction; the renderers' own would show
        # variables.
        structlog.processors.format_exc_info,
    ]
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=is_terminal, sort_keys=False)
        if human
        else structlog.processors.JSONRenderer(ensure_ascii=False, default=str)
    )
    handler = LogWriter(descriptor)
    handler.addFilter(_leave_header_out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                redact,
                _order,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    threading.excepthook = _log_thread_failure
    sys.unraisablehook = _log_unraisable
    logging.captureWarnings(capture=True)


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """The last line of defence: no value under a secret's name and no userinfo reaches the log."""
    return _redacted_fields(event)


def _leave_header_out(record: logging.LogRecord) -> bool:
    """Tell of a header that is not text by its size: it may be a credential, and may be long."""
    if record.msg == _NOT_TEXT and isinstance(record.args, tuple):
        (header,) = record.args
        size = len(header) if isinstance(header, bytes) else 0
        record.msg, record.args = "a header of a call is not text: %d bytes", (size,)
        record.exc_info = None
    return True


def _redacted_fields(fields: Mapping[str, object]) -> dict[str, object]:
    return {
        name: "***"
        if _SECRET_NAME.search(str(name))
        # A key may have spaces, so no word of it says where a credential in it begins.
        else redact_url(value)
        if name == "key" and isinstance(value, str)
        else _redacted(value)
        for name, value in fields.items()
    }


def _order(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    first = {name: event[name] for name in ("timestamp", "level", "event") if name in event}
    return {**first, **event}


def _redacted(value: object) -> object:
    if isinstance(value, str):
        return _USERINFO.sub(r"\1***@", value) if "@" in value else value
    if isinstance(value, dict):
        return _redacted_fields(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_redacted(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return _redacted(str(value))


def _log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_value is None or isinstance(failure.exc_value, SystemExit):
        return
    thread = failure.thread.name if failure.thread is not None else "unknown"
    structlog.stdlib.get_logger(__name__).error("thread failed", thread=thread, exc_info=failure.exc_value)


def _log_unraisable(failure: sys.UnraisableHookArgs) -> None:
    # The object itself may hold anything, and may be on its way out.
    place = getattr(failure.object, "__qualname__", type(failure.object).__name__)
    structlog.stdlib.get_logger(__name__).error("finalizer failed", place=place, exc_info=failure.exc_value)
