"""The command check-proxies, as a process against a real server, local proxies and a local site."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from proxystash import CacheEntry, Client, HealthMonitoring
from tests.clients.python.commands import Commands, Running, going_on
from tests.clients.python.feeding.site import Request, Site
from tests.clients.python.waiting import wait_until

from .conftest import echo
from .proxies import LocalProxy, running_proxies

SECRET = "s3cr3t"


@pytest.fixture
def run(target: str) -> Commands:
    return Commands(target)


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target, timeout=60) as client:
        yield client


def checking(target: str, out: Path, *arguments: str) -> AbstractContextManager[Running]:
    """A checker that goes on; a line is a check."""
    return going_on(target, out, "check-proxies", "--json", *arguments)


def test_what_is_said_of_each_proxy_is_the_truth(run: Commands, client: Client, site: Site) -> None:
    good = LocalProxy(exit_address="127.0.0.5", credentials=("ann", SECRET))
    telling = LocalProxy(adds={"Via": "1.1 x"})
    lying = LocalProxy(answer=b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    closed = LocalProxy(credentials=("bob", "other"))
    with running_proxies(good, telling, lying, closed):
        urls = {
            "good": f"socks5://{good.location}", "telling": f"http://{telling.location}",
            "lying": f"http://{lying.location}", "closed": f"http://{closed.location}",
            "gone": "socks4://127.0.0.1:1",
        }  # fmt: skip
        client.put_many(
            [
                CacheEntry(urls["good"], username="ann", password=SECRET, labels={"mine": "1"}),
                CacheEntry(urls["closed"], username="ann", password=SECRET),
                *(CacheEntry(urls[name]) for name in ("telling", "lying", "gone")),
            ]
        )
        outcome = run("check-proxies", site.url("/"), "--once", "--json")
        again = run("check-proxies", site.url("/"), "--once", "--json")

    assert (outcome.code, outcome.err) == (0, "")
    assert SECRET not in outcome.out
    assert {check["proxy_url"]: check["outcome"] for check in outcome.json_lines} == {
        urls["good"]: "success", urls["telling"]: "success", urls["lying"]: "bad_content",
        urls["closed"]: "auth_error", urls["gone"]: "connect_error",
    }  # fmt: skip
    stored = {entry.proxy_url: entry for entry in client.list()}
    entry = stored[urls["good"]]
    assert entry.health_status == "healthy"
    assert entry.labels == {"mine": "1", "anonymity": "elite", "exit_address": "127.0.0.5"}
    assert stored[urls["telling"]].labels["anonymity"] == "anonymous"
    for name, works in {
        "good": True,
        "telling": True,
        "lying": False,
        "gone": False,
        "closed": False,
    }.items():
        monitoring = stored[urls[name]].health_monitoring
        assert monitoring is not None
        assert monitoring.last_health_check is not None
        assert monitoring.next_check_time is not None
        assert monitoring.next_check_time > monitoring.last_health_check
        assert (monitoring.total_health_checks, monitoring.total_health_check_failures) == (1, not works)
        assert (monitoring.last_health_error is None) is works
        health = client.pool.health(stored[urls[name]])
        assert health is not None
        assert round(health.overall.successes) == works
        assert health.leases == 0
    # Nothing is due so soon.
    assert (again.code, again.out) == (0, "")


def test_only_what_is_due_and_wanted_is_checked(run: Commands, client: Client, site: Site) -> None:
    proxy = LocalProxy()
    with running_proxies(proxy):
        client.put(CacheEntry(f"http://{proxy.location}", labels={"country": "DE"}, source="a"))
        client.put(CacheEntry(f"socks5://{proxy.location}", source="b"))

        checks = run("check-proxies", site.url("/"), "--once", "--json", "--label", "country=DE").json_lines
        assert [check["proxy_url"] for check in checks] == [f"http://{proxy.location}"]
        checks = run("check-proxies", site.url("/"), "--once", "--json", "--scheme", "socks5").json_lines
        assert [check["proxy_url"] for check in checks] == [f"socks5://{proxy.location}"]


def test_what_is_not_due_yet_is_given_back_unchecked(run: Commands, client: Client, site: Site) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    due, early = LocalProxy(), LocalProxy()
    with running_proxies(due, early):
        for proxy, moment in ((due, later - timedelta(hours=2)), (early, later)):
            monitoring = HealthMonitoring(next_check_time=moment, consecutive_health_failures=3)
            client.put(CacheEntry(f"http://{proxy.location}", health_monitoring=monitoring))

        checks = run("check-proxies", site.url("/"), "--once", "--json").json_lines

    assert [check["proxy_url"] for check in checks] == [f"http://{due.location}"]
    assert early.uses == 0
    assert [*client.pool.leases()] == []


def test_failures_in_a_row_put_the_next_check_off(run: Commands, client: Client, site: Site) -> None:
    monitoring = HealthMonitoring(consecutive_health_failures=2, total_health_checks=5)
    client.put(CacheEntry("http://127.0.0.1:1", health_monitoring=monitoring))

    run("check-proxies", site.url("/"), "--once", "--every", "10m")

    [entry] = client.list()
    after = entry.health_monitoring
    assert after is not None
    assert after.next_check_time is not None
    assert after.last_health_check is not None
    # The third: four times as long, less a tenth at most.
    assert 36 <= (after.next_check_time - after.last_health_check) / timedelta(minutes=1) <= 40
    assert (after.consecutive_health_failures, after.total_health_checks) == (3, 6)
    assert after.last_health_error == "connect_error: the proxy is not there"


def test_no_more_run_at_once_or_begin_in_a_second_than_may(run: Commands, client: Client, site: Site) -> None:
    active, most, begun = 0, 0, []
    lock = threading.Lock()

    def answer(request: Request) -> None:
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
            begun.append(time.monotonic())
        site.stopping.wait(0.3)
        echo(request)
        with lock:
            active -= 1

    site.answers["/"] = answer
    proxies = [LocalProxy() for _ in range(8)]
    with running_proxies(*proxies):
        client.put_many([CacheEntry(f"http://{proxy.location}") for proxy in proxies])
        run("check-proxies", site.url("/"), "--once", "--concurrency", "2", "--rate", "1000")
        assert (len(begun), most) == (9, 2)
        client.clear()
        begun.clear()
        client.put_many([CacheEntry(f"socks5://{proxy.location}") for proxy in proxies])
        run("check-proxies", site.url("/"), "--once", "--rate", "5")

    # Seven pauses of a fifth of a second; the first request is the direct one.
    assert len(begun) == 9
    assert begun[-1] - begun[1] > 1


def test_while_the_target_is_down_nobody_is_to_blame_and_nothing_is_checked(
    target: str, client: Client, site: Site, tmp_path: Path
) -> None:
    proxy = LocalProxy()
    down = False

    def answer(request: Request) -> None:
        if down:
            request.answer(503)
        else:
            echo(request)

    site.answers["/"] = answer
    with running_proxies(proxy):
        client.put(CacheEntry(f"http://{proxy.location}"))
        with checking(target, tmp_path / "out", site.url("/"), "--every", "1s") as checker:
            wait_until(lambda: len(checker.lines()) >= 1)
            down = True
            wait_until(lambda: checker.lines()[-1]["outcome"] == "target_error")
            used = proxy.uses
            # Asked directly again and again, and not through the proxy.
            asked = len(site.headers_of("/"))
            wait_until(lambda: len(site.headers_of("/")) >= asked + 2)
            assert proxy.uses == used
            health = client.pool.health(f"http://{proxy.location}")
            assert health is not None
            assert health.overall.failures == 0
            down = False
            wait_until(lambda: checker.lines()[-1]["outcome"] == "success")
            code, err = checker.end(signal.SIGTERM)

    assert code == 143
    assert Counter(check["outcome"] for check in checker.lines())["target_error"] == 1
    assert err.splitlines() == [
        "proxystash: the URL itself does not answer (status 503); waiting for it",
        "proxystash: the URL answers again",
    ]


def test_a_target_that_is_down_from_the_beginning_is_told(run: Commands, client: Client, site: Site) -> None:
    client.put(CacheEntry("http://127.0.0.1:1"))

    outcome = run("check-proxies", site.url("/missing"), "--once")

    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.endswith("the URL itself does not answer: status 404\n")
    [entry] = client.list()
    assert entry.health_monitoring is None


def test_two_checkers_share_the_work(target: str, client: Client, site: Site, tmp_path: Path) -> None:
    proxies = [LocalProxy() for _ in range(30)]
    with running_proxies(*proxies):
        client.put_many([CacheEntry(f"http://{proxy.location}") for proxy in proxies])
        with (
            checking(target, tmp_path / "one", site.url("/"), "--rate", "10") as one,
            checking(target, tmp_path / "two", site.url("/"), "--rate", "10") as two,
        ):
            wait_until(lambda: len(one.lines()) + len(two.lines()) >= 30)
            assert one.end(signal.SIGTERM) == (143, "")
            assert two.end(signal.SIGTERM) == (143, "")

    checked = Counter(check["proxy_url"] for checker in (one, two) for check in checker.lines())
    assert checked == {f"http://{proxy.location}": 1 for proxy in proxies}
    assert one.lines()
    assert two.lines()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_checker_that_ends_in_mid_check_leaves_nothing_behind(
    target: str, client: Client, site: Site, tmp_path: Path, number: signal.Signals
) -> None:
    """Given that it has begun with one of those that it holds."""
    proxies = [LocalProxy(silent=True) for _ in range(5)]
    with running_proxies(*proxies):
        client.put_many([CacheEntry(f"socks5://{proxy.location}") for proxy in proxies])
        with checking(
            target, tmp_path / "out", site.url("/"), "--check-timeout", "20", "--rate", "5"
        ) as checker:
            wait_until(lambda: any(proxy.uses for proxy in proxies))
            code, err = checker.end(number)
        leases = [*client.pool.leases()]

    assert (code, err) == ({signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number], "")
    # Killed, it cannot give them back, and they end by themselves.
    assert len(leases) == (5 if number == signal.SIGKILL else 0)
    for lease in leases:
        assert round((lease.expires_at - lease.acquired_at).total_seconds()) == 70
    assert all(entry.health_monitoring is None for entry in client.list())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ftp://h/"], "write a URL with http or https, without credentials"),
        ([f"http://ann:{SECRET}@h/"], "write a URL with http or https, without credentials"),
        (["http://h:port/"], "write a URL with http or https, without credentials"),
        (["http://h/", "--every", "0s"], "at least 1s"),
        (["http://h/", "--rate", "0"], "--rate"),
    ],
)
def test_wrong_usage_is_one_line(run: Commands, arguments: list[str], message: str) -> None:
    outcome = run("check-proxies", *arguments)

    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert SECRET not in outcome.err


def test_a_server_that_is_away_is_exit_code_3(site: Site) -> None:
    outcome = Commands("127.0.0.1:1")("check-proxies", site.url("/"), "--once", "--timeout", "0.5")

    assert (outcome.code, outcome.out) == (3, "")


def test_without_its_libraries_it_says_what_to_install(run: Commands, tmp_path: Path) -> None:
    (tmp_path / "aiohttp_socks.py").write_text("raise ModuleNotFoundError('none', name='aiohttp_socks')\n")

    outcome = run("check-proxies", "http://h/", env={"PYTHONPATH": str(tmp_path)})

    assert (outcome.code, outcome.err) == (
        2, "proxystash: proxies are tried with aiohttp and aiohttp-socks; install proxystash[check]\n",
    )  # fmt: skip


def test_people_see_a_line_for_all_or_for_each(run: Commands, client: Client, site: Site) -> None:
    proxy = LocalProxy()
    with running_proxies(proxy):
        client.put(CacheEntry(f"http://{proxy.location}"))
        client.put(CacheEntry("http://127.0.0.1:1"))
        outcome = run("check-proxies", site.url("/"), "--once", "-v")

    *checks, summary = outcome.out.splitlines()
    assert len(checks) == 2
    assert any("  success  " in line and line.endswith("  elite  127.0.0.9") for line in checks)
    assert summary.endswith("checked 2: connect_error 1, success 1")
