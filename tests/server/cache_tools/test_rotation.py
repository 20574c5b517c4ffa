"""Changing the encryption key of a stopped store: everything is sealed anew, whatever interrupts it."""

from __future__ import annotations

import shutil
import sqlite3
import stat
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from cryptography.fernet import Fernet, InvalidToken
from pydantic import SecretStr

from proxystash_server.cache import (
    CredentialEncryptor,
    EncryptionKeyError,
    EntryFilter,
    L2BackendType,
    StoreError,
)
from proxystash_server.cache.stopped.rotation import rotate_key
from tests.server.cache.support import (
    PASSWORD,
    SWITCHED_OFF,
    USERNAME,
    fingerprint,
    make_reachable,
    make_unreachable,
)
from tests.server.cache_tools.steps import killed_at
from tests.server.cache_tools.stopped import (
    KEYS,
    SEALED,
    StoppedCache,
    fill,
    kinds,
    miss_changes,
    note_kinds,
    sql,
    told,
)


def filled(cache: StoppedCache) -> StoppedCache:
    """A store with entries in every state: replaced, used, deleted, and with garbage."""
    cache.fill().fill()
    with cache.running() as manager:
        manager.delete(KEYS[0])
        for key in KEYS[1:5]:
            manager.get(key)
    for database in (cache.l3, cache.l2_database):
        if database.exists():
            leave_garbage(database)
    return cache


def leave_garbage(database: Path) -> None:
    """Put entries and delete them as an SQLite does that is not built to wipe what it deletes."""
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA secure_delete = OFF")
        columns = (
            "proxy_url, scheme, sealed, source, fetch_time, expires_at, health_status, failure_count, version"
        )
        facts = "checksum, access_count, last_accessed, evicted_from_l1, recency"
        for number in range(10):
            connection.execute(
                f"INSERT INTO entries (key, {columns}, {facts}) "
                f"SELECT key || '-gone-{number}', {columns}, {facts} FROM entries WHERE key NOT LIKE '%gone%'"
            )
        connection.execute("DELETE FROM entries WHERE key LIKE '%gone%'")


def tokens(cache: StoppedCache) -> list[bytes]:
    """Every seal that stands anywhere in the files, the garbage included."""
    data = cache.bytes()
    found = []
    position = data.find(b"gAAAAA")
    while position >= 0:
        end = position
        while data[end : end + 1].isalnum() or data[end : end + 1] in (b"-", b"_", b"="):
            end += 1
        found.append(data[position:end])
        position = data.find(b"gAAAAA", end)
    return found


def opens(key: bytes, token: bytes) -> bool:
    """Whether a key opens a token, behind which something else may stand."""
    for length in range(100, len(token) + 1, 4):
        try:
            Fernet(key).decrypt(token[:length])
        except InvalidToken:
            continue
        return True
    return False


def assert_all_readable(
    cache: StoppedCache, switched_off: Sequence[str] = ("", "l2_config", "l3_config"), **fields: object
) -> None:
    """Every credential, in each tier by itself."""
    for off in [{name: SWITCHED_OFF} if name else {} for name in switched_off]:
        copy = cache.copy(f"copy-{len(list(cache.directory.parent.iterdir()))}")
        entries = copy.entries(**off, **fields)
        assert set(entries) == set(KEYS[1:])
        for key in SEALED[1:]:
            assert entries[key].username == SecretStr(USERNAME)
            assert entries[key].password == SecretStr(PASSWORD)


def assert_every_credential_opens(cache: StoppedCache) -> None:
    """As `assert_all_readable`, by the word of a check, which opens each of them."""
    report = cache.check()
    assert report.consistent, told(report)
    assert note_kinds(report) <= {"unfinished_rotation", "leftover", "unsealed_cache"}, told(report)
    assert {tier.credentials for tier in report.tiers} == {len(SEALED) - 1}


