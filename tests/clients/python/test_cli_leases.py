"""The commands that borrow, as processes against a real server."""

from __future__ import annotations

import csv
from collections.abc import Iterator

import pytest

from proxystash import CacheEntry, Client, Outcome

from .commands import Commands

SECRET = "s3cr3t-p4ss"


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target, timeout=60) as client:
        yield client


@pytest.fixture
def run(target: str) -> Commands:
    return Commands(target)


def test_a_proxy_is_borrowed_listed_reported_and_given_back(client: Client, run: Commands) -> None:
    entry = CacheEntry("http://192.0.2.60:1", username="ann", password=SECRET, labels={"country": "DE"})
    key = client.put(entry).key

    borrowed = run(
        *[
            "acquire",
            "--for",
            "Shop.Example",
            "--label",
            "country=DE",
            "--scheme",
            "http",
            "--lease-duration",
            "5m",
        ],
        *["--policy", "best", "--holder", "me", "--request-id", "once", "--json"],
    )

    assert (borrowed.code, borrowed.err) == (0, "")
    lease = borrowed.json
    assert SECRET not in borrowed.out
    assert (lease["key"], lease["target"], lease["holder"]) == (key, "shop.example", "me")
    assert lease["entry"]["proxy_url"] == "http://192.0.2.60:1"
    assert "username" not in lease["entry"]
    again = run("acquire", "--request-id", "once", "--show-credentials", "-o", "csv")
    [row] = csv.DictReader(again.out.splitlines())
    assert row["lease_id"] == lease["lease_id"]
    assert row["proxy_url"] == f"http://ann:{SECRET}@192.0.2.60:1"

    listed = run("leases", "--holder", "me", "--for", "shop.example", "--key", key)
    assert listed.out.splitlines()[0].split()[:4] == ["lease_id", "key", "target", "holder"]
    assert lease["lease_id"] in listed.out
    assert run("leases", "--holder", "nobody", "-o", "json").out == "[]\n"

    reported = run("report", "success", "--lease", lease["lease_id"], "--latency", "400ms", "--count", "3")
    assert (reported.code, reported.err) == (0, "")
    assert "score 0." in reported.out
    released = run("release", lease["lease_id"], "--outcome", "rate_limited", "--retry-after", "3h")
    assert (released.code, released.err) == (0, "")
    assert f"released {lease['lease_id']}; score" in released.out
    assert "rests at the target for 2h59m" in released.out

    health = run("health", key, "--json").json
    assert health["overall"]["latency_seconds"] == 0.4
    [at] = health["targets"]
    assert (at["target"], at["standing"]["last_outcome"]) == ("shop.example", "rate_limited")
    shown = run("health", "http://ann@192.0.2.60:1")
    assert "(everywhere)" in shown.out
    assert "0 of 1 leases held" in shown.out
    [target] = [one for one in run("targets", "--json").json_lines if one["target"] == "shop.example"]
    assert target["resting"] == 1
    assert "shop.example" in run("targets").out

    none = run("acquire", "--for", "shop.example", "--label", "country=DE")
    assert (none.code, none.out) == (1, "")
    assert "rest after failures; the next may come free in 2h" in none.err


def test_what_is_not_there_is_told(client: Client, run: Commands) -> None:
    nothing = run("acquire", "--wait", "100ms")
    assert (nothing.code, nothing.err) == (1, "proxystash: no proxy matches\n")
    gone = run("release", "no-such-lease", "another")
    assert gone.code == 1
    assert gone.err.splitlines() == [
        "proxystash: no lease with id no-such-lease",
        "proxystash: no lease with id another",
    ]
    assert run("release", "no-such-lease", "--json").json == {
        "lease_id": "no-such-lease",
        "released": False,
        "effect": None,
    }
    unknown = run("report", "connect_error", "http://192.0.2.61:1")
    assert (unknown.code, unknown.out) == (1, "")
    assert "no proxy with key" in unknown.err
    ended = run("report", "success", "--lease", "no-such-lease")
    assert ended.code == 1
    assert "no such lease is known" in ended.err
    refused = run(
        "report", "success", "--lease", "no-such-lease", "http://192.0.2.61:1", "--retry-after", "1s"
    )
    assert refused.code == 2
    assert refused.err.count("retry_after is for") == 2
    assert run("health", "nothing").code == 1
    assert run("leases").err == "no leases\n"


def test_failures_by_key_make_a_proxy_rest(client: Client, run: Commands) -> None:
    keys = [client.put(CacheEntry(f"http://192.0.2.62:{port}")).key for port in (1, 2)]

    told = run("report", "connect_error", *keys, "--json")

    assert [one["key"] for one in told.json_lines] == keys
    assert all(one["resting_until"] for one in told.json_lines)
    for key in keys:
        known = client.pool.health(key)
        assert known is not None
        assert known.overall.last_outcome is Outcome.CONNECT_ERROR
        assert known.overall.resting_until is not None


def test_a_session_and_what_is_excluded_are_asked_for(client: Client, run: Commands) -> None:
    keys = [client.put(CacheEntry(f"http://192.0.2.63:{port}")).key for port in range(1, 5)]
    first = run("acquire", "--session", "account-1", "--json").json
    assert first["session_id"] == "account-1"
    assert run("release", first["lease_id"], "--outcome", "success").code == 0
    with client.pool.acquire(session="account-1") as lease:
        assert lease.key == first["key"]
    excluded = [word for key in keys[1:] for word in ("--exclude", key)]
    assert run("acquire", "--count", "4", *excluded, "--json").json["key"] == keys[0]
