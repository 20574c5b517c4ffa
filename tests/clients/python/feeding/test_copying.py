"""Lists in files: copied, bounded, unpacked."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from proxystash.feeding.copying import bounded_file, unpacked
from proxystash.feeding.failures import SourceError
from proxystash.feeding.files import read_file

LIMIT = 1000


def unpack(data: bytes, limit: int = LIMIT) -> bytes:
    with bounded_file(1 << 30) as packed:
        packed.write(data)
    with unpacked(packed.file, limit) as file:
        return file.read()


def reason_of(data: bytes) -> str:
    with pytest.raises(SourceError) as caught:
        unpack(data)
    return str(caught.value)


def test_what_is_packed_once_or_twice_is_unpacked() -> None:
    assert unpack(b"plain") == b"plain"
    assert unpack(b"") == b""
    assert unpack(gzip.compress(b"once")) == b"once"
    assert unpack(gzip.compress(gzip.compress(b"twice"))) == b"twice"
    assert unpack(gzip.compress(b"a") + gzip.compress(b"b")) == b"ab"


def test_a_bomb_is_given_up_at_the_limit() -> None:
    assert unpack(gzip.compress(b"x" * LIMIT)) == b"x" * LIMIT
    assert reason_of(gzip.compress(b"x" * (LIMIT + 1))) == "larger than 1,000 bytes when unpacked"
    assert reason_of(gzip.compress(gzip.compress(bytes(1 << 22)))) == "larger than 1,000 bytes when unpacked"


def test_what_is_packed_again_and_again_is_refused() -> None:
    data = b"x"
    for _ in range(3):
        data = gzip.compress(data)

    assert reason_of(data) == "packed more than twice"


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-3], lambda data: data[:9] + b"\xff" * 20, lambda data: data[:5]]
)
def test_damaged_gzip_is_refused_as_a_whole(damage: object) -> None:
    assert callable(damage)
    data = damage(gzip.compress(os.urandom(100)))

    assert reason_of(data) == "its gzip is damaged or ends too early"


def test_a_file_is_read_once_for_each_change(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"a")

    got = read_file(path, None, LIMIT)
    assert got is not None
    file, state = got
    with file:
        file.seek(0)
        assert file.read() == b"a"
    assert read_file(path, state, LIMIT) is None
    path.write_bytes(b"ab")
    again = read_file(path, state, LIMIT)
    assert again is not None
    again[0].close()


def test_a_file_that_is_none_says_so(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(b"x" * (LIMIT + 1))
    os.mkfifo(tmp_path / "pipe")

    for path, reason in {
        tmp_path / "missing": "cannot be read: No such file or directory",
        tmp_path: "not a regular file",
        tmp_path / "pipe": "not a regular file",
        Path("/dev/zero"): "not a regular file",
        large: "larger than 1,000 bytes",
        Path("a\0b"): "cannot be read: embedded null byte",
    }.items():
        with pytest.raises(SourceError) as caught:
            read_file(path, None, LIMIT)
        assert str(caught.value) == reason


def test_a_file_that_is_longer_than_it_says_is_bounded() -> None:
    """Given one whose size is told as 0 while it holds something, as the kernel's own are."""
    with pytest.raises(SourceError, match="larger than 10 bytes"):
        read_file(Path("/proc/self/status"), None, 10)
