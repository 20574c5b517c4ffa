"""Promise 12: what breaks a limit is refused with the field at fault, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from pydantic import ValidationError

from proxystash_server.cache import (
    CacheConfig,
    CacheEntry,
    CacheManager,
    CacheTierConfig,
    HealthMonitoring,
    InvalidEntryError,
    check_key,
)
from tests.server.cache.stash import Stash
from tests.server.cache.support import PASSWORD, START_US, bounded, broken, contents, fail_until_skipped, put

SECOND_US = 1_000_000
TEN_YEARS_US = 10 * 365 * 24 * 3600 * SECOND_US
URL = "http://192.0.2.1:8080"
_LONG_HOST = ".".join(["a" * 63] * 3) + "." + "b" * 61
_IN_9000 = 221_845_392_000 * SECOND_US


def _monitoring(**fields: Any) -> HealthMonitoring:
    return HealthMonitoring(**fields)


# For each field: its name in the contract, the reason, values at the edge, and values over it.
LIMITS: dict[str, tuple[str, str, list[dict[str, Any]], list[dict[str, Any]]]] = {
    "key": (
        "key",
        "INVALID_KEY",
        [
            {"key": "k"},
            {"key": "k" * 256},
            {"key": "é" * 128},
            {"key": "😀" * 64},
            {"key": " "},
            {"key": "a/b c\u00a0\u200b"},
        ],
        [
            {"key": "k" * 257},
            {"key": "é" * 128 + "k"},
            {"key": "😀" * 65},
            {"key": "a\nb"},
            {"key": "a\x00b"},
            {"key": "a\x7f"},
            {"key": "a\x85b"},
            {"key": "\ud800"},
        ],
    ),
    "proxy_url": (
        "proxy_url",
        "INVALID_PROXY_URL",
        [
            {"proxy_url": "http://h:1"},
            {"proxy_url": "socks5h://[::1]:65535"},
            {"proxy_url": f"https://{_LONG_HOST}:65535"},
        ],
        [
            {"proxy_url": ""},
            {"proxy_url": "192.0.2.1:8080"},
            {"proxy_url": "ftp://192.0.2.1:8080"},
            {"proxy_url": "http://192.0.2.1"},
            {"proxy_url": "http://192.0.2.1:0"},
            {"proxy_url": "http://192.0.2.1:65536"},
            {"proxy_url": "http://:8080"},
            {"proxy_url": "http://192.0.2.1:8080/path"},
            {"proxy_url": "http://192.0.2.1:8080?query"},
            {"proxy_url": "http://192.0.2.1:8080#fragment"},
            {"proxy_url": " http://192.0.2.1:8080"},
            {"proxy_url": "http://192.0.2.1:80\n80"},
            {"proxy_url": "http://" + "a." * 1100 + "com:1"},
            {"proxy_url": f"http://user:{PASSWORD}@192.0.2.1:8080/{PASSWORD}"},
        ],
    ),
    "username": (
        "username",
        "INVALID_CREDENTIALS",
        [{"username": "u" * 1024}, {"username": "ü :@/"}, {"username": ""}],
        [{"username": "u" * 1025}, {"username": "a\nb"}, {"username": "\udfff"}],
    ),
    "username twice": (
        "username",
        "INVALID_CREDENTIALS",
        [{"proxy_url": "http://jane@192.0.2.1:1", "username": "jane"}],
        [{"proxy_url": "http://jane@192.0.2.1:1", "username": "john"}],
    ),
    "password": (
        "password",
        "INVALID_CREDENTIALS",
        [{"password": "p" * 1024}, {"password": "ü :@/"}],
        [{"password": "p" * 1025}, {"password": "a\x1b"}, {"password": "\ud8ff"}],
    ),
    "password twice": (
        "password",
        "INVALID_CREDENTIALS",
        [{"proxy_url": f"http://u:{PASSWORD}@192.0.2.1:1", "password": PASSWORD}],
        [{"proxy_url": f"http://u:{PASSWORD}@192.0.2.1:1", "password": "another"}],
    ),
    "source": (
        "source",
        "INVALID_SOURCE",
        [{"source": ""}, {"source": "s" * 128}, {"source": "é" * 128}],
        [{"source": "s" * 129}, {"source": "a\tb"}, {"source": "\ud800"}],
    ),
    "ttl": (
        "ttl",
        "INVALID_TTL",
        [{"ttl_us": SECOND_US}, {"ttl_us": TEN_YEARS_US}, {"ttl_us": 1_500_000}],
        [{"ttl_us": SECOND_US - 1}, {"ttl_us": 0}, {"ttl_us": -SECOND_US}, {"ttl_us": TEN_YEARS_US + 1}],
    ),
    "fetch_time": (
        "fetch_time",
        "INVALID_FETCH_TIME",
        [{"fetch_time_us": START_US - 1}, {"fetch_time_us": START_US}],
        [{"fetch_time_us": -1}, {"fetch_time_us": _IN_9000 + 1}, {"fetch_time_us": 2**63}],
    ),
    "failure_count": (
        "failure_count",
        "INVALID_FAILURE_COUNT",
        [{"failure_count": 0}, {"failure_count": 2**31 - 1}],
        [{"failure_count": -1}, {"failure_count": 2**31}],
    ),
    "max_leases": (
        "max_leases",
        "INVALID_MAX_LEASES",
        [{"max_leases": 0}, {"max_leases": 2**31 - 1}],
        [{"max_leases": -1}, {"max_leases": 2**31}],
    ),
    "labels": (
        "labels",
        "INVALID_LABELS",
        [
            {"labels": {f"name-{number}": "" for number in range(32)}},
            {"labels": {"n" * 64: "v" * 256}},
            {"labels": {"é" * 64: "é" * 256}},
        ],
        [
            {"labels": {f"name-{number}": "" for number in range(33)}},
            {"labels": {"n" * 65: ""}},
            {"labels": {"n": "v" * 257}},
            {"labels": {"": "v"}},
            {"labels": {"a\nb": "v"}},
            {"labels": {"n": "a\x00"}},
            {"labels": {"n": "\ud800"}},
        ],
    ),
    **{
        name: (
            f"health_monitoring.{name}",
            "INVALID_HEALTH_MONITORING",
            [{"health_monitoring": _monitoring(**{name: count})} for count in (0, 2**31 - 1)],
            [{"health_monitoring": _monitoring(**{name: -1})}],
        )
        for name in (
            "consecutive_health_failures",
            "consecutive_health_successes",
            "recovery_attempt",
            "total_health_checks",
            "total_health_check_failures",
        )
    },
    "last_health_error": (
        "health_monitoring.last_health_error",
        "INVALID_HEALTH_MONITORING",
        [
            {"health_monitoring": HealthMonitoring(last_health_error="e" * 1024)},
            {"health_monitoring": HealthMonitoring(last_health_error="several\nlines\twith tabs")},
        ],
        [
            {"health_monitoring": HealthMonitoring(last_health_error="e" * 1025)},
            {"health_monitoring": HealthMonitoring(last_health_error="\x00")},
            {"health_monitoring": HealthMonitoring(last_health_error="\ud800")},
        ],
    ),
}
ACCEPTED = [(name, fields) for name, (_, _, at_the_edge, _) in LIMITS.items() for fields in at_the_edge]
REFUSED = [(name, fields) for name, (_, _, _, over_it) in LIMITS.items() for fields in over_it]


@pytest.fixture
def manager(stash: Stash) -> CacheManager:
    return stash.open()


@pytest.mark.parametrize(("name", "fields"), ACCEPTED)
def test_what_is_within_the_limits_is_stored_and_comes_back(
    stash: Stash, name: str, fields: dict[str, Any]
) -> None:
    manager = stash.open()
    entry = manager.new_entry(**{"proxy_url": URL, **fields})
    assert manager.put(entry.key, entry)
    for tier in (manager.l1_tier, manager.l2_tier, manager.l3_tier):
        assert tier.get(entry.key) == entry


@pytest.mark.parametrize(("name", "fields"), REFUSED)
def test_what_is_over_a_limit_is_refused_by_the_name_of_its_field(
    manager: CacheManager, name: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(InvalidEntryError) as refusal:
        manager.new_entry(**{"proxy_url": URL, **fields})
    assert refusal.value.field == LIMITS[name][0]
    assert refusal.value.reason == LIMITS[name][1]
    assert str(refusal.value)
    assert PASSWORD not in str(refusal.value)
    assert manager.get_statistics().entries == 0


KEYED: dict[str, Callable[[CacheManager, str], object]] = {
    "put": lambda manager, key: manager.put(key, manager.new_entry(URL)),
    "delete": lambda manager, key: manager.delete(key),
    "get": lambda manager, key: manager.get(key),
    "lookup of many": lambda manager, key: manager.lookup_many(["nothing", key]),
    "invalidation": lambda manager, key: manager.invalidate_by_health(key),
    "check": lambda _manager, key: check_key(key),
}


@pytest.mark.parametrize(
    "key", ["", "k" * 257, "a\nb", "\ud800"], ids=["empty", "long", "control", "surrogate"]
)
@pytest.mark.parametrize("operation", KEYED)
def test_an_unusable_key_is_refused_by_every_operation_and_changes_nothing(
    stash: Stash, key: str, operation: str
) -> None:
    manager = stash.open()
    put(manager, "key-1")
    before = contents(stash.directory)
    with pytest.raises(InvalidEntryError) as refusal:
        KEYED[operation](manager, key)
    assert refusal.value.field == "key"
    assert contents(stash.directory) == before
    assert manager.get_statistics().entries == 1


def test_deleting_the_empty_key_while_a_tier_is_away_clears_nothing(stash: Stash) -> None:
    """The empty key has a meaning of its own in the backlog of a tier."""
    manager = stash.open()
    put(manager, "key-1", "key-2")
    with broken(manager.l3_tier):
        fail_until_skipped(manager, manager.l3_tier)
        with pytest.raises(InvalidEntryError):
            manager.delete("")
    stash.recover(manager)
    assert manager.l3_tier.size() == 2


# -- the entry's own constructor has the same limits


NOW = datetime(2026, 1, 1, tzinfo=UTC)


# Whose first and last hours lie outside of the years that UTC has.
EAST, WEST = timezone(timedelta(hours=12)), timezone(-timedelta(hours=12))


def made(**fields: Any) -> CacheEntry:
    return CacheEntry(**{"key": "k", "proxy_url": URL, "fetch_time": NOW, "ttl_seconds": 60, **fields})


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("key", {"key": ""}),
        ("key", {"key": "k" * 257}),
        ("proxy_url", {"proxy_url": "nonsense"}),
        ("source", {"source": "s" * 129}),
        ("ttl", {"ttl_seconds": 0.9}),
        ("ttl", {"ttl_seconds": 0}),
        ("ttl", {"ttl_seconds": 10 * 365 * 24 * 3600 + 1}),
        ("ttl", {"ttl_seconds": float("nan")}),
        ("ttl", {"ttl_seconds": float("inf")}),
        ("ttl", {"ttl_seconds": None}),
        ("ttl", {"ttl_seconds": None, "expires_at": NOW + timedelta(days=3651)}),
        ("failure_count", {"failure_count": -1}),
        ("access_count", {"access_count": -1}),
        ("fetch_time", {"fetch_time": datetime(1969, 12, 31, tzinfo=UTC)}),
        ("expires_at", {"ttl_seconds": None, "expires_at": datetime(1969, 12, 31, tzinfo=UTC)}),
        ("expires_at", {"ttl_seconds": None, "expires_at": datetime(1, 1, 1, tzinfo=EAST)}),
        ("health_monitoring.last_health_check", {"last_health_check": datetime(1, 1, 1, tzinfo=EAST)}),
        ("health_monitoring.next_check_time", {"next_check_time": datetime.max.replace(tzinfo=WEST)}),
        ("labels", {"labels": {"": ""}}),
        ("health_status", {"health_status": "splendid"}),
        ("health_monitoring.recovery_attempt", {"recovery_attempt": -1}),
        ("username", {"username": "a\nb"}),
        ("password", {"password": "x" * 1025}),
    ],
)
def test_an_entry_over_a_limit_cannot_be_made(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidEntryError) as refusal:
        made(**fields)
    assert refusal.value.field == field


def test_a_field_that_no_entry_has_is_refused() -> None:
    with pytest.raises(TypeError, match="colour"):
        made(colour="blue")


# -- the configuration


@pytest.mark.parametrize(
    "fields",
    [
        {"default_ttl_seconds": 0},
        {"failure_threshold": 0},
        {"cleanup_interval_seconds": 0},
        {"l2_backend": "redis"},
        {"durability": "somewhat"},
        {"unknown": 1},
        {"l1_config": {"max_entries": 0}},
        {"l1_config": {"max_entries": -1}},
        {"l1_config": {"eviction_policy": "random"}},
        {"l1_config": {"size": 5}},
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CacheConfig.model_validate(fields)


def test_the_defaults_are_those_of_proxywhirl() -> None:
    config = CacheConfig()
    assert (config.l1_config.max_entries, config.l2_config.max_entries, config.l3_config.max_entries) == (
        1000,
        5000,
        None,
    )
    assert [tier.eviction_policy for tier in (config.l1_config, config.l2_config, config.l3_config)] == [
        "lru"
    ] * 3
    assert all(tier.enabled for tier in (config.l1_config, config.l2_config, config.l3_config))
    assert config.l2_backend == "jsonl"
    assert (config.default_ttl_seconds, config.per_source_ttl) == (3600, {})
    assert (config.enable_background_cleanup, config.cleanup_interval_seconds) == (False, 60)
    assert (config.health_check_invalidation, config.failure_threshold) == (True, 3)
    assert config.enable_statistics
    assert config.encryption_key is None
    assert CacheTierConfig() == bounded(None, "lru")


@pytest.mark.parametrize("fetch_time_us", [START_US + 1, START_US + TEN_YEARS_US, _IN_9000])
def test_a_fetch_time_beyond_the_present_makes_nothing_live_longer(
    manager: CacheManager, fetch_time_us: int
) -> None:
    entry = manager.new_entry(URL, fetch_time_us=fetch_time_us, ttl_us=SECOND_US)
    assert (entry.fetch_time_us, entry.expires_at_us) == (START_US, START_US + SECOND_US)


def test_an_entry_that_has_expired_already_is_refused(manager: CacheManager) -> None:
    with pytest.raises(InvalidEntryError, match="has expired") as refusal:
        manager.new_entry(URL, fetch_time_us=START_US - SECOND_US, ttl_us=SECOND_US)
    assert (refusal.value.field, refusal.value.reason) == ("fetch_time", "ALREADY_EXPIRED")
    manager.new_entry(URL, fetch_time_us=START_US - SECOND_US, ttl_us=SECOND_US + 1)