def test_every_credential_opens_with_the_new_key_alone_and_no_old_seal_is_left(cache: StoppedCache) -> None:
    filled(cache)
    old = cache.key_file.read_bytes().strip()
    assert any(opens(old, token) for token in tokens(cache))
    rotation = rotate_key(cache.config())
    assert list(rotation.resealed.values()) == [len(SEALED) - 1] * 2
    assert list(rotation.credentials.values()) == [len(SEALED) - 1] * 2
    assert not rotation.was_unfinished
    [new] = cache.key_file.read_bytes().split()
    assert new != old
    assert stat.S_IMODE(cache.key_file.stat().st_mode) == 0o600
    assert old not in cache.bytes()
    for token in tokens(cache):
        assert opens(new, token)
        assert not opens(old, token)
    report = cache.check()
    assert report.consistent, told(report)
    assert_all_readable(cache)


@pytest.mark.parametrize("off", ["l2_config", "l3_config"])
def test_a_rotation_changes_nothing_but_seals(cache: StoppedCache, off: str) -> None:
    cache.settings = {off: SWITCHED_OFF}
    filled(cache)
    before = state(cache)
    rotate_key(cache.config())
    assert state(cache) == before


def test_a_store_of_an_older_format_is_sealed_anew_like_any_other(cache: StoppedCache) -> None:
    filled(cache)
    cache.turn_into_format_1()
    rotate_key(cache.config())
    [new] = cache.key_file.read_bytes().split()
    assert all(opens(new, token) for token in tokens(cache))
    assert_all_readable(cache)


def state(cache: StoppedCache) -> object:
    """What the tier that decides has."""
    with cache.running() as manager:
        tier = manager._authority.tier
        return {key: tier.get(key) for key in sorted(tier.keys())}, tier.versions(KEYS)


def test_the_order_of_eviction_survives_a_rotation(cache: StoppedCache) -> None:
    bounded = {"max_entries": 10, "eviction_policy": "fifo"}
    cache.settings = {"l2_config": bounded, "l3_config": SWITCHED_OFF}
    cache.fill()
    copy = cache.copy("unrotated")
    rotate_key(cache.config())
    survivors = []
    for one in (cache, copy):
        with one.running() as manager:
            for number in range(5):
                manager.put(f"new-{number}", manager.new_entry("http://192.0.2.9:1", key=f"new-{number}"))
            survivors.append(sorted(manager.l2_tier.keys()))
    assert len(survivors[0]) == 10
    assert survivors[0] == survivors[1]


def test_a_store_without_credentials_gets_a_new_key_too(cache: StoppedCache) -> None:
    with cache.running() as manager:
        manager.put("a", manager.new_entry("http://192.0.2.9:1", key="a"))
    old = cache.key_file.read_bytes()
    rotate_key(cache.config())
    assert cache.key_file.read_bytes() != old
    with cache.running() as manager:
        assert manager.get("a") is not None


def test_stores_that_are_switched_off_are_sealed_anew_as_well(cache: StoppedCache) -> None:
    filled(cache)
    rotate_key(cache.config(l2_config=SWITCHED_OFF))
    assert_all_readable(cache)


def test_the_store_of_the_other_backend_is_sealed_anew_as_well(cache: StoppedCache) -> None:
    filled(cache)
    other = next(backend for backend in L2BackendType if backend is not cache.l2_backend)
    rotate_key(cache.config(l2_backend=other))
    assert_all_readable(cache)


def test_a_store_that_was_killed_can_be_rotated(cache: StoppedCache) -> None:
    with cache.running() as manager:
        fill(manager)
        manager.delete(KEYS[0])
        killed = cache.copy("killed")
    if cache.l2_backend is L2BackendType.JSONL:
        shard = killed.shard_of(KEYS[1])
        shard.write_bytes(shard.read_bytes() + b'{"op":"put","key":"torn')
    rotate_key(killed.config())
    assert killed.check().consistent
    assert_all_readable(killed)


