"""Credentials are opened with the keys that are given; what none of them opens is told of."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from proxystash_server.proxywhirl_import.keyring import Keyring, KeyringError, load_keyring
from tests.server.proxywhirl_import.support import (
    CURRENT_KEY,
    FIXTURES,
    L2_DATABASE,
    L3_DATABASE,
    PREVIOUS_KEY,
    SECRETS,
    SHARDS,
    Target,
    copy_of,
    edit,
    reasons,
    secret,
)

UNOPENED = ("skipped", "no key that was given opens its credentials")
# login, username-only, the two accounts of the gateway, and newer-in-l2 and -l3
UNDER_CURRENT_KEY = 6

each_store = pytest.mark.parametrize("source", [SHARDS, L2_DATABASE, L3_DATABASE], ids=lambda path: path.name)


@each_store
def test_with_another_key_entries_with_credentials_are_skipped_and_the_others_imported(
    source: Path, target: Target
) -> None:
    report = target.take(source, keyring=Keyring([Fernet.generate_key()]))

    # Those, one under the previous key, and two under a key that is lost.
    assert reasons(report)[UNOPENED] == UNDER_CURRENT_KEY + 1 + 2
    stored = target.entries()
    assert "plain.example.com:8080" in stored
    assert [name for name in stored if "@" in name] == ["carol@userinfo.example.com:8080"]
    assert report.complete


@each_store
def test_each_key_opens_what_was_sealed_under_it(source: Path, target: Target) -> None:
    report = target.take(source, keyring=Keyring([PREVIOUS_KEY.encode()]))

    assert reasons(report)[UNOPENED] == UNDER_CURRENT_KEY + 2
    assert secret(target.entries()["olga@older-key.example.com:8080"].password) == "previous-password"


def test_without_any_key_the_reason_says_that_none_was_given(target: Target) -> None:
    report = target.take(L3_DATABASE, keyring=Keyring([]))
    told = reasons(report)
    assert told["skipped", "its credentials are sealed, and no key of proxywhirl's was given"] == 9
    assert report.imported > 10


@each_store
def test_on_request_entries_are_imported_without_the_credentials_that_no_key_opens(
    source: Path, target: Target
) -> None:
    report = target.take(source, without_credentials=True)

    stored = target.entries()
    for name in ("lost-key.example.com:8080", "lost-password.example.com:8080"):
        assert (stored[name].username, stored[name].password) == (None, None)
    assert report.as_json()["without_credentials"] == 2
    assert not reasons(report)[UNOPENED]
    assert secret(stored["alice@login.example.com:8080"].password) == "current-password"


def test_a_copy_without_its_credentials_does_not_stand_beside_one_that_has_them(
    target: Target, tmp_path: Path
) -> None:
    """Given an entry sealed under two keys in L2 and L3, when one of them opens, that one counts."""
    l2 = copy_of(L2_DATABASE, tmp_path)
    token = Fernet(Fernet.generate_key()).encrypt(b"under-another-key")
    edit(l2, "UPDATE l2_cache SET username_encrypted = ? WHERE proxy_url LIKE '%//login%'", token)

    report = target.take(l2, L3_DATABASE, without_credentials=True)

    stored = target.entries()
    assert "alice@login.example.com:8080" in stored
    assert "login.example.com:8080" not in stored
    assert reasons(report)["skipped", "duplicate: a copy whose credentials could be opened counts"] == 1


def test_importing_again_with_the_key_adds_the_password_that_was_left_out(
    target: Target, tmp_path: Path
) -> None:
    database = copy_of(L3_DATABASE, tmp_path)
    edit(database, "UPDATE cache_entries SET username_encrypted = NULL WHERE proxy_url LIKE '%//login%'")
    target.take(database, keyring=Keyring([]), without_credentials=True)
    assert target.entries()["login.example.com:8080"].password is None

    target.take(database)

    assert secret(target.entries()["login.example.com:8080"].password) == "current-password"


def test_credentials_in_the_url_and_beside_it_that_differ_are_told_of(target: Target, tmp_path: Path) -> None:
    database = copy_of(L3_DATABASE, tmp_path)
    edit(
        database,
        "UPDATE cache_entries SET proxy_url = 'http://carol:other@login.example.com:8080' "
        "WHERE proxy_url LIKE '%//login%'",
    )

    told = reasons(target.take(database))

    (reason,) = (reason for kind, reason in told if kind == "skipped" and "differ" in reason)
    assert "carol" not in reason
    assert "other" not in reason


def test_keys_come_from_proxywhirls_variables_and_from_files(target: Target, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"\n{PREVIOUS_KEY}\n\n{Fernet.generate_key().decode()}\n")

    keyring = load_keyring({"PROXYWHIRL_CACHE_ENCRYPTION_KEY": CURRENT_KEY}, [file])

    assert reasons(target.take(L3_DATABASE, keyring=keyring))[UNOPENED] == 2
    both = {
        "PROXYWHIRL_CACHE_ENCRYPTION_KEY": Fernet.generate_key().decode(),
        "PROXYWHIRL_CACHE_KEY_PREVIOUS": CURRENT_KEY,
    }
    assert load_keyring(both, []).open(Fernet(CURRENT_KEY).encrypt(b"alice")) == "alice"


def test_a_key_file_may_be_a_pipe(tmp_path: Path) -> None:
    """So that a key need not be written to a disk: --proxywhirl-key-file <(pass show proxywhirl)."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(CURRENT_KEY + "\n",))
    writer.start()
    keyring = load_keyring({}, [pipe])
    writer.join()
    assert keyring.open(Fernet(CURRENT_KEY).encrypt(b"alice")) == "alice"


