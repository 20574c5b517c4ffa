"""The command feed, as a process against a real server and a site that misbehaves."""

from __future__ import annotations

import gzip
import signal
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from proxystash import CacheEntry, Client
from tests.clients.python.commands import PROGRAM, Commands, Running, environment, going_on
from tests.clients.python.waiting import wait_until

from .site import Request, Site

SECRET = "s3cr3t-p4ss"
NOBODY = "127.0.0.1:1"


@pytest.fixture
def run(target: str) -> Commands:
    return Commands(target)


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target, timeout=60) as client:
        yield client


def stored(client: Client) -> dict[str, str]:
    """The sources of what is stored, by URL."""
    return {entry.proxy_url: entry.source for entry in client.list()}


def feeding(target: str, tmp_path: Path, *arguments: str) -> AbstractContextManager[Running]:
    """A feed that goes on; a line is a round."""
    return going_on(target, tmp_path / "feed.out", "feed", "--every", "1s", "--json", *arguments)


# --- one round


def test_files_and_urls_are_loaded_under_their_names(
    run: Commands, client: Client, site: Site, tmp_path: Path
) -> None:
    file = tmp_path / "socks5.txt.gz"
    file.write_bytes(gzip.compress(b"192.0.2.1:1080\nnothing\n"))
    site.serves(gzip.compress(b"ip,port\n192.0.2.2,80\n"), "/a.csv", Content_Encoding="gzip")

    outcome = run("feed", "--once", str(file), site.url(f"/a.csv?key={SECRET}"))

    assert (outcome.code, outcome.err) == (0, "")
    by_file, by_site = (f"{file}", site.url("/a.csv?***"))
    assert f"  {by_file}: loaded 1, kept 0, skipped 1, failed 0\n" in outcome.out
    assert f"  {by_site}: loaded 1, kept 0, skipped 0, failed 0\n" in outcome.out
    assert "  skipped line 2: the proxy URL has no port\n" in outcome.out
    assert (
        "  note: no scheme was given, socks5 was taken from the name socks5.txt (1 record)\n" in outcome.out
    )
    assert stored(client) == {"socks5://192.0.2.1:1080": by_file, "http://192.0.2.2:80": by_site}


def test_what_is_stored_already_is_merged_or_kept_or_replaced(
    run: Commands, client: Client, site: Site
) -> None:
    site.serves(b"192.0.2.1:80\n192.0.2.2:80\n")
    client.put(CacheEntry("http://192.0.2.1:80", labels={"country": "DE"}))

    kept = run("feed", "--once", "--if-absent", "--json", site.url()).json
    merged = run("feed", "--once", "--json", "--source", "mine", site.url()).json

    assert (kept["outcome"], kept["loaded"], kept["kept"]) == ("loaded", 1, 1)
    assert (merged["loaded"], merged["kept"]) == (2, 0)
    entry = client.get("http://192.0.2.1:80")
    assert entry is not None
    assert (entry.entry.labels, entry.entry.source) == ({"country": "DE"}, "mine")
    run("feed", "--once", "--replace", site.url())
    assert {tuple(entry.labels) for entry in client.list()} == {()}


def test_sources_are_read_from_standard_input(run: Commands, client: Client, site: Site) -> None:
    site.serves(b"192.0.2.1:80\n")

    outcome = run("feed", "--once", "-", stdin=f"# mine\n\n{site.url(userinfo=f'ann:{SECRET}')}\n")

    assert outcome.code == 0
    assert SECRET not in outcome.out + outcome.err
    assert "Authorization" in site.headers_of("/list.txt")[0]
    assert stored(client) == {"http://192.0.2.1:80": site.url()}


def test_one_that_fails_is_exit_code_1_and_the_others_are_loaded(
    run: Commands, client: Client, site: Site, tmp_path: Path
) -> None:
    site.serves(b"192.0.2.1:80\n")

    outcome = run("feed", "--once", site.url("/missing"), str(tmp_path / "none.txt"), site.url())

    assert (outcome.code, outcome.err) == (1, "")
    assert f"  {site.url('/missing')}: failed: answers with status 404\n" in outcome.out
    assert f"  {tmp_path}/none.txt: failed: cannot be read: No such file or directory\n" in outcome.out
    assert len(stored(client)) == 1


