"""warm and export with lists of every kind, as processes against a real server."""

from __future__ import annotations

import gzip
import json
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from proxystash import CacheEntry, Client

from .commands import PROGRAM, Commands, environment

SECRET = "s3cr3t-p4ss"


@pytest.fixture
def run(target: str) -> Commands:
    return Commands(target)


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target, timeout=60) as client:
        yield client


def stored(client: Client) -> set[str]:
    return {entry.proxy_url for entry in client.list()}


# --- warm


def test_warm_reads_several_files_and_standard_input(run: Commands, client: Client, tmp_path: Path) -> None:
    (tmp_path / "socks5.txt.gz").write_bytes(gzip.compress(b"192.0.2.1:1080\n"))
    (tmp_path / "b.csv").write_text("ip;port\n192.0.2.2;80\n192.0.2.3\n")
    missing = str(tmp_path / "none.json")

    outcome = run(
        "warm", str(tmp_path / "socks5.txt.gz"), str(tmp_path / "b.csv"), missing, "-",
        stdin='[{"proxy": "192.0.2.4:80"}, {"proxy": "socks5://192.0.2.1:1080"}]',
    )  # fmt: skip

    assert outcome.code == 1
    first, *reasons = outcome.out.splitlines()
    assert first.startswith("loaded 3, skipped 2, failed 1 in ")
    assert reasons == [
        f"  skipped {tmp_path}/b.csv line 3: no port",
        f"  failed {missing}: cannot read {missing}: No such file or directory",
        f"  skipped standard input record 2: duplicate of {tmp_path}/socks5.txt.gz line 1",
        "  note: no scheme was given, socks5 was taken from the name socks5.txt (1 record)",
        "  note: no scheme was given, http was taken (2 records)",
    ]
    assert stored(client) == {"socks5://192.0.2.1:1080", "http://192.0.2.2:80", "http://192.0.2.4:80"}


def test_warm_takes_the_scheme_that_it_is_given(run: Commands, client: Client) -> None:
    outcome = run(
        "warm", "-", "--scheme", "SOCKS4", "--json", stdin="# HTTP\n192.0.2.1:80\nhttp://192.0.2.2:80\n"
    )

    assert (outcome.code, outcome.json["notices"]) == (0, [])
    assert stored(client) == {"socks4://192.0.2.1:80", "http://192.0.2.2:80"}


def test_warm_tells_scripts_what_it_guessed(run: Commands) -> None:
    outcome = run("warm", "-", "--json", stdin="192.0.2.1:80\n")

    assert outcome.json == {
        "loaded": 1, "kept": 0, "skipped": 0, "failed": 0, "rejected": [],
        "notices": [{"notice": "no scheme was given, http was taken", "records": 1}],
    }  # fmt: skip


def test_warm_reads_addresses_in_the_way_that_it_is_given(run: Commands, client: Client) -> None:
    line = "gw.example:80:user:8080\n"

    refused = run("warm", "-", stdin=line)
    loaded = run("warm", "-", "--format", "host:port:user:pass", stdin=line)

    assert refused.code == 1
    assert "in two ways, as host:port:user:pass or as user:pass:host:port: --format decides" in refused.out
    assert loaded.code == 0
    [entry] = client.list(include_credentials=True)
    assert (entry.proxy_url, entry.username, entry.password) == ("http://gw.example:80", "user", "8080")


def test_warm_tells_sessions_by_their_password_if_asked(run: Commands, client: Client) -> None:
    sessions = "".join(f"http://user:session-{number}@gw.example:80\n" for number in range(3))

    by_user = run("warm", "-", stdin=sessions)
    by_password = run("warm", "-", "--identity", "user+password", stdin=sessions)

    assert "loaded 1, skipped 2" in by_user.out
    assert "load them with --identity user+password" in by_user.out
    assert "loaded 3, skipped 0" in by_password.out
    passwords = {entry.password for entry in client.list(include_credentials=True)}
    assert passwords == {"session-0", "session-1", "session-2"}


def test_warm_gives_a_reason_of_each_kind_in_its_own_words(run: Commands) -> None:
    """Given more reasons than are listed one by one, then the first of each kind stands for the others."""
    ports = "".join(f"192.0.2.{number}:{70000 + number}\n" for number in range(10))
    sources = "".join(
        json.dumps({"url": f"http://192.0.2.{number}:80", "source": "s" * (200 + number)}) + "\n"
        for number in range(9)
    )

    by_port = run("warm", "-", stdin=ports + "192.0.2.1:80\nx\n")
    by_source = run("warm", "-", "--format", "jsonl", stdin=sources + "{\n" * 2)

    assert "  skipped 10 like line 1: the port is not a number from 1 to 65535\n" in by_port.out
    assert "  skipped line 12: the proxy URL has no port\n" in by_port.out
    assert "  skipped 9 like line 1: source has 200 characters; at most 128 are allowed\n" in by_source.out
    assert "  failed 2 like line 10: not JSON: Expecting property name" in by_source.out