@pytest.mark.parametrize(
    ("variable", "content", "place"),
    [
        ("no-key-at-all", "", "PROXYWHIRL_CACHE_ENCRYPTION_KEY"),
        ("", f"{CURRENT_KEY}\nno-key-at-all\n", r"line 2 of .*keys"),
        ("", "\n", r"keys is empty"),
        ("", "\udcff", r"keys is no text"),
        ("", None, r"keys cannot be read"),
    ],
)
def test_a_faulty_key_is_told_by_its_place_and_not_quoted(
    variable: str, content: str | None, place: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content.encode(errors="surrogateescape"))
    files = [file] if content != "" else []
    with pytest.raises(KeyringError, match=place) as caught:
        load_keyring({"PROXYWHIRL_CACHE_ENCRYPTION_KEY": variable}, files)
    assert "no-key-at-all" not in str(caught.value)


def test_a_credential_that_is_no_text_is_a_sealed_one_and_shows_nowhere(
    target: Target, tmp_path: Path
) -> None:
    database = copy_of(L3_DATABASE, tmp_path)
    token = Fernet(CURRENT_KEY).encrypt(b"secret-bytes\xff")
    edit(
        database,
        "UPDATE cache_entries SET password_encrypted = ? WHERE proxy_url LIKE '%//login%'",
        token,
    )

    report = target.take(database)

    assert reasons(report)[UNOPENED] == 3
    assert "secret-bytes" not in json.dumps(report.as_json())


def test_no_secret_is_in_a_report_or_in_the_clear_on_our_disk(target: Target) -> None:
    reports = [
        target.take(FIXTURES, keyring=keyring, without_credentials=without)
        for keyring in (Keyring([]), Keyring([Fernet.generate_key()]), Keyring([CURRENT_KEY.encode()]))
        for without in (False, True)
    ]

    texts = [json.dumps(report.as_json()) + "\n".join(report.lines()) for report in reports]
    files = [path for path in target.directory.rglob("*") if path.is_file()]
    assert len(files) > 3
    for word in SECRETS:
        assert not any(word in text for text in texts), word
        assert not any(word.encode() in path.read_bytes() for path in files), word
