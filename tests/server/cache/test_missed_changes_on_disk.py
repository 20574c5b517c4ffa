"""The file in which stands what the authority has missed: cut off, damaged, refused."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from proxystash_server.cache import CacheEntry, CredentialEncryptor, EncryptionKeyError
from proxystash_server.cache.coherence.missed import FORMAT
from proxystash_server.cache.errors import StoreError, StoreFormatError
from proxystash_server.cache.tiers.base import Write
from proxystash_server.cache.tiers.jsonl.line import encode_body, finish_line
from tests.server.cache.invariants import check_line
from tests.server.cache.journal import (
    CHANGES,
    ENCRYPTOR,
    OpenJournal,
    as_is_and_reopened,
    opening_journals,
    outcome_of,
    put,
    told,
    write_changes,
)
from tests.server.cache.support import PASSWORD, USERNAME, run_in_threads, stored
from tests.server.cache.tier_contract import everything_set


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "missed-changes.jsonl"


@pytest.fixture
def open_journal(path: Path) -> Iterator[OpenJournal]:
    with opening_journals(path) as open_journal:
        yield open_journal


def test_the_journal_is_json_lines_that_anyone_can_read(open_journal: OpenJournal, path: Path) -> None:
    write_changes(open_journal())
    header, *lines = path.read_bytes().splitlines()
    for line in (header, *lines):
        check_line(line)
    assert json.loads(header)["format"] == FORMAT.name
    assert json.loads(header)["version"] == FORMAT.version
    assert [(json.loads(line)["op"], json.loads(line)["version"]) for line in lines] == [
        ("put", 1),
        ("put", 2),
        ("delete", 3),
        ("clear", 4),
        ("put", 5),
        ("put", 6),
        ("delete", 7),
    ]


def test_cut_off_anywhere_it_holds_what_its_whole_lines_say(
    open_journal: OpenJournal, path: Path, tmp_path: Path
) -> None:
    write_changes(open_journal())
    data = path.read_bytes()
    cut = tmp_path / "cut.jsonl"
    for end in range(len(data) + 1):
        cut.write_bytes(data[:end])
        whole = CHANGES[: max(0, data[:end].count(b"\n") - 1)]
        missed = open_journal(cut)
        assert told(missed) == outcome_of(whole), end
        # And it goes on from there.
        missed.append([put("new", 8, source="eight")])
        assert told(open_journal(cut)) == outcome_of([*whole, put("new", 8, source="eight")]), end


@pytest.mark.parametrize("bit", [0x01, 0x80])
def test_a_flipped_bit_costs_its_line_alone_and_the_file_is_kept_in_the_end(
    open_journal: OpenJournal, path: Path, tmp_path: Path, bit: int
) -> None:
    write_changes(open_journal())
    data = path.read_bytes()
    for place in range(len(data)):
        directory = tmp_path / str(place)
        directory.mkdir()
        flipped = directory / path.name
        flipped.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        line = data[:place].count(b"\n")
        # A flipped newline joins two lines into one that cannot be trusted.
        lost = {line, line + 1} if data[place] == ord("\n") else {line}
        left = [change for number, change in enumerate(CHANGES, 1) if number not in lost]
        missed = open_journal(flipped, damaged=1)
        assert told(missed) == outcome_of(left), place
        missed.append([put("new", 8)])
        damaged = flipped.read_bytes()
        missed.cleared()
        missed.mark_applied(missed.keys())
        missed.finish()
        assert [file.name for file in directory.iterdir()] == [f"{path.name}.damaged-1"]
        assert (directory / f"{path.name}.damaged-1").read_bytes() == damaged
        # The next one has nothing to do with it.
        missed.append([put("after", 9)])
        missed.mark_applied(["after"])
        missed.finish()
        assert [file.name for file in directory.iterdir()] == [f"{path.name}.damaged-1"]


def test_files_that_are_damaged_one_after_another_are_all_kept(open_journal: OpenJournal, path: Path) -> None:
    for number in range(3):
        open_journal().append([put("a", 1, source=f"source-{number}"), put("b", 2)])
        path.write_bytes(path.read_bytes().replace(b"source-", b"damage-"))
        missed = open_journal(damaged=1)
        missed.mark_applied(missed.keys())
        missed.finish()
    kept = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert all(b"damage-%d" % number in kept for number in range(3))


def test_a_line_that_says_nothing_known_is_a_damaged_one(open_journal: OpenJournal, path: Path) -> None:
    open_journal().append([put("a", 1)])
    strange: list[dict[str, Any]] = [
        {"op": "sing", "version": 2, "key": "a"},
        {"op": "put", "version": 2},
        {"op": "put", "key": "a"},
        {"version": 2},
    ]
    with path.open("ab") as file:
        for record in strange:
            file.write(finish_line(encode_body(record), 9))
        file.write(b"\n")
    assert told(open_journal(damaged=5)) == (0, {"a": (1, "")})


def test_a_change_that_can_no_longer_be_read_is_told_from_one_that_can_and_its_line_is_kept(
    open_journal: OpenJournal, path: Path
) -> None:
    missed = open_journal()
    missed.append([put("damaged", 1, source="sound"), put("intact", 2)])
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(b"sound"))
        file.write(b"s0und")
    with pytest.raises(ValueError, match="damaged"):
        missed.read("damaged")
    assert missed.write_of("damaged") is None
    assert missed.write_of("intact") == put("intact", 2)
    missed.mark_applied(["damaged", "intact"])
    missed.finish()
    assert b"s0und" in path.with_name(f"{path.name}.damaged-1").read_bytes()


def test_a_change_whose_credentials_no_key_opens_cannot_be_made_up_for(
    open_journal: OpenJournal, path: Path
) -> None:
    entry = everything_set("a")
    entry.content.sealed = CredentialEncryptor().seal(entry.username, entry.password)
    missed = open_journal()
    missed.append([Write("a", entry, 1), put("b", 2)])
    for one in as_is_and_reopened(missed, open_journal):
        assert one.write_of("a") is None
        assert one.write_of("b") == put("b", 2)
    one.mark_applied(["a", "b"])
    one.finish()
    assert path.with_name(f"{path.name}.damaged-1").exists()


# -- what must not be opened


def rewrite_header(path: Path, **fields: object) -> None:
    header, *lines = path.read_bytes().splitlines(keepends=True)
    record = {name: value for name, value in json.loads(header).items() if name not in ("seq", "crc")}
    path.write_bytes(b"".join([finish_line(encode_body({**record, **fields}), 0), *lines]))


@pytest.mark.parametrize("fields", [{"version": FORMAT.version + 1}, {"format": "something-else"}])
def test_a_journal_of_another_format_is_refused_and_left_alone(
    open_journal: OpenJournal, path: Path, fields: dict[str, object]
) -> None:
    open_journal().append([put("a", 1)])
    rewrite_header(path, **fields)
    before = path.read_bytes()
    with pytest.raises(StoreFormatError, match=r"Use a newer release") as refusal:
        open_journal()
    assert str(path) in str(refusal.value)
    assert path.read_bytes() == before


def test_a_journal_that_was_sealed_under_another_key_is_refused_and_left_alone(
    open_journal: OpenJournal, path: Path
) -> None:
    open_journal().append([put("a", 1, username=USERNAME)])
    before = path.read_bytes()
    with pytest.raises(EncryptionKeyError) as refusal:
        open_journal(encryptor=CredentialEncryptor())
    assert str(path) in str(refusal.value)
    assert path.read_bytes() == before
    newer = CredentialEncryptor(Fernet.generate_key(), [ENCRYPTOR.key])
    assert open_journal(encryptor=newer).read("a") == stored("a", username=USERNAME)


def test_a_journal_that_cannot_be_read_is_refused_with_what_to_do(
    open_journal: OpenJournal, path: Path
) -> None:
    path.mkdir(parents=True)
    with pytest.raises(StoreError, match="move it away") as refusal:
        open_journal()
    assert str(path) in str(refusal.value)


# -- privacy


def test_no_credential_is_readable_in_the_file_and_it_is_its_owners_alone(
    open_journal: OpenJournal, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    earlier = os.umask(0)
    try:
        with caplog.at_level(logging.DEBUG):
            open_journal().append([Write("full", everything_set(), 1)])
            assert open_journal().read("full") == everything_set()
    finally:
        os.umask(earlier)
    content = path.read_bytes()
    for secret in (USERNAME, PASSWORD, ENCRYPTOR.key.decode()):
        assert secret.encode() not in content
        assert secret not in caplog.text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# -- threads


def test_readers_see_a_change_whole_or_not_at_all(open_journal: OpenJournal) -> None:
    missed = open_journal()
    last = 400

    def write() -> None:
        for version in range(1, last + 1):
            missed.append([put(key, version, source=f"{key}:{version}") for key in "abc"])
            if version % 50 == 0 and version < last:
                missed.mark_applied("abc")
                missed.finish()

    def read() -> None:
        while missed.last_version < last:
            seen: list[CacheEntry | None] = [missed.read(key) for key in "abc"]
            assert all(one is None or one.source == f"{one.key}:{one.version}" for one in seen)
            assert missed.entries() <= 3
            assert len(missed.keys()) <= 3

    run_in_threads(write, read, read)
    assert told(open_journal()) == (0, {key: (last, f"{key}:{last}") for key in "abc"})