# --- export


@pytest.fixture
def filled(client: Client) -> None:
    client.put_many(
        [
            CacheEntry("http://192.0.2.1:80", source="a", labels={"country": "DE"}),
            CacheEntry("socks5://gw.example:1080", username="ann", password=f"{SECRET}@", source="b"),
        ]
    )


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("name", ["all.jsonl", "all.csv"])
def test_what_is_exported_is_warmed_again_the_same(
    run: Commands, client: Client, tmp_path: Path, name: str
) -> None:
    before = [replace(entry, version=0) for entry in client.list(include_credentials=True)]

    exported = run("export", str(tmp_path / name), "--include-credentials")
    client.clear()
    warmed = run("warm", str(tmp_path / name))

    assert exported.out == f"exported 2 to {tmp_path / name}\n"
    assert warmed.out.startswith("loaded 2, skipped 0, failed 0 in ")
    after = client.list(include_credentials=True)
    assert [replace(entry, version=0) for entry in after] == before
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["--format", "url"], {"http://192.0.2.1:80", "socks5://gw.example:1080"}),
        (
            ["--format", "url", "--include-credentials"],
            {"http://192.0.2.1:80", f"socks5://ann:{SECRET}%40@gw.example:1080"},
        ),
        (["--format", "host:port"], {"192.0.2.1:80", "gw.example:1080"}),
        (["--format", "host:port", "--scheme", "socks5"], {"gw.example:1080"}),
        (["--format", "url", "--label", "country=DE"], {"http://192.0.2.1:80"}),
        (["--format", "url", "--source", "b"], {"socks5://gw.example:1080"}),
        (["--format", "url", "--health", "dead"], set()),
    ],
)
def test_addresses_are_exported_to_standard_output(
    run: Commands, arguments: list[str], lines: set[str]
) -> None:
    outcome = run("export", "-", *arguments)

    assert (outcome.code, set(outcome.out.splitlines())) == (0, lines)
    first, *notes = outcome.err.splitlines()
    assert first == f"exported {len(lines)} to standard output"
    asked = "--include-credentials" in arguments
    left_out = any("gw.example" in line for line in lines) and not asked
    mixed = arguments == ["--format", "host:port"]
    expected = ["  note: 1 without their credentials"] * left_out
    expected += ["  note: host:port does not say which is which: 1 "] * mixed
    assert [note.startswith(text) for note, text in zip(notes, expected, strict=True)] == [True] * len(notes)


@pytest.mark.usefixtures("filled")
def test_standard_output_gets_json_lines_and_nothing_else(run: Commands) -> None:
    outcome = run("export", "-", "--json")

    assert {line["proxy_url"] for line in outcome.json_lines} == {
        "http://192.0.2.1:80",
        "socks5://gw.example:1080",
    }
    assert SECRET not in outcome.out
    counts = {"exported": 2, "credentials_omitted": 1, "file": "-", "format": "jsonl"}
    assert json.loads(outcome.err) == counts


@pytest.mark.usefixtures("filled")
def test_csv_has_its_header_even_without_rows(run: Commands) -> None:
    outcome = run("export", "-", "--format", "csv", "--source", "nobody")

    assert outcome.out.splitlines()[0].startswith("proxy_url,key,username,password,source,")
    assert len(outcome.out.splitlines()) == 1


@pytest.mark.usefixtures("filled")
def test_a_full_disk_behind_standard_output_is_one_line(target: str) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [PROGRAM, "export", "-"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
            env=environment({"PROXYSTASH_TARGET": target}),
        )

    assert (result.returncode, result.stderr) == (
        2, "proxystash: cannot write to standard output: No space left on device\n",
    )  # fmt: skip


def test_an_export_can_be_piped_into_warm(run: Commands, client: Client) -> None:
    client.put(CacheEntry("http://192.0.2.1:80", username="ann", password=SECRET))
    exported = run("export", "-", "--include-credentials").out
    client.clear()

    assert run("warm", "-", stdin=exported).code == 0
    assert [entry.password for entry in client.list(include_credentials=True)] == [SECRET]
