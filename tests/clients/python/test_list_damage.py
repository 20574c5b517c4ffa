"""Damaged lists: a damaged record costs itself, and none is swallowed."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxystash import CacheEntry, ProxyFileError, Rejected
from proxystash.files import ListReader, read_proxy_file

# What damage is made of: a byte that is put in, or nothing for one that is lost.
BYTES = st.sampled_from(
    [b"", b'"', b"'", b",", b";", b":", b"@", b"{", b"}", b"[", b"]", b"\xff", b"x", b"7", b" "]
)
HIT = st.tuples(st.integers(0, 10**6), BYTES)


@st.composite
def damaged(draw: st.DrawFn, count: int, hits: int = 4) -> dict[int, list[tuple[int, bytes]]]:
    """Which of so many records are damaged, where in each, and how."""
    of_one = st.lists(HIT, min_size=1, max_size=hits)
    return draw(st.dictionaries(st.integers(0, count - 1), of_one, max_size=4))


def hit(record: bytes, hits: list[tuple[int, bytes]]) -> bytes:
    for place, byte in hits:
        position = place % max(1, len(record))
        record = record[:position] + byte + record[position + 1 :]
    return record


def host(number: int) -> str:
    return f"192.0.2.{number + 1}"


def line(number: int) -> str:
    return [
        f"{host(number)}:8080",
        f"socks5://{host(number)}:1080",
        f"{host(number)}:8080:ann:pw{number}",
        f"ann:pw{number}@{host(number)}:8080",
        f"{host(number)},8080,DE,elite",
    ][number % 5]


ISPS = ["Rome", '"Foo, Inc"', '"He said ""hi"""', ""]


def row(number: int) -> str:
    return f"http,{host(number)},8080,{ISPS[number % 4]},ann,pw{number}"


def record(number: int) -> str:
    return json.dumps(
        {"ip": host(number), "port": 8080, "protocols": ["http"], "geo": {"country": "DE"}, "n": "a,b"}
    )


def outcomes_of(content: bytes, name: str) -> tuple[ListReader, list[CacheEntry | Rejected]]:
    reader = read_proxy_file(io.BytesIO(content), name=name)
    return reader, [*reader]


COUNT = 12


@pytest.mark.parametrize(
    ("name", "header", "make"),
    [
        ("a.txt", "", line),
        ("a.csv", "protocol,ip,port,isp,username,password\n", row),
        ("a.jsonl", "", record),
    ],
)
@given(damage=damaged(COUNT, hits=1))
def test_every_line_of_a_damaged_list_is_accounted_for(
    name: str, header: str, make: Callable[[int], str], damage: dict[int, list[tuple[int, bytes]]]
) -> None:
    """Whole lines are loaded, each once; a damaged one is loaded or refused, unless it became a comment."""
    lines = [hit(make(number).encode(), damage.get(number, [])) for number in range(COUNT)]

    reader, outcomes = outcomes_of(header.encode() + b"\n".join(lines) + b"\n", name)

    places = Counter(
        outcome.where if isinstance(outcome, Rejected) else reader.place_of(outcome) for outcome in outcomes
    )
    first = 2 if header else 1
    loaded = {outcome.proxy_url.split("//")[1] for outcome in outcomes if isinstance(outcome, CacheEntry)}
    for number, text in enumerate(lines):
        place = f"line {number + first}"
        if number not in damage:
            assert places[place] == 1, (place, lines)
            assert any(address.startswith(f"{host(number)}:") for address in loaded), (place, lines)
        elif text.strip(b" ,;'\"") and not text.lstrip().startswith((b";", b"#", b"//")):
            assert places[place] >= 1, (place, lines)


@given(damage=damaged(COUNT))
def test_no_whole_row_is_taken_for_a_part_of_a_quoted_cell(
    damage: dict[int, list[tuple[int, bytes]]],
) -> None:
    """Given rows with cells of several lines among them, then each that is whole is loaded."""
    texts = [
        f'{host(number)},80,"two\nlines, of {number}"' if number % 3 == 0 else f"{host(number)},80,x"
        for number in range(COUNT)
    ]
    rows = [hit(text.encode(), damage.get(number, [])) for number, text in enumerate(texts)]

    _, outcomes = outcomes_of(b"ip,port,note\n" + b"\n".join(rows), "a.csv")

    loaded = {outcome.proxy_url for outcome in outcomes if isinstance(outcome, CacheEntry)}
    assert {f"http://{host(number)}:80" for number in range(COUNT) if number not in damage} <= loaded