def test_a_server_that_is_away_is_exit_code_3(site: Site) -> None:
    site.serves(b"192.0.2.1:80\n")

    outcome = Commands(NOBODY)("feed", "--once", "--timeout", "0.5", site.url())

    assert (outcome.code, outcome.err) == (3, "")
    assert "failed: " in outcome.out


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", None),
        (b"<html>\n<p>No proxies</p>\n", "nothing could be loaded; line 1: "),
        (b"<p>\n" * 20_000, "none of the first 10,000 records could be loaded"),
        (b'{"error": "quota"}', "holds no list of proxies"),
        (bytes(1000), "is not a text file"),
        (b"\xff" * 2_000_000, "nothing could be loaded; line 1: longer than 1,048,576 bytes"),
        (b"[" * 100_000, "nothing could be loaded; line 1: "),
        (gzip.compress(bytes(3 << 20)), "larger than 1,048,576 bytes when unpacked"),
        (gzip.compress(b"192.0.2.1:80\n")[:-4], "its gzip is damaged or ends too early"),
    ],
    ids=["empty", "page", "long page", "other JSON", "zeros", "one line", "deep JSON", "bomb", "cut"],
)
def test_garbage_is_a_failure_that_changes_nothing(
    run: Commands, client: Client, site: Site, body: bytes, reason: str | None
) -> None:
    site.serves(body)

    outcome = run("feed", "--once", "--json", "--max-size", "1" if len(body) < 1 << 20 else "3", site.url())

    assert outcome.code == (0 if reason is None else 1)
    error = outcome.json["error"]
    assert error is None if reason is None else reason in error
    assert stored(client) == {}
    assert outcome.err == ""


def test_no_list_changes_the_credentials_that_somebody_else_has_stored(
    run: Commands, client: Client, site: Site
) -> None:
    client.put(CacheEntry("http://gw.example:80", username="ann", password=SECRET))
    site.serves(b"http://ann:other@gw.example:80\nhttp://ann@gw.example:80\nhttp://bob:pw@gw.example:80\n")

    outcome = run("feed", "--once", site.url())

    assert outcome.code == 0
    assert "loaded 1, kept 0, skipped 2, failed 0" in outcome.out
    assert "  skipped line 1: stored with other credentials, from another source\n" in outcome.out
    found = client.get("http://ann@gw.example:80")
    assert found is not None
    assert (found.entry.password, found.entry.source) == (SECRET, "")


def test_a_source_changes_the_credentials_that_it_has_given(
    run: Commands, client: Client, site: Site
) -> None:
    for password in ("first", "second"):
        site.serves(f"http://ann:{password}@gw.example:80\n".encode())
        assert run("feed", "--once", site.url()).code == 0

    assert [entry.password for entry in client.list(include_credentials=True)] == ["second"]
    site.serves(b"http://ann:third@gw.example:80\n", "/other.txt")
    run("feed", "--once", "--replace", site.url("/other.txt"))
    assert [entry.password for entry in client.list(include_credentials=True)] == ["third"]


def test_no_credential_is_shown_whatever_fails(run: Commands, site: Site) -> None:
    def never(request: Request) -> None:
        site.stopping.wait()

    site.answers["/never"] = never
    site.answers["/loop"] = lambda request: request.answer(302, headers={"Location": f"/loop?key={SECRET}"})
    site.answers["/away"] = lambda request: request.answer(
        302, headers={"Location": f"http://ann:{SECRET}@127.0.0.1:1/"}
    )
    site.serves(f"http://ann:{SECRET}@\n{SECRET}\nann:{SECRET}@h:0\n".encode(), "/list")
    urls = [
        site.url(f"{path}?key={SECRET}", userinfo=f"ann:{SECRET}")
        for path in ("/never", "/loop", "/away", "/list", "/missing")
    ]
    arguments = ("feed", "--once", "-v", "--fetch-timeout", "0.5", *urls)

    for outcome in (run(*arguments), run(*arguments, "--json")):
        assert outcome.code == 1
        assert SECRET not in outcome.out + outcome.err
        assert len([line for line in outcome.out.splitlines() if "127.0.0.1" in line]) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-"], "there is none"),
        ([f"ftp://ann:{SECRET}@h/x"], "source 1: it is neither a file nor a URL with http or https"),
        (["a.txt", "a.txt"], "a.txt is given twice"),
        (["a.txt", "--every", "0.5s"], "at least 1s"),
        (["a.txt", "--max-size", "0"], "--max-size"),
    ],
)
def test_wrong_usage_is_told_in_one_line(run: Commands, arguments: list[str], message: str) -> None:
    outcome = run("feed", *arguments)

    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert SECRET not in outcome.err


