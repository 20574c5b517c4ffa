"""Promise 9: credentials are secrets in memory and sealed on disk; no start with the wrong key."""

from __future__ import annotations

import logging
import sqlite3
import stat
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from proxystash_server.cache import (
    CacheManager,
    CredentialEncryptor,
    EncryptionKeyError,
    EntryFilter,
    InvalidEntryError,
    L2BackendType,
)
from proxystash_server.cache.entry.credentials import UnreadableCredentialsError
from tests.server.cache.stash import Stash
from tests.server.cache.support import (
    PASSWORD,
    SWITCHED_OFF,
    USERNAME,
    broken,
    contents,
    fingerprint,
    make_reachable,
    make_unreachable,
    put,
)

ANY = EntryFilter()
KEY, ANOTHER_KEY, THIRD_KEY = (Fernet.generate_key().decode() for _ in range(3))


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


def put_secret(manager: CacheManager, key: str = "key-1") -> None:
    put(manager, key, username=USERNAME, password=PASSWORD)


def secret_of(manager: CacheManager, key: str = "key-1") -> tuple[str | None, str | None]:
    entry = manager.get(key)
    assert entry is not None
    assert entry.username is not None
    assert entry.password is not None
    return entry.username.get_secret_value(), entry.password.get_secret_value()


def sets_aside(stash: Stash) -> int:
    """How many records the closed stores have set aside."""
    path = stash.directory / "l2" / "set-aside.jsonl"
    count = len(path.read_bytes().splitlines()) if path.exists() else 0
    for database in stash.directory.rglob("*.db"):
        with closing(sqlite3.connect(database)) as connection:
            count += connection.execute("SELECT count(*) FROM set_aside").fetchone()[0]
    return count


# -- in memory


def test_credentials_come_back_as_secrets(stash: Stash) -> None:
    manager = stash.open()
    put_secret(manager)
    entry = manager.get("key-1")
    assert entry is not None
    assert isinstance(entry.username, SecretStr)
    assert isinstance(entry.password, SecretStr)
    assert secret_of(manager) == (USERNAME, PASSWORD)


@pytest.mark.parametrize(
    "url", [f"http://{USERNAME}:{PASSWORD}@192.0.2.1:8080", f"HTTP://{USERNAME}:{PASSWORD}@192.0.2.1:8080/"]
)
def test_userinfo_in_a_url_is_split_off_before_anything_is_stored(stash: Stash, url: str) -> None:
    manager = stash.open()
    entry = manager.new_entry(url)
    manager.put(entry.key, entry)
    assert entry.proxy_url == "http://192.0.2.1:8080"
    assert secret_of(manager, entry.key) == (USERNAME, PASSWORD)
    for content in contents(stash.directory).values():
        assert PASSWORD.encode() not in content


def test_no_repr_and_no_text_of_anything_carries_a_credential(stash: Stash) -> None:
    manager = stash.open(encryption_key=KEY)
    put_secret(manager)
    lookup = manager.lookup("key-1")
    things: list[object] = [
        lookup,
        lookup.entry,
        manager.list_entries("", 10, ANY),
        manager.config,
        manager.config.model_dump(),
        manager.encryptor,
        manager.l1_tier,
        manager.l2_tier,
        manager.l3_tier,
        manager.get_statistics(),
        manager.get_statistics().model_dump_json(),
        manager,
    ]
    for thing in things:
        for text in (repr(thing), str(thing), f"{thing}"):
            assert PASSWORD not in text
            assert KEY not in text


