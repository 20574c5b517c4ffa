"""Files of records beside the stores: JSON lines, the first of which says what the file is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from proxystash_server.cache.errors import StoreError, StoreFormatError
from proxystash_server.cache.ground.parsing import UNREADABLE
from proxystash_server.cache.tiers.jsonl.line import decode_line, encode_body, finish_line, is_sound
from proxystash_server.cache.tiers.jsonl.log import LogFile

Record = dict[str, Any]


class RecordFormat(NamedTuple):
    """What a kind of file is called, the greatest version that is read, and what to do if one cannot be."""

    name: str
    version: int
    remedy: str

    def header(self, **facts: object) -> bytes:
        """The first line, with what else it says."""
        record = {"op": "header", "format": self.name, "version": self.version, **facts}
        return finish_line(encode_body(record), 0)

    @contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """Raise StoreError, with the remedy, where a file cannot be read."""
        try:
            yield
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}. {self.remedy}") from None

    def check(self, path: Path) -> None:
        """Raise StoreError for a file that cannot be read, is of another kind, or newer; changes nothing."""
        with self.reading(path), suppress(FileNotFoundError, *UNREADABLE), path.open("rb") as file:
            self._check(decode_line(file.readline()), path)

    def _check(self, record: Record, path: Path) -> None:
        if record["op"] == "header" and (record["format"] != self.name or record["version"] > self.version):
            raise StoreFormatError(
                f"{path} has format {record['format']} {record['version']}; this release reads {self.name} "
                f"up to {self.version}. Use a newer release"
            )

    def read(self, log: LogFile, take: Callable[[Record, int, int], object]) -> int:
        """Hand over every record, the header too, with where its line begins and how long it is.

        Returns how many lines are damaged; so is one for which `take` raises one of UNREADABLE. Raises
        StoreFormatError for a file of another kind, or a newer one, and OSError.
        """
        damaged = 0
        for offset, line in log.lines():
            # What is cut short was so by the end of the process, and nobody was answered. A line whose
            # end alone is another byte was not: that is damaged.
            if not (line.endswith(b"\n") or is_sound(line[:-1] + b"\n")):
                continue
            try:
                record = decode_line(line)
                self._check(record, log.path)
                take(record, offset, len(line))
            except UNREADABLE:
                damaged += 1
        return damaged


def encode(record: Record) -> bytes:
    """The line of a record that needs no number."""
    return finish_line(encode_body(record), 0)
