"""What exceptions and HTTP statuses say of a proxy and a target."""

from __future__ import annotations

import asyncio
import http.client
import socket
import ssl
import urllib.error
from email.message import Message
from typing import Any

import pytest

from proxystash import Outcome, UnavailableError, outcome_of_error


def library_error(module: str, *names: str, **fields: Any) -> Exception:
    """An exception as a library has it, its class named first and then what that descends from."""
    base: type[Exception] = Exception
    for name in reversed(names):
        base = type(name, (base,), {"__module__": module})
    error = base(fields.pop("text", ""))
    vars(error).update(fields)
    return error


def browser_error(text: str) -> Exception:
    return library_error("playwright._impl._errors", "Error", text=text)


def proxy_answer(status: int) -> Exception:
    return library_error("aiohttp", "ClientHttpProxyError", "ClientResponseError", status=status)


def because(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


class Response:
    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


REFUSED = ConnectionRefusedError(111, "Connection refused")
CASES: list[tuple[BaseException, Outcome]] = [
    # the standard library
    (REFUSED, Outcome.CONNECT_ERROR),
    (ConnectionResetError(), Outcome.CONNECT_ERROR),
    (http.client.RemoteDisconnected(""), Outcome.CONNECT_ERROR),
    (http.client.BadStatusLine("SSH-2.0"), Outcome.CONNECT_ERROR),
    (http.client.IncompleteRead(b""), Outcome.BAD_CONTENT),
    (socket.gaierror(-2, "Name or service not known"), Outcome.CONNECT_ERROR),
    (TimeoutError(), Outcome.TIMEOUT),
    (ssl.SSLCertVerificationError("certificate verify failed"), Outcome.BAD_CONTENT),
    (ssl.SSLEOFError(), Outcome.CONNECT_ERROR),
    (urllib.error.URLError(REFUSED), Outcome.CONNECT_ERROR),
    (urllib.error.URLError(TimeoutError()), Outcome.TIMEOUT),
    (urllib.error.HTTPError("http://t", 429, "", Message(), None), Outcome.RATE_LIMITED),
    (OSError("Tunnel connection failed: 407 Proxy Authentication Required"), Outcome.AUTH_ERROR),
    (OSError("Tunnel connection failed: 503 Service Unavailable"), Outcome.CONNECT_ERROR),
    # requests and urllib3
    (library_error("requests.exceptions", "ConnectTimeout", "ConnectionError"), Outcome.CONNECT_ERROR),
    (library_error("requests.exceptions", "ReadTimeout", "Timeout"), Outcome.TIMEOUT),
    (library_error("requests.exceptions", "ProxyError", "ConnectionError"), Outcome.CONNECT_ERROR),
    (library_error("requests.exceptions", "ProxyError", text="... 407 Proxy ..."), Outcome.AUTH_ERROR),
    (library_error("requests.exceptions", "HTTPError", response=Response(403)), Outcome.BLOCKED),
    (library_error("requests.exceptions", "ChunkedEncodingError"), Outcome.BAD_CONTENT),
    (library_error("requests.exceptions", "SSLError", text="certificate verify failed"), Outcome.BAD_CONTENT),
    (library_error("urllib3.exceptions", "MaxRetryError", reason=REFUSED), Outcome.CONNECT_ERROR),
    # httpx
    (library_error("httpx", "ConnectTimeout", "TimeoutException"), Outcome.CONNECT_ERROR),
    (library_error("httpx", "PoolTimeout", "TimeoutException"), Outcome.TIMEOUT),
    (library_error("httpx", "ProxyError", text="407 Proxy Authentication Required"), Outcome.AUTH_ERROR),
    (library_error("httpx", "HTTPStatusError", response=Response(503)), Outcome.TARGET_ERROR),
    (library_error("httpx", "RemoteProtocolError"), Outcome.CONNECT_ERROR),
    # aiohttp
    (library_error("aiohttp.client_exceptions", "ServerDisconnectedError"), Outcome.CONNECT_ERROR),
    (proxy_answer(502), Outcome.CONNECT_ERROR),
    (proxy_answer(407), Outcome.AUTH_ERROR),
    (library_error("aiohttp", "ClientResponseError", status=451), Outcome.BLOCKED),
    # SOCKS, browsers
    (library_error("socks", "SOCKS5AuthError", "ProxyError"), Outcome.AUTH_ERROR),
    (browser_error("net::ERR_PROXY_CONNECTION_FAILED at"), Outcome.CONNECT_ERROR),
    (browser_error("net::ERR_CONNECTION_RESET at"), Outcome.CONNECT_ERROR),
    (library_error("playwright._impl._errors", "TimeoutError", "Error"), Outcome.TIMEOUT),
    # what says nothing
    (ValueError("407"), Outcome.ABANDONED),
    (FileNotFoundError(2, "No such file"), Outcome.ABANDONED),
    (OSError(28, "No space left on device"), Outcome.ABANDONED),
    (library_error("redis.exceptions", "ConnectionError"), Outcome.ABANDONED),
    (browser_error("Target page has been closed"), Outcome.ABANDONED),
    (UnavailableError("the server of the proxies"), Outcome.ABANDONED),
    (asyncio.CancelledError(), Outcome.ABANDONED),
    (KeyboardInterrupt(), Outcome.ABANDONED),
    (SystemExit(429), Outcome.ABANDONED),
    # what comes from something else
    (because(RuntimeError("page 7"), REFUSED), Outcome.CONNECT_ERROR),
    (because(RuntimeError("page 7"), ValueError()), Outcome.ABANDONED),
]  # fmt: skip


@pytest.mark.parametrize(("error", "outcome"), CASES, ids=lambda case: repr(case)[:60])
def test_an_exception_says_whose_fault_it_was(error: BaseException, outcome: Outcome) -> None:
    assert outcome_of_error(error) is outcome


def test_exceptions_that_come_from_one_another_end() -> None:
    first, second = RuntimeError(), RuntimeError()
    first.__cause__, second.__cause__ = second, first

    assert outcome_of_error(first) is Outcome.ABANDONED


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, Outcome.SUCCESS),
        (302, Outcome.SUCCESS),
        (404, Outcome.SUCCESS),
        (401, Outcome.BLOCKED),
        (403, Outcome.BLOCKED),
        (451, Outcome.BLOCKED),
        (407, Outcome.AUTH_ERROR),
        (429, Outcome.RATE_LIMITED),
        (500, Outcome.TARGET_ERROR),
        (503, Outcome.TARGET_ERROR),
    ],
)
def test_a_status_says_whose_fault_it_was(status: int, outcome: Outcome) -> None:
    assert Outcome.from_http_status(status) is outcome
