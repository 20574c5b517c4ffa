"""Proxies on loopback ports, honest and not. What they ask for comes from an address of their own."""

from __future__ import annotations

import asyncio
import base64
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter

_OWN_HOP = {b"proxy-connection", b"proxy-authorization"}


@dataclass
class LocalProxy:
    """A proxy that speaks HTTP, SOCKS 4 and SOCKS 5, whichever it is spoken to in.

    `exit_address` is where its requests come from. With `credentials` it asks for them. `adds` are headers
    that it adds to a request that it can read. `answer` is what it says instead of asking anybody. With
    `silent` it says nothing.
    """

    exit_address: str = "127.0.0.9"
    credentials: tuple[str, str] | None = None
    adds: dict[str, str] = field(default_factory=dict)
    answer: bytes = b""
    silent: bool = False
    port: int = 0
    uses: int = 0
    _open: set[Writer] = field(default_factory=set)

    @property
    def location(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def serve(self, reader: Reader, writer: Writer) -> None:
        self.uses += 1
        self._open.add(writer)
        try:
            first = await reader.readexactly(1)
            if self.silent:
                await reader.read()
            elif first == b"\x05":
                await self._socks5(reader, writer)
            elif first == b"\x04":
                await self._socks4(reader, writer)
            else:
                await self._http(first, reader, writer)
        except (OSError, EOFError):
            pass
        finally:
            self._open.discard(writer)
            await _close(writer)

    def hang_up(self) -> None:
        """End all connections that it has."""
        for writer in self._open:
            writer.transport.abort()

    async def _http(self, first: bytes, reader: Reader, writer: Writer) -> None:
        head = first + await reader.readuntil(b"\r\n\r\n")
        line, *headers = head.rstrip().split(b"\r\n")
        method, where, _ = line.split(b" ")
        given = {
            name.lower(): value.strip() for name, _, value in (header.partition(b":") for header in headers)
        }
        if self.credentials is not None:
            wanted = b"Basic " + base64.b64encode(":".join(self.credentials).encode())
            if given.get(b"proxy-authorization") != wanted:
                writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()
                return
        if self.answer:
            writer.write(self.answer)
            await writer.drain()
            return
        if method == b"CONNECT":
            host, _, port = where.decode().partition(":")
            tunnel = await self._connect(host, int(port))
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await _pump(reader, writer, *tunnel)
            return
        location, _, path = where.decode().removeprefix("http://").partition("/")
        host, _, port = location.partition(":")
        onward_reader, onward = await self._connect(host, int(port or 80))
        kept = [header for header in headers if header.partition(b":")[0].lower() not in _OWN_HOP]
        kept += [f"{name}: {value}".encode() for name, value in self.adds.items()]
        first_line = f"{method.decode()} /{path} HTTP/1.1".encode()
        onward.write(b"\r\n".join([first_line, *kept, b"Connection: close", b"", b""]))
        await _pump(reader, writer, onward_reader, onward)

    async def _socks5(self, reader: Reader, writer: Writer) -> None:
        methods = await reader.readexactly((await reader.readexactly(1))[0])
        if self.credentials is None:
            writer.write(b"\x05\x00")
        elif 2 not in methods:
            writer.write(b"\x05\xff")
            return
        else:
            writer.write(b"\x05\x02")
            await reader.readexactly(1)
            username = await reader.readexactly((await reader.readexactly(1))[0])
            password = await reader.readexactly((await reader.readexactly(1))[0])
            right = (username.decode(), password.decode()) == self.credentials
            writer.write(b"\x01\x00" if right else b"\x01\x01")
            if not right:
                await writer.drain()
                return
        _, _, _, kind = await reader.readexactly(4)
        if kind == 1:
            host = socket.inet_ntoa(await reader.readexactly(4))
        else:
            host = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
        [port] = struct.unpack(">H", await reader.readexactly(2))
        onward = await self._connect(host, port)
        writer.write(b"\x05\x00\x00\x01" + bytes(6))
        await _pump(reader, writer, *onward)

    async def _socks4(self, reader: Reader, writer: Writer) -> None:
        _, port, address = struct.unpack(">BH4s", await reader.readexactly(7))
        await reader.readuntil(b"\0")
        host = socket.inet_ntoa(address)
        if host.startswith("0.0.0."):
            host = (await reader.readuntil(b"\0"))[:-1].decode()
        onward = await self._connect(host, port)
        writer.write(b"\x00\x5a" + bytes(6))
        await _pump(reader, writer, *onward)

    async def _connect(self, host: str, port: int) -> tuple[Reader, Writer]:
        return await asyncio.open_connection(host, port, local_addr=(self.exit_address, 0))


async def _pump(reader: Reader, writer: Writer, onward_reader: Reader, onward: Writer) -> None:
    """Carry bytes both ways until the answering side has ended."""

    async def carry(source: Reader, sink: Writer) -> None:
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()

    asking = asyncio.create_task(carry(reader, onward))
    try:
        await carry(onward_reader, writer)
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await _close(onward)


async def _close(writer: Writer) -> None:
    writer.close()
    try:
        await writer.wait_closed()
    except OSError:
        pass


@contextmanager
def running_proxies(*proxies: LocalProxy) -> Iterator[Callable[[Coroutine[Any, Any, None]], None]]:
    """Proxies that serve until the end of the block, on a thread of their own; their `port` is set."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(30)

    async def start() -> None:
        for proxy in proxies:
            server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
            proxy.port = server.sockets[0].getsockname()[1]
            servers.append(server)

    async def stop() -> None:
        for server in servers:
            server.close()
        for proxy in proxies:
            proxy.hang_up()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), 20)

    servers: list[asyncio.Server] = []
    try:
        run(start())
        yield run
    finally:
        try:
            run(stop())
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