@pytest.mark.parametrize(
    "make", [record, lambda number: json.dumps(f"{host(number)}:8080")], ids=["objects", "texts"]
)
@pytest.mark.parametrize("between", [",", ", ", ",\n  "])
@given(damage=damaged(COUNT, hits=1))
def test_whole_elements_of_a_damaged_document_are_loaded(
    make: Callable[[int], str], between: str, damage: dict[int, list[tuple[int, bytes]]]
) -> None:
    elements = [hit(make(number).encode(), damage.get(number, [])) for number in range(COUNT)]
    content = b'{"proxies": [' + between.encode().join(elements) + b"]}"
    try:
        _, outcomes = outcomes_of(content, "a.json")
    except ProxyFileError:
        assert len(damage) == COUNT
        return

    loaded = {outcome.proxy_url for outcome in outcomes if isinstance(outcome, CacheEntry)}
    missing = {number for number in range(COUNT) if f"http://{host(number)}:8080" not in loaded}
    assert missing <= set(damage), content
    # What is missing was told, or became another proxy.
    assert len(outcomes) >= COUNT or len(damage) > 1, content


@given(cut=st.integers(1, 400))
@pytest.mark.parametrize("name", ["a.json", "a.txt", "a.jsonl", "a.csv"])
def test_a_list_that_was_cut_off_gives_what_is_there(name: str, cut: int) -> None:
    """Given a download that broke off, then all whole records are loaded, and the last one is told of."""
    make = {"a.json": record, "a.txt": line, "a.jsonl": record, "a.csv": row}[name]
    texts = [make(number) for number in range(COUNT)]
    begin = {"a.json": "[", "a.csv": "protocol,ip,port,isp,username,password\n"}.get(name, "")
    content = (begin + ("," if name == "a.json" else "\n").join(texts)).encode()[:-cut]
    whole = sum(content.decode().count(text) for text in texts)

    try:
        _, outcomes = outcomes_of(content, name)
    except ProxyFileError:
        assert not whole
        return

    assert sum(isinstance(outcome, CacheEntry) for outcome in outcomes) >= whole
    assert len(outcomes) in {whole, whole + 1}


@given(cut=st.integers(9, 500))
def test_a_packed_list_that_was_cut_off_tells_where(cut: int) -> None:
    packed = gzip.compress("".join(f"192.0.{n // 250}.{n % 250}:8080\n" for n in range(500)).encode())

    _, outcomes = outcomes_of(packed[:-cut], "a.txt.gz")

    *entries, last = outcomes
    assert all(isinstance(entry, CacheEntry) for entry in entries)
    assert isinstance(last, Rejected)
    assert (last.where, last.kind) == (f"line {len(entries) + 1}", "failed")
    assert last.reason == "nothing can be read from here on: it ends too early"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json", "a.yaml", "a.gz", "a"])
@given(st.binary(max_size=200) | st.text('{}[]",:;|@#-\n\t 1.ahttpsock=&*', max_size=80).map(str.encode))
def test_any_bytes_are_read_or_refused(name: str, content: bytes) -> None:
    try:
        outcomes = [*read_proxy_file(io.BytesIO(content), name=name)]
    except ProxyFileError:
        return
    assert all(isinstance(outcome, CacheEntry | Rejected) for outcome in outcomes)


@pytest.mark.parametrize("name", ["a.yaml", "a.json", "a.jsonl"])
@pytest.mark.parametrize(
    "content", ["[" * 100_000, "- " * 100_000, '{"a":' * 100_000, '["192.0.2.1:80",' + "[" * 100_000]
)
def test_deep_nesting_is_a_reason_and_no_crash(name: str, content: str) -> None:
    refused = ""
    try:
        outcomes = [*read_proxy_file(io.BytesIO(content.encode()), name=name)]
        refused = next(outcome.reason for outcome in outcomes if isinstance(outcome, Rejected))
    except ProxyFileError as error:
        refused = str(error)
    assert any(reason in refused for reason in ("nested too deeply", "not YAML", "not JSON", "neither"))