def test_progress_is_told(cache: StoppedCache) -> None:
    filled(cache)
    seen: list[tuple[str, int, int]] = []
    rotate_key(cache.config(), progress=lambda what, done, total: seen.append((what, done, total)))
    assert {what for what, _, _ in seen} >= {"reading l3", "sealing l3 (sqlite)"}
    assert ("sealing l3 (sqlite)", len(SEALED) - 1, len(SEALED) - 1) in seen


def test_records_that_were_set_aside_keep_their_seals_and_are_told_of(cache: StoppedCache) -> None:
    filled(cache)
    sql(cache.l3, "UPDATE entries SET source = 'x' WHERE key = ?", SEALED[1])
    cache.repair()
    damaged = cache.l3.with_name("proxystash.db.damaged-1")
    damaged.write_bytes(b"damaged")
    rotation = rotate_key(cache.config())
    for place in (cache.l3, damaged):
        [advice] = [advice for advice in rotation.advice if advice.startswith(f"{place} ")]
        assert "set aside" in advice
        assert "when you have looked at it" in advice


# -- with changes that the slowest tier has missed


def with_missed_changes(cache: StoppedCache) -> StoppedCache:
    with filled(cache).running() as manager:
        miss_changes(manager)
    assert cache.missed_changes.exists()
    return cache


def facts(cache: StoppedCache, **fields: object) -> dict[str, tuple[object, ...]]:
    """What a cache that is started now serves, in any order."""
    with cache.running(**fields) as manager:
        found = manager.list_entries("", 100, EntryFilter())
    return {entry.key: (entry.source, entry.version, entry.username, entry.password) for entry in found}


@pytest.mark.parametrize("off", ["", "l2_config", "l3_config"])
def test_what_the_slowest_tier_has_missed_is_sealed_anew_as_well(cache: StoppedCache, off: str) -> None:
    cache.settings = {off: SWITCHED_OFF} if off else {}
    with_missed_changes(cache)
    expected = facts(cache.copy("expected"))
    assert set(expected) == {"missed", *KEYS[1:]} - {KEYS[2]}
    old = cache.key_file.read_bytes().strip()
    rotate_key(cache.config())
    assert not cache.missed_changes.exists()
    assert not any(opens(old, token) for token in tokens(cache))
    assert facts(cache) == expected


def test_what_was_missed_is_sealed_anew_when_the_key_moves_to_the_configuration(cache: StoppedCache) -> None:
    with_missed_changes(cache)
    expected = facts(cache.copy("expected"))
    old, new = cache.key_file.read_bytes().strip(), Fernet.generate_key().decode()
    rotate_key(cache.config(encryption_key=new))
    assert not any(opens(old, token) for token in tokens(cache))
    assert facts(cache, encryption_key=new) == expected


def test_killed_at_any_step_no_change_that_was_missed_is_lost(cache: StoppedCache) -> None:
    with_missed_changes(cache)
    expected = facts(cache.copy("expected"))
    old = cache.key_file.read_bytes().strip()
    for number in range(1000):
        attempt = cache.copy("attempt")
        if not killed_at(number, partial(rotate_key, attempt.config())):
            break
        report = attempt.check()
        assert report.consistent, told(report)
        rotate_key(attempt.config())
        assert not any(opens(old, token) for token in tokens(attempt))
        assert facts(attempt) == expected
        shutil.rmtree(attempt.directory)
    else:
        raise AssertionError("the rotation never ends")
    assert number > 20


def test_what_cannot_be_applied_now_stops_a_rotation(cache: StoppedCache) -> None:
    with_missed_changes(cache)
    key = cache.key_file.read_bytes()
    hidden = make_unreachable(cache.l3.parent)
    with pytest.raises(StoreError, match=r"missed-changes\.jsonl .* no key was changed"):
        rotate_key(cache.config())
    make_reachable(cache.l3.parent, hidden)
    assert cache.key_file.read_bytes() == key
    before = fingerprint(cache.directory)
    with pytest.raises(StoreError, match=r"missed-changes\.jsonl .* no key was changed"):
        rotate_key(cache.config(l2_config=SWITCHED_OFF, l3_config=SWITCHED_OFF))
    assert fingerprint(cache.directory) == before
    rotate_key(cache.config())
    assert set(facts(cache)) == {"missed", *KEYS[1:]} - {KEYS[2]}


