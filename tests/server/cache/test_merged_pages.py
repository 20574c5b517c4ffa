"""Pages of several tiers, merged where no tier has everything."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxystash_server.cache.coherence.reads import _merge
from proxystash_server.cache.entry.entry import CacheEntry
from proxystash_server.cache.tiers.base import Page
from tests.server.cache.support import keys_of, stored


def _page(keys: str, next_after: str | None = None, source: str = "") -> Page:
    return Page([stored(key, source=source) for key in keys], next_after)


def test_of_equal_keys_the_fastest_tiers_entry_is_taken() -> None:
    entries, next_after = _merge([_page("b", source="l1"), _page("ab", source="l3")], 10)
    assert [(entry.key, entry.source) for entry in entries] == [("a", "l3"), ("b", "l1")]
    assert next_after is None


def test_nothing_is_given_from_behind_the_place_that_another_tier_has_come_to() -> None:
    assert _keys(_merge([_page("adf"), _page("bc", "c")], 10)) == ("abc", "c")
    assert _keys(_merge([_page("x"), _page("", "k")], 10)) == ("", "k")


def test_a_full_page_ends_with_its_last_entry() -> None:
    assert _keys(_merge([_page("ab", "b"), _page("bc", "c")], 2)) == ("ab", "b")
    assert _keys(_merge([_page("ace"), _page("bdf", "f")], 2)) == ("ab", "b")


_KEYS = st.frozensets(st.sampled_from("abcdefghij"))


@given(st.lists(_KEYS, min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 4))
def test_merged_pages_one_after_the_other_give_every_key_once(
    tiers: list[frozenset[str]], limit: int, looked_at: int
) -> None:
    listed = ""
    place: str | None = ""
    while place is not None:
        pages = [_scan(sorted(tier), place, min(limit, looked_at)) for tier in tiers]
        keys, place = _keys(_merge(pages, limit))
        listed += keys
    assert listed == "".join(sorted(frozenset().union(*tiers)))


def _scan(keys: list[str], after: str, most: int) -> Page:
    found = [key for key in keys if key > after]
    return _page("".join(found[:most]), found[most - 1] if len(found) > most else None)


def _keys(page: tuple[list[CacheEntry], str | None]) -> tuple[str, str | None]:
    return "".join(keys_of(page[0])), page[1]
