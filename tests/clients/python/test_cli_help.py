"""Every command and every option says what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer.main

from proxystash.cli import app

from .commands import Commands

GROUP = typer.main.get_command(app)
NAMES = [
    "get", "put", "delete", "clear", "invalidate", "unban", "ping", "list", "count", "warm",
    "export", "import", "feed", "check-proxies", "stats", "watch-stats", "watch", "acquire", "release",
    "report", "leases", "targets", "health",
]  # fmt: skip

run = Commands("127.0.0.1:1")


def test_the_commands_are_those_that_are_promised() -> None:
    assert list(GROUP.commands) == NAMES  # type: ignore[attr-defined]  # typer types it as a plain command


@pytest.mark.parametrize("name", NAMES)
def test_a_command_and_each_of_its_options_is_documented(name: str) -> None:
    command = GROUP.commands[name]  # type: ignore[attr-defined]  # as above

    assert command.help
    undocumented = [parameter.name for parameter in command.params if not parameter.help]
    assert undocumented == []
    assert {"--target", "--timeout", "--json"} <= {
        option for parameter in command.params for option in parameter.opts
    }


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command_is_shown(name: str) -> None:
    outcome = run(name, "--help")

    assert (outcome.code, outcome.err) == (0, "")
    assert f"Usage: proxystash {name}" in outcome.out
    assert "PROXYSTASH_TARGET" in outcome.out


def test_the_exit_codes_are_documented() -> None:
    outcome = run("--help")

    assert outcome.code == 0
    assert all(name in outcome.out for name in NAMES)
    for code in ("0: done", "1: ", "2: ", "3: ", "130: ", "141: ", "143: "):
        assert f" {code}" in outcome.out


def test_no_command_at_all_shows_the_help_as_wrong_usage() -> None:
    outcome = run()

    assert outcome.code == 2
    assert "Usage: proxystash" in outcome.out


def test_the_version_is_that_of_the_distribution() -> None:
    import tomllib

    project = tomllib.loads(Path("clients/python/pyproject.toml").read_text(encoding="utf-8"))["project"]

    assert run("--version").out == f"proxystash {project['version']}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense"], "No such option"),
        (["nonsense"], "No such command"),
        (["get"], "Missing argument"),
        (["put", "a", "b"], "unexpected extra argument"),
        (["stats", "--timeout", "0"], "--timeout"),
        (["put", "http://h:1", "--ttl", "soon"], "write a duration as"),
        (["put", "http://h:1", "--label", "x"], "write a label as name=value"),
        (["put", "http://h:1", "--label", "=x"], "write a label as name=value"),
        (["put", "http://h:1", "--health", "fine"], "--health"),
        (["put", "http://h"], "the proxy URL has no port"),
        (["put", "http://ann@h:1", "--username", "bob"], "the URL has another username"),
        (["put", "http://ann:pw@h:1", "--password-stdin"], "the URL has a password, too"),
        (["get", "http://h"], "the proxy URL has no port"),
        (["get", "abc", "--username", "ann"], "goes with a proxy URL"),
        (["list", "--scheme", "gopher"], "the schemes are http"),
        (["list", "--limit", "0"], "--limit"),
        (["export", "proxies.txt"], "name the file .jsonl"),
        (["export", "proxies.txt", "--format", "xml"], "the formats are jsonl, csv"),
        (["export", "-", "--format", "host:port", "--include-credentials"], "has no place for them"),
        (["warm"], "Missing argument"),
        (["warm", "-", "--format", "xml"], "the formats are text, csv"),
        (["warm", "-", "--scheme", "gopher"], "the schemes are http"),
        (["warm", "-", "--identity", "name"], "--identity"),
        (["watch-stats", "--interval", "x"], "write a duration as"),
        (["acquire", "--label", "!country"], "write a label that a proxy has"),
        (["acquire", "--policy", "best-of-all"], "--policy"),
        (["acquire", "--count", "0"], "--count"),
        (["release"], "Missing argument"),
        (["release", "x", "--latency", "1s"], "goes with --outcome"),
        (["report", "fine", "k"], "OUTCOME"),
        (["report", "success"], "say of which proxies"),
    ],
)
def test_wrong_usage_is_one_line_that_says_where_to_look(arguments: list[str], message: str) -> None:
    outcome = run(*arguments)

    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("proxystash: ")
    assert outcome.err.count("\n") == 1
    assert message in outcome.err
    assert "--help`" in outcome.err
