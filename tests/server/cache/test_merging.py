"""Puts that do not take the place of what is stored: merged with it, or only where there is nothing."""

from __future__ import annotations

from typing import Any

import pytest

from proxystash.proxies import key_of
from proxystash_server.cache import (
    CacheEntry,
    CacheManager,
    HealthStatus,
    InvalidEntryError,
    L2BackendType,
    NotStoredError,
    Stored,
)
from proxystash_server.cache.entry.merging import Combine, if_absent, merge_seen, update_fields
from tests.server.cache.stash import Stash
from tests.server.cache.support import START_US, SWITCHED_OFF, bounded, broken, fail_until_skipped, put

SECOND_US = 1_000_000
URL = "http://192.0.2.1:8080"
LABELS = {"country": "DE", "city": "Berlin"}


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


def store(manager: CacheManager, combine: Combine | None, **fields: Any) -> Stored:
    [stored] = manager.store([(manager.new_entry(URL, **fields), combine)])
    assert isinstance(stored, Stored)
    assert stored.stored_in
    return stored


def rich(manager: CacheManager, **fields: Any) -> CacheEntry:
    """A stored entry that says something in every field."""
    [entry] = put(
        manager,
        "a",
        source="shop",
        username="user",
        password="secret",
        ttl_us=600 * SECOND_US,
        health_status=HealthStatus.DEGRADED,
        labels=LABELS,
        **fields,
    )
    return entry


def stored_in_every_tier(manager: CacheManager, key: str = "a") -> CacheEntry:
    l1, l2, l3 = (tier.get(key) for tier in (manager.l1_tier, manager.l2_tier, manager.l3_tier))
    assert l3 is not None
    assert l2 == l3
    assert l1 in (l3, None)
    return l3


def test_what_a_merge_does_not_name_stays_and_the_proxy_lives_on(stash: Stash) -> None:
    manager = stash.open()
    rich(manager)
    manager.get("a")
    stash.clock.advance(300)
    merged = store(manager, merge_seen({"labels"}), key="a", labels={"city": "Bonn", "rack": "7"}).entry
    assert merged.source == "shop"
    assert (merged.username, merged.password) == (merged.username, merged.password) != (None, None)
    assert merged.health_status is HealthStatus.DEGRADED
    assert merged.labels == {"country": "DE", "city": "Bonn", "rack": "7"}
    assert merged.fetch_time_us == START_US + 300 * SECOND_US
    assert merged.ttl_us == 600 * SECOND_US
    assert merged.access_count == 1
    assert stored_in_every_tier(manager) == merged
    # And so it is after a restart, with credentials that can be opened.
    again = stash.reopen_after_kill().get("a")
    assert again is not None
    assert again.password is not None
    assert again.password.get_secret_value() == "secret"
    assert again.labels == merged.labels


