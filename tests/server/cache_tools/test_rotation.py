"""Changing the encryption key of a stopped store: everything is sealed anew, whatever interrupts it."""

from __future__ import annotations

import shutil
import stat
from functools import partial

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from proxystash_server.cache import EncryptionKeyError, L2BackendType, StoreError
from proxystash_server.cache.stopped.rotation import rotate_key
from tests.server.cache.support import PASSWORD, SWITCHED_OFF, fingerprint, make_reachable, make_unreachable
from tests.server.cache_tools.rotating import (
    assert_all_readable,
    filled,
    killed_while_rotated,
    opens,
    served,
    tokens,
    with_missed_changes,
)
from tests.server.cache_tools.steps import killed_at
from tests.server.cache_tools.stopped import KEYS, SEALED, StoppedCache, fill, note_kinds, sql, told


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
        file = killed.l2_file
        file.write_bytes(file.read_bytes() + b'{"op":"put","key":"torn')
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


@pytest.mark.parametrize("off", ["", "l2_config", "l3_config"])
def test_what_the_slowest_tier_has_missed_is_sealed_anew_as_well(cache: StoppedCache, off: str) -> None:
    cache.settings = {off: SWITCHED_OFF} if off else {}
    with_missed_changes(cache)
    expected = served(cache.copy("expected"))
    assert set(expected) == {"missed", *KEYS[1:]} - {KEYS[2]}
    old = cache.key_file.read_bytes().strip()
    rotate_key(cache.config())
    assert not cache.missed_changes.exists()
    assert not any(opens(old, token) for token in tokens(cache))
    assert served(cache) == expected


def test_what_was_missed_is_sealed_anew_when_the_key_moves_to_the_configuration(cache: StoppedCache) -> None:
    with_missed_changes(cache)
    expected = served(cache.copy("expected"))
    old, new = cache.key_file.read_bytes().strip(), Fernet.generate_key().decode()
    rotate_key(cache.config(encryption_key=new))
    assert not any(opens(old, token) for token in tokens(cache))
    assert served(cache, encryption_key=new) == expected


def test_killed_at_any_step_no_change_that_was_missed_is_lost(cache: StoppedCache) -> None:
    with_missed_changes(cache)
    expected = served(cache.copy("expected"))
    old = cache.key_file.read_bytes().strip()
    for killed in killed_while_rotated(cache):
        report = killed.check()
        assert report.consistent, told(report)
        rotate_key(killed.config())
        assert not any(opens(old, token) for token in tokens(killed))
        assert served(killed) == expected
    assert served(cache) == expected


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
    assert set(served(cache)) == {"missed", *KEYS[1:]} - {KEYS[2]}


# -- interrupted


def test_killed_at_any_step_everything_can_be_opened_and_running_it_again_finishes(
    cache: StoppedCache,
) -> None:
    filled(cache)
    old = cache.key_file.read_bytes().strip()
    for killed in killed_while_rotated(cache):
        assert_every_credential_opens(killed)
        rotation = rotate_key(killed.config())
        [new] = killed.key_file.read_bytes().split()
        assert new != old
        assert not any(opens(old, token) for token in tokens(killed)), rotation
        assert_every_credential_opens(killed)


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
    for killed in killed_while_rotated(cache):
        assert_every_credential_opens(killed)
        refused = 0
        for key in (old, new):
            alone = killed.copy("alone")
            alone.settings = {**killed.settings, "encryption_key": key, "previous_encryption_keys": ()}
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
    assert len(cache.entries(previous_encryption_keys=())) == len(KEYS) - 1
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
