"""Trying one proxy against a URL: by aiohttp, and for SOCKS by aiohttp-socks, which are loaded here alone."""

from __future__ import annotations

import asyncio
import secrets
import ssl
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Final
from urllib.parse import urlsplit

import aiohttp
import aiohttp_socks

from proxystash.checking.answers import Anonymity, Seen, anonymity, read_answer
from proxystash.models import CacheEntry
from proxystash.pool_models import Outcome

_CHUNK: Final = 1 << 14
_LIMIT: Final = 1 << 18
_SOCKS: Final = {"socks4": "4", "socks4a": "4", "socks5": "5", "socks5h": "5"}
_FAILURES: Final = (
    aiohttp.ClientError, aiohttp_socks.ProxyError, aiohttp_socks.ProxyConnectionError, OSError, ValueError,
)  # fmt: skip
_HEADER: Final = "X-Proxystash-Check"


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of one request: `reason` says why it failed, and holds nothing that the other side said."""

    outcome: Outcome
    latency: timedelta
    reason: str = ""
    seen: Seen | None = None
    anonymity: Anonymity | None = None


class Prober:
    """Makes requests to one URL, directly and through proxies. For one event loop.

    A good answer has status 200 and holds `expect`, if that is given; and where a direct answer shows the
    headers of its request, one through a proxy must show them, too. The environment's proxies are not used.
    """

    def __init__(self, url: str, *, timeout: float, expect: str = "") -> None:
        self._url, self._timeout, self._expect = url, timeout, expect
        self._direct: Seen | None = None

    async def direct(self) -> Probe:
        """A request without a proxy; what a good one shows is what others are compared with."""
        probe = await self._request(None)
        if probe.seen is not None:
            self._direct = probe.seen
        return probe

    async def through(self, entry: CacheEntry) -> Probe:
        """A request through a proxy."""
        return await self._request(entry)

    async def _request(self, entry: CacheEntry | None) -> Probe:
        token = secrets.token_hex(8)
        begun = time.monotonic()
        seen: Seen | None = None
        try:
            async with asyncio.timeout(self._timeout):
                status, body = await self._fetch(entry, token)
            outcome, reason = self._judge_status(status)
            if outcome is Outcome.SUCCESS:
                seen = read_answer(body, token)
                outcome, reason = self._judge_content(seen, is_direct=entry is None)
        except (TimeoutError, aiohttp_socks.ProxyTimeoutError):
            outcome, reason = Outcome.TIMEOUT, f"no whole answer within {self._timeout:g} s"
        except _FAILURES as error:
            outcome, reason = _judge_error(error)
        latency = timedelta(seconds=time.monotonic() - begun)
        if outcome is not Outcome.SUCCESS:
            return Probe(outcome, latency, reason)
        assert seen is not None
        level = None if entry is None or self._direct is None else anonymity(seen, self._direct)
        return Probe(outcome, latency, "", seen, level)

    async def _fetch(self, entry: CacheEntry | None, token: str) -> tuple[int, bytes]:
        proxy = None if entry is None else entry.url(with_credentials=True)
        socks = entry is not None and urlsplit(entry.proxy_url).scheme in _SOCKS
        connector = (
            _socks_connector(entry) if entry is not None and socks else aiohttp.TCPConnector(force_close=True)
        )
        async with (
            aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
                trust_env=False,
            ) as session,
            session.get(
                self._url, headers={_HEADER: token}, allow_redirects=False, proxy=None if socks else proxy
            ) as answer,
        ):
            body = bytearray()
            async for chunk in answer.content.iter_chunked(_CHUNK):
                body += chunk
                if len(body) > _LIMIT:
                    raise _TooLargeError
            return answer.status, bytes(body)

    def _judge_status(self, status: int) -> tuple[Outcome, str]:
        outcome = Outcome.from_http_status(status)
        if status == 200:
            return outcome, ""
        if outcome is Outcome.TARGET_ERROR:
            # Where the target itself works, the proxy has not reached it.
            outcome = Outcome.CONNECT_ERROR
        return Outcome.BAD_CONTENT if outcome is Outcome.SUCCESS else outcome, f"status {status}"

    def _judge_content(self, seen: Seen, *, is_direct: bool) -> tuple[Outcome, str]:
        if self._expect and self._expect not in seen.text:
            return Outcome.BAD_CONTENT, "the answer lacks what is expected"
        if not is_direct and self._direct is not None and self._direct.echoes and not seen.echoes:
            return Outcome.BAD_CONTENT, "the answer is not the target's"
        return Outcome.SUCCESS, ""


class _TooLargeError(ValueError):
    """An answer that is larger than any check needs."""


def _socks_connector(entry: CacheEntry) -> aiohttp.TCPConnector:
    parts = urlsplit(entry.proxy_url)
    kind = aiohttp_socks.ProxyType.SOCKS4 if _SOCKS[parts.scheme] == "4" else aiohttp_socks.ProxyType.SOCKS5
    assert parts.hostname is not None
    assert parts.port is not None
    return aiohttp_socks.ProxyConnector(
        parts.hostname,
        parts.port,
        kind,
        entry.username,
        entry.password,
        rdns=parts.scheme in {"socks4a", "socks5h"},
        force_close=True,
    )


def _judge_error(error: Exception) -> tuple[Outcome, str]:
    """Whose fault an error looks like; what else it may have been, a direct request tells."""
    if isinstance(error, _TooLargeError):
        return Outcome.BAD_CONTENT, f"an answer of more than {_LIMIT:,} bytes"
    if isinstance(error, aiohttp.ClientConnectorCertificateError | ssl.SSLCertVerificationError):
        return Outcome.BAD_CONTENT, "the certificate is not the target's"
    if isinstance(error, aiohttp.ClientHttpProxyError):
        if error.status == 407:
            return Outcome.AUTH_ERROR, "the proxy refuses the credentials"
        return Outcome.CONNECT_ERROR, f"the proxy connects nowhere: status {error.status}"
    if isinstance(error, aiohttp_socks.ProxyConnectionError | aiohttp.ClientProxyConnectionError):
        return Outcome.CONNECT_ERROR, "the proxy is not there"
    if isinstance(error, aiohttp_socks.ProxyError):
        if "auth" in str(error).lower() or "credentials" in str(error).lower():
            return Outcome.AUTH_ERROR, "the proxy refuses the credentials"
        return Outcome.CONNECT_ERROR, "the proxy connects nowhere"
    return Outcome.CONNECT_ERROR, "the connection failed or broke off"
