"""One proxy tried against a local site, whatever it is like."""

from __future__ import annotations

import asyncio
import socket

import pytest

from proxystash.checking.answers import Anonymity, anonymity, read_answer
from proxystash.checking.probe import Probe, Prober
from proxystash.models import CacheEntry
from proxystash.pool_models import Outcome
from tests.clients.python.feeding.site import Site

from .proxies import LocalProxy, running_proxies

SECRET = "s3cr3t"


def probe(site: Site, entry: CacheEntry, *, timeout: float = 30, expect: str = "", path: str = "/") -> Probe:
    """What comes of a request through a proxy, after a direct one."""

    async def run() -> Probe:
        prober = Prober(site.url(path), timeout=timeout, expect=expect)
        await prober.direct()
        return await prober.through(entry)

    return asyncio.run(run())


@pytest.mark.parametrize("scheme", ["http", "socks4", "socks4a", "socks5", "socks5h"])
def test_a_proxy_of_each_kind_works(site: Site, scheme: str) -> None:
    proxy = LocalProxy(exit_address="127.0.0.5")
    with running_proxies(proxy):
        result = probe(site, CacheEntry(f"{scheme}://{proxy.location}"))

    assert (result.outcome, result.reason, proxy.uses) == (Outcome.SUCCESS, "", 1)
    assert result.seen is not None
    assert (result.seen.address, result.anonymity) == ("127.0.0.5", Anonymity.ELITE)
    assert result.latency.total_seconds() > 0


@pytest.mark.parametrize("scheme", ["http", "socks5", "socks5h"])
def test_credentials_are_given_to_the_proxy_and_to_nobody_else(site: Site, scheme: str) -> None:
    proxy = LocalProxy(credentials=("ann", f"{SECRET}@"))
    with running_proxies(proxy):
        right = probe(site, CacheEntry(f"{scheme}://{proxy.location}", username="ann", password=f"{SECRET}@"))
        wrong = probe(site, CacheEntry(f"{scheme}://{proxy.location}", username="ann", password="no"))
        none = probe(site, CacheEntry(f"{scheme}://{proxy.location}"))

    assert [result.outcome for result in (right, wrong, none)] == [
        Outcome.SUCCESS, Outcome.AUTH_ERROR, Outcome.AUTH_ERROR,
    ]  # fmt: skip
    for headers in site.headers_of("/"):
        assert not {"Proxy-Authorization", "Authorization"} & set(headers)


@pytest.mark.parametrize(
    ("adds", "level"),
    [
        ({}, Anonymity.ELITE),
        ({"Via": "1.1 proxy"}, Anonymity.ANONYMOUS),
        ({"X-Forwarded-For": "198.51.100.7"}, Anonymity.ANONYMOUS),
        ({"X-Forwarded-For": "127.0.0.1"}, Anonymity.TRANSPARENT),
        ({"X-Whatever": "127.0.0.1"}, Anonymity.TRANSPARENT),
        ({"X-Whatever": "127.0.0.12"}, Anonymity.ELITE),
    ],
)
def test_what_a_proxy_gives_away_is_told(site: Site, adds: dict[str, str], level: Anonymity) -> None:
    proxy = LocalProxy(adds=adds)
    with running_proxies(proxy):
        assert probe(site, CacheEntry(f"http://{proxy.location}")).anonymity is level


def test_a_proxy_that_hides_nothing_at_all_is_transparent(site: Site) -> None:
    proxy = LocalProxy(exit_address="127.0.0.1")
    with running_proxies(proxy):
        assert probe(site, CacheEntry(f"socks5://{proxy.location}")).anonymity is Anonymity.TRANSPARENT


