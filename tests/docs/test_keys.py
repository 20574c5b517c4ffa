"""The test vectors of docs/keys.json hold for the client and for the server, and the page for the shell."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from proxystash.proxies import Identity, InvalidProxyUrl, ProxyAddress, cache_key, key_by, parse_proxy_url
from proxystash_server.cache import CacheConfig, CacheManager, CacheTierConfig
from proxystash_server.cache.errors import InvalidEntryError
from tests.support.scripts import ROOT

VECTORS = json.loads((ROOT / "docs/keys.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("cache")
    off = CacheTierConfig(enabled=False)
    config = CacheConfig(
        l2_cache_dir=folder / "l2", l3_database_path=folder / "l3.db", l2_config=off, l3_config=off
    )
    with CacheManager(config) as manager:
        yield manager


@pytest.mark.parametrize("vector", VECTORS["accepted"], ids=lambda vector: vector["given"])
def test_the_client_gives_the_keys_of_the_vectors(vector: dict[str, str]) -> None:
    address = parse_proxy_url(vector["given"])

    assert address == ProxyAddress(vector["proxy_url"], vector["username"], vector["password"])
    assert cache_key(vector["given"]) == cache_key(address.url, address.username) == vector["key"]
    assert key_by(Identity.USER, address) == vector["key"]
    assert key_by(Identity.URL, address) == vector["key_url"]
    assert key_by(Identity.USER_AND_PASSWORD, address) == vector["key_user_password"]


@pytest.mark.parametrize("vector", VECTORS["accepted"], ids=lambda vector: vector["given"])
def test_the_server_gives_the_keys_of_the_vectors(manager: CacheManager, vector: dict[str, str]) -> None:
    entry = manager.new_entry(vector["given"])

    assert (entry.proxy_url, entry.key) == (vector["proxy_url"], vector["key"])
    assert manager.generate_cache_key(vector["given"]) == vector["key"]


@pytest.mark.parametrize("vector", VECTORS["accepted"], ids=lambda vector: vector["given"])
def test_the_vectors_follow_the_written_rule(vector: dict[str, str]) -> None:
    userinfo = f"{vector['username']}@" if vector["username"] else ""
    assert vector["hashed"] == vector["proxy_url"].replace("://", f"://{userinfo}")
    for name, text in {
        "key": vector["hashed"],
        "key_url": vector["proxy_url"],
        "key_user_password": vector["proxy_url"].replace(
            "://", f"://{vector['username'] or ''}\n{vector['password']}@"
        )
        if vector["password"]
        else vector["hashed"],
    }.items():
        assert vector[name] == hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("given", VECTORS["refused"])
def test_what_the_vectors_refuse_is_refused_by_both(manager: CacheManager, given: str) -> None:
    with pytest.raises(InvalidProxyUrl):
        parse_proxy_url(given)
    with pytest.raises(InvalidEntryError):
        manager.new_entry(given)


def test_the_command_on_the_page_gives_what_it_says() -> None:
    page = (ROOT / "docs/keys.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(printf .+?)\s+# ([0-9a-f]{16})$", page, re.MULTILINE)

    assert commands
    for command, key in commands:
        assert (
            subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout
            == f"{key}\n"
        )
