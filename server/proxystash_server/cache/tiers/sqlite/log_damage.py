"""Whether SQLite still finds in a write-ahead log all that was committed to it.

For SQLite a damaged frame is the end of the log, and what was committed after it is dropped. The index of the
log (`-shm`), which survives a kill, says how much that was, until the first connection makes it anew. The
formats of both: https://www.sqlite.org/walformat.html.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import struct
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from proxystash_server.cache.ground.files import open_anew, unused_path
from proxystash_server.cache.tiers.sqlite.files import companions

logger = logging.getLogger(__name__)

# Size of a page, committed frames, checksum of the last of them, salts of the log; twice. Then how many have
# been copied into the file.
_INDEX = struct.Struct("=14xHI4x2I8s8x48xI")
_HEADER_BYTES, _UNSUMMED_BYTES = 48, 40
_LOG_HEADER_BYTES, _FRAME_HEADER_BYTES = 32, 24


class Committed(NamedTuple):
    """What the index says of the log: how many frames are committed, and whether the file has all of them.

    The others tell its last frame.
    """

    frames: int
    in_file: bool
    page_bytes: int
    salts: bytes
    checksum: bytes


def committed(path: Path) -> Committed | None:
    """What the index beside a database says; None if there is none or it was being written. Raises OSError.

    Not for a database that this process has open, whose locks on the index would be gone.
    """
    try:
        with companions(path)[1].open("rb") as file:
            index = file.read(_INDEX.size)
    except FileNotFoundError:
        return None
    header, again = index[:_HEADER_BYTES], index[_HEADER_BYTES : 2 * _HEADER_BYTES]
    if len(index) < _INDEX.size or header != again:
        return None
    if _checksum(header[:_UNSUMMED_BYTES], "=") != header[_UNSUMMED_BYTES:]:
        return None
    size, frames, first, second, salts, copied = _INDEX.unpack(index)
    # A file that has some of them is not whole without the others.
    page_bytes = (size & 0xFE00) + ((size & 1) << 16)
    return Committed(frames, copied == frames, page_bytes, salts, struct.pack(">2I", first, second))


def has_log(path: Path) -> bool:
    """Whether the database has a log that SQLite takes for one. Raises OSError."""
    try:
        with companions(path)[0].open("rb") as file:
            return _is_sound(file.read(_LOG_HEADER_BYTES))
    except FileNotFoundError:
        return False


def lost_pages(path: Path, before: Committed | None) -> int | None:
    """How many pages are lost by damage to the log of a database that nobody has open; None without damage.

    0 if the file is whole without the log, and only then. `before` is what the index said before the first
    connection; it is made anew here. Raises OSError.
    """
    if before is None or not before.frames or not _has_last_frame(companions(path)[0], before):
        return None
    # Only for reading, so that closing copies nothing into the file.
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    # What is damaged beyond that is told by whoever opens it next.
    with closing(connection), suppress(sqlite3.Error):
        connection.execute("PRAGMA schema_version").fetchone()
    after = committed(path)
    if after is None or after.frames >= before.frames:
        return None
    return 0 if before.in_file else before.frames - after.frames


def set_damaged_log_aside(path: Path) -> int:
    """Keep a damaged log of the database at `path`, which nobody has open; how many pages are lost.

    A log that the file does not need is taken away: its sound beginning is older. Raises OSError.
    """
    lost = lost_pages(path, committed(path))
    if lost is None:
        return 0
    log, index = companions(path)
    kept, _ = companions(unused_path(path, "damaged", "-wal", "-shm"))
    told = {"path": str(path), "lost_pages": lost, "kept_as": str(kept)}
    if not lost:
        log.rename(kept)
        index.unlink()
        logger.warning("the log of a database is damaged; the file has all of it", extra=told)
        return 0
    try:
        with log.open("rb") as source, os.fdopen(open_anew(kept), "wb") as target:
            shutil.copyfileobj(source, target)
    except OSError as error:
        # For want of room, the rest is not to be out of reach.
        kept.unlink(missing_ok=True)
        told["kept_as"] = f"not kept: {error.strerror}"
    logger.error("the log of a database is damaged; what was committed last is lost", extra=told)
    return lost


def _has_last_frame(log: Path, known: Committed) -> bool:
    """Whether the last committed frame is in the log: not so if it has started over, or is an older copy."""
    try:
        with log.open("rb") as file:
            header = file.read(_LOG_HEADER_BYTES)
            file.seek(_LOG_HEADER_BYTES + (known.frames - 1) * (_FRAME_HEADER_BYTES + known.page_bytes))
            frame = file.read(_FRAME_HEADER_BYTES)
    except FileNotFoundError:
        return False
    if header[16:24] != known.salts and _is_sound(header):
        return False
    # One of them may be what is damaged.
    return frame[8:16] == known.salts or frame[16:24] == known.checksum


def _is_sound(header: bytes) -> bool:
    return len(header) == _LOG_HEADER_BYTES and _checksum(header[:24], "<>"[header[3] & 1]) == header[24:]


def _checksum(data: bytes, byte_order: str) -> bytes:
    """SQLite's checksum of words in a byte order: in the index as the machine has them, in the log as ">"."""
    words = struct.unpack(f"{byte_order}{len(data) // 4}I", data)
    first = second = 0
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return struct.pack("=2I" if byte_order == "=" else ">2I", first, second)
