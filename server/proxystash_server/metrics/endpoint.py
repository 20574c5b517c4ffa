"""Where Prometheus asks: GET /metrics over HTTP."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Final
from urllib.parse import urlsplit

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

PATH: Final = "/metrics"

# Answers at once: a few Prometheus servers and a person. Who comes beyond them waits in the kernel, and takes
# no descriptor that the tiers may need.
_THREADS: Final = 4
# How long a connection may say nothing, or not read, before it is closed.
_PATIENCE_SECONDS: Final = 5.0

_log = structlog.stdlib.get_logger(__name__)


class MetricsEndpoint:
    """Answers GET /metrics from a registry, on an address `host:port`. Listens once made; `start` answers.

    Raises OSError where it cannot listen.
    """

    def __init__(self, listen: str, registry: CollectorRegistry) -> None:
        host, _, port = listen.rpartition(":")
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        self._server = _Server(family, address, registry)
        self.address = f"{host}:{self._server.server_address[1]}"
        self._threads = [
            threading.Thread(target=self._server.answer, name=f"metrics-{number}", daemon=True)
            for number in range(_THREADS)
        ]

    def start(self) -> None:
        """Answer from now on."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Listen no more. Who is being answered may not get it all."""
        self._server.close()


class _Server(HTTPServer):
    def __init__(self, family: int, address: Any, registry: CollectorRegistry) -> None:  # noqa: ANN401 - by family
        self.address_family = family
        self.registry = registry
        self._closing = False
        super().__init__(address, _Request)

    def server_bind(self) -> None:
        # The base class asks the name service for the host's name, which may take long, for nothing.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def answer(self) -> None:
        """Take one connection after the other, until closed; in any number of threads."""
        while not self._closing:
            try:
                connection, client = self.get_request()
            except OSError:
                if not self._closing:
                    _log.warning("metrics connection failed", exc_info=True)
                continue
            try:
                self.finish_request(connection, client)
            except (ConnectionError, TimeoutError):
                # Whoever asked has gone.
                pass
            except Exception:  # noqa: BLE001 - costs this answer, and no thread
                _log.exception("metrics failed")
            finally:
                self.shutdown_request(connection)

    def close(self) -> None:
        self._closing = True
        # Wakes the threads that wait for a connection, where the system does that.
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.server_close()


class _Request(BaseHTTPRequestHandler):
    server: _Server
    timeout = _PATIENCE_SECONDS
    # Not the version of Python, which only helps an attacker.
    server_version = "proxystash"
    sys_version = ""

    def do_GET(self) -> None:
        body = self._answer()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> bytes:
        status = 200
        if urlsplit(self.path).path == PATH:
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            body = encode(self.server.registry)
        else:
            status, content_type, body = 404, "text/plain; charset=utf-8", f"see {PATH}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401 - as the base class has it
        """Nothing: it would be a line for each scrape."""
