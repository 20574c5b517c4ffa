"""Reading proxy URLs and deriving keys."""

from __future__ import annotations

import hashlib
import traceback
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxystash.proxies import SCHEMES, InvalidProxyUrl, cache_key, parse_proxy_url, redact, redact_url

from .strategies import credentials, hosts, ports

SECRET = "s3cr3t-p4ss"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://203.0.113.7:8080", "http://203.0.113.7:8080"),
        ("HTTP://Proxy.Example.COM:80/", "http://proxy.example.com:80"),
        ("socks5h://[2001:DB8::1]:1080", "socks5h://[2001:db8::1]:1080"),
        ("socks4a://under_score.example:1", "socks4a://under_score.example:1"),
        ("https://localhost:65535", "https://localhost:65535"),
        ("http://host:00080", "http://host:80"),
        ("http://@host:80", "http://host:80"),
        ("http://GW.example.:080", "http://gw.example:80"),
        ("http://192.0.2.1.:80", "http://192.0.2.1:80"),
        ("http://[2001:DB8:0:0:0:0:0:1]:80", "http://[2001:db8::1]:80"),
        ("http://[2001:0db8::0001]:80", "http://[2001:db8::1]:80"),
        ("http://[2001:db8:0:0:1:0:0:1]:80", "http://[2001:db8::1:0:0:1]:80"),
        ("http://[2001:db8:0:1:1:1:1:1]:80", "http://[2001:db8:0:1:1:1:1:1]:80"),
        ("http://[::ffff:192.0.2.1]:80", "http://192.0.2.1:80"),
        ("http://[::FFFF:C000:0201]:80", "http://192.0.2.1:80"),
        ("http://bücher.example:80", "http://xn--bcher-kva.example:80"),
        ("http://BÜCHER。Example.:80", "http://xn--bcher-kva.example:80"),
        ("http://XN--BCHER-KVA.example:80", "http://xn--bcher-kva.example:80"),
    ],
)
def test_a_url_is_brought_into_its_one_spelling(text: str, url: str) -> None:
    assert parse_proxy_url(text).url == url


@pytest.mark.parametrize(
    ("text", "username", "password"),
    [
        ("http://ann:pw@h:1", "ann", "pw"),
        ("http://ann@h:1", "ann", None),
        ("http://ann:@h:1", "ann", None),
        ("http://:pw@h:1", None, "pw"),
        ("http://a%40b:p%3A%2Fw@h:1", "a@b", "p:/w"),
        ("http://ann:p@ss:word@h:1", "ann", "p@ss:word"),
        ("http://ann:100%@h:1", "ann", "100%"),
        ("http://%C3%A9:%F0%9F%94%91@h:1", "é", "🔑"),
    ],
)
def test_userinfo_is_split_off_and_decoded(text: str, username: str | None, password: str | None) -> None:
    address = parse_proxy_url(text)

    assert (address.url, address.username, address.password) == ("http://h:1", username, password)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no scheme"),
        ("h:1", "no scheme"),
        ("://h:1", "none of http"),
        ("ftp://h:1", "none of http"),
        ("http//h:1", "no scheme"),
        ("http://", "no host"),
        ("http://:80", "no host"),
        ("http://h", "no port"),
        ("http://h:", "no port"),
        ("http://h:0", "port is not a number"),
        ("http://h:65536", "port is not a number"),
        ("http://h:-1", "port is not a number"),
        ("http://h:8e1", "port is not a number"),
        ("http://h:٣٣", "port is not a number"),
        ("http://h:1:2", "contains ':'"),
        ("http://::1:80", "contains ':'"),
        ("http://[::1]", "no port"),
        ("http://[::1]80", "only a port"),
        ("http://[::1:80", "not closed"),
        ("http://[nonsense]:80", "not an IPv6"),
        ("http://[fe80::1%25eth0]:80", "zone"),
        ("http://300.1.1.1:80", "not a valid IPv4"),
        ("http://1.2.3:80", "not a valid IPv4"),
        ("http://01.2.3.4:80", "not a valid IPv4"),
        ("http://-h:80", "neither a name nor"),
        ("http://a..b:80", "neither a name nor"),
        ("http://h%41:80", "neither a name nor"),
        ("http://h\\x:80", "neither a name nor"),
        (f"http://{'a.' * 127}a:80", "neither a name nor"),
        ("http://.:80", "neither a name nor"),
        ("http://faß.example:80", "write it as xn--"),
        ("http://\u0378.example:80", "write it as xn--"),
        (f"http://{'ü' * 300}.example:80", "write it as xn--"),
        ("http://h:1/path", "has a path"),
        ("http://h:1//", "has a path"),
        ("http://h:1?", "has a query"),
        ("http://h:1#", "has a fragment"),
        (" http://h:1", "whitespace"),
        ("http://h:1\n", "whitespace"),
        ("http://h\u00a0x:1", "whitespace"),
        ("http://h\x00:1", "whitespace or a control"),
        ("http://h\x85:1", "whitespace or a control"),
        ("http://a%00b@h:1", "username contains a control"),
        ("http://a:b%0Ac@h:1", "password contains a control"),
        ("http://a:%FF@h:1", "password is not valid UTF-8"),
        ("http://\ud800:b@h:1", "username is not valid UTF-8"),
        (f"http://{'a' * 2048}:1", "longer than 2048"),
    ],
)
def test_what_is_no_proxy_url_is_refused_with_its_fault(text: str, fault: str) -> None:
    with pytest.raises(InvalidProxyUrl, match=fault):
        parse_proxy_url(text)