@pytest.mark.parametrize(
    ("names", "fields", "expected"),
    [
        ({"source"}, {"source": "list"}, {"source": "list"}),
        ({"ttl_us"}, {"ttl_us": 60 * SECOND_US}, {"ttl_us": 60 * SECOND_US}),
        ({"health_status"}, {"health_status": HealthStatus.DEAD}, {"health_status": HealthStatus.DEAD}),
        ({"failure_count"}, {"failure_count": 2}, {"failure_count": 2}),
        ({"max_leases"}, {"max_leases": 2}, {"max_leases": 2}),
    ],
)
def test_what_a_merge_names_is_taken(
    stash: Stash, names: set[str], fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    manager = stash.open()
    before = rich(manager)
    merged = store(manager, merge_seen(names), key="a", **fields).entry
    for name in ("source", "ttl_us", "health_status", "failure_count", "labels", "max_leases"):
        assert getattr(merged, name) == expected.get(name, getattr(before, name)), name


def test_a_merge_takes_new_credentials(stash: Stash) -> None:
    manager = stash.open(l1_config=SWITCHED_OFF)
    rich(manager)
    store(manager, merge_seen(()), key="a", username="user", password="changed")
    entry = stash.reopen().get("a")
    assert entry is not None
    assert entry.username is not None
    assert entry.password is not None
    assert (entry.username.get_secret_value(), entry.password.get_secret_value()) == ("user", "changed")


def test_a_merge_into_nothing_stores_what_is_put(stash: Stash) -> None:
    manager = stash.open()
    stored = store(manager, merge_seen({"source"}), key="a", source="list")
    assert (stored.entry.source, stored.kept) == ("list", False)
    stash.clock.advance(3601)
    # Into what has expired, too.
    assert store(manager, merge_seen(()), key="a").entry.source == ""


def test_a_merge_that_would_have_too_many_labels_changes_nothing(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a", labels={f"old-{number}": "" for number in range(20)})
    new = manager.new_entry(URL, key="a", labels={f"new-{number}": "" for number in range(20)})
    good = manager.new_entry(URL, key="b")
    before = manager.l3_tier.get("a")
    refused, stored = manager.store([(new, merge_seen({"labels"})), (good, None)])
    assert isinstance(refused, InvalidEntryError)
    assert refused.field == "labels"
    assert isinstance(stored, Stored)
    assert manager.l3_tier.get("a") == before


def test_only_where_absent_leaves_what_is_stored(stash: Stash) -> None:
    manager = stash.open()
    before = rich(manager)
    kept = store(manager, if_absent, key="a", source="list")
    assert kept.kept
    assert kept.entry == before
    assert set(kept.stored_in) == {"l1", "l2", "l3"}
    assert stored_in_every_tier(manager) == before
    assert not store(manager, if_absent, key="b", source="list").kept
    stash.clock.advance(601)
    assert not store(manager, if_absent, key="a", source="list").kept


def test_an_update_changes_the_named_fields_and_nothing_else(stash: Stash) -> None:
    manager = stash.open()
    before = rich(manager)
    stash.clock.advance(10)
    names = {"password", "labels.city", "labels.rack", "labels.none"}
    updated = store(
        manager, update_fields(names), key="a", password="changed", labels={"rack": "7", "other": "x"}
    ).entry
    assert updated.labels == {"country": "DE", "rack": "7"}
    assert updated.username == before.username
    assert updated.password is not None
    assert updated.password.get_secret_value() == "changed"
    assert (updated.fetch_time_us, updated.expires_at_us) == (before.fetch_time_us, before.expires_at_us)
    assert updated.source == before.source
    entry = stash.reopen_after_kill().get("a")
    assert entry is not None
    assert entry.password == updated.password
    assert entry.username == before.username


def test_an_update_of_the_ttl_counts_from_the_fetch_time(stash: Stash) -> None:
    manager = stash.open()
    rich(manager)
    stash.clock.advance(10)
    updated = store(manager, update_fields({"ttl_us"}), key="a", ttl_us=60 * SECOND_US).entry
    assert (updated.fetch_time_us, updated.expires_at_us) == (START_US, START_US + 60 * SECOND_US)


def test_an_update_of_the_fetch_time_moves_the_end_by_the_ttl_that_is_stored(stash: Stash) -> None:
    manager = stash.open()
    rich(manager)
    stash.clock.advance(10)
    at = START_US + 5 * SECOND_US
    updated = store(
        manager, update_fields({"fetch_time_us"}), key="a", fetch_time_us=at, ttl_us=60 * SECOND_US
    ).entry
    assert (updated.fetch_time_us, updated.expires_at_us) == (at, at + 600 * SECOND_US)


def test_a_merge_is_no_use_and_takes_nobody_s_place_in_memory(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(1))
    put(manager, "a", "b")
    assert [*manager.l1_tier.keys()] == ["b"]
    store(manager, merge_seen({"source"}), key="a", source="list")
    assert [*manager.l1_tier.keys()] == ["b"]
    assert stored_in_every_tier(manager).source == "list"


def test_an_older_sighting_makes_nobody_live_shorter(stash: Stash) -> None:
    manager = stash.open(default_ttl_seconds=86_400)
    before = rich(manager)
    stash.clock.advance(10)
    merged = store(
        manager, merge_seen({"source"}), key="a", source="list", fetch_time_us=START_US - 3600 * SECOND_US
    ).entry
    assert (merged.source, merged.fetch_time_us, merged.expires_at_us) == (
        "list",
        START_US,
        before.expires_at_us,
    )


@pytest.mark.parametrize(
    ("name", "value"), [("ttl_us", 100 * SECOND_US), ("fetch_time_us", START_US - 500 * SECOND_US)]
)
def test_an_update_to_what_has_expired_already_is_refused_as_a_put_of_it_is(
    stash: Stash, name: str, value: int
) -> None:
    manager = stash.open(default_ttl_seconds=86_400)
    before = rich(manager)
    stash.clock.advance(100)
    fields: dict[str, Any] = {name: value}
    new = manager.new_entry(URL, key="a", **fields)
    [refused] = manager.store([(new, update_fields({name}))])
    assert isinstance(refused, InvalidEntryError)
    assert (refused.field, refused.reason) == ("fetch_time", "ALREADY_EXPIRED")
    assert stored_in_every_tier(manager) == before


def test_an_update_of_what_is_not_stored_is_refused(stash: Stash) -> None:
    manager = stash.open()
    [refused] = manager.store([(manager.new_entry(URL, key="a"), update_fields({"source"}))])
    assert isinstance(refused, NotStoredError)
    assert manager.get("a") is None


def test_several_puts_of_one_key_in_a_group_each_see_the_one_before(stash: Stash) -> None:
    manager = stash.open()
    entries = [manager.new_entry(URL, key="a", labels={str(number): ""}) for number in range(3)]
    results = manager.store([(entry, merge_seen({"labels"})) for entry in entries])
    assert all(isinstance(one, Stored) for one in results)
    assert stored_in_every_tier(manager).labels == {"0": "", "1": "", "2": ""}


# -- credentials that a put leaves out


def test_a_put_without_the_username_that_its_key_was_made_with_keeps_the_credentials(stash: Stash) -> None:
    manager = stash.open()
    entry = manager.new_entry(URL, username="user", password="secret", source="shop")
    manager.put(entry.key, entry)
    assert entry.key == key_of(URL, "user")
    # As an export without credentials has it, or a list.
    bare = manager.new_entry(URL, key=entry.key, source="list")
    manager.put(bare.key, bare)
    after = stored_in_every_tier(manager, entry.key)
    assert after.source == "list"
    assert (after.username, after.password) == (entry.username, entry.password)


def test_a_put_that_may_lack_credentials_is_taken_also_where_nobody_can_say_which(stash: Stash) -> None:
    manager = stash.open(l1_config=SWITCHED_OFF)
    entry = manager.new_entry(URL, username="user", password="secret")
    manager.put(entry.key, entry)
    with broken(manager.l2_tier), broken(manager.l3_tier):
        fail_until_skipped(manager, manager.l2_tier)
        bare = manager.new_entry(URL, key=entry.key, source="list")
        [stored] = manager.store([(bare, None)])
        [merged] = manager.store([(bare, merge_seen(()))])
    assert isinstance(stored, Stored)
    assert stored.stored_in
    assert isinstance(merged, Stored)


@pytest.mark.parametrize("key", ["own-key", "0123456789abcdef"])
def test_a_put_under_a_key_of_its_own_takes_credentials_away(stash: Stash, key: str) -> None:
    manager = stash.open()
    put(manager, key, username="user", password="secret")
    bare = manager.new_entry(URL, key=key)
    manager.put(bare.key, bare)
    after = stored_in_every_tier(manager, key)
    assert (after.username, after.password) == (None, None)