# -- interrupted


def test_killed_at_any_step_everything_can_be_opened_and_running_it_again_finishes(
    cache: StoppedCache,
) -> None:
    filled(cache)
    old = cache.key_file.read_bytes().strip()
    for number in range(1000):
        attempt = cache.copy("attempt")
        if not killed_at(number, partial(rotate_key, attempt.config())):
            break
        assert_every_credential_opens(attempt)
        rotation = rotate_key(attempt.config())
        [new] = attempt.key_file.read_bytes().split()
        assert new != old
        assert not any(opens(old, token) for token in tokens(attempt)), rotation
        assert_every_credential_opens(attempt)
        shutil.rmtree(attempt.directory)
    else:
        raise AssertionError("the rotation never ends")
    assert number > 15


@pytest.mark.parametrize("off", ["none", "l2_config", "l3_config"])
def test_killed_with_the_keys_in_the_configuration_one_key_starts_a_cache_only_if_it_opens_everything(
    cache: StoppedCache, monkeypatch: pytest.MonkeyPatch, off: str
) -> None:
    """A cache with one key alone would set the other's credentials aside as damaged."""
    monkeypatch.setattr("proxystash_server.cache.stopped.resealing._BATCH", 2)
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    cache.settings = {"encryption_key": old} if off == "none" else {"encryption_key": old, off: SWITCHED_OFF}
    filled(cache)
    cache.settings.update(encryption_key=new, previous_encryption_keys=(old,))
    refusals = 0
    for number in range(1000):
        attempt = cache.copy("attempt")
        if not killed_at(number, partial(rotate_key, attempt.config())):
            break
        assert_every_credential_opens(attempt)
        refused = 0
        for key in (old, new):
            alone = attempt.copy("alone")
            alone.settings = {**attempt.settings, "encryption_key": key, "previous_encryption_keys": ()}
            before = fingerprint(alone.directory)
            try:
                entries = alone.entries()
            except EncryptionKeyError:
                refused += 1
                assert fingerprint(alone.directory) == before
            else:
                assert all(entries[key].password == SecretStr(PASSWORD) for key in SEALED[1:])
                assert "set_aside" not in note_kinds(alone.check())
            shutil.rmtree(alone.directory)
        refusals += refused == 2
        shutil.rmtree(attempt.directory)
    else:
        raise AssertionError("the rotation never ends")
    assert len(attempt.entries(previous_encryption_keys=())) == len(KEYS) - 1
    assert number > 5
    assert refusals


@pytest.mark.parametrize("off", ["", "l3_config"])
def test_a_cache_may_run_between_two_halves_of_a_rotation(cache: StoppedCache, off: str) -> None:
    cache.settings = {off: SWITCHED_OFF} if off else {}
    filled(cache)
    old = cache.key_file.read_bytes().strip()
    original = cache.copy("original")
    for number in range(3, 1000, 5):
        attempt = original.copy(f"attempt-{number}")
        if not killed_at(number, partial(rotate_key, attempt.config())):
            break
        with attempt.running() as manager:
            manager.put(
                "between", manager.new_entry("http://192.0.2.9:1", key="between", username="u", password="p")
            )
        rotate_key(attempt.config())
        assert not any(opens(old, token) for token in tokens(attempt))
        with attempt.running() as manager:
            entry = manager.get("between")
            assert entry is not None
            assert entry.password == SecretStr("p")
        # As a cache, L2 may have started empty meanwhile.
        assert_all_readable(attempt, [off] if off else ["", "l2_config"])
    assert number > 3


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
