"""A file or a stream as lines or as a document: unpacked, measured, and looked at before it is read."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from proxystash.lists.outcomes import Line, ProxyFileError, Rejected

ProgressCallback = Callable[[float], None]

_GZIP_MARK = b"\x1f\x8b"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_UTF8_MARK = b"\xef\xbb\xbf"
_CHUNK = 1 << 16
_MAX_LINE = 1 << 20
# What is read as a whole takes several times its size in memory.
_MAX_DOCUMENT = 1 << 29
# What reading a damaged file raises; gzip.BadGzipFile is an OSError.
_UNREADABLE = (OSError, EOFError, zlib.error)


class Source:
    """An open list: `head` is its beginning, up to the end of a line at least, or all of it.

    `name` is that of the file without `.gz`, or what stands for it, and `shown` how messages call it. It is
    read once, by `lines` or by `document`.
    """

    def __init__(self, stream: BinaryIO, name: str, shown: str, on_progress: ProgressCallback | None) -> None:
        self.shown = shown
        self._raw = stream
        self._on_progress = on_progress
        self._size = _size_of(stream)
        head = self._read_head(stream)
        self._packed = head.startswith(_GZIP_MARK)
        self._stream = _after(head, stream)
        if self._packed:
            unpacked = gzip.GzipFile(fileobj=self._stream)
            head = self._read_head(unpacked)
            self._stream = _after(head, unpacked)
        self.name = name[:-3] if name.lower().endswith(".gz") else name
        self.head = head.removeprefix(_UTF8_MARK)
        if head.startswith(_UTF16_MARKS):
            raise ProxyFileError(f"{shown} is UTF-16; save it as UTF-8")
        if b"\0" in head:
            raise ProxyFileError(f"{shown} is not a text file")

    def lines(self) -> Iterator[Line]:
        """The lines, without what ends them. Bytes that are not UTF-8 become surrogates.

        Lines longer than a megabyte are passed over as failures, and so is the rest of a file that cannot be
        read to its end.
        """
        number = done = 0
        while True:
            number += 1
            where = f"line {number}"
            try:
                line = self._stream.readline(_MAX_LINE + 1)
                done += len(line)
                too_long = len(line) > _MAX_LINE and not line.endswith(b"\n")
                while too_long and not line.endswith(b"\n"):
                    line = self._stream.readline(_MAX_LINE)
                    done += len(line)
                    if not line:
                        break
            except _UNREADABLE as error:
                yield (
                    where,
                    Rejected(where, f"nothing can be read from here on: {_describe(error)}", "failed"),
                )
                return
            if not line and not too_long:
                return
            if too_long:
                yield where, Rejected(where, f"longer than {_MAX_LINE:,} bytes", "failed")
            else:
                content = line.removeprefix(_UTF8_MARK) if number == 1 else line
                yield where, content.rstrip(b"\r\n").decode(errors="surrogateescape")
            self._progress(done)

    def document(self) -> str:
        """All of it. Bytes that are not UTF-8 become surrogates. Raises ProxyFileError."""
        try:
            data = self._stream.read(_MAX_DOCUMENT + 1)
        except _UNREADABLE as error:
            raise ProxyFileError(f"cannot read {self.shown}: {_describe(error)}") from error
        if len(data) > _MAX_DOCUMENT:
            raise ProxyFileError(
                f"{self.shown} is larger than {_MAX_DOCUMENT >> 20} MB; JSON Lines may be larger"
            )
        return data.removeprefix(_UTF8_MARK).decode(errors="surrogateescape")

    def tell(self, part: float) -> None:
        """Say how much has been read, from 0 to 1."""
        if self._on_progress is not None:
            self._on_progress(part)

    def _progress(self, done: int) -> None:
        if self._on_progress is not None and self._size:
            self._on_progress(min(1.0, (self._raw.tell() if self._packed else done) / self._size))

    def _read_head(self, stream: BinaryIO | gzip.GzipFile) -> bytes:
        """As much as it takes to see what this is, and no more, since others may still be writing."""
        head = b""
        try:
            while len(head) < _CHUNK and not _shows_enough(head):
                chunk = stream.read1(_CHUNK)  # type: ignore[union-attr]  # buffered streams have it
                if not chunk:
                    break
                head += chunk
        except _UNREADABLE as error:
            if not head:
                raise ProxyFileError(f"cannot read {self.shown}: {_describe(error)}") from error
            # What comes after is met again where it is read.
        return head


@contextmanager
def opened(
    file: str | os.PathLike[str] | BinaryIO, name: str, on_progress: ProgressCallback | None
) -> Iterator[Source]:
    """Open a path, or take a binary stream as it is. Raises ProxyFileError."""
    if not isinstance(file, str | os.PathLike):
        yield Source(file, Path(name).name, name, on_progress)
        return
    try:
        stream = Path(file).open("rb")  # noqa: SIM115 -- closed below; only opening it may fail like this
    except (OSError, ValueError) as error:
        raise ProxyFileError(f"cannot read {name}: {_describe(error)}") from error
    with stream:
        yield Source(stream, Path(file).name, name, on_progress)


class _After(io.RawIOBase):
    """A stream with its beginning put back."""

    def __init__(self, head: bytes, stream: BinaryIO | gzip.GzipFile) -> None:
        self._head, self._stream = head, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # a Buffer cannot be assigned to
        if self._head:
            part, self._head = self._head[: len(buffer)], self._head[len(buffer) :]
        else:
            part = self._stream.read1(len(buffer))  # type: ignore[union-attr]  # as above
        buffer[: len(part)] = part
        return len(part)


def _after(head: bytes, stream: BinaryIO | gzip.GzipFile) -> BinaryIO:
    return io.BufferedReader(_After(head, stream), _CHUNK)


def _shows_enough(head: bytes) -> bool:
    """Whether a whole line is there that is neither blank nor a comment, or a mark that tells by itself."""
    if head.startswith(_GZIP_MARK) or b"\0" in head:
        return True
    *lines, _ = head.removeprefix(_UTF8_MARK).split(b"\n")
    return any(line.strip() and not line.lstrip().startswith(b"#") for line in lines)


def _size_of(stream: BinaryIO) -> int:
    try:
        return os.fstat(stream.fileno()).st_size
    except OSError:
        return 0


def _describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, EOFError):
        return "it ends too early"
    return "it is damaged" if isinstance(error, zlib.error | gzip.BadGzipFile) else str(error)