@pytest.mark.parametrize(
    ("answer", "outcome", "reason"),
    [
        (b"200 OK\r\nContent-Length: 4\r\n\r\nfine", Outcome.BAD_CONTENT, "the answer is not the target's"),
        (b"502 X\r\nContent-Length: 0\r\n\r\n", Outcome.CONNECT_ERROR, "status 502"),
        (b"403 X\r\nContent-Length: 0\r\n\r\n", Outcome.BLOCKED, "status 403"),
        (b"429 X\r\nContent-Length: 0\r\n\r\n", Outcome.RATE_LIMITED, "status 429"),
        (b"302 X\r\nLocation: http://192.0.2.1/\r\n\r\n", Outcome.BAD_CONTENT, "status 302"),
        (b"200 OK\r\n\r\n" + bytes(300_000), Outcome.BAD_CONTENT, "an answer of more than 262,144 bytes"),
        (b"\xff\r\n\r\n", Outcome.CONNECT_ERROR, "the connection failed or broke off"),
    ],
    ids=["lie", "502", "403", "429", "redirect", "endless", "other protocol"],
)  # fmt: skip
def test_a_proxy_that_answers_by_itself_is_seen_through(
    site: Site, answer: bytes, outcome: Outcome, reason: str
) -> None:
    proxy = LocalProxy(answer=b"HTTP/1.1 " + answer)
    with running_proxies(proxy):
        result = probe(site, CacheEntry(f"http://{proxy.location}"))

    assert (result.outcome, result.reason) == (outcome, reason)


@pytest.mark.parametrize("scheme", ["http", "socks4", "socks5"])
def test_a_proxy_that_is_not_there_or_says_nothing(site: Site, scheme: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = probe(site, CacheEntry(f"{scheme}://127.0.0.1:{unused.getsockname()[1]}", password=SECRET))
    proxy = LocalProxy(silent=True)
    with running_proxies(proxy):
        silent = probe(site, CacheEntry(f"{scheme}://{proxy.location}"), timeout=0.3)

    assert (nobody.outcome, nobody.reason) == (Outcome.CONNECT_ERROR, "the proxy is not there")
    assert (silent.outcome, silent.reason) == (Outcome.TIMEOUT, "no whole answer within 0.3 s")


def test_an_expected_text_is_looked_for(site: Site) -> None:
    site.serves(b"welcome", "/plain")
    proxy = LocalProxy()
    with running_proxies(proxy):
        entry = CacheEntry(f"http://{proxy.location}")
        assert probe(site, entry, path="/plain", expect="welcome").outcome is Outcome.SUCCESS
        assert probe(site, entry, path="/plain", expect="other").outcome is Outcome.BAD_CONTENT
        # Neither an address nor an echo to judge by.
        assert probe(site, entry, path="/plain").anonymity is None


def test_the_environments_proxy_is_not_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    proxy = LocalProxy()
    with running_proxies(proxy):
        assert probe(site, CacheEntry(f"http://{proxy.location}")).outcome is Outcome.SUCCESS


@pytest.mark.parametrize(
    ("body", "address"),
    [
        (b'{"origin": "198.51.100.1, 198.51.100.2"}', "198.51.100.2"),
        (b'{"ip": "2001:DB8::1"}', "2001:db8::1"),
        (b'{"query": "198.51.100.1", "ip": 7}', "198.51.100.1"),
        (b"198.51.100.1\n", "198.51.100.1"),
        (b"fl=1\nip=198.51.100.1\nts=1\n", "198.51.100.1"),
        (b"<p>198.51.100.1</p>", None),
        (b"[" * 100_000, None),
        (b"\xff", None),
        (b"{}", None),
    ],
)
def test_the_address_is_found_in_what_sites_answer(body: bytes, address: str | None) -> None:
    assert read_answer(body, "token").address == address


def test_an_address_that_is_part_of_another_is_not_given_away() -> None:
    direct = read_answer(b'{"ip": "198.51.100.1", "headers": {"x": "token"}}', "token")
    seen = read_answer(b'{"ip": "198.51.100.12", "headers": {"x": "token", "y": "8198.51.100.1"}}', "token")

    assert anonymity(seen, direct) is Anonymity.ELITE
