"""The page on settings, the help of the flags, and the command that shows what is in effect."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from proxystash_server.settings import FLAGS, SECRETS, Settings, choices_of, load_settings, variable_of
from proxystash_server.settings_text import document_settings, show_settings
from tests.support.scripts import ROOT, run


def settings_command(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    result = run(sys.executable, "-m", "proxystash_server", *arguments, env=env)
    return result.returncode, result.stdout, result.stderr


def test_the_page_is_what_the_settings_say() -> None:
    """Write it anew with: proxystash-server settings --markdown > docs/settings.md"""  # noqa: D400 - a command
    assert (ROOT / "docs" / "settings.md").read_text() == "\n".join(document_settings()) + "\n"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented_with_its_flag_and_its_variable(name: str) -> None:
    (row,) = [line for line in document_settings() if line.startswith(f"| `{name}` |")]
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    assert len(cells) == 6
    assert cells[1] == (
        f"`{FLAGS[name]}`" if name not in SECRETS else "none: a command line is visible to others"
    )
    assert cells[2] == f"`{variable_of(name)}`"
    assert cells[3] == ", ".join(f"`{choice}`" for choice in choices_of(name))
    assert cells[5].endswith(".")
    assert len(cells[5]) > 20


@pytest.mark.parametrize("command", ["serve", "settings"])
def test_the_help_of_a_command_has_every_flag_and_no_other_setting(command: str) -> None:
    code, output, _ = settings_command(command, "--help", env={"COLUMNS": "200", "TERM": "dumb"})
    assert code == 0
    shown = {word for word in output.replace(",", " ").split() if word.startswith("--")}
    assert shown - {"--help", "--config", "--markdown"} == set(FLAGS.values())


def test_the_help_of_a_setting_says_what_it_may_be() -> None:
    _, output, _ = settings_command("serve", "--help", env={"COLUMNS": "200", "TERM": "dumb"})
    rows = {row.split()[1]: row for row in output.splitlines() if row.startswith("│ --")}
    assert choices_of("l2_backend") == ("jsonl", "sqlite")
    assert choices_of("l1_enabled") == ("true", "false")
    assert choices_of("threads") == ()
    for name, flag in FLAGS.items():
        assert "|".join(choices_of(name)) in rows[flag]


def test_the_help_of_a_command_begins_with_its_own_options() -> None:
    for command, own in {
        "check": ["--repair", "--json"],
        "rotate-key": ["--new-key-file"],
        "import-proxywhirl": ["--proxywhirl-key-file", "--without-credentials", "--json"],
        "settings": ["--markdown"],
    }.items():
        _, output, _ = settings_command(command, "--help", env={"COLUMNS": "200", "TERM": "dumb"})
        options = [row.split()[1] for row in output.splitlines() if row.startswith("│ --")]
        assert options[: len(own)] == own


@pytest.mark.parametrize(
    "arguments",
    [("check", ""), ("rotate-key", " "), ("rotate-key", "--new-key-file", ""), ("import-proxywhirl", "")],
)
def test_an_empty_path_on_the_command_line_is_refused(arguments: tuple[str, ...]) -> None:
    code, output, errors = settings_command(*arguments)
    assert (code, output) == (2, "")
    assert "is empty" in errors


def test_what_is_shown_is_a_file_that_has_the_same_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROXYSTASH_SOURCE_TTL", 'webshare=2h,a "quoted" name=10m')
    loaded = load_settings({"listen": "127.0.0.1:0", "l1_enabled": "false"}, None)
    file = tmp_path / "shown.toml"
    file.write_text("\n".join(show_settings(loaded)))
    monkeypatch.delenv("PROXYSTASH_SOURCE_TTL")
    assert load_settings({}, file).settings == loaded.settings


def test_the_command_shows_where_each_setting_comes_from_and_no_secret(tmp_path: Path) -> None:
    config = tmp_path / "proxystash.toml"
    config.write_text('durability = "full"\nencryption_key = "planted-key"\n')
    code, output, errors = settings_command(
        "settings", "--config", str(config), "--threads", "4", env={"PROXYSTASH_DEFAULT_TTL": "15m"}
    )
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    assert "threads = 4  # flag --threads" in lines
    assert "default_ttl = 900  # environment variable PROXYSTASH_DEFAULT_TTL" in lines
    assert f'durability = "full"  # file {config}' in lines
    assert "l1_max_entries = 1000  # default" in lines
    assert f"# encryption_key is set (file {config})" in lines
    assert "# encryption_key_previous is not set (default)" in lines
    assert "planted-key" not in output
    assert tomllib.loads(output)["threads"] == 4


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    config = tmp_path / "proxystash.toml"
    config.write_text("threads = 5\n")
    code, output, _ = settings_command("settings", env={"PROXYSTASH_CONFIG": str(config)})
    assert (code, f"threads = 5  # file {config}" in output) == (0, True)


@pytest.mark.parametrize("command", ["serve", "settings"])
def test_a_wrong_setting_ends_the_command_with_2_and_a_line_for_each_fault(command: str) -> None:
    code, output, errors = settings_command(command, "--threads", "0", "--l2-backend", "redis")
    assert (code, output) == (2, "")
    assert [line.partition(" (")[0] for line in errors.splitlines()] == [
        "proxystash-server: l2_backend",
        "proxystash-server: threads",
    ]


def test_an_unknown_flag_ends_the_command_with_2() -> None:
    code, _, errors = settings_command("serve", "--l1-max-entires", "5")
    assert code == 2
    assert "--l1-max-entires" in errors


def test_the_command_tells_its_version() -> None:
    assert settings_command("--version") == (0, "proxystash-server 0.1.0\n", "")