def test_files_need_no_aiohttp_and_urls_say_that_they_do(run: Commands, site: Site, tmp_path: Path) -> None:
    (tmp_path / "aiohttp.py").write_text("raise ModuleNotFoundError('no aiohttp here', name='aiohttp')\n")
    (tmp_path / "list.txt").write_text("192.0.2.1:80\n")
    env = {"PYTHONPATH": str(tmp_path)}

    assert run("feed", "--once", str(tmp_path / "list.txt"), env=env).code == 0
    outcome = run("feed", "--once", site.url(), env=env)
    assert (outcome.code, outcome.err) == (
        2, "proxystash: URLs are fetched with aiohttp; install proxystash[feed]\n",
    )  # fmt: skip


def test_what_is_under_way_is_shown_on_a_terminal(run: Commands, site: Site) -> None:
    site.serves(b"192.0.2.1:80\n" * 1000)

    code, shown = run.on_terminal("feed", "--once", site.url())

    assert code == 0
    assert "list.txt: loaded 1, kept 0, skipped 999, failed 0" in shown
    assert "━" in shown


# --- round after round


def test_an_unchanged_list_is_said_to_be_so_and_a_change_is_loaded(
    target: str, client: Client, site: Site, tmp_path: Path
) -> None:
    version = 1

    def answer(request: Request) -> None:
        if request.headers["If-None-Match"] == f'"{version}"':
            request.answer(304)
        else:
            request.answer(200, f"192.0.2.{version}:80\n".encode(), {"ETag": f'"{version}"'})

    site.answers["/list.txt"] = answer
    with feeding(target, tmp_path, site.url()) as feed:
        wait_until(lambda: len(feed.lines()) >= 2)
        version = 2
        wait_until(lambda: len(stored(client)) == 2)
        wait_until(lambda: feed.lines()[-1]["outcome"] == "unchanged" and len(feed.lines()) >= 4)
        outcomes = [one["outcome"] for one in feed.lines()]
        assert outcomes[0] == "loaded"
        assert outcomes[1] == "unchanged"
        assert outcomes.count("loaded") == 2
        assert all(0.9 <= one["next_in_seconds"] <= 1.1 for one in feed.lines())
        assert feed.end(signal.SIGTERM) == (143, "")


def test_a_source_that_never_answers_holds_up_nobody(
    target: str, client: Client, site: Site, tmp_path: Path
) -> None:
    asked = []

    def never(request: Request) -> None:
        asked.append(1)
        site.stopping.wait()

    site.answers["/never"] = never
    site.serves(b"192.0.2.1:80\n")
    with feeding(target, tmp_path, site.url("/never"), site.url()) as feed:
        wait_until(lambda: len(feed.lines()) >= 3)
        assert asked
        assert {one["source"] for one in feed.lines()} == {site.url()}
        # In the middle of a fetch.
        assert feed.end(signal.SIGINT) == (130, "")


def test_a_feed_outlives_an_outage_of_its_server_and_can_be_stopped_in_it(site: Site, tmp_path: Path) -> None:
    site.serves(b"192.0.2.1:80\n")
    with feeding(NOBODY, tmp_path, "--timeout", "0.2", site.url()) as feed:
        wait_until(lambda: len(feed.lines()) >= 2)
        assert {one["outcome"] for one in feed.lines()} == {"failed"}
        assert feed.end(signal.SIGTERM) == (143, "")
    with feeding(NOBODY, tmp_path, "--timeout", "1000", site.url()) as feed:
        # In the middle of a load that waits for the server.
        wait_until(lambda: len(site.headers_of("/list.txt")) >= 3)
        assert feed.end(signal.SIGTERM) == (143, "")


def test_a_pipe_that_nobody_reads_any_more_ends_it(target: str, site: Site) -> None:
    site.serves(b"192.0.2.1:80\n")
    with subprocess.Popen(
        [PROGRAM, "feed", "--every", "1s", site.url()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment({"PROXYSTASH_TARGET": target}),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "loaded 1" in process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == ""
