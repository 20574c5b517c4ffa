"""Page tokens."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxystash.models import HealthStatus
from proxystash_server.cache import EntryFilter
from proxystash_server.rpc.errors import RequestError
from proxystash_server.rpc.paging import make_page_token, read_page_token

FILTERS = [
    EntryFilter(),
    EntryFilter(source="a"),
    EntryFilter(source="b"),
    EntryFilter(health_statuses=frozenset({HealthStatus.HEALTHY})),
    EntryFilter(schemes=frozenset({"http"})),
    EntryFilter(schemes=frozenset({"http", "https"})),
    EntryFilter(labels={"a": "b"}),
    EntryFilter(labels={"a": "c"}),
    EntryFilter(labels={"a": "b", "c": "d"}),
    EntryFilter(labels={"a": "bc", "d": ""}),
]


# Keys are bytes: this many characters of four bytes are the longest.
@given(st.text(min_size=1, max_size=64), st.sampled_from(FILTERS))
def test_a_token_leads_back_to_its_key(key: str, entry_filter: EntryFilter) -> None:
    assert read_page_token(make_page_token(key, entry_filter), entry_filter) == key


def test_no_token_is_the_beginning() -> None:
    assert read_page_token("", EntryFilter()) == ""


@pytest.mark.parametrize("given_for", FILTERS, ids=str)
def test_a_token_is_refused_with_any_filter_but_its_own(given_for: EntryFilter) -> None:
    token = make_page_token("key", given_for)
    for other in FILTERS:
        if other != given_for:
            with pytest.raises(RequestError) as caught:
                read_page_token(token, other)
            assert caught.value.failure.field == "page_token"


def test_a_token_with_any_character_changed_is_refused() -> None:
    token = make_page_token("0123456789abcdef", EntryFilter())
    for place, character in enumerate(token[:-1]):
        damaged = token[:place] + ("A" if character != "A" else "B") + token[place + 1 :]
        with pytest.raises(RequestError):
            read_page_token(damaged, EntryFilter())


@pytest.mark.parametrize(
    "token",
    ["x", "!!!!", "ä", "AAAA", base64.urlsafe_b64encode(b"\x02" + bytes(30)).decode(), "A" * 5000],
    ids=lambda token: token[:8],
)
def test_what_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_page_token(token, EntryFilter())
    assert caught.value.failure.reason == "INVALID_PAGE_TOKEN"
