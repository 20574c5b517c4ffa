"""What users of the library import, and what it imports itself."""

from __future__ import annotations

import inspect
import subprocess
import sys
from enum import Enum

import pytest
from pydantic import ValidationError

from proxystash_server import cache
from proxystash_server.cache import CacheClosedError, CacheManager, EntryFilter
from tests.server.cache.stash import Stash
from tests.server.cache.support import put

# The names of proxywhirl.cache 0.3.3, whose users switch by changing an import.
OF_PROXYWHIRL = {
    "CacheConfig",
    "CacheEntry",
    "CacheManager",
    "CacheStatistics",
    "CacheTier",
    "CacheTierConfig",
    "CacheTierType",
    "CredentialEncryptor",
    "HealthStatus",
    "JsonlCacheTier",
    "L2BackendType",
    "MemoryCacheTier",
    "SQLiteCacheTier",
    "TTLManager",
    "TierStatistics",
}


def test_proxywhirls_names_are_there() -> None:
    assert set(cache.__all__) >= OF_PROXYWHIRL


def test_every_public_name_exists_and_says_what_it_is() -> None:
    for name in cache.__all__:
        thing = getattr(cache, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert inspect.getdoc(thing), name
    assert sorted(cache.__all__) == list(cache.__all__)


@pytest.mark.parametrize(
    "name", ["get", "put", "delete", "clear", "size", "keys", "cleanup_expired", "enabled"]
)
def test_the_tiers_of_a_manager_have_proxywhirls_members(stash: Stash, name: str) -> None:
    manager = stash.open()
    for tier in (manager.l1_tier, manager.l2_tier, manager.l3_tier):
        assert hasattr(tier, name)
        assert tier.enabled is True


def test_a_manager_has_proxywhirls_members(stash: Stash) -> None:
    manager = stash.open()
    for name in (
        "config",
        "statistics",
        "encryptor",
        "ttl_manager",
        "get",
        "put",
        "delete",
        "clear",
        "invalidate_by_health",
        "get_statistics",
        "generate_cache_key",
        "warm_from_file",
        "export_to_file",
    ):
        assert hasattr(manager, name), name


def test_the_library_imports_no_grpc() -> None:
    """It is used without a server, too."""
    loaded = subprocess.run(
        [sys.executable, "-c", "import proxystash_server.cache, sys; print('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "proxystash_server.cache.manager" in loaded
    assert [name for name in loaded if name.split(".")[0] in {"grpc", "google", "structlog", "typer"}] == []
    assert [name for name in loaded if name.startswith("proxystash_server.rpc")] == []


def refuses_unknown_arguments(thing: type) -> bool:
    try:
        thing(colour="red")
    except TypeError:
        return True
    except ValidationError as error:
        return "colour" in {fault["loc"][0] for fault in error.errors()}
    return False


def test_nothing_takes_an_argument_that_it_does_not_know() -> None:
    made = [
        thing
        for name in cache.__all__
        if inspect.isclass(thing := getattr(cache, name)) and not issubclass(thing, Exception | Enum)
    ]
    assert [thing.__name__ for thing in made if not refuses_unknown_arguments(thing)] == []


CLOSED = {
    "get": lambda manager: manager.get("key-1"),
    "lookup": lambda manager: manager.lookup("key-1"),
    "lookup_many": lambda manager: manager.lookup_many(["key-1"]),
    "list_entries": lambda manager: manager.list_entries("", 10, EntryFilter()),
    "scan_entries": lambda manager: manager.scan_entries("", 10, EntryFilter()),
    "put": lambda manager: manager.put("key-1", manager.new_entry("http://192.0.2.1:1")),
    "put_many": lambda manager: manager.put_many([manager.new_entry("http://192.0.2.1:1")]),
    "store": lambda manager: manager.store([(manager.new_entry("http://192.0.2.1:1"), None)]),
    "bans": lambda manager: manager.bans(),
    "unban": lambda manager: manager.unban("key-1"),
    "delete": lambda manager: manager.delete("key-1"),
    "clear": lambda manager: manager.clear(),
    "invalidate_by_health": lambda manager: manager.invalidate_by_health("key-1"),
    "cleanup_expired": lambda manager: manager.cleanup_expired(),
    "maintain": lambda manager: manager.maintain(),
    "warm_from_file": lambda manager: manager.warm_from_file(__file__),
    "export_to_file": lambda manager: manager.export_to_file("/nowhere"),
}


@pytest.mark.parametrize("name", CLOSED)
def test_a_closed_manager_refuses_everything_but_its_statistics(stash: Stash, name: str) -> None:
    manager: CacheManager = stash.open()
    put(manager, "key-1")
    manager.close()
    with pytest.raises(CacheClosedError):
        CLOSED[name](manager)
    assert manager.get_statistics().observed_at_us
