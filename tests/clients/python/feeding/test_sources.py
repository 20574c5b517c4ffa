"""What a source is, and what it is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxystash.feeding.sources import InvalidSourceError, parse_sources

SECRET = "s3cr3t"


def test_a_file_is_called_as_it_was_given() -> None:
    [source] = parse_sources(["lists/socks5.txt"])

    assert (source.name, source.path, source.url) == ("lists/socks5.txt", Path("lists/socks5.txt"), "")


@pytest.mark.parametrize(
    ("text", "url", "name", "list_name"),
    [
        ("http://h/socks5.txt", "http://h/socks5.txt", "http://h/socks5.txt", "http://h/socks5.txt"),
        ("HTTPS://H:8443/a#part", "https://h:8443/a", "https://h:8443/a", "https://h:8443/a"),
        ("http://[2001:db8::1]:80/a", "http://[2001:db8::1]:80/a", "http://[2001:db8::1]:80/a",
         "http://[2001:db8::1]:80/a"),
        (f"http://ann:{SECRET}@h/a.csv", "http://h/a.csv", "http://h/a.csv", "http://h/a.csv"),
        (f"http://h/a.csv?key={SECRET}", f"http://h/a.csv?key={SECRET}", "http://h/a.csv?***",
         "http://h/a.csv"),
        ("http://h/download/abcdefghij0123456789/-/any/", "http://h/download/abcdefghij0123456789/-/any/",
         "http://h/download/***/-/any/", "http://h/download/***/-/any/"),
    ],
)  # fmt: skip
def test_what_others_see_of_a_url_holds_no_credential(text: str, url: str, name: str, list_name: str) -> None:
    [source] = parse_sources([text])

    assert (source.url, source.name, source.list_name) == (url, name, list_name)
    assert SECRET not in repr(source)


def test_userinfo_is_decoded() -> None:
    [source] = parse_sources(["http://ann%40example.com:p%3Aw@h/"])

    assert (source.username, source.password) == ("ann@example.com", "p:w")


def test_sources_that_look_the_same_get_numbers() -> None:
    sources = parse_sources(["http://h/?a=1", "http://h/?a=2", "http://ann@h/?a=2"])

    assert [source.name for source in sources] == ["http://h/?***", "http://h/?*** (2)", "http://h/?*** (3)"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            ["list.txt", f"ftp://ann:{SECRET}@h/"],
            "source 2: it is neither a file nor a URL with http or https",
        ),
        ([f"http://ann:{SECRET}@"], "source 1: its URL is malformed"),
        ([f"http://ann:{SECRET}@h:port/"], "source 1: its URL is malformed"),
        ([f"http://h/{SECRET}\r\nX: y"], "source 1: its URL is malformed"),
        (["a.txt", "./a.txt"], "./a.txt is given twice"),
        (["http://ann:1@h/", "http://ann:2@h/"], "http://h/ is given twice"),
    ],
)
def test_what_is_no_source_is_refused_without_quoting_it(texts: list[str], message: str) -> None:
    with pytest.raises(InvalidSourceError) as caught:
        parse_sources(texts)

    assert str(caught.value) == message
