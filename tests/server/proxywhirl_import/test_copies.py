"""Of copies of an entry, in one store or several or in ours, the newest counts."""

from __future__ import annotations

import itertools
import json
from datetime import timedelta
from pathlib import Path

import pytest

from proxystash.proxies import cache_key
from tests.server.proxywhirl_import.support import (
    FIXTURES,
    GENERATED,
    L2_DATABASE,
    L3_DATABASE,
    SHARDS,
    Target,
    copy_of,
    edit,
    fixture_clock,
    reasons,
    secret,
)

PLAIN_KEY = cache_key("http://plain.example.com:8080")


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_newest_counts_in_whichever_order_the_three_stores_are_read(
    order: tuple[int, ...], target: Target, tmp_path: Path
) -> None:
    """Given an entry in all three stores, when each was fetched at another time, the last one is kept."""
    l2 = copy_of(L2_DATABASE, tmp_path)
    l3 = copy_of(L3_DATABASE, tmp_path)
    later = GENERATED.timestamp() - 60
    edit(l2, "UPDATE l2_cache SET fetch_time = ?, source = 'l2' WHERE key = 'gw-1'", later)
    edit(l3, "UPDATE cache_entries SET fetch_time = ?, source = 'l3' WHERE key = 'gw-2'", later)
    sources = [SHARDS, l2, l3]

    report = target.take(*(sources[number] for number in order))

    stored = target.entries()
    assert stored["account-1@gateway.example.com:7777"].source == "l2"
    assert stored["account-2@gateway.example.com:7777"].source == "l3"
    for name in ("newer-in-l2", "newer-in-l3"):
        entry = stored[f"alice@{name}.example.com:8080"]
        assert entry.fetch_time == GENERATED - timedelta(minutes=1)
        assert secret(entry.password) == "newer-password"
    assert len(stored) == report.imported == 23
    assert sum(file.read for file in report.files) == 3 * 31


def test_an_entry_whose_newest_copy_has_expired_is_not_brought_back_from_an_older_one(target: Target) -> None:
    """Given L3 with a live copy and L2 with a newer one that has expired, then neither is imported."""
    report = target.take(L2_DATABASE, L3_DATABASE)

    assert "replaced.example.com:8080" not in target.entries()
    # The other one is expired.example.com.
    assert reasons(report)["skipped", "expired"] == 2


def test_a_live_copy_is_imported_where_the_newer_one_is_not_among_the_sources(target: Target) -> None:
    target.take(L3_DATABASE)
    assert "replaced.example.com:8080" in target.entries()


def test_two_spellings_of_a_url_are_one_entry(target: Target) -> None:
    target.take(L3_DATABASE)
    assert target.entries()["plain.example.com:8080"].source == "webshare"


def test_of_lines_that_are_as_old_the_last_counts_as_it_does_for_proxywhirl(
    target: Target, tmp_path: Path
) -> None:
    record = json.loads((SHARDS / "shard_00.jsonl").read_text().splitlines()[-1])
    shard = tmp_path / "shard_00.jsonl"
    shard.write_text("".join(json.dumps(record | {"source": source}) + "\n" for source in ("a", "b", "c")))

    report = target.take(shard)

    (entry,) = target.entries().values()
    assert entry.source == "c"
    assert reasons(report) == {("skipped", "duplicate: another copy is newer, or the same"): 2}


def test_a_copy_with_more_failures_is_newer_where_all_times_are_the_same(
    target: Target, tmp_path: Path
) -> None:
    """proxywhirl leaves every time alone when it counts a failure, and one store may have missed that."""
    l2 = copy_of(L2_DATABASE, tmp_path)
    edit(l2, "UPDATE l2_cache SET failure_count = 8 WHERE proxy_url LIKE '%//dead%'")

    target.take(l2, L3_DATABASE)

    assert target.entries()["dead.example.com:3128"].failure_count == 8


def test_health_monitoring_comes_from_another_copy_where_the_newest_is_in_a_store_without_it(
    target: Target, tmp_path: Path
) -> None:
    l2 = copy_of(L2_DATABASE, tmp_path)
    used = GENERATED.timestamp() + 30
    edit(l2, "UPDATE l2_cache SET last_accessed = ?, access_count = 5 WHERE proxy_url LIKE '%//dead%'", used)

    target.take(l2, L3_DATABASE)

    entry = target.entries()["dead.example.com:3128"]
    assert entry.access_count == 5
    assert entry.total_health_checks == 40


def test_importing_again_changes_nothing(target: Target) -> None:
    first = target.take(FIXTURES)
    stored = target.entries()

    again = target.take(FIXTURES)

    assert first.imported == len(stored) == 24
    assert again.imported == 0
    assert reasons(again)["skipped", "already there, as new or newer"] == 24
    assert again.complete
    assert target.entries() == stored


def test_an_entry_that_lives_on_in_ours_is_not_set_back(target: Target) -> None:
    """Given an import, when the server has used, counted and replaced entries since, it keeps what it has."""
    target.take(L3_DATABASE)
    with target.manager() as manager:
        manager.invalidate_by_health(PLAIN_KEY)
        assert manager.get(PLAIN_KEY) is not None
        replaced = manager.new_entry(
            "http://login.example.com:8080", username="alice", password="changed", source="ours"
        )
        manager.put(replaced.key, replaced)
    before = target.entries()

    target.take(L3_DATABASE)

    assert target.entries() == before
    assert before["plain.example.com:8080"].failure_count == 1
    assert secret(before["alice@login.example.com:8080"].password) == "changed"


def test_what_proxywhirl_has_fetched_anew_since_the_last_import_is_imported(
    target: Target, tmp_path: Path
) -> None:
    target.take(L3_DATABASE)
    database = copy_of(L3_DATABASE, tmp_path)
    later = (fixture_clock() + 60_000_000) / 1_000_000
    edit(
        database,
        "UPDATE cache_entries SET fetch_time = ?, source = 'again' WHERE proxy_url LIKE '%//login%'",
        later,
    )

    report = target.take(database)

    assert report.imported == 1
    assert target.entries()["alice@login.example.com:8080"].source == "again"