def test_no_log_line_carries_a_credential_whatever_happens(
    stash: Stash, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG, logger="")
    proxies = tmp_path / "proxies.txt"
    proxies.write_text(
        f"http://{USERNAME}:{PASSWORD}@192.0.2.9:1\nhttp://u:{PASSWORD}@bad host\n192.0.2.8:x:u:{PASSWORD}\n"
    )
    manager = stash.open(encryption_key=KEY, failure_threshold=2)
    put_secret(manager)
    with broken(manager.l2_tier), broken(manager.l3_tier):
        put_secret(manager, "key-2")
        manager.get("key-1")
    stash.recover(manager)
    manager.invalidate_by_health("key-1")
    manager.invalidate_by_health("key-1")
    manager.warm_from_file(str(proxies))
    manager.export_to_file(str(tmp_path / "out.jsonl"))
    manager.cleanup_expired()
    manager = stash.reopen(encryption_key=KEY)
    manager.clear()
    assert caplog.records
    for record in caplog.records:
        text = f"{record.getMessage()} {vars(record)} {record.exc_text}"
        assert PASSWORD not in text
        assert KEY not in text


@pytest.mark.parametrize(
    "make",
    [
        lambda manager: manager.new_entry(f"http://u:{PASSWORD}@192.0.2.1:99999"),
        lambda manager: manager.new_entry(f"http://u:{PASSWORD}@192.0.2.1:1/{PASSWORD}"),
        lambda manager: manager.new_entry(f"http://u:%FF{PASSWORD}@192.0.2.1:1"),
        lambda manager: manager.new_entry("http://192.0.2.1:1", password=PASSWORD + "\n"),
        lambda manager: manager.new_entry("http://192.0.2.1:1", password=PASSWORD * 100),
        lambda manager: manager.new_entry(f"http://u:{PASSWORD}@192.0.2.1:1", password="another"),
        lambda manager: manager.generate_cache_key(f"http://u:{PASSWORD}@192.0.2.1"),
    ],
    ids=["port", "path", "encoding", "control character", "length", "twice", "key"],
)
def test_no_error_carries_a_credential(stash: Stash, make: Callable[[CacheManager], object]) -> None:
    manager = stash.open()
    with pytest.raises(InvalidEntryError) as refusal:
        make(manager)
    chain = "".join(traceback.TracebackException.from_exception(refusal.value).format_exception_only())
    causes = [
        refusal.value.__cause__,
        None if refusal.value.__suppress_context__ else refusal.value.__context__,
    ]
    for text in (chain, repr(refusal.value), *map(repr, causes)):
        assert PASSWORD not in text


# -- the key


def test_the_first_start_makes_a_key_that_only_its_owner_may_read(stash: Stash) -> None:
    put_secret(stash.open())
    path = stash.directory / "secret.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    Fernet(path.read_bytes().strip())
    key = path.read_bytes()
    assert secret_of(stash.reopen()) == (USERNAME, PASSWORD)
    assert path.read_bytes() == key


def test_a_key_file_of_no_stated_place_is_beside_the_database(stash: Stash) -> None:
    stash.open(encryption_key_file=None)
    assert (stash.directory / "l3" / "secret.key").exists()


def test_a_configured_key_makes_no_file(stash: Stash) -> None:
    put_secret(stash.open(encryption_key=KEY))
    assert not (stash.directory / "secret.key").exists()
    assert secret_of(stash.reopen(encryption_key=KEY)) == (USERNAME, PASSWORD)
    for content in contents(stash.directory).values():
        assert KEY.encode() not in content


def test_a_configured_key_counts_for_more_than_the_file(stash: Stash) -> None:
    put_secret(stash.open(encryption_key=KEY))
    stash.close()
    (stash.directory / "secret.key").write_text(ANOTHER_KEY)
    (stash.directory / "secret.key").chmod(0o600)
    assert secret_of(stash.open(encryption_key=KEY)) == (USERNAME, PASSWORD)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir(0o700)


