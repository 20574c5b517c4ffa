"""What became of a use, told by the exception that ended it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from proxystash.pool_models import Outcome

# Whose exceptions are known by their names. Others' may well be of something else than the use of a proxy.
_LIBRARIES = {
    "aiohttp", "aiohttp_socks", "asyncio", "builtins", "curl_cffi", "http", "httpcore", "httpx", "playwright",
    "python_socks", "requests", "scrapy", "socket", "socks", "ssl", "twisted", "urllib", "urllib3",
}  # fmt: skip
# The first that is found in the name of the exception, or of what it descends from, counts.
_NAMES = (
    (re.compile("AuthError"), Outcome.AUTH_ERROR),
    (re.compile("Connect(ion)?Timeout"), Outcome.CONNECT_ERROR),
    (re.compile("Timeout|TimedOut"), Outcome.TIMEOUT),
    (re.compile("CertificateError|CertVerification"), Outcome.BAD_CONTENT),
    (re.compile("IncompleteRead|ChunkedEncoding|PayloadError|ContentDecoding"), Outcome.BAD_CONTENT),
    (
        re.compile(
            "ProxyError|ProxyConnection|Connect(ion|or)?Error|Connection(Done|Lost|Refused)|Disconnected"
            "|NetworkError|ReadError|WriteError|RemoteProtocolError|BadStatusLine|SSLError|TunnelError|gaierror"
        ),
        Outcome.CONNECT_ERROR,
    ),
)
# What a tunnel that was refused, or a browser, has to say.
_TEXTS = (
    (re.compile(r"\b407\b|ERR_PROXY_AUTH|ERR_INVALID_AUTH_CREDENTIALS"), Outcome.AUTH_ERROR),
    (re.compile("certificate verify failed|ERR_CERT_"), Outcome.BAD_CONTENT),
    (re.compile("ERR_(CONNECTION_)?TIMED_OUT"), Outcome.TIMEOUT),
    (
        re.compile("Tunnel connection failed|ERR_(PROXY|TUNNEL|SOCKS|CONNECTION|EMPTY)_"),
        Outcome.CONNECT_ERROR,
    ),
)
_Table = Sequence[tuple[re.Pattern[str], Outcome]]


def outcome_of_error(error: BaseException) -> Outcome:
    """What an exception says of the proxy and the target.

    What carries an HTTP status counts as that status. Timeouts, and connections that were refused, reset or
    never made, are told by the names that the standard library and the usual HTTP libraries have for them,
    also in what an exception comes from. All else is ABANDONED, which says nothing: a bug in a worker, a full
    disk or an interrupt is no fault of a proxy.
    """
    if isinstance(error, Exception):
        for one in _origins(error):
            outcome = _outcome_of_one(one)
            if outcome is not None:
                return outcome
    return Outcome.ABANDONED


def _origins(error: BaseException) -> Iterator[BaseException]:
    """An exception, and what it comes from."""
    seen: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in seen:
        seen.append(found)
        yield found
        reason = getattr(found, "reason", None)
        found = reason if isinstance(reason, BaseException) else found.__cause__


def _outcome_of_one(error: BaseException) -> Outcome | None:
    known = [cls.__name__ for cls in type(error).__mro__ if cls.__module__.partition(".")[0] in _LIBRARIES]
    status = _http_status(error)
    # A proxy that could not connect says so with a status, too, which is not the target's.
    if status is not None and (status == 407 or not any("ProxyError" in name for name in known)):
        return Outcome.from_http_status(status)
    outcome = _first(_NAMES, known)
    if outcome is Outcome.CONNECT_ERROR or (outcome is None and set(known) & {"OSError", "Error"}):
        outcome = _first(_TEXTS, [str(error)]) or outcome
    return outcome


def _first(table: _Table, texts: Sequence[str]) -> Outcome | None:
    return next((outcome for text in texts for pattern, outcome in table if pattern.search(text)), None)


def _http_status(error: BaseException) -> int | None:
    """The status of the answer that an exception is about, as requests, httpx, aiohttp and urllib have it."""
    for holder in (getattr(error, "response", None), error):
        for name in ("status_code", "status", "code"):
            status = getattr(holder, name, None)
            if isinstance(status, int) and 400 <= status < 600:
                return status
    return None
