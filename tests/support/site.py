"""A site that bans, and HTTP proxies that lead to it, on free loopback ports."""

from __future__ import annotations

import base64
import socket
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final
from urllib.error import HTTPError

PAGE: Final = b"<p>What the site is for.</p>"
ROBOT: Final = b"<p>Are you a robot?</p>"
_VIA: Final = "X-Via"


class LocalSite:
    """Answers with PAGE; those that come by a proxy it has banned get 403, and those that it doubts ROBOT.

    With `patience`, it bans a proxy that has come so often. `visits` are by the proxies' ports.
    """

    def __init__(self, address: str, patience: int | None) -> None:
        self.url = f"http://{address}/page"
        self.patience = patience
        self.visits: Counter[str] = Counter()
        self.banned: set[str] = set()
        self.doubted: set[str] = set()
        self._lock = threading.Lock()

    def answer(self, via: str) -> tuple[int, bytes]:
        with self._lock:
            self.visits[via] += 1
            if self.patience is not None and self.visits[via] > self.patience:
                self.banned.add(via)
            if via in self.banned:
                return 403, b""
            return 200, ROBOT if via in self.doubted else PAGE


class LocalProxy:
    """An HTTP proxy, which asks for a password if it has one."""

    def __init__(self, address: str, password: str | None) -> None:
        self.address = address
        self.url = f"http://{address}"
        self.password = password

    def admits(self, authorization: str | None) -> bool:
        if self.password is None:
            return True
        kind, _, value = (authorization or "").partition(" ")
        return kind == "Basic" and base64.b64decode(value).decode().partition(":")[2] == self.password

    def fetch(self, url: str) -> tuple[int, bytes]:
        request = urllib.request.Request(url, headers={_VIA: self.address})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=30) as response:
                return response.status, response.read()
        except HTTPError as error:
            with error:
                return error.code, error.read()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing: a test's output is its own."""


@contextmanager
def local_site(patience: int | None = None) -> Iterator[LocalSite]:
    """A site until the end of the block."""

    class Handler(_Handler):
        def do_GET(self) -> None:
            self.reply(*site.answer(self.headers.get(_VIA, "")))

    with _serving(Handler) as address:
        site = LocalSite(address, patience)
        yield site


@contextmanager
def local_proxy(password: str | None = None) -> Iterator[LocalProxy]:
    """A proxy until the end of the block; afterwards its port refuses connections."""

    class Handler(_Handler):
        def do_GET(self) -> None:
            if proxy.admits(self.headers.get("Proxy-Authorization")):
                self.reply(*proxy.fetch(self.path))
            else:
                self.reply(407, b"")

    with _serving(Handler) as address:
        proxy = LocalProxy(address, password)
        yield proxy


def dead_proxy_url() -> str:
    """The URL of a proxy whose port refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def _serving(handler: type[_Handler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(30)
