"""Files and streams: several of them, packed, large, named in any way, and unreadable."""

from __future__ import annotations

import gzip
import io
import os
from pathlib import Path

import pytest

from proxystash import CacheEntry, Identity, ProxyFileError, Rejected, read_proxy_file, read_proxy_files


def urls(outcomes: object) -> list[str]:
    assert isinstance(outcomes, list)
    return [outcome.proxy_url for outcome in outcomes if isinstance(outcome, CacheEntry)]


def test_several_files_are_one_list(tmp_path: Path) -> None:
    (tmp_path / "socks5.txt").write_text("192.0.2.1:80\n192.0.2.2:80\n")
    (tmp_path / "b.json").write_text('["socks5://192.0.2.1:80", "192.0.2.3:80"]')
    seen: list[float] = []
    names = [str(tmp_path / name) for name in ("socks5.txt", "none.txt", "b.json")]

    reader = read_proxy_files([(name, name) for name in names], on_progress=seen.append)
    outcomes = [*reader]

    assert urls(outcomes) == ["socks5://192.0.2.1:80", "socks5://192.0.2.2:80", "http://192.0.2.3:80"]
    missing, duplicate = (outcome for outcome in outcomes if isinstance(outcome, Rejected))
    assert (missing.where, missing.kind) == (names[1], "failed")
    assert missing.reason == f"cannot read {names[1]}: No such file or directory"
    assert (duplicate.where, duplicate.reason) == (f"{names[2]} record 1", f"duplicate of {names[0]} line 1")
    last = outcomes[-1]
    assert isinstance(last, CacheEntry)
    assert reader.place_of(last) == f"{names[2]} record 2"
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_a_packed_file_is_read_by_the_name_inside(tmp_path: Path) -> None:
    path = tmp_path / "socks4.csv.gz"
    path.write_bytes(gzip.compress(b"ip,port\n192.0.2.1,80\n"))
    seen: list[float] = []

    assert urls([*read_proxy_file(path, on_progress=seen.append)]) == ["socks4://192.0.2.1:80"]
    assert seen[-1] == 1.0


def test_a_pipe_is_read_as_it_comes() -> None:
    """Given a producer that has written one line, then that line is there."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream, os.fdopen(writing, "wb", buffering=0) as producer:
        reader = read_proxy_file(stream, name="standard input")
        producer.write(b"# SOCKS5\n192.0.2.1:80\n")
        first = next(reader)
        producer.write(b"192.0.2.2:80\n")
        second = next(reader)

    assert urls([first, second]) == ["socks5://192.0.2.1:80", "socks5://192.0.2.2:80"]


def test_a_line_without_an_end_does_not_fill_the_memory() -> None:
    """Given a line of 100 MB, then it is passed over in pieces."""

    class Endless(io.RawIOBase):
        left = 100 << 20
        largest = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # a Buffer cannot be assigned to
            size = min(len(buffer), self.left)
            self.largest = max(self.largest, size)
            self.left -= size
            buffer[:size] = b"x" * size
            return size

    raw = Endless()
    (outcome,) = read_proxy_file(io.BufferedReader(raw), name="a.txt")

    assert outcome == Rejected("line 1", "longer than 1,048,576 bytes", "failed")
    assert raw.left == 0
    assert raw.largest <= 1 << 20


def test_the_first_bytes_may_come_one_by_one() -> None:
    class Slow(io.BytesIO):
        def read1(self, size: int | None = -1) -> bytes:
            return super().read1(1)

    for content, name in ((b'{"proxies": ["192.0.2.1:80"]}', "a"), (gzip.compress(b"192.0.2.1:80\n"), "b")):
        assert urls([*read_proxy_file(Slow(content), name=name)]) == ["http://192.0.2.1:80"]


@pytest.mark.parametrize(
    ("option", "value"), [("scheme", "gopher"), ("scheme", "SOCKS5"), ("format", "xml"), ("identity", "name")]
)
def test_an_option_that_there_is_not_is_refused_at_once(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is none of|is not a valid Identity"):
        read_proxy_file("none.txt", **{option: value})  # type: ignore[arg-type]  # what is tested


def test_an_identity_may_be_given_as_a_word(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("http://u:a@h:1\nhttp://u:b@h:1\n")

    assert len(urls([*read_proxy_file(path, identity=Identity("user+password"))])) == 2


def test_a_name_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(ProxyFileError, match="cannot read"):
        next(read_proxy_file("a\0b"))
