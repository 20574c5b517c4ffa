"""Lists in temporary files, no larger than they may be, unpacked."""

from __future__ import annotations

import gzip
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from proxystash.feeding.failures import SourceError

_CHUNK = 1 << 16
_GZIP_MARK = b"\x1f\x8b"
# A file that is packed, in an answer that is packed.
_MAX_LAYERS = 2


class BoundedFile:
    """A temporary file that nobody else can open, and that holds at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 -- whoever gets it closes it
        self._left = self._limit = limit

    def write(self, data: bytes) -> None:
        """Add to the file. Raises SourceError when there is no room for it."""
        self._left -= len(data)
        if self._left < 0:
            raise too_large(self._limit)
        self.file.write(data)

    def copy(self, stream: BinaryIO | gzip.GzipFile) -> None:
        """Add what is left of a stream."""
        while chunk := stream.read(_CHUNK):
            self.write(chunk)


@contextmanager
def bounded_file(limit: int) -> Iterator[BoundedFile]:
    """A file that the block may keep; it is closed if the block raises."""
    bounded = BoundedFile(limit)
    try:
        yield bounded
    except BaseException:
        bounded.file.close()
        raise


def too_large(limit: int) -> SourceError:
    """What is wrong with a source that has more than `limit` bytes."""
    return SourceError(f"larger than {limit:,} bytes")


def unpacked(file: BinaryIO, limit: int) -> BinaryIO:
    """The file at its beginning; if it is packed with gzip, what it holds instead, and the file is closed.

    Raises SourceError if that is larger than `limit` bytes, damaged, or packed more than twice.
    """
    for _ in range(_MAX_LAYERS):
        if not _is_packed(file):
            return file
        with file, bounded_file(limit) as inner:
            try:
                inner.copy(gzip.GzipFile(fileobj=file))
            except SourceError as error:
                raise SourceError(f"{error} when unpacked") from None
            except (OSError, EOFError, zlib.error):
                raise SourceError("its gzip is damaged or ends too early") from None
        file = inner.file
    if _is_packed(file):
        file.close()
        raise SourceError("packed more than twice")
    return file


def _is_packed(file: BinaryIO) -> bool:
    file.seek(0)
    mark = file.read(len(_GZIP_MARK))
    file.seek(0)
    return mark == _GZIP_MARK
