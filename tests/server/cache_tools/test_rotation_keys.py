"""Which key a rotation seals under, and what it refuses, with nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from proxystash_server.cache import CredentialEncryptor, EncryptionKeyError, StoreError
from proxystash_server.cache.stopped.rotation import rotate_key
from tests.server.cache.support import fingerprint
from tests.server.cache_tools.rotating import assert_all_readable, filled, opens, tokens, with_missed_changes
from tests.server.cache_tools.steps import killed_at
from tests.server.cache_tools.stopped import StoppedCache, kinds, sql, told

# -- which key


def test_the_new_key_may_come_from_a_file(cache: StoppedCache, tmp_path: Path) -> None:
    filled(cache)
    file = tmp_path / "new.key"
    file.touch(mode=0o600)
    file.write_bytes(Fernet.generate_key())
    rotate_key(cache.config(), file)
    assert cache.key_file.read_bytes().strip() == file.read_bytes()
    assert_all_readable(cache)


def test_a_configured_key_is_the_new_one_and_the_previous_one_the_old(cache: StoppedCache) -> None:
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    cache.settings = {"encryption_key": old}
    filled(cache)
    rotation = rotate_key(cache.config(encryption_key=new, previous_encryption_keys=(old,)))
    assert rotation.advice == ["PROXYSTASH_ENCRYPTION_KEY_PREVIOUS is not needed any more"]
    assert_all_readable(cache, encryption_key=new)
    assert not cache.key_file.exists()


def test_a_configured_key_may_give_way_to_that_of_a_file(cache: StoppedCache, tmp_path: Path) -> None:
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    cache.settings = {"encryption_key": old}
    filled(cache)
    file = tmp_path / "new.key"
    file.touch(mode=0o600)
    file.write_text(new)
    rotation = rotate_key(cache.config(), file)
    assert "PROXYSTASH_ENCRYPTION_KEY must be the key in" in rotation.advice[0]
    assert new not in rotation.advice[0]
    assert_all_readable(cache, encryption_key=new)


def test_a_key_may_move_from_the_key_file_to_the_configuration(cache: StoppedCache) -> None:
    filled(cache)
    new = Fernet.generate_key().decode()
    before = cache.key_file.read_bytes()
    rotation = rotate_key(cache.config(encryption_key=new))
    assert any("delete it" in advice for advice in rotation.advice)
    assert cache.key_file.read_bytes() == before
    assert_all_readable(cache, encryption_key=new)


def test_a_rotation_to_yet_another_key_finishes_one_that_was_interrupted(
    cache: StoppedCache, tmp_path: Path
) -> None:
    filled(cache)
    old = cache.key_file.read_bytes().strip()
    assert killed_at(12, partial(rotate_key, cache.config()))
    [second, still_old] = cache.key_file.read_bytes().split()
    assert still_old == old
    file = tmp_path / "new.key"
    file.touch(mode=0o600)
    file.write_bytes(Fernet.generate_key())
    rotation = rotate_key(cache.config(), file)
    assert rotation.was_unfinished
    for token in tokens(cache):
        assert not opens(old, token)
        assert not opens(second, token)
    assert_all_readable(cache)


# -- refusals, which change nothing


def replace_key(cache: StoppedCache) -> None:
    cache.key_file.write_bytes(Fernet.generate_key())


def spoil_key(cache: StoppedCache) -> None:
    cache.key_file.write_bytes(b"not a key")


def spoil_second_key(cache: StoppedCache) -> None:
    cache.key_file.write_bytes(Fernet.generate_key() + b"\nnot a key\n")


def empty_key_file(cache: StoppedCache) -> None:
    cache.key_file.write_bytes(b"")


def lose_key(cache: StoppedCache) -> None:
    cache.key_file.unlink()


def open_key_to_others(cache: StoppedCache) -> None:
    cache.key_file.chmod(0o644)


KEY_TROUBLE: dict[str, tuple[Callable[[StoppedCache], None], str]] = {
    "another key": (replace_key, "PROXYSTASH_ENCRYPTION_KEY"),
    "a malformed key": (spoil_key, r"line 1 of .*secret\.key is malformed.*Make one with"),
    "a malformed second key": (spoil_second_key, r"line 2 of .*secret\.key is malformed"),
    "an empty key file": (empty_key_file, r"is empty\. Put the key back"),
    "a missing key": (lose_key, r"(missing|not at hand).*"),
    "a key that others may read": (open_key_to_others, "chmod 600"),
}


@pytest.mark.parametrize("prepare", [filled, with_missed_changes])
@pytest.mark.parametrize("trouble", KEY_TROUBLE)
def test_trouble_with_the_key_is_told_with_what_to_do_and_changes_nothing(
    cache: StoppedCache, trouble: str, prepare: Callable[[StoppedCache], StoppedCache]
) -> None:
    prepare(cache)
    make, message = KEY_TROUBLE[trouble]
    make(cache)
    before = fingerprint(cache.directory)
    with pytest.raises(EncryptionKeyError, match=message):
        rotate_key(cache.config())
    with pytest.raises(EncryptionKeyError, match=message), cache.running():
        pass
    report = cache.check()
    assert {fault.kind for fault in report.faults} <= {"wrong_key", "unusable_key"}
    assert not report.consistent
    with pytest.raises(EncryptionKeyError, match="nothing was changed"):
        cache.repair()
    assert fingerprint(cache.directory) == before
    assert "not a key" not in told(report)


NEW_KEY_TROUBLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such file": (lambda path: path.unlink(), "does not exist"),
    "a malformed key": (lambda path: path.write_bytes(b"nonsense"), "malformed"),
    "a file that others may read": (lambda path: path.chmod(0o640), "chmod 600"),
    "two keys": (
        lambda path: path.write_bytes(Fernet.generate_key() + b"\n" + Fernet.generate_key()),
        "must be the only one",
    ),
}


@pytest.mark.parametrize("trouble", NEW_KEY_TROUBLE)
def test_trouble_with_the_new_key_is_told_and_changes_nothing(
    cache: StoppedCache, tmp_path: Path, trouble: str
) -> None:
    filled(cache)
    file = tmp_path / "new.key"
    file.touch(mode=0o600)
    file.write_bytes(Fernet.generate_key())
    make, message = NEW_KEY_TROUBLE[trouble]
    make(file)
    before = fingerprint(cache.directory)
    with pytest.raises(EncryptionKeyError, match=message):
        rotate_key(cache.config(), file)
    assert fingerprint(cache.directory) == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encryption_key": "nonsense"}, "the encryption key is malformed: .* Make one with"),
        ({"previous_encryption_keys": ("nonsense",)}, "previous encryption key number 1 is malformed"),
    ],
)
def test_a_malformed_key_in_the_configuration_is_told_and_changes_nothing(
    cache: StoppedCache, fields: dict[str, object], message: str
) -> None:
    filled(cache)
    before = fingerprint(cache.directory)
    with pytest.raises(EncryptionKeyError, match=message):
        rotate_key(cache.config(**fields))
    with pytest.raises(EncryptionKeyError, match=message), cache.running(**fields):
        pass
    report = cache.check(**fields)
    assert "unusable_key" in kinds(report)
    assert "nonsense" not in told(report)
    with pytest.raises(EncryptionKeyError, match="nothing was changed"):
        cache.repair(**fields)
    assert fingerprint(cache.directory) == before


def test_the_same_key_is_no_new_key(cache: StoppedCache) -> None:
    filled(cache)
    before = fingerprint(cache.directory)
    with pytest.raises(EncryptionKeyError, match="in use already"):
        rotate_key(cache.config(), cache.key_file)
    assert fingerprint(cache.directory) == before


def test_a_configured_key_alone_cannot_be_changed_and_what_to_set_is_told(cache: StoppedCache) -> None:
    cache.settings = {"encryption_key": Fernet.generate_key().decode()}
    filled(cache)
    before = fingerprint(cache.directory)
    with pytest.raises(EncryptionKeyError, match="set PROXYSTASH_ENCRYPTION_KEY to the new key and"):
        rotate_key(cache.config())
    assert fingerprint(cache.directory) == before


def test_a_wrong_configured_key_changes_nothing(cache: StoppedCache) -> None:
    filled(cache)
    cache.key_file.unlink()
    wrong = [Fernet.generate_key().decode() for _ in range(2)]
    before = fingerprint(cache.directory)
    with pytest.raises(EncryptionKeyError, match="not at hand"):
        rotate_key(cache.config(encryption_key=wrong[0], previous_encryption_keys=(wrong[1],)))
    assert fingerprint(cache.directory) == before


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE entries SET source = 'x' WHERE key = 'key-3'",
        "UPDATE entries SET sealed = 'gAAAAA' WHERE key = 'key-3'",
    ],
)
def test_a_damaged_store_must_be_repaired_first(cache: StoppedCache, damage: str) -> None:
    filled(cache)
    sql(cache.l3, damage)
    before = fingerprint(cache.directory)
    with pytest.raises(StoreError, match="check --repair; nothing was changed"):
        rotate_key(cache.config())
    assert fingerprint(cache.directory) == before
    cache.repair()
    rotate_key(cache.config())
    assert_all_readable(cache)


def test_where_there_is_no_key_there_is_none_to_change(cache: StoppedCache) -> None:
    cache.directory.mkdir()
    with pytest.raises(EncryptionKeyError, match="there is no key to change"):
        rotate_key(cache.config())
    assert list(cache.directory.iterdir()) == []


def test_a_credential_under_a_key_that_is_gone_stops_a_rotation(cache: StoppedCache) -> None:
    filled(cache)
    foreign = CredentialEncryptor(Fernet.generate_key()).encrypt(SecretStr("x")).decode()
    sql(cache.l3, "UPDATE entries SET sealed = ? WHERE key = 'key-3'", foreign)
    with pytest.raises(StoreError, match="nothing was changed"):
        rotate_key(cache.config())
