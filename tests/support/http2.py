"""A client of gRPC that writes its own HTTP/2 frames, for what no well-behaved library sends.

RFC 9113 has the frames, RFC 7541 the headers; those here are literals, neither indexed nor compressed.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Final, NamedTuple, Self

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA: Final = 0
HEADERS: Final = 1
RST_STREAM: Final = 3
SETTINGS: Final = 4
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
_END_STREAM: Final = 0x1
_ACK: Final = 0x1
_END_HEADERS: Final = 0x4
_CANCEL: Final = 8
_INITIAL_WINDOW_SIZE: Final = 4
# What gRPC's peers take by default.
_MAX_FRAME: Final = 16_384


class Frame(NamedTuple):
    """A frame as it came."""

    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def ends_stream(self) -> bool:
        """Whether the server has ended the stream."""
        return self.kind == RST_STREAM or (self.kind in {DATA, HEADERS} and bool(self.flags & _END_STREAM))


class RawConnection:
    """One connection, whose streams are opened, fed, reset or left alone as the caller likes.

    `window` is how many bytes of each answer it takes: with 0 it reads no answer. What it sends beyond the
    server's window, 64 KiB of a connection, ends the connection. Not for several threads.
    """

    def __init__(self, target: str, *, window: int = 65_535, timeout: float = 30) -> None:
        host, _, port = target.rpartition(":")
        self._authority = target
        self._next = 1
        self._socket = socket.create_connection((host, int(port)), timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        settings = struct.pack(">HI", _INITIAL_WINDOW_SIZE, window)
        self._socket.sendall(_PREFACE + _frame(SETTINGS, 0, 0, settings))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()

    def call(
        self, method: str, body: bytes = b"", *, end: bool = False, headers: Mapping[str, str] | None = None
    ) -> int:
        """Open a stream for `method`, send `body` if there is any, and return the stream's number.

        `body` is sent as it is: `message_bytes` makes one of a message. Without `end` the server has to
        expect more.
        """
        stream, opening = self._open(method, headers or {})
        self._socket.sendall(opening + _data_frames(stream, body, end=end))
        return stream

    def calls(self, method: str, count: int, body: bytes = b"", *, end: bool = False) -> list[int]:
        """`count` such calls, in one piece."""
        opened = [self._open(method, {}) for _ in range(count)]
        self._socket.sendall(
            b"".join(opening + _data_frames(stream, body, end=end) for stream, opening in opened)
        )
        return [stream for stream, _ in opened]

    def reset(self, *streams: int) -> None:
        """Cancel calls."""
        code = struct.pack(">I", _CANCEL)
        self._socket.sendall(b"".join(_frame(RST_STREAM, 0, stream, code) for stream in streams))

    def frames(self) -> Iterator[Frame]:
        """What the server sends, until it closes; settings and pings are answered. Raises TimeoutError."""
        while True:
            head = self._read(9)
            if len(head) < 9:
                return
            length = int.from_bytes(head[:3], "big")
            frame = Frame(head[3], head[4], int.from_bytes(head[5:9], "big") & 0x7FFFFFFF, self._read(length))
            if frame.kind == SETTINGS and not frame.flags & _ACK:
                self._socket.sendall(_frame(SETTINGS, _ACK, 0, b""))
            elif frame.kind == PING and not frame.flags & _ACK:
                self._socket.sendall(_frame(PING, _ACK, 0, frame.payload))
            yield frame

    def take(self, count: int) -> None:
        """Allow the server `count` more bytes of all answers together."""
        self._socket.sendall(_frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", count)))

    def _open(self, method: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        stream, self._next = self._next, self._next + 2
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": method,
            ":authority": self._authority,
            "content-type": "application/grpc",
            "te": "trailers",
            **headers,
        }
        block = b"".join(_literal(name.encode(), value.encode("latin-1")) for name, value in fields.items())
        return stream, _frame(HEADERS, _END_HEADERS, stream, block)

    def _read(self, count: int) -> bytes:
        parts: list[bytes] = []
        while count:
            part = self._socket.recv(count)
            if not part:
                break
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


def message_bytes(serialized: bytes) -> bytes:
    """A message as gRPC frames it: not compressed, and its length."""
    return struct.pack(">BI", 0, len(serialized)) + serialized


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _data_frames(stream: int, body: bytes, *, end: bool) -> bytes:
    pieces = [body[start : start + _MAX_FRAME] for start in range(0, len(body), _MAX_FRAME)]
    if end and not pieces:
        pieces = [b""]
    last = len(pieces) - 1
    return b"".join(
        _frame(DATA, _END_STREAM if end and number == last else 0, stream, piece)
        for number, piece in enumerate(pieces)
    )


def _literal(name: bytes, value: bytes) -> bytes:
    return b"\x00" + _length(len(name)) + name + _length(len(value)) + value


def _length(number: int) -> bytes:
    if number < 127:
        return bytes((number,))
    number -= 127
    encoded = [127]
    while number >= 128:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*encoded, number))