@pytest.mark.parametrize(
    "text",
    [
        f"http://ann:{SECRET}/x@h:1",
        f"http://ann:{SECRET}?x@h:1",
        f"http://ann:{SECRET}#x@h:1",
        f"http://ann:{SECRET}@h",
        f"http://ann:{SECRET}@h:x",
        f"ann:{SECRET}@h:1",
        f"http://ann:{SECRET}",
        f"http://ann:{SECRET}/",
        f"{SECRET}://h:1",
        f"http://ann:{SECRET}%FF@h:1",
        f"http://ann:{SECRET}%00@h:1",
        f"http://ann:{SECRET}\ud800@h:1",
        f"http://h:{SECRET}",
        f"http://{SECRET}_-:1",
        f"http://[{SECRET}]:1",
        f"http://{SECRET}ß:1",
    ],
)
def test_no_error_quotes_what_may_be_a_credential(text: str) -> None:
    with pytest.raises(InvalidProxyUrl) as caught:
        parse_proxy_url(text)

    assert SECRET not in "".join(traceback.format_exception(caught.value, chain=True))
    assert SECRET not in repr(_everything_reachable_from(caught.value))


def test_credentials_do_not_count_for_the_length_of_a_url() -> None:
    address = parse_proxy_url(f"http://ann:{'p' * 5000}@h:1")

    assert address.password == "p" * 5000


def test_an_address_does_not_show_its_credentials() -> None:
    assert repr(parse_proxy_url(f"http://ann:{SECRET}@h:1")) == "ProxyAddress(url='http://h:1')"


@pytest.mark.parametrize(
    "location",
    ["192.0.2.1:8080", "gate.example.com:1", "a_b-c.d:65535", "x:80", "1a:80", "xn--bcher-kva.example:3128"],
)
def test_a_url_in_its_one_spelling_is_read_like_any_other(location: str) -> None:
    for scheme in SCHEMES:
        usual = parse_proxy_url(f"{scheme}://{location}")
        assert usual == parse_proxy_url(f"{scheme.upper()}://{location}")
        assert usual.url == f"{scheme}://{location}"


def test_the_key_is_the_start_of_the_hash_of_the_url() -> None:
    assert cache_key("HTTP://H:1/") == hashlib.sha256(b"http://h:1").hexdigest()[:16]


def test_a_username_is_part_of_the_key_as_it_is_and_a_password_is_not() -> None:
    expected = hashlib.sha256("socks5://a@ü:@gw.example:1080".encode()).hexdigest()[:16]

    assert cache_key("socks5://gw.example:1080", "a@ü:") == expected
    assert cache_key(f"socks5://{quote('a@ü:', safe='')}:{SECRET}@gw.example:1080") == expected
    assert cache_key("socks5://gw.example:1080") != expected


def test_a_username_that_is_given_counts_for_more_than_that_of_the_url() -> None:
    assert cache_key("http://ann@h:1", "bob") == cache_key("http://h:1", "bob")


def test_a_username_that_no_url_can_have_has_no_key() -> None:
    for username in ("a\nb", "\ud800"):
        with pytest.raises(InvalidProxyUrl, match="username"):
            cache_key("http://h:1", username)


@given(st.sampled_from(SCHEMES), hosts, ports, credentials, credentials)
def test_any_credentials_survive_the_way_into_a_url_and_back(
    scheme: str, host: str, port: int, username: str, password: str
) -> None:
    userinfo = f"{quote(username, safe='')}:{quote(password, safe='')}@"

    address = parse_proxy_url(f"{scheme}://{userinfo}{host}:{port}")

    assert address.url == parse_proxy_url(f"{scheme}://{host}:{port}").url
    assert (address.username, address.password) == (username or None, password or None)
    assert parse_proxy_url(address.url).url == address.url
    assert cache_key(address.url, username) == cache_key(f"{scheme}://{userinfo}{host}:{port}")


@given(st.text(max_size=60) | st.from_regex(r"\A[a-z0-9]{0,7}:?/{0,2}[^\n]{0,40}\Z"))
def test_any_text_is_read_or_refused_and_what_is_read_stays_as_it_is(text: str) -> None:
    try:
        address = parse_proxy_url(text)
    except InvalidProxyUrl:
        return
    assert parse_proxy_url(address.url).url == address.url
    assert "@" not in address.url


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://h:1", "http://h:1"),
        (f"http://ann:{SECRET}@h:1", "http://***@h:1"),
        (f"http://ann:{SECRET} /@x@h:1", "http://***@h:1"),
        (f"ann:{SECRET}@h:1", "***@h:1"),
    ],
)
def test_a_redacted_url_shows_no_userinfo(text: str, shown: str) -> None:
    assert redact_url(text) == shown


def test_a_redacted_text_shows_no_userinfo_of_any_url_in_it() -> None:
    text = f"407 from http://ann:{SECRET}@h:1, then http://bob:{SECRET}/@i:2 and a@b"

    assert redact(text) == "407 from http://***@h:1, then http://***@i:2 and a@b"


def _everything_reachable_from(error: BaseException) -> list[object]:
    found: list[object] = []
    seen: BaseException | None = error
    while seen is not None:
        found += [seen.args, vars(seen)]
        seen = seen.__cause__ or seen.__context__
    return found
