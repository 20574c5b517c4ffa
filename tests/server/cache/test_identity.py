"""Promise 10: the key is the first 16 hex digits of the SHA-256 of the URL, with the username if any."""

from __future__ import annotations

import hashlib

import pytest

from proxystash_server.cache import CacheManager, InvalidEntryError
from tests.server.cache.stash import Stash


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.fixture
def manager(stash: Stash) -> CacheManager:
    return stash.open()


def test_the_key_of_a_url_is_the_beginning_of_its_sha_256() -> None:
    assert CacheManager.generate_cache_key("http://proxy.example.com:8080") == digest(
        "http://proxy.example.com:8080"
    )
    # Fixed for good: other clients compute it, and directories full of entries are found by it.
    assert CacheManager.generate_cache_key("http://192.0.2.1:8080") == "f3cf533718aa54f9"


@pytest.mark.parametrize(
    "spelling",
    ["HTTP://Proxy.Example.COM:8080", "http://proxy.example.com:8080/", "http://proxy.example.com:08080"],
)
def test_spellings_of_one_url_have_one_key(manager: CacheManager, spelling: str) -> None:
    assert CacheManager.generate_cache_key(spelling) == digest("http://proxy.example.com:8080")
    assert manager.new_entry(spelling).key == digest("http://proxy.example.com:8080")
    assert manager.new_entry(spelling).proxy_url == "http://proxy.example.com:8080"


def test_a_username_is_part_of_the_identity_and_a_password_is_not(manager: CacheManager) -> None:
    expected = digest("http://jane@192.0.2.1:8080")
    assert manager.new_entry("http://192.0.2.1:8080", username="jane").key == expected
    assert manager.new_entry("http://192.0.2.1:8080", username="jane", password="x").key == expected
    assert manager.new_entry("http://jane@192.0.2.1:8080").key == expected
    assert manager.new_entry("http://jane:x@192.0.2.1:8080").key == expected
    assert CacheManager.generate_cache_key("http://jane:x@192.0.2.1:8080") == expected
    assert manager.new_entry("http://192.0.2.1:8080", password="x").key == digest("http://192.0.2.1:8080")


def test_a_username_counts_as_it_is_and_not_percent_encoded(manager: CacheManager) -> None:
    expected = digest("http://jané:x y@192.0.2.1:8080")
    assert manager.new_entry("http://192.0.2.1:8080", username="jané:x y").key == expected
    assert manager.new_entry("http://jan%C3%A9%3Ax%20y@192.0.2.1:8080").key == expected


def test_scheme_host_port_and_username_all_tell_proxies_apart(manager: CacheManager) -> None:
    keys = {
        manager.new_entry(url, username=username).key
        for url in ("http://192.0.2.1:1", "https://192.0.2.1:1", "http://192.0.2.2:1", "http://192.0.2.1:2")
        for username in (None, "a", "b")
    }
    assert len(keys) == 12


def test_one_gateway_with_several_users_is_several_entries(manager: CacheManager) -> None:
    for username in ("a", "b", "c"):
        entry = manager.new_entry("http://gate.example.com:1", username=username, password="p")
        manager.put(entry.key, entry)
    assert manager.get_statistics().entries == 3


def test_a_key_that_is_given_counts(manager: CacheManager) -> None:
    assert manager.new_entry("http://192.0.2.1:8080", key="mine").key == "mine"


def test_no_key_comes_of_what_is_no_proxy_url() -> None:
    with pytest.raises(InvalidEntryError) as error:
        CacheManager.generate_cache_key("ftp://192.0.2.1:21")
    assert error.value.field == "proxy_url"
