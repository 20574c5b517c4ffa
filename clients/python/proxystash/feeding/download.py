"""Lists behind URLs, by aiohttp, which is loaded here alone.

A fetch has one deadline for everything: for a blocking library that is a time for each read, and an answer of
one byte each second never ends.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from dataclasses import dataclass
from http import HTTPStatus
from importlib.metadata import version
from typing import BinaryIO, Final

import aiohttp
from yarl import URL

from proxystash.feeding.copying import BoundedFile, bounded_file, too_large
from proxystash.feeding.failures import SourceError
from proxystash.feeding.sources import SCHEMES, Source

_CHUNK: Final = 1 << 16
_REDIRECTS: Final = (301, 302, 303, 307, 308)


@dataclass(frozen=True, slots=True)
class Validators:
    """What an answer said of its version, and the URL that it came from."""

    url: URL
    etag: str | None
    last_modified: str | None

    def headers(self) -> dict[str, str]:
        """What asks for a newer version alone."""
        given = {"If-None-Match": self.etag, "If-Modified-Since": self.last_modified}
        return {name: value for name, value in given.items() if value}


class Downloader:
    """Fetches lists: each within `timeout` seconds, `limit` bytes as they arrive, and some redirects.

    The environment's proxies, cookies and netrc are not used. Credentials go to the scheme, host and port of
    the source's own URL and nowhere else; those in a redirect are dropped. For one event loop.
    """

    def __init__(self, *, timeout: float, limit: int, max_redirects: int) -> None:
        self._timeout, self._limit, self._max_redirects = timeout, limit, max_redirects
        self._session = aiohttp.ClientSession(
            headers={"User-Agent": f"proxystash/{version('proxystash')}", "Accept-Encoding": "gzip"},
            auto_decompress=False,
            # No source waits for a connection that another one holds.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
            trust_env=False,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def fetch(self, source: Source, known: Validators | None) -> tuple[BinaryIO, Validators] | None:
        """The list as it arrived, perhaps packed with gzip; None if it is the one that is known.

        Raises SourceError.
        """
        with bounded_file(self._limit) as body:
            try:
                async with asyncio.timeout(self._timeout):
                    validators = await self._follow(source, known, body)
            except TimeoutError:
                raise SourceError(f"no whole answer within {self._timeout:g} s") from None
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise SourceError(_describe(error)) from None
        if validators is None:
            body.file.close()
            return None
        return body.file, validators

    async def _follow(self, source: Source, known: Validators | None, body: BoundedFile) -> Validators | None:
        url = URL(source.url)
        origin = url.origin()
        for _ in range(self._max_redirects + 1):
            headers = known.headers() if known is not None and known.url == url else {}
            if (source.username or source.password) and url.origin() == origin:
                userinfo = f"{source.username}:{source.password}".encode()
                headers["Authorization"] = f"Basic {b64encode(userinfo).decode()}"
            async with self._session.get(url, headers=headers, allow_redirects=False) as answer:
                if answer.status in _REDIRECTS:
                    url = _target(url, answer.headers.get("Location"))
                    continue
                if answer.status == HTTPStatus.NOT_MODIFIED and known is not None:
                    return None
                await self._read(answer, body)
                return Validators(url, answer.headers.get("ETag"), answer.headers.get("Last-Modified"))
        raise SourceError(f"redirected more than {self._max_redirects} times")

    async def _read(self, answer: aiohttp.ClientResponse, body: BoundedFile) -> None:
        if answer.status != HTTPStatus.OK:
            raise SourceError(f"answers with status {answer.status}")
        encoding = answer.headers.get("Content-Encoding", "").strip().lower()
        if encoding not in {"", "identity", "gzip", "x-gzip"}:
            raise SourceError("packed in another way than gzip")
        if answer.content_length is not None and answer.content_length > self._limit:
            raise too_large(self._limit)
        async for chunk in answer.content.iter_chunked(_CHUNK):
            body.write(chunk)


def _target(url: URL, location: str | None) -> URL:
    """Where a redirect leads, without credentials."""
    if not location:
        raise SourceError("redirects to nowhere")
    target = url.join(URL(location))
    if target.scheme not in SCHEMES or not target.host:
        raise SourceError("redirects to what is no URL with http or https")
    if url.scheme == "https" and target.scheme == "http":
        raise SourceError("redirects from https to http")
    return target.with_user(None).with_fragment(None)


def _describe(error: Exception) -> str:
    """What went wrong, without what the other side said."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "its host has no address"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "its certificate is not to be trusted"
    if isinstance(error, aiohttp.ClientSSLError):
        return "no encrypted connection can be made"
    if isinstance(error, aiohttp.ClientOSError | OSError):
        return f"no connection: {error.strerror or 'it was lost'}"
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError):
        return "the answer broke off"
    return "the answer is no proper HTTP"
