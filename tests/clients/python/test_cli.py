"""The commands as processes against a real server."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from proxystash import CacheEntry, Client, HealthStatus, cache_key
from proxystash.v1 import cache_service_pb2 as pb

from .commands import PROGRAM, Commands, environment
from .fake_service import FakeService, Fault, WatchScript
from .waiting import wait_until

SECRET = "s3cr3t-p4ss"
KEY = cache_key("http://h:1")
NOBODY = "127.0.0.1:1"


@pytest.fixture
def run(target: str) -> Commands:
    return Commands(target)


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target, timeout=60) as client:
        yield client


def proxies(count: int) -> list[CacheEntry]:
    return [CacheEntry(f"http://h:{port}") for port in range(1, count + 1)]


# --- get, put, delete, invalidate


def test_a_proxy_that_is_put_can_be_got(run: Commands) -> None:
    put = run(
        "put", "HTTP://H:1/", "--source", "tests", "--ttl", "2h", "--health", "healthy",
        "--label", "country=DE", "--label", "note=a=b", "--json",
    )  # fmt: skip
    got = run("get", KEY, "--json")

    assert (put.code, put.err) == (got.code, got.err) == (0, "")
    assert (put.json["key"], put.json["stored_in"]) == (KEY, ["l1", "l2", "l3"])
    entry = got.json
    assert entry["expires_at"] == put.json["expires_at"]
    assert (entry["proxy_url"], entry["source"], entry["ttl_seconds"]) == ("http://h:1", "tests", 7200)
    assert (entry["health_status"], entry["labels"]) == ("healthy", {"country": "DE", "note": "a=b"})
    assert (entry["served_by"], entry["access_count"]) == ("l1", 1)


def test_what_people_see_says_the_same(run: Commands) -> None:
    put = run("put", "http://h:1", "--label", "country=DE")
    got = run("get", KEY)

    assert put.out.startswith(f"stored {KEY} in l1, l2, l3, until 2")
    shown = dict(line.split(None, 1) for line in got.out.splitlines())
    assert (shown["key"], shown["proxy_url"], shown["labels"]) == (KEY, "http://h:1", "country=DE")
    assert (shown["served_by"], shown["evicted_from_l1"]) == ("l1", "no")
    assert "credentials" not in shown


@pytest.mark.parametrize(
    "key", [["http://ann@h:1"], ["http://ann:whatever@H:1/"], ["http://h:1", "--username", "ann"]]
)
def test_a_url_with_its_username_stands_for_a_key(run: Commands, client: Client, key: list[str]) -> None:
    client.put(CacheEntry("http://h:1"))
    client.put(CacheEntry("http://h:1", username="ann"))
    expected = cache_key("http://h:1", "ann")

    assert run("get", *key, "--json").json["key"] == expected
    assert run("invalidate", *key, "--json").json["failure_count"] == 1
    assert run("delete", *key, "--json").json == {"key": expected, "deleted": True}
    assert [entry.key for entry in client.list()] == [KEY]


@pytest.mark.parametrize("command", ["get", "delete", "invalidate"])
def test_a_proxy_that_is_not_there_is_exit_code_1(run: Commands, command: str) -> None:
    outcome = run(command, "http://h:1")

    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == f"proxystash: no proxy with key {KEY}\n"


def test_scripts_are_told_what_was_not_there(run: Commands) -> None:
    assert run("delete", KEY, "--json").json == {"key": KEY, "deleted": False}
    assert run("invalidate", KEY, "--json").json["found"] is False
    assert run("get", KEY, "--json").out == ""


def test_a_deleted_proxy_is_gone(run: Commands, client: Client) -> None:
    client.put(CacheEntry("http://h:1"))

    assert run("delete", KEY).out == f"deleted {KEY}\n"
    assert client.get(KEY) is None


def test_three_failures_evict_a_proxy(run: Commands, client: Client) -> None:
    client.put(CacheEntry("http://h:1"))

    first, second, third = (run("invalidate", KEY).out for _ in range(3))
    assert first == f"{KEY}: failure 1 of 3, unhealthy\n"
    assert second == f"{KEY}: failure 2 of 3, unhealthy\n"
    assert third.startswith(f"{KEY}: failure 3 of 3, evicted, banned until 2")
    assert client.get(KEY) is None


# --- credentials


def stored_credentials(client: Client) -> list[tuple[str | None, str | None]]:
    return [(entry.username, entry.password) for entry in client.list(include_credentials=True)]


def test_a_put_can_merge_and_can_leave_what_is_stored(run: Commands, client: Client) -> None:
    run("put", "http://h:1", "--source", "first", "--label", "country=DE")
    merged = run("put", "http://h:1", "--merge", "--label", "city=Bonn", "--json")
    kept = run("put", "http://h:1", "--if-absent", "--source", "second")
    assert (merged.code, kept.code) == (0, 0)
    assert kept.out.startswith(f"kept {KEY} in l1, l2, l3")
    [entry] = client.list()
    assert (entry.source, entry.labels) == ("first", {"country": "DE", "city": "Bonn"})
    refused = run("put", "http://h:1", "--merge", "--if-absent")
    assert refused.code == 2
    assert "only one of --merge, --if-absent can be" in refused.err


def test_a_plain_list_leaves_what_a_rich_one_said(run: Commands, client: Client, tmp_path: Path) -> None:
    client.put(CacheEntry("http://h:1", source="rich", labels={"country": "DE"}))
    plain = tmp_path / "plain.txt"
    plain.write_text("http://h:1\nhttp://h:2\n")
    assert run("warm", str(plain)).code == 0
    assert {entry.proxy_url: entry.source for entry in client.list()} == {
        "http://h:1": "rich",
        "http://h:2": "",
    }
    assert run("warm", str(plain), "--replace").code == 0
    assert {entry.source for entry in client.list()} == {""}


def test_bans_are_listed_and_lifted(run: Commands) -> None:
    assert run("list", "--banned").err == "no bans\n"
    run("put", "http://h:1")
    failed = [run("invalidate", KEY) for _ in range(3)]
    assert f"{KEY}: failure 3 of 3, evicted, banned until 20" in failed[2].out
    assert KEY in run("list", "--banned").out
    assert run("list", "--banned", "--source", "s").code == 2
    ban = run("list", "--banned", "--json").json
    assert (ban["key"], ban["failure_count"], ban["bans"]) == (KEY, 3, 1)
    again = run("put", "http://h:1")
    assert "so stored as unhealthy" in again.out
    assert run("put", "http://h:1", "--json").json["banned_until"] == ban["banned_until"]
    assert run("unban", KEY).out == f"unbanned {KEY}\n"
    gone = run("unban", "http://h:1")
    assert (gone.code, gone.err) == (1, f"proxystash: no ban of a proxy with key {KEY}\n")


def test_a_password_is_read_from_standard_input(run: Commands, client: Client) -> None:
    run("put", "http://h:1", "--username", "ann", "--password-stdin", stdin=f"{SECRET} \r\n")

    assert stored_credentials(client) == [("ann", f"{SECRET} ")]


def test_a_password_is_taken_from_the_environment_for_those_with_a_username(
    run: Commands, client: Client
) -> None:
    env = {"PROXYSTASH_PASSWORD": SECRET}
    run("put", "http://h:1", env=env)
    run("put", "http://h:2", "--username", "ann", env=env)
    run("put", "http://bob@h:3", env=env)
    run("put", "http://cid:own@h:4", env=env)

    assert sorted(stored_credentials(client), key=str) == [
        ("ann", SECRET), ("bob", SECRET), ("cid", "own"), (None, None),
    ]  # fmt: skip


def test_a_password_is_asked_for_on_a_terminal_and_not_shown(run: Commands, client: Client) -> None:
    code, shown = run.on_terminal(
        "put", "http://h:1", "--username", "ann", prompt="Password (empty for none): ", answer=SECRET
    )

    assert code == 0
    assert SECRET not in shown
    assert stored_credentials(client) == [("ann", SECRET)]


def test_credentials_are_shown_only_when_asked_for(run: Commands, client: Client) -> None:
    client.put(CacheEntry("http://h:1", username="ann-user", password=SECRET))
    key = cache_key("http://h:1", "ann-user")

    for hidden in (run("get", key), run("get", key, "--json"), run("list"), run("list", "--json")):
        assert hidden.code == 0
        assert SECRET not in hidden.out + hidden.err
        assert "ann-user" not in hidden.out
    assert "hidden; --show-credentials" in run("get", key).out
    assert run("get", key, "--json", "--show-credentials").json["password"] == SECRET
    assert run("list", "--json", "--show-credentials").json["username"] == "ann-user"
    for shown in (run("get", key, "--show-credentials"), run("list", "--show-credentials")):
        assert SECRET in shown.out
        assert "ann-user" in shown.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["put", f"http://ann:{SECRET}@h"],
        ["put", f"http://ann:{SECRET}/@h:1"],
        ["put", f"ann:{SECRET}@h:1"],
        ["get", f"http://ann:{SECRET}@h:x"],
        ["get", f"http://ann:{SECRET}@h:1"],
        ["delete", f"http://ann:{SECRET}@h:1"],
        ["put", f"http://ann:{SECRET}@h:1", "--ttl", "1ms"],
        ["put", f"http://ann:{SECRET}@h:1", "--target", NOBODY],
    ],
)
def test_no_error_shows_a_password(run: Commands, arguments: list[str]) -> None:
    outcome = run(*arguments)

    assert outcome.code != 0
    assert outcome.err.count("\n") == 1
    assert SECRET not in outcome.out + outcome.err


# --- clear


def test_clear_without_a_terminal_wants_a_yes(run: Commands, client: Client) -> None:
    client.put_many(proxies(3))

    refused = run("clear", stdin="y\n")
    assert (refused.code, refused.out) == (2, "")
    assert "--yes" in refused.err
    assert client.stats().entries == 3

    assert run("clear", "--yes", "--json").json == {"cleared": 3}
    assert run("clear", "--yes").out == "removed 0 proxies\n"


@pytest.mark.parametrize(("answer", "code", "left"), [("n", 1, 3), ("", 1, 3), ("y", 0, 0)])
def test_clear_asks_on_a_terminal(run: Commands, client: Client, answer: str, code: int, left: int) -> None:
    client.put_many(proxies(3))

    question = f"Remove all 3 proxies from {run.target}?"

    assert run.on_terminal("clear", prompt=question, answer=answer)[0] == code
    assert client.stats().entries == left


# --- list


def test_filters_narrow_the_list(run: Commands, client: Client) -> None:
    client.put_many(
        [
            CacheEntry("http://h:1", source="a", health_status=HealthStatus.HEALTHY, labels={"c": "DE"}),
            CacheEntry(
                "http://h:2", source="b", health_status=HealthStatus.DEAD, labels={"c": "DE", "d": "1"}
            ),
            CacheEntry("socks5://h:3", source="b", health_status=HealthStatus.UNKNOWN),
        ]
    )

    def ports(*arguments: str) -> set[str]:
        return {line["proxy_url"][-1] for line in run("list", "--json", *arguments).json_lines}

    assert ports() == {"1", "2", "3"}
    assert ports("--source", "b") == {"2", "3"}
    assert ports("--health", "dead", "--health", "healthy") == {"1", "2"}
    assert ports("--scheme", "SOCKS5", "--scheme", "socks4") == {"3"}
    assert ports("--label", "c=DE", "--label", "d=1") == {"2"}
    assert ports("--source", "none") == set()


def test_the_list_is_a_table_for_people(run: Commands, client: Client) -> None:
    client.put(CacheEntry("http://h:1", source="[red]a\u202eb", labels={"c": "DE"}, failure_count=2))

    outcome = run("list")

    header, row = outcome.out.splitlines()
    assert header.split() == ["key", "proxy_url", "health", "expires_in", "failures", "source", "labels"]
    assert row.split()[:3] == [KEY, "http://h:1", "unknown"]
    assert row.split()[4:] == [
        "2",
        "[red]a\N{REPLACEMENT CHARACTER}b",
        "c=DE",
    ]


def test_the_list_goes_on_over_pages_and_stops_at_its_limit(run: Commands, client: Client) -> None:
    client.put_many(proxies(1203))
    keys = sorted(cache_key(entry.proxy_url) for entry in proxies(1203))

    assert [line["key"] for line in run("list", "--json").json_lines] == keys
    assert [line["key"] for line in run("list", "--json", "--limit", "701").json_lines] == keys[:701]
    table = [line.split()[0] for line in run("list", "--limit", "701").out.splitlines() if "http" in line]
    assert table == keys[:701]


def test_an_empty_list_is_no_error(run: Commands) -> None:
    outcome = run("list")

    assert (outcome.code, outcome.out, outcome.err) == (0, "", "no proxies\n")
    assert run("list", "--json").out == ""


@pytest.mark.parametrize("json_option", [["--json"], []])
def test_a_reader_that_goes_away_is_no_news(run: Commands, client: Client, json_option: list[str]) -> None:
    client.put_many(proxies(1500))
    process = subprocess.Popen(
        [PROGRAM, "list", *json_option, "--target", run.target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    _, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (141, b"")


# --- warm and export


def test_warm_loads_a_file_and_says_what_it_did_not_load(
    run: Commands, client: Client, tmp_path: Path
) -> None:
    file = tmp_path / "proxies.txt"
    file.write_bytes(b"h:1\n# SOCKS5 Proxies (2)\nh:2:ann:%s\nh:2:ann:x\n\xff\nh:99999\n" % SECRET.encode())

    outcome = run("warm", str(file))

    first, *reasons = outcome.out.splitlines()
    same_but_password = (
        "duplicate of line 3, which differs in the password alone: give them keys of their own, or load them "
        "with --identity user+password"
    )
    assert outcome.code == 1
    assert first.startswith("loaded 2, skipped 2, failed 1 in ")
    assert reasons == [
        f"  skipped line 4: {same_but_password}",
        "  failed line 5: not UTF-8",
        "  skipped line 6: the port is not a number from 1 to 65535",
        "  note: no scheme was given, http was taken (1 record)",
    ]
    stored = {(entry.proxy_url, entry.password) for entry in client.list(include_credentials=True)}
    assert stored == {("http://h:1", None), ("socks5://h:2", SECRET)}


def test_warm_tells_scripts_every_reason(run: Commands, tmp_path: Path) -> None:
    file = tmp_path / "proxies.jsonl"
    file.write_text('{"url": "http://h:1"}\nnonsense\n{"url": "http://h:2", "source": "%s"}\n' % ("s" * 129))

    outcome = run("warm", str(file), "--json")

    assert outcome.code == 1
    assert {name: outcome.json[name] for name in ("loaded", "skipped", "failed")} == {
        "loaded": 1, "skipped": 1, "failed": 1,
    }  # fmt: skip
    unreadable, refused = outcome.json["rejected"]
    assert (unreadable["where"], unreadable["kind"]) == ("line 2", "failed")
    assert (refused["where"], refused["kind"]) == ("line 3", "skipped")
    assert "source" in refused["reason"]


def test_warm_groups_many_reasons_and_lists_them_when_asked(run: Commands, tmp_path: Path) -> None:
    file = tmp_path / "proxies.txt"
    file.write_text("".join(f"h:{port}\n" for port in [*range(1, 3001), *range(1, 51)]) + "nonsense\n")

    grouped = run("warm", str(file))
    listed = run("warm", str(file), "--verbose")

    assert grouped.code == listed.code == 0
    assert grouped.out.splitlines()[0].startswith("loaded 3,000, skipped 51, failed 0 in ")
    assert grouped.out.splitlines()[1:] == [
        "  skipped 50 like line 3001: duplicate of line 1",
        "  skipped line 3051: the proxy URL has no port",
        "  --verbose lists each of them",
        "  note: no scheme was given, http was taken (3,000 records)",
    ]
    assert listed.out.splitlines()[1] == "  skipped line 3001: duplicate of line 1"
    assert len(listed.out.splitlines()) == 53


def test_warm_overrides_source_and_ttl(run: Commands, client: Client, tmp_path: Path) -> None:
    file = tmp_path / "proxies.jsonl"
    long_ago = datetime.now(UTC) - timedelta(days=1)
    record = {"url": "http://h:1", "source": "a", "fetch_time": long_ago.isoformat(), "ttl": 10**6}
    file.write_text(json.dumps(record))

    assert run("warm", str(file), "--source", "b", "--ttl", "90s").code == 0

    (entry,) = client.list()
    assert (entry.source, entry.ttl) == ("b", timedelta(seconds=90))
    assert entry.fetch_time is not None
    assert entry.fetch_time > long_ago + timedelta(hours=1)


def test_warm_that_loads_nothing_is_exit_code_1(run: Commands, tmp_path: Path) -> None:
    file = tmp_path / "proxies.txt"
    file.write_text("nonsense\n")

    assert run("warm", str(file)).code == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "cannot read {file}: No such file or directory"),
        ("a.json", "{", "{file} is not JSON"),
        ("a.csv", "a,b\n", "{file} holds no proxies, and its header row names neither"),
    ],
)
def test_a_file_that_cannot_be_read_is_exit_code_2(
    run: Commands, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_text(content)

    outcome = run("warm", str(file))

    assert (outcome.code, outcome.out) == (2, "")
    assert message.format(file=file) in outcome.err
    assert outcome.err.count("\n") == 1


def test_warm_shows_its_progress_on_a_terminal_only(run: Commands, tmp_path: Path) -> None:
    file = tmp_path / "proxies.txt"
    file.write_text("".join(f"h:{port}\n" for port in range(1, 2001)))

    code, shown = run.on_terminal("warm", str(file))

    assert code == 0
    assert "warm proxies.txt" in shown
    assert "100%" in shown
    assert run("warm", str(file)).err == ""


def test_what_is_exported_can_be_warmed_again(run: Commands, client: Client, tmp_path: Path) -> None:
    entries = [
        CacheEntry(f"http://h:{port}", username="ann", password=f"p{port}", labels={"n": str(port)})
        for port in range(1, 1501)
    ]
    client.put_many(entries)
    before = list(client.list(include_credentials=True))
    file = tmp_path / "all.jsonl"

    exported = run("export", str(file), "--include-credentials", "--json")
    client.clear()
    warmed = run("warm", str(file), "--json")

    assert exported.json == {
        "exported": 1500, "credentials_omitted": 0, "file": str(file), "format": "jsonl",
    }  # fmt: skip
    assert warmed.json["loaded"] == 1500
    after = list(client.list(include_credentials=True))
    assert [(entry.key, entry.password, entry.labels, entry.expires_at) for entry in after] == [
        (entry.key, entry.password, entry.labels, entry.expires_at) for entry in before
    ]


def test_credentials_are_exported_only_when_asked_and_then_for_the_owner_alone(
    run: Commands, client: Client, tmp_path: Path
) -> None:
    client.put(CacheEntry("http://h:1", username="ann", password=SECRET))
    file = tmp_path / "all.jsonl"
    file.touch(mode=0o644)

    run("export", str(file))
    assert SECRET not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~_umask()

    run("export", str(file), "--include-credentials")
    assert SECRET in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_an_export_says_and_marks_what_it_leaves_out(run: Commands, client: Client, tmp_path: Path) -> None:
    client.put(CacheEntry("http://192.0.2.1:80", username="ann", password="secret-1"))
    client.put(CacheEntry("http://192.0.2.2:80"))
    file = tmp_path / "all.jsonl"

    outcome = run("export", str(file))
    counts = run("export", str(tmp_path / "all.csv"), "--json").json
    records = [json.loads(line) for line in file.read_text().splitlines()]

    assert outcome.out == (
        f"exported 2 to {file}\n  note: 1 without their credentials; --include-credentials writes them\n"
    )
    assert counts["credentials_omitted"] == 1
    assert {record["proxy_url"]: record.get("credentials_omitted") for record in records} == {
        "http://192.0.2.1:80": True,
        "http://192.0.2.2:80": None,
    }
    for mode in ("--merge", "--replace"):
        for exported in (file, tmp_path / "all.csv"):
            assert run("warm", str(exported), mode).code == 0
            assert {entry.password for entry in client.list(include_credentials=True)} == {None, "secret-1"}
    assert "note" not in run("export", str(file), "--include-credentials").out
    assert "omitted" not in file.read_text()


def test_an_export_can_be_filtered(run: Commands, client: Client, tmp_path: Path) -> None:
    client.put_many([CacheEntry("http://h:1", source="a"), CacheEntry("http://h:2", source="b")])
    file = tmp_path / "some.ndjson"

    assert run("export", str(file), "--source", "b").out == f"exported 1 to {file}\n"
    assert json.loads(file.read_text())["proxy_url"] == "http://h:2"


def test_an_export_that_fails_leaves_the_file_as_it_was(run: Commands, tmp_path: Path) -> None:
    file = tmp_path / "all.jsonl"
    file.write_text("before")

    outcome = run("export", str(file), "--target", NOBODY, "--timeout", "0.2")

    assert outcome.code == 3
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_an_export_that_fails_half_way_leaves_the_file_as_it_was(
    service: FakeService, fake_target: str, tmp_path: Path
) -> None:
    fill(service, 700)
    service.fail("List", Fault(grpc.StatusCode.INTERNAL, "oh"), after=1)
    file = tmp_path / "all.jsonl"
    file.write_text("before")

    outcome = Commands(fake_target)("export", str(file))

    assert (outcome.code, outcome.err) == (3, "proxystash: oh\n")
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_an_export_that_is_terminated_leaves_nothing_behind(
    service: FakeService, fake_target: str, tmp_path: Path
) -> None:
    service.hanging.add("List")
    process = subprocess.Popen(
        [PROGRAM, "export", str(tmp_path / "all.jsonl"), "--target", fake_target], env=environment()
    )
    wait_until(lambda: service.calls["List"] == 1)
    assert list(tmp_path.iterdir())  # the file it is writing

    process.terminate()

    assert process.wait(60) == 143
    assert list(tmp_path.iterdir()) == []


def test_warm_that_fails_half_way_says_how_far_it_came(
    service: FakeService, fake_target: str, tmp_path: Path
) -> None:
    service.fail("BatchPut", Fault(grpc.StatusCode.INTERNAL, "oh"), after=1)
    file = tmp_path / "proxies.txt"
    file.write_text("".join(f"h:{port}\n" for port in range(1, 1501)))

    outcome = Commands(fake_target)("warm", str(file))

    assert (outcome.code, outcome.out) == (3, "")
    assert outcome.err == (
        "proxystash: oh; 1,000 were loaded before that, and loading them again does no harm\n"
    )


def test_ctrl_c_in_the_midst_of_warm_says_how_far_it_came(
    service: FakeService, fake_target: str, tmp_path: Path
) -> None:
    service.fail("BatchPut", Fault(grpc.StatusCode.INTERNAL, hangs=True), after=1)
    file = tmp_path / "proxies.txt"
    file.write_text("".join(f"h:{port}\n" for port in range(1, 1501)))
    process = subprocess.Popen(
        [PROGRAM, "warm", str(file), "--target", fake_target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    wait_until(lambda: service.calls["BatchPut"] == 2)

    process.send_signal(signal.SIGINT)

    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "proxystash: interrupted; 1,000 were loaded, and loading them again does no harm\n"


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_an_export_without_credentials_that_is_warmed_again_erases_none(
    run: Commands, client: Client, tmp_path: Path, suffix: str
) -> None:
    url = "http://192.0.2.1:80"
    for entry in (
        CacheEntry(url, username="ann", password=SECRET),
        CacheEntry(url, key="mine", username="bob", password=SECRET, labels={"country": "DE"}),
        CacheEntry(url, key="password-alone", password=SECRET),
        CacheEntry("http://192.0.2.2:80", key="open"),
    ):
        client.put(entry)
    before = stored_credentials(client)
    file = tmp_path / f"proxies.{suffix}"
    run("export", str(file))

    for how in ("--replace", "--merge", "--if-absent"):
        assert run("warm", str(file), how).code == 0
        assert stored_credentials(client) == before


CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.mark.parametrize(("key", "code"), [(CTRL_C, 130), (CTRL_D, 1)])
@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        (["clear"], "Remove all 1 proxy from "),
        (["delete", "--source", ""], "Remove 1 proxy?"),
        (["put", "http://192.0.2.2:80", "--username", "ann"], "Password (empty for none): "),
    ],
)
def test_a_question_that_is_left_changes_nothing(
    run: Commands, client: Client, arguments: list[str], prompt: str, key: str, code: int
) -> None:
    client.put(CacheEntry("http://192.0.2.1:80"))

    left, shown = run.on_terminal(*arguments, prompt=prompt, answer=key)

    assert left == code
    assert shown.endswith("\r\nproxystash: nothing was changed\r\n")
    assert [entry.proxy_url for entry in client.list()] == ["http://192.0.2.1:80"]


def test_warm_says_how_many_it_kept(run: Commands, client: Client) -> None:
    client.put(CacheEntry("http://192.0.2.1:80", source="before"))
    lines = "http://192.0.2.1:80\nhttp://192.0.2.2:80\n"

    outcome = run("warm", "-", "--if-absent", stdin=lines)
    counts = run("warm", "-", "--if-absent", "--json", stdin=lines).json

    assert outcome.out.startswith("loaded 2 (1 of them kept as they were), skipped 0, failed 0 in ")
    assert (counts["loaded"], counts["kept"]) == (2, 2)
    assert "kept" not in run("warm", "-", stdin=lines).out


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["list", "--json"], ["count"], ["stats"], ["stats", "--json"], ["--help"], ["--version"]],
    ids=" ".join,
)
def test_a_full_disk_behind_any_output_is_one_line(
    run: Commands, client: Client, arguments: list[str]
) -> None:
    client.put(CacheEntry("http://192.0.2.1:80"))
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [PROGRAM, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
            env=environment({"PROXYSTASH_TARGET": run.target}),
        )

    assert (result.returncode, result.stderr) == (
        2, "proxystash: cannot write the output: No space left on device\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    "before", [["--target=T"], ["--target", "T"], ["--timeout", "9", "--target", "T"]], ids=" ".join
)
def test_where_the_server_is_may_be_said_before_the_command(run: Commands, before: list[str]) -> None:
    nowhere = {"PROXYSTASH_TARGET": "127.0.0.1:1"}
    before = [text.replace("T", run.target) for text in before]

    assert run(*before, "count", env=nowhere).out == "0\n"
    assert run("--target", "127.0.0.1:1", "count", "--target", run.target, env=nowhere).code == 0
    assert run("count", "--target", run.target, env=nowhere).code == 0
    assert run("count", env=nowhere).code == 3


def test_a_command_is_missed_behind_its_options(run: Commands) -> None:
    outcome = run("--target", run.target)
    assert outcome.code == 2
    assert "Usage: proxystash" in outcome.out
    assert (
        run("--target").err == "proxystash: Option '--target' requires an argument; see `proxystash --help`\n"
    )


def test_a_shell_is_told_what_can_follow() -> None:
    for words, expected in (
        ("proxystash wa", {"warm", "watch", "watch-stats"}),
        ("proxystash list --sou", {"--source"}),
    ):
        asked = {
            "_PROXYSTASH_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        result = subprocess.run(
            [PROGRAM], capture_output=True, text=True, check=False, timeout=60, env=environment(asked)
        )
        assert set(result.stdout.split()) == expected


def fill(service: FakeService, count: int) -> None:
    for entry in proxies(count):
        key = cache_key(entry.proxy_url)
        service.entries[key] = pb.CacheEntry(key=key, proxy_url=entry.proxy_url)


def test_an_export_through_a_link_replaces_what_it_points_to(
    run: Commands, client: Client, tmp_path: Path
) -> None:
    client.put(CacheEntry("http://h:1"))
    (tmp_path / "real.jsonl").write_text("before")
    link = tmp_path / "link.jsonl"
    link.symlink_to("real.jsonl")

    run("export", str(link))

    assert link.is_symlink()
    assert KEY in (tmp_path / "real.jsonl").read_text()


@pytest.mark.parametrize("kind", ["missing folder", "folder", "pipe"])
def test_where_no_file_can_be_is_exit_code_2(run: Commands, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "all.jsonl"
    if kind == "missing folder":
        file = tmp_path / "none" / "all.jsonl"
    elif kind == "folder":
        file.mkdir()
    else:
        os.mkfifo(file)

    outcome = run("export", str(file))

    assert (outcome.code, outcome.out) == (2, "")
    assert str(file) in outcome.err
    assert outcome.err.count("\n") == 1


# --- statistics


def test_statistics_for_scripts_and_for_people(run: Commands, client: Client) -> None:
    client.put_many(proxies(3))

    record = run("stats", "--json").json
    table = run("stats").out

    assert record["entries"] == 3
    assert [tier["tier"] for tier in record["tiers"]] == ["l1", "l2", "l3"]
    assert {tier["state"] for tier in record["tiers"]} == {"active"}
    assert record["tiers"][0]["write_latency"].keys() == {"p50_us", "p99_us", "max_us"}
    rows = {line[:17].strip(): line[17:].split() for line in table.splitlines()}
    assert rows["entries"] == ["3", "3", "3", "3"]
    assert rows["state"] == ["active", "active", "active"]
    assert record["pool"].keys() >= {"ready", "leases", "acquire_latency", "loading", "journal_degraded"}
    assert rows["pool: leases"] == ["0"]
    assert len(rows["pool: acquire max"]) == 2


def test_watch_stats_writes_one_object_on_a_line(run: Commands) -> None:
    outcome = run("watch-stats", "--json", "--interval", "100ms", "--count", "3")

    assert (outcome.code, outcome.err) == (0, "")
    assert [line["sequence"] for line in outcome.json_lines] == [1, 2, 3]
    assert outcome.json_lines[0]["statistics"]["stats_subscribers"] == 1
    assert outcome.json_lines[0]["per_second"] is None
    assert outcome.json_lines[1]["per_second"] == dict.fromkeys(
        ("hits", "misses", "promotions", "demotions", "removals"), 0
    )


def test_watch_stats_writes_one_line_for_each_snapshot_where_there_is_no_terminal(run: Commands) -> None:
    outcome = run("watch-stats", "--interval", "100ms", "--count", "2")

    assert outcome.out.count("\n") == outcome.out.count("0 entries") == 2
    assert outcome.out.count("0.0 and 0.0 a second") == 1


def test_watch_stats_shows_a_table_on_a_terminal(run: Commands) -> None:
    code, shown = run.on_terminal("watch-stats", "--interval", "100ms", "--count", "2")

    assert code == 0
    assert shown.count("stats subscribers") >= 2


def test_ctrl_c_ends_watch_stats_quietly(run: Commands) -> None:
    process = subprocess.Popen(
        [PROGRAM, "watch-stats", "--json", "--target", run.target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (130, "")


# --- changes


def test_watch_writes_one_object_for_each_change(run: Commands, client: Client) -> None:
    kept = client.put(CacheEntry("http://192.0.2.1:1", source="mine", username="jane", password="secret")).key
    client.put(CacheEntry("http://192.0.2.2:1", source="other"))
    arguments = ["--json", "--existing", "--source", "mine", "--count", "5"]

    with started(run, "watch", *arguments) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        client.invalidate_by_health(kept)
        client.delete(kept)
        client.clear()
        out, err = process.communicate(timeout=60)

    records = [json.loads(line) for line in [*lines, *out.splitlines()]]
    assert (process.returncode, err) == (0, "")
    assert [(record["kind"], record["key"]) for record in records] == [
        ("existing", kept),
        ("synced", ""),
        ("health", kept),
        ("deleted", kept),
        ("cleared", ""),
    ]
    assert records[2]["entry"]["failure_count"] == 1
    assert "secret" not in "".join(lines)
    assert records[3]["entry"] is None
    assert records[3]["happened_at"].endswith("Z")
    assert records[3]["position"]["revision"] == records[3]["version"]
    assert records[0]["position"] is None


def test_watch_shows_a_line_for_each_change(run: Commands, client: Client) -> None:
    entry = CacheEntry("http://192.0.2.1:1", labels={"country": "DE"}, username="jane", password="secret")
    key = client.put(entry).key

    outcome = run("watch", "--existing", "--show-credentials", "--count", "2")

    existing, synced = outcome.out.splitlines()
    assert existing.split() == [
        "-" * 20, "existing", key, "http://192.0.2.1:1", "unknown", "failures=0", "country=DE",
    ]  # fmt: skip
    assert synced.split() == ["-" * 20, "synced"]


def test_watch_tells_the_kinds_that_were_asked_for(run: Commands, client: Client) -> None:
    with started(run, "watch", "--kind", "deleted", "--kind", "put", "--existing", "--count", "3") as process:
        assert process.stdout is not None
        assert "synced" in process.stdout.readline()
        key = client.put(CacheEntry("http://192.0.2.1:1")).key
        client.invalidate_by_health(key)
        client.delete(key)
        out, _ = process.communicate(timeout=60)

    assert [line.split()[1] for line in out.splitlines()] == ["put", "deleted"]


def test_a_kind_that_there_is_not_is_refused(run: Commands) -> None:
    outcome = run("watch", "--kind", "synced")

    assert outcome.code == 2
    assert "the kinds are put, health, left" in outcome.err


@pytest.mark.parametrize("label", ["country!=DE", "!country", "country"])
def test_watch_takes_no_label_that_a_proxy_lacks(run: Commands, label: str) -> None:
    outcome = run("watch", "--label", label)

    assert outcome.code == 2
    assert "--label" in outcome.err


def test_watch_says_when_it_has_to_begin_anew(fake_target: str, service: FakeService) -> None:
    compacted = error_details_pb2.ErrorInfo(reason="REVISION_COMPACTED", domain="proxystash")
    begun = pb.WatchResponse(revision=1, synced=True, history="h")
    service.watches.extend(
        [
            WatchScript([begun], Fault(grpc.StatusCode.OUT_OF_RANGE, "begin anew", [compacted])),
            WatchScript([begun], stay_open=True),
        ]
    )

    outcome = Commands(fake_target)("watch", "--count", "1")

    assert outcome.out.split()[1:5] == ["reset", "changes", "may", "have"]
    assert outcome.err == "proxystash: connection lost (begin anew); trying again\n"


def test_ctrl_c_ends_watch_quietly(run: Commands, client: Client) -> None:
    with started(run, "watch", "--existing") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (130, "")


def started(run: Commands, *arguments: str) -> subprocess.Popen[str]:
    """A command that goes on while the test does other things."""
    return subprocess.Popen(
        [PROGRAM, *arguments, "--target", run.target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
    )


# --- failures


@pytest.mark.parametrize(
    "arguments",
    [
        ["get", KEY], ["put", "http://h:1"], ["delete", KEY], ["clear", "--yes"], ["invalidate", KEY],
        ["list"], ["warm", "FILE"], ["export", "FILE"], ["stats"], ["watch-stats"], ["watch"],
    ],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_a_server_that_cannot_be_reached_is_one_line_and_exit_code_3(
    tmp_path: Path, arguments: list[str]
) -> None:
    file = tmp_path / "proxies.jsonl"
    file.write_text('{"url": "http://h:1"}\n')

    outcome = Commands(NOBODY)(
        *(str(file) if word == "FILE" else word for word in arguments), "--timeout", "0.3"
    )

    assert (outcome.code, outcome.out) == (3, "")
    assert outcome.err == (
        f"proxystash: cannot reach {NOBODY} (Connection refused); "
        "start a server with `proxystash-server serve`, or pass --target\n"
    )


def test_the_target_option_counts_for_more_than_the_environment(run: Commands) -> None:
    assert run("stats", "--target", run.target, env={"PROXYSTASH_TARGET": NOBODY}).code == 0
    assert run("stats", "--target", NOBODY).code == 3


def test_what_the_server_refuses_is_exit_code_2(run: Commands) -> None:
    outcome = run("put", "http://h:1", "--source", "s" * 129)

    assert (outcome.code, outcome.out) == (2, "")
    assert "source" in outcome.err
    assert outcome.err.count("\n") == 1


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
