"""A site on a loopback port whose answers are written in the tests, byte by byte if need be."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Answer = Callable[["Request"], None]


class Request(BaseHTTPRequestHandler):
    """A request that a test answers."""

    server: Site

    def do_GET(self) -> None:
        site = self.server
        with site.lock:
            site.seen.append((self.path, dict(self.headers)))
        answer = site.answers.get(self.path.partition("?")[0])
        if answer is None:
            self.answer(404)
            return
        try:
            answer(self)
        except ConnectionError:
            # The client has gone away, as it may.
            self.close_connection = True

    def answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        """A whole answer."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""


class Site(ThreadingHTTPServer):
    """Answers by path, and remembers what it was asked. `stopping` is set when the test is over."""

    daemon_threads = False

    def __init__(self, certificate: Path | None = None, host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), Request)
        self.host = host
        self.answers: dict[str, Answer] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
            self.scheme = "https"

    def handle_error(self, *_: object) -> None:
        """A connection that the client gave up is no failure of the test."""

    def url(self, path: str = "/list.txt", *, host: str = "", userinfo: str = "") -> str:
        at = f"{userinfo}@" if userinfo else ""
        return f"{self.scheme}://{at}{host or self.host}:{self.server_port}{path}"

    def serves(self, body: bytes, path: str = "/list.txt", status: int = 200, **headers: str) -> None:
        """Answer a path with the same body each time."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answers[path] = lambda request: request.answer(status, body, given)

    def headers_of(self, path: str) -> list[dict[str, str]]:
        """The headers of each request for a path."""
        with self.lock:
            return [headers for seen, headers in self.seen if seen.partition("?")[0] == path]


@contextmanager
def running_site(certificate: Path | None = None, host: str = "127.0.0.1") -> Iterator[Site]:
    """A site that answers until the end of the block, when all its connections end, too."""
    site = Site(certificate, host)
    thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield site
    finally:
        site.stopping.set()
        site.shutdown()
        thread.join()
        site.server_close()