REFUSALS: dict[str, tuple[Callable[[Path], object], dict[str, object], str]] = {
    "another key": (lambda _: None, {"encryption_key": ANOTHER_KEY}, "not the one"),
    "another key and a previous one that is none of it": (
        lambda _: None,
        {"encryption_key": ANOTHER_KEY, "previous_encryption_keys": [THIRD_KEY]},
        "not the one",
    ),
    "no key": (lambda path: path.unlink(), {}, "missing"),
    "another key in the file": (lambda path: path.write_text(ANOTHER_KEY), {}, "not the one"),
    "a malformed key": (lambda _: None, {"encryption_key": "not-a-key"}, "malformed"),
    "a malformed previous key": (
        lambda _: None,
        {"encryption_key": ANOTHER_KEY, "previous_encryption_keys": ["not-a-key"]},
        "malformed",
    ),
    "an empty key file": (lambda path: path.write_text(""), {}, "empty"),
    "a key file that others may read": (lambda path: path.chmod(0o640), {}, "chmod 600"),
    "a directory as a key file": (replace_by_directory, {}, "cannot be read"),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("end", ["orderly", "abrupt"])
def test_a_key_that_is_not_right_is_refused_and_nothing_changes_on_disk(
    stash: Stash, name: str, end: str
) -> None:
    stash.validated = False
    spoil, fields, message = REFUSALS[name]
    manager = stash.open()
    put_secret(manager)
    key = (stash.directory / "secret.key").read_text().strip()
    if end == "abrupt":
        stash.kill()
    else:
        stash.close()
    spoil(stash.directory / "secret.key")
    before = fingerprint(stash.directory)
    with pytest.raises(EncryptionKeyError, match=message) as refusal:
        stash.open(**fields)
    assert fingerprint(stash.directory) == before
    for secret in (KEY, ANOTHER_KEY, THIRD_KEY, key, PASSWORD, "not-a-key"):
        assert secret not in str(refusal.value)


@pytest.mark.parametrize("off", [{}, {"l2_config": SWITCHED_OFF}, {"l3_config": SWITCHED_OFF}])
def test_the_right_key_starts_again_after_a_refusal(stash: Stash, off: dict[str, object]) -> None:
    put_secret(stash.open(encryption_key=KEY, **off))
    stash.close()
    with pytest.raises(EncryptionKeyError):
        stash.open(encryption_key=ANOTHER_KEY, **off)
    assert secret_of(stash.open(encryption_key=KEY, **off)) == (USERNAME, PASSWORD)


def test_a_key_that_cannot_be_checked_at_the_start_is_checked_before_the_tier_is_used(stash: Stash) -> None:
    """A tier that was out of reach when the key was checked must not take every sealed record for corrupt."""
    put_secret(stash.open(encryption_key=KEY))
    stash.close()
    hidden = {name: make_unreachable(stash.directory / name) for name in ("l2", "l3")}
    manager = stash.open(encryption_key=ANOTHER_KEY)
    for name, path in hidden.items():
        make_reachable(stash.directory / name, path)
    stash.recover(manager)
    manager.get("key-1")
    manager.list_entries("", 10, ANY)
    stash.recover(manager)
    stash.validated = False
    stash.close()
    assert sets_aside(stash) == 0
    assert secret_of(stash.open(encryption_key=KEY)) == (USERNAME, PASSWORD)


def test_a_previous_key_opens_what_it_sealed_and_the_new_one_seals(stash: Stash) -> None:
    put_secret(stash.open(encryption_key=KEY), "old")
    manager = stash.reopen(encryption_key=ANOTHER_KEY, previous_encryption_keys=[KEY])
    assert secret_of(manager, "old") == (USERNAME, PASSWORD)
    put_secret(manager, "new")
    for tier in (manager.l2_tier, manager.l3_tier):
        entry = tier.get("new")
        assert entry is not None
        assert CredentialEncryptor(ANOTHER_KEY.encode()).open(entry.sealed) == (USERNAME, PASSWORD)
    manager = stash.reopen(encryption_key=ANOTHER_KEY, previous_encryption_keys=[KEY])
    assert secret_of(manager, "new") == secret_of(manager, "old") == (USERNAME, PASSWORD)


def test_an_invalidation_or_a_promotion_does_not_need_to_seal_again(stash: Stash) -> None:
    manager = stash.open()
    put_secret(manager)
    sealed = [tier.get("key-1").sealed for tier in (manager.l2_tier, manager.l3_tier)]  # type: ignore[union-attr]
    assert sealed[0] == sealed[1]
    assert sealed[0] is not None
    manager.invalidate_by_health("key-1")
    manager = stash.reopen()
    manager.get("key-1")
    for tier in (manager.l2_tier, manager.l3_tier):
        entry = tier.get("key-1")
        assert entry is not None
        assert entry.sealed == sealed[0]


def test_no_file_holds_a_credential_or_the_key_in_the_clear(stash: Stash) -> None:
    manager = stash.open(encryption_key=KEY)
    for number in range(5):
        put_secret(manager, f"key-{number}")
    manager.delete("key-1")
    manager.invalidate_by_health("key-2")
    manager.get("key-3")
    manager.maintain()
    during = contents(stash.directory)
    stash.close()
    for files in (during, contents(stash.directory)):
        for name, content in files.items():
            for secret in (USERNAME, PASSWORD, KEY):
                assert secret.encode() not in content, name


# -- the encryptor by itself


def test_what_is_sealed_opens_and_what_was_tampered_with_does_not() -> None:
    encryptor = CredentialEncryptor()
    token = encryptor.seal(SecretStr(USERNAME), SecretStr(PASSWORD))
    assert token is not None
    assert encryptor.open(token) == (USERNAME, PASSWORD)
    assert encryptor.seal(SecretStr(USERNAME), SecretStr(PASSWORD)) != token
    middle = len(token) // 2
    tampered = token[:middle] + (b"A" if token[middle : middle + 1] != b"A" else b"B") + token[middle + 1 :]
    for bad in (tampered, token[:-4], b"", b"\xff", token + b"A"):
        with pytest.raises(UnreadableCredentialsError):
            encryptor.open(bad)
    with pytest.raises(UnreadableCredentialsError):
        CredentialEncryptor().open(token)


def test_nothing_to_seal_needs_no_token() -> None:
    encryptor = CredentialEncryptor()
    assert encryptor.seal(None, None) is None
    assert encryptor.open(None) == (None, None)
    for pair in ((SecretStr("u"), None), (None, SecretStr("p"))):
        expected = tuple(secret and secret.get_secret_value() for secret in pair)
        assert encryptor.open(encryptor.seal(*pair)) == expected


def test_single_secrets_are_encrypted_and_decrypted_as_with_proxywhirl() -> None:
    encryptor = CredentialEncryptor(KEY.encode())
    sealed = encryptor.encrypt(SecretStr(PASSWORD))
    assert PASSWORD.encode() not in sealed
    assert CredentialEncryptor(KEY.encode()).decrypt(sealed).get_secret_value() == PASSWORD
    assert encryptor.encrypt(SecretStr("")) == b""
    assert encryptor.decrypt(b"").get_secret_value() == ""
    assert encryptor.key == KEY.encode()


def test_each_encryptor_without_a_key_makes_one_of_its_own() -> None:
    assert CredentialEncryptor().key != CredentialEncryptor().key


def test_a_malformed_key_is_named_by_its_place_and_not_quoted() -> None:
    for keys, place in (((b"oops", []), "the encryption key"), ((KEY.encode(), [b"oops"]), "number 1")):
        with pytest.raises(EncryptionKeyError, match=place) as refusal:
            CredentialEncryptor(*keys)
        assert "oops" not in str(refusal.value)


def test_a_check_token_recognizes_its_key_and_no_other() -> None:
    encryptor = CredentialEncryptor(KEY.encode())
    token = encryptor.make_check()
    assert CredentialEncryptor(KEY.encode()).passes_check(token)
    assert CredentialEncryptor(ANOTHER_KEY.encode(), [KEY.encode()]).passes_check(token)
    assert not CredentialEncryptor(ANOTHER_KEY.encode()).passes_check(token)
    assert not encryptor.passes_check(b"nonsense")
    sealed = encryptor.seal(SecretStr("u"), SecretStr("p"))
    assert sealed is not None
    assert not encryptor.passes_check(sealed)
