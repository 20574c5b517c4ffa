"""Lists, counts, and commands on many proxies at once, as processes against a real server."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxystash import CacheEntry, Client, HealthStatus, cache_key
from proxystash.cli.tables import Column, lines

from .commands import Commands


@pytest.fixture
def run(target: str) -> Commands:
    return Commands(target)


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target, timeout=60) as client:
        yield client


@pytest.fixture
def filled(client: Client) -> dict[str, str]:
    """Six proxies that differ in what is filtered by; their keys by number."""
    entries = [
        CacheEntry("http://192.0.2.1:8080", source="shop", labels={"country": "DE"}),
        CacheEntry("http://192.0.2.2:8080", source="shop", labels={"country": "FR"}),
        CacheEntry("socks5://192.0.2.3:1080", source="list", ttl=timedelta(minutes=5)),
        CacheEntry("http://192.0.2.4:8080", health_status=HealthStatus.HEALTHY, labels={"country": "DE"}),
        CacheEntry("http://192.0.2.5:8080", username="ann", password="secret", labels={"x": ""}),
        CacheEntry("http://192.0.2.6:8080", ttl=timedelta(days=2, hours=3), labels={"long": "y" * 100}),
    ]
    client.put_many(entries)
    return {str(number): cache_key(one.proxy_url, one.username) for number, one in enumerate(entries, 1)}


def numbers(out: str) -> str:
    """Which of them a list has, by the last digit of their addresses."""
    return "".join(
        sorted(line.partition("192.0.2.")[2][0] for line in out.splitlines() if "192.0.2." in line)
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--source shop", "12"),
        ("--source=", "456"),
        ("--label country=DE", "14"),
        ("--label country!=DE", "2356"),
        ("--label !country", "356"),
        ("--label !country --label !x", "36"),
        ("--label country!=DE --source shop", "2"),
        ("--expiring-within 10m", "3"),
        ("--expiring-within 3d --scheme http", "12456"),
        ("--health healthy", "4"),
    ],
)  # fmt: skip
def test_filters_say_what_is_wanted(
    run: Commands, filled: dict[str, str], options: str, expected: str
) -> None:
    assert numbers(run("list", *options.split()).out) == expected
    assert run("count", *options.split()).out == f"{len(expected)}\n"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_table_fits_the_terminal_and_keeps_keys_and_urls_whole(
    run: Commands, filled: dict[str, str], width: int
) -> None:
    code, shown = run.on_terminal("list", env={"COLUMNS": str(width)})
    rows = shown.replace("\r", "").splitlines()
    assert code == 0
    assert len(rows) == 7
    assert max(map(len, rows)) <= width
    for key in filled.values():
        [row] = [row for row in rows if row.startswith(key)]
        assert row.split()[1].rpartition(":")[2].isdigit()
    header = rows[0].split()
    assert header[:3] == ["key", "proxy_url", "health"]
    assert ("labels" in header) == (width == 120)


def test_a_pipe_gets_everything(run: Commands, filled: dict[str, str]) -> None:
    assert "long=" + "y" * 100 in run("list").out
    code, shown = run.on_terminal("list", "-o", "wide", env={"COLUMNS": "60"})
    assert code == 0
    assert "long=" + "y" * 100 in shown


def test_a_list_says_in_how_long_a_proxy_expires(run: Commands, filled: dict[str, str]) -> None:
    rows = {row.split()[0]: row for row in run("list", "--columns", "key,expires_in").out.splitlines()}
    assert rows[filled["3"]].split()[1] in {"5m", "4m59s", "4m58s", "4m57s", "4m56s"}
    assert rows[filled["6"]].split()[1] in {"2d3h", "2d2h"}


def test_columns_can_be_chosen(run: Commands, filled: dict[str, str]) -> None:
    out = run("list", "--columns", "labels.country, key").out
    assert [line.split()[-1] for line in out.splitlines()] == ["key", *sorted(filled.values())]
    unknown = run("list", "--columns", "key,nothing")
    assert unknown.code == 2
    assert "there is no column 'nothing'; there are key, proxy_url" in unknown.err
    assert "show-credentials" in run("list", "--columns", "password").err
    shown = run("list", "--columns", "password", "--show-credentials").out
    assert "secret" in shown


def test_a_list_is_also_json_json_lines_and_csv(run: Commands, filled: dict[str, str]) -> None:
    keys = sorted(filled.values())
    array = json.loads(run("list", "-o", "json").out)
    assert [record["key"] for record in array] == keys
    assert run("list", "-o", "jsonl").json_lines == array == run("list", "--json").json_lines
    rows = [*csv.DictReader(run("list", "-o", "csv").out.splitlines())]
    assert [row["key"] for row in rows] == keys
    assert {row["source"] for row in rows} == {"shop", "list", ""}
    assert json.loads(run("list", "-o", "json", "--source", "none").out) == []


def test_every_record_has_every_field(run: Commands, filled: dict[str, str]) -> None:
    for options in ((), ("--show-credentials",)):
        records = run("list", "--json", *options).json_lines
        assert len({tuple(record) for record in records}) == 1


def test_a_count_says_how_many_have_what_in_common(run: Commands, filled: dict[str, str]) -> None:
    assert run("count").out == "6\n"
    assert run("count", "--json").json == {"count": 6}
    by_source = [line.split() for line in run("count", "--by", "source").out.splitlines()]
    assert by_source == [["source", "count"], ["(none)", "3"], ["shop", "2"], ["list", "1"]]
    assert run("count", "--by", "labels.country", "--json").json_lines == [
        {"labels.country": "", "count": 3},
        {"labels.country": "DE", "count": 2},
        {"labels.country": "FR", "count": 1},
    ]
    assert run("count", "--by", "color").code == 2


def test_several_keys_may_be_given_also_by_standard_input(
    run: Commands, client: Client, filled: dict[str, str]
) -> None:
    got = run("get", filled["1"], "-", "missing", stdin=f"{filled['2']}\n\nHTTP://192.0.2.4:8080/\n")
    assert got.code == 1
    assert numbers(got.out) == "124"
    assert got.err == "proxystash: no proxy with key missing\n"
    reported = run("invalidate", "-", "--json", stdin=f"{filled['1']}\n{filled['2']}\n")
    assert [record["failure_count"] for record in reported.json_lines] == [1, 1]
    deleted = run("delete", filled["1"], "missing", filled["2"], "gone")
    assert deleted.code == 1
    assert deleted.out == f"deleted {filled['1']}\ndeleted {filled['2']}\n"
    assert deleted.err.splitlines() == [f"proxystash: no proxy with key {key}" for key in ("missing", "gone")]
    assert len([*client.list()]) == 4


def test_what_is_wanted_is_deleted_after_a_question(
    run: Commands, client: Client, filled: dict[str, str]
) -> None:
    refused = run("delete", "--source", "shop")
    assert (refused.code, len([*client.list()])) == (2, 6)
    assert "pass --yes" in refused.err
    code, shown = run.on_terminal("delete", "--source", "shop", prompt="Remove 2 proxies?", answer="n")
    assert (code, len([*client.list()])) == (1, 6)
    code, shown = run.on_terminal("delete", "--source", "shop", prompt="Remove 2 proxies?", answer="y")
    assert code == 0
    assert shown.count("deleted") == 2
    assert {entry.source for entry in client.list()} == {"list", ""}
    assert run("invalidate", "--label", "country=DE", "--yes").code == 0
    assert {entry.failure_count for entry in client.list(labels={"country": "DE"})} == {1}
    assert run("delete", "--source", "shop", "--yes").err == "proxystash: no proxy is like that\n"


@pytest.mark.parametrize("arguments", [["delete"], ["invalidate"], ["delete", "k", "--source", "s"]])
def test_what_is_meant_must_be_clear(run: Commands, filled: dict[str, str], arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert "which proxies" in outcome.err


def test_a_ping_says_whether_a_server_answers(run: Commands) -> None:
    answered = run("ping")
    assert answered.code == 0
    assert answered.out.startswith(f"{run.target} answers in ")
    assert "l3 active" in answered.out
    assert set(run("ping", "--json").json) == {"target", "milliseconds", "tiers"}
    assert run("ping", "--target", "127.0.0.1:1").code == 3


def test_one_label_twice_is_refused(run: Commands) -> None:
    outcome = run("put", "http://h:1", "--label", "a=1", "--label", "a=2")
    assert (outcome.code, "label a is given twice" in outcome.err) == (2, True)


# -- tables


WORDS = st.text(st.characters(codec="utf-8", categories=["L", "N"]), max_size=30)


@given(st.lists(st.lists(WORDS, min_size=4, max_size=4), min_size=1, max_size=10), st.integers(1, 140))
def test_no_table_is_wider_than_wanted_unless_it_must_be(rows: list[list[str]], width: int) -> None:
    columns = [Column("a"), Column("b", rank=1, right=True), Column("c", 2, cuttable=True), Column("d", 3)]
    rows = [[cell.encode("ascii", "replace").decode() for cell in row] for row in rows]
    whole = max(len("a"), *(len(row[0]) for row in rows))
    shown = [*lines(rows, columns, width)]
    assert len(shown) == len(rows) + 1
    assert max(map(len, shown)) <= max(width, whole)
    for row, line in zip(rows, shown[1:], strict=True):
        assert line.startswith(row[0])
    for row, line in zip(rows, [*lines(rows, columns)][1:], strict=True):
        assert all(cell in line for cell in row)


def test_wide_characters_take_two_columns() -> None:
    shown = [*lines([["日本", "x"], ["ab", "y"]], [Column("n"), Column("v")])]
    assert shown == ["n     v", "日本  x", "ab    y"]
