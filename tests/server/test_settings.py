"""Settings: which source wins, and what is refused in what words."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from annotated_types import Le

from proxystash_server.app import cache_config
from proxystash_server.cache import CacheManager
from proxystash_server.settings import (
    CLIENT_VARIABLES,
    FLAGS,
    SECRETS,
    LoadedSettings,
    Settings,
    SettingsError,
    load_settings,
    variable_of,
)
from tests.support.scripts import ROOT


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("PROXYSTASH_"):
            monkeypatch.delenv(name)


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "proxystash.toml"
    path.write_text(text)
    return path


def faults(flags: dict[str, str] | None = None, config: Path | None = None) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(flags or {}, config)
    return caught.value.lines


class TestPrecedence:
    def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = toml(tmp_path, "threads = 3\nl1_max_entries = 3\nl2_max_entries = 3\n")
        monkeypatch.setenv("PROXYSTASH_THREADS", "4")
        monkeypatch.setenv("PROXYSTASH_L1_MAX_ENTRIES", "4")
        loaded = load_settings({"threads": "5"}, file)
        settings = loaded.settings
        assert (settings.threads, settings.l1_max_entries, settings.l2_max_entries) == (5, 4, 3)
        assert settings.failure_threshold == 3
        assert loaded.origins == {
            "threads": "flag --threads",
            "l1_max_entries": "environment variable PROXYSTASH_L1_MAX_ENTRIES",
            "l2_max_entries": f"file {file}",
        }

    @pytest.mark.parametrize("name", Settings.model_fields)
    def test_every_setting_can_come_from_every_source(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        text, value = EXAMPLES[name]
        assert value != getattr(Settings(), name)
        monkeypatch.setenv(variable_of(name), text)
        assert getattr(load_settings({}, None).settings, name) == value
        monkeypatch.delenv(variable_of(name))
        assert getattr(load_settings({}, toml(tmp_path, f"{name} = '{text}'\n")).settings, name) == value
        if name not in SECRETS:
            assert getattr(load_settings({name: text}, None).settings, name) == value

    def test_a_table_of_one_source_replaces_that_of_another(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = toml(tmp_path, '[source_ttl]\nwebshare = "2h"\n"free list" = 600\n')
        assert load_settings({}, file).settings.source_ttl == {"webshare": 7200, "free list": 600}
        monkeypatch.setenv("PROXYSTASH_SOURCE_TTL", "other=1m")
        assert load_settings({}, file).settings.source_ttl == {"other": 60}


EXAMPLES: dict[str, tuple[str, Any]] = {
    "listen": ("[::1]:0", "[::1]:0"),
    "metrics_listen": ("127.0.0.1:9464", "127.0.0.1:9464"),
    "data_dir": ("/var/lib/proxystash", Path("/var/lib/proxystash")),
    "default_ttl": ("15m", 900),
    "source_ttl": ("webshare=2h,free=10m", {"webshare": 7200, "free": 600}),
    "failure_threshold": ("5", 5),
    "ban_period": ("2h", 7200),
    "max_ban_period": ("2d", 172_800),
    "banned_puts": ("refuse", "refuse"),
    "health_check_invalidation": ("false", False),
    "durability": ("full", "full"),
    "l1_enabled": ("false", False),
    "l1_max_entries": ("7", 7),
    "l1_eviction_policy": ("lfu", "lfu"),
    "l2_enabled": ("no", False),
    "l2_backend": ("sqlite", "sqlite"),
    "l2_max_entries": ("7", 7),
    "l2_eviction_policy": ("fifo", "fifo"),
    "l3_enabled": ("0", False),
    "l3_max_entries": ("7", 7),
    "l3_eviction_policy": ("lfu", "lfu"),
    "cleanup_interval": ("5s", 5),
    "threads": ("2", 2),
    "max_stats_streams": ("2", 2),
    "max_watch_streams": ("2", 2),
    "watch_history": ("7", 7),
    "pool_enabled": ("false", False),
    "pool_max_leases": ("4", 4),
    "pool_policy": ("best", "best"),
    "pool_labels": ("country,city", ("country", "city")),
    "grace_period": ("1m", 60),
    "log_level": ("debug", "debug"),
    "log_format": ("json", "json"),
    "encryption_key": ("k", Settings(encryption_key="k").encryption_key),  # type: ignore[arg-type]  # read from text
    "encryption_key_previous": ("a,b", Settings(encryption_key_previous="a,b").encryption_key_previous),  # type: ignore[arg-type]  # as above
}


class TestDurations:
    @pytest.mark.parametrize(
        ("text", "seconds"),
        [("90", 90), ("90s", 90), ("15m", 900), ("1h", 3600), ("7d", 604_800), (" 2 h ", 7200)],
    )
    def test_a_duration_has_seconds_or_a_unit(self, text: str, seconds: int) -> None:
        assert load_settings({"default_ttl": text}, None).settings.default_ttl == seconds

    @pytest.mark.parametrize("text", ["", "h", "1w", "1h30m", "-1", "1.5h", "soon", "3651d", "0"])
    def test_anything_else_is_refused(self, text: str) -> None:
        (line,) = faults({"default_ttl": text})
        assert line.startswith("default_ttl (flag --default-ttl): ")


NUMBERS = [name for name, field in Settings.model_fields.items() if field.annotation is int]
DURATIONS = {"default_ttl", "ban_period", "max_ban_period", "cleanup_interval", "grace_period"}


class TestBounds:
    @pytest.mark.parametrize("name", NUMBERS)
    def test_every_number_has_bounds(self, name: str) -> None:
        [line] = faults({name: "999999999999d" if name in DURATIONS else "9" * 30})
        assert line.startswith(f"{name} (flag {FLAGS[name]}): should be less than or equal to ")

    def test_the_greatest_numbers_make_a_cache(self, tmp_path: Path) -> None:
        greatest = {name: largest(name) for name in NUMBERS}
        settings = Settings.model_validate({**greatest, "data_dir": tmp_path})
        with CacheManager(cache_config(settings)) as manager:
            assert manager.ttl_manager is not None
            assert manager.ttl_manager.enabled
        assert settings.grace_period <= threading.TIMEOUT_MAX


def largest(name: str) -> object:
    """The greatest value of a setting."""
    return next(one.le for one in Settings.model_fields[name].metadata if isinstance(one, Le))


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("listen", "50051"),
            ("listen", "127.0.0.1"),
            ("listen", "127.0.0.1:65536"),
            ("listen", "::1:50051"),
            ("listen", "http://127.0.0.1:50051"),
            ("source_ttl", "webshare"),
            ("source_ttl", "=5"),
            ("failure_threshold", "0"),
            ("failure_threshold", "many"),
            ("health_check_invalidation", "perhaps"),
            ("durability", "none"),
            ("l1_max_entries", "0"),
            ("l1_eviction_policy", "random"),
            ("l2_backend", "redis"),
            ("l3_max_entries", "-1"),
            ("cleanup_interval", "0"),
            ("threads", "0"),
            ("threads", "257"),
            ("threads", "2.5"),
            ("max_stats_streams", "0"),
            ("max_watch_streams", "0"),
            ("watch_history", "0"),
            ("pool_max_leases", "0"),
            ("pool_max_leases", "1000001"),
            ("pool_policy", "fairest"),
            ("grace_period", "never"),
            ("log_level", "loud"),
            ("log_format", "xml"),
        ],
    )
    def test_a_wrong_value_is_refused_with_the_name_and_where_it_came_from(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
    ) -> None:
        (line,) = faults({name: text})
        assert line.startswith(f"{name} (flag {FLAGS[name]}): ")
        monkeypatch.setenv(variable_of(name), text)
        (line,) = faults()
        assert line.startswith(f"{name} (environment variable {variable_of(name)}): ")
        monkeypatch.delenv(variable_of(name))
        file = toml(tmp_path, f"{name} = '{text}'\n")
        (line,) = faults(config=file)
        assert line.startswith(f"{name} (file {file}): ")

    def test_what_is_wrong_inside_a_table_is_named(self, tmp_path: Path) -> None:
        file = toml(tmp_path, "[source_ttl]\nwebshare = 0\n")
        assert faults(config=file)[0].startswith(f"source_ttl.webshare (file {file}): ")

    def test_a_boolean_is_no_number(self, tmp_path: Path) -> None:
        file = toml(tmp_path, "threads = true\ngrace_period = true\n")
        assert [line.partition(" ")[0] for line in faults(config=file)] == ["threads", "grace_period"]

    def test_every_fault_has_its_own_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PROXYSTASH_THRAEDS", "1")
        lines = faults({"threads": "0"}, toml(tmp_path, "listne = 'x'\nlog_level = 'loud'\n"))
        assert len(lines) == 4
        assert all("\n" not in line for line in lines)

    def test_an_unknown_setting_in_the_file_is_refused(self, tmp_path: Path) -> None:
        file = toml(tmp_path, "l1_max_entires = 5\n")
        assert faults(config=file) == [
            f"l1_max_entires (file {file}): unknown setting; did you mean l1_max_entries?"
        ]

    def test_an_unknown_variable_with_our_prefix_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PROXYSTASH_DATADIR", "/data")
        assert faults() == [
            "environment variable PROXYSTASH_DATADIR: unknown setting; did you mean PROXYSTASH_DATA_DIR?"
        ]

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("PROXYSTASH_PORT", "50051"),
            ("PROXYSTASH_LISTEN_PORT", "50051"),
            ("PROXYSTASH_SERVER_PORT", "50051"),
            ("PROXYSTASH_SERVICE_PORT", "tcp"),
            ("PROXYSTASH_SERVICE_HOST", "somewhere"),
            ("PROXYSTASH_HOST", "192.0.2.10"),
        ],
    )
    def test_a_variable_that_only_looks_as_if_kubernetes_had_set_it_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, name: str, value: str
    ) -> None:
        monkeypatch.setenv(name, value)
        (line,) = faults()
        assert line.startswith(f"environment variable {name}: unknown setting")

    @pytest.mark.parametrize("text", ["", " "])
    def test_an_empty_path_is_refused_rather_than_taken_for_where_one_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
    ) -> None:
        monkeypatch.setenv("PROXYSTASH_DATA_DIR", text)
        for lines in (
            faults({"data_dir": text}),
            faults(),
            faults(config=toml(tmp_path, f"data_dir = '{text}'")),
        ):
            assert [line.partition(": ")[2] for line in lines] == [
                "is empty; . is the directory that it is started in"
            ]

    def test_the_client_s_variables_are_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in CLIENT_VARIABLES:
            monkeypatch.setenv(name, "x")
        assert isinstance(load_settings({}, None), LoadedSettings)

    def test_the_client_s_variables_are_those_that_its_source_names(self) -> None:
        package = ROOT / "clients" / "python" / "proxystash"
        named = {
            name
            for path in package.rglob("*.py")
            for name in re.findall(r"PROXYSTASH_[A-Z_]+", path.read_text())
        }
        assert named == CLIENT_VARIABLES

    def test_a_server_without_any_tier_is_refused(self) -> None:
        tiers = dict.fromkeys(("l1_enabled", "l2_enabled", "l3_enabled"), "false")
        assert faults(tiers) == ["one of l1_enabled, l2_enabled and l3_enabled must be true"]

    def test_a_file_that_is_missing_or_no_toml_is_refused(self, tmp_path: Path) -> None:
        missing = tmp_path / "missing.toml"
        assert faults(config=missing) == [f"file {missing}: cannot be read: No such file or directory"]
        broken = toml(tmp_path, "threads =\n")
        (line,) = faults(config=broken)
        assert line.startswith(f"file {broken}: is not TOML: ")

    @pytest.mark.parametrize("name", sorted(SECRETS))
    def test_a_secret_is_in_no_refusal_and_in_no_repr(
        self, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setenv(variable_of(name), "planted-key")
        loaded = load_settings({}, None)
        assert "planted-key" not in repr(loaded)
        lines = faults({"threads": "0"})
        assert "planted-key" not in repr(lines)

    def test_an_empty_key_is_refused_rather_than_replaced_by_a_new_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PROXYSTASH_ENCRYPTION_KEY", " ")
        assert faults()[0].startswith(
            "encryption_key (environment variable PROXYSTASH_ENCRYPTION_KEY): is empty"
        )
