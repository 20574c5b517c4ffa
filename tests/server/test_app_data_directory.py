"""The data directory and its lock."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest

from proxystash_server.data_directory import DataDirectory, DataDirectoryError


def test_a_missing_directory_is_created_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "a" / "data"
    with DataDirectory(path, "starting"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_second_user_is_told_who_has_it(tmp_path: Path) -> None:
    with DataDirectory(tmp_path, "starting") as directory:
        directory.tell("serving on 127.0.0.1:50051")
        with pytest.raises(DataDirectoryError) as caught, DataDirectory(tmp_path, "starting"):
            pass
    expected = (
        rf"data directory {re.escape(str(tmp_path))} is in use by process {os.getpid()}, "
        r"serving on 127\.0\.0\.1:50051 since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"
    )
    assert re.fullmatch(expected, str(caught.value))


def test_the_first_user_keeps_it_when_a_second_was_refused(tmp_path: Path) -> None:
    with DataDirectory(tmp_path, "starting"):
        for _ in range(2):
            with pytest.raises(DataDirectoryError), DataDirectory(tmp_path, "starting"):
                pass


def test_a_holder_that_left_no_note_is_still_a_holder(tmp_path: Path) -> None:
    with DataDirectory(tmp_path, "starting"):
        (tmp_path / "lock").write_text("")
        with (
            pytest.raises(DataDirectoryError, match="is in use by another process"),
            DataDirectory(tmp_path, "x"),
        ):
            pass


def test_it_can_be_had_again_once_it_was_let_go_and_whatever_an_earlier_holder_left(tmp_path: Path) -> None:
    for _ in range(2):
        with DataDirectory(tmp_path, "starting"):
            pass
    (tmp_path / "lock").write_text("left by a crash")
    with DataDirectory(tmp_path, "starting"):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_directory_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataDirectoryError, match="cannot be used: "), DataDirectory(tmp_path / "file", "x"):
        pass
