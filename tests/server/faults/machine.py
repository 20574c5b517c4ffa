"""What a test does to the machine, and undoes: mounts, full disks, another user, another process."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

UNPRIVILEGED = 65534
_FILLER = "filler"
_LOCKER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


class Mounts:
    """Mounts file systems in memory, and takes them away at the end. Skips the test where it may not."""

    def __init__(self) -> None:
        self._places: list[Path] = []

    def add(self, place: Path, *options: str) -> None:
        """Mount an empty file system in memory at `place`."""
        place.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", ",".join(["mode=700", *options]), "tmpfs", str(place)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"there is no mount: {error}")
        if result.returncode:
            pytest.skip(f"this user may not mount a file system here: {result.stderr.strip()}")
        self._places.append(place)

    def change(self, place: Path, mode: str) -> None:
        """Make a mounted file system `ro` or `rw`."""
        subprocess.run(["mount", "-o", f"remount,{mode}", str(place)], check=True)

    def remove(self, place: Path) -> None:
        self._places.remove(place)
        subprocess.run(["umount", "--lazy", str(place)], check=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for place in self._places[::-1]:
            self.remove(place)


def fill(directory: Path) -> None:
    """Use up the space of the file system of `directory`."""
    descriptor = os.open(directory / _FILLER, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for size in (65536, 1024, 1):
            try:
                while True:
                    os.write(descriptor, bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017 -- any other error is no full disk
    finally:
        os.close(descriptor)


def make_room(directory: Path) -> None:
    (directory / _FILLER).unlink()


@contextmanager
def unprivileged(directory: Path) -> Iterator[None]:
    """Go on without root's right to ignore permissions, as the owner of `directory`."""
    if os.geteuid() != 0:
        yield
        return
    for path in (directory, *directory.rglob("*")):
        os.chown(path, UNPRIVILEGED, -1)
    os.seteuid(UNPRIVILEGED)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def locked_by_another_process(database: Path) -> Iterator[None]:
    """Hold the database's write lock in a second process."""
    with subprocess.Popen(
        [sys.executable, "-c", _LOCKER, str(database)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "locked\n"
        try:
            yield
        finally:
            process.stdin.close()
            process.wait(30)


def file_of(descriptor: int) -> Path:
    """Where an open file is."""
    return Path(f"/proc/self/fd/{descriptor}").readlink()


@contextmanager
def free_descriptors(number: int) -> Iterator[None]:
    """Leave this process so many file descriptors to open, at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    # Nobody here has opened half as many.
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for descriptor in taken[len(taken) - number :]:
            os.close(descriptor)
        del taken[len(taken) - number :]
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
