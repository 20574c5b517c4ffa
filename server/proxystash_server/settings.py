"""Settings of the server: flags over environment over a TOML file over defaults."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

PREFIX: Final = "PROXYSTASH_"
CONFIG_VARIABLE: Final = "PROXYSTASH_CONFIG"
# Variables with our prefix that the command line client reads, and the server leaves alone.
CLIENT_VARIABLES: Final = frozenset({"PROXYSTASH_TARGET", "PROXYSTASH_PASSWORD"})

# What Kubernetes tells every container of the Services around it, by name and value. A Service that is called
# proxystash, proxystash-server or the like has our prefix there.
_OF_KUBERNETES: Final = re.compile(
    r"PROXYSTASH_(?:[A-Z0-9_]+_)?(?:"
    r"SERVICE_HOST=[0-9A-Fa-f.:]+"
    r"|SERVICE_PORT(?:_[A-Z0-9_]+)?=[0-9]+"
    r"|PORT(?:_[0-9]+_(?:TCP|UDP|SCTP))?=(?:tcp|udp|sctp)://.+"
    r"|PORT_[0-9]+_(?:TCP|UDP|SCTP)_(?:PROTO=(?:tcp|udp|sctp)|PORT=[0-9]+|ADDR=[0-9A-Fa-f.:]+)"
    r")"
)

MAX_TTL_SECONDS: Final = 10 * 365 * 24 * 3600
MAX_ENTRIES: Final = 10**12

_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION: Final = re.compile(r"(\d{1,12})\s*([smhd]?)")
_ADDRESS: Final = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^\s:\[\]/]+):(\d{1,5})")


class SettingsError(Exception):
    """Settings that are unknown or wrong: a line for each, which names the setting and where it came from."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


def _read_seconds(value: object) -> object:
    if not isinstance(value, str):
        return _refuse_bool(value)
    match = _DURATION.fullmatch(value.strip())
    if match is None:
        raise ValueError("must be a number of seconds, or a number and one of s, m, h, d, such as 15m")
    return int(match[1]) * _UNITS[match[2]]


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")  # noqa: TRY004 - pydantic takes no TypeError
    return value


def _read_table(value: object) -> object:
    if not isinstance(value, str):
        return value
    table: dict[str, str] = {}
    for item in _split(value):
        name, separator, amount = item.rpartition("=")
        if not separator or not name.strip():
            raise ValueError("must be a list such as webshare=2h,free=10m")
        table[name.strip()] = amount.strip()
    return table


def _read_list(value: object) -> object:
    return _split(value) if isinstance(value, str) else value


def _split(text: str) -> list[str]:
    return [item for item in (item.strip() for item in text.split(",")) if item]


def _check_secret(value: SecretStr) -> SecretStr:
    if not value.get_secret_value().strip():
        raise ValueError("is empty; unset it to use the key file of the data directory")
    return value


def _check_address(value: str) -> str:
    match = _ADDRESS.fullmatch(value)
    if match is None or int(match[1]) > 65_535:
        raise ValueError("must be host:port, such as 127.0.0.1:50051 or [::1]:50051")
    return value


def _check_address_if_any(value: str) -> str:
    return _check_address(value) if value else value


def refuse_empty_path(value: object) -> object:
    """`value`; raises ValueError for an empty text, which as a path means the directory somebody is in."""
    if isinstance(value, str) and not value.strip():
        raise ValueError("is empty; . is the directory that it is started in")
    return value


Address = Annotated[str, AfterValidator(_check_address)]
Seconds = Annotated[int, BeforeValidator(_read_seconds)]
Directory = Annotated[Path, BeforeValidator(refuse_empty_path)]
TtlSeconds = Annotated[Seconds, Field(ge=1, le=MAX_TTL_SECONDS)]
Count = Annotated[int, BeforeValidator(_refuse_bool)]
EncryptionKey = Annotated[SecretStr, AfterValidator(_check_secret)]
EvictionPolicy = Literal["lru", "lfu", "fifo"]


class Settings(BaseSettings):
    """Every setting of the server. What stands below each is its documentation, and the help of its flag."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    listen: Address = "127.0.0.1:50051"
    """Address to serve on, host:port. Port 0 takes a free one, which the log's first line names."""

    metrics_listen: Annotated[str, AfterValidator(_check_address_if_any)] = ""
    """Address for Prometheus, host:port, where the path is /metrics. Empty: no metrics."""

    data_dir: Directory = Path("data")
    """Directory for everything that is kept: both disk tiers, key file and lock. Created if missing."""

    default_ttl: TtlSeconds = 3600
    """How long an entry lives that brings no TTL and whose source has none.

    Seconds, or with a unit: 90s, 15m, 1h, 7d."""

    source_ttl: Annotated[dict[str, TtlSeconds], NoDecode, BeforeValidator(_read_table)] = {}
    """How long entries of a source live.

    A table in the file, elsewhere a list such as webshare=2h,free=10m."""

    failure_threshold: Annotated[Count, Field(ge=1, le=1_000_000)] = 3
    """Failures in a row after which an entry is evicted from every tier."""

    health_check_invalidation: bool = True
    """Whether reaching the failure threshold evicts. If not, failures are only counted."""

    ban_period: Annotated[Seconds, Field(ge=0, le=MAX_TTL_SECONDS)] = 3600
    """How long a proxy stays banned that its failures have evicted; 0 bans nobody.

    Doubled each time it happens again. Seconds, or with a unit."""

    max_ban_period: Annotated[Seconds, Field(ge=0, le=MAX_TTL_SECONDS)] = 86_400
    """How long a proxy stays banned at most. Seconds, or with a unit."""

    banned_puts: Literal["unhealthy", "refuse"] = "unhealthy"
    """What becomes of a banned proxy that is put again: stored as unhealthy with its failures, or refused."""

    durability: Literal["process", "full"] = "process"
    """What an acknowledged write survives: the end of the process at any moment, or also a power cut."""

    l1_enabled: bool = True
    """Whether entries are kept in memory."""

    l1_max_entries: Annotated[Count, Field(ge=1, le=MAX_ENTRIES)] = 1000
    """Entries that the memory tier holds at most, at one to two kilobytes each."""

    l1_eviction_policy: EvictionPolicy = "lru"
    """Which entry leaves the full memory tier: the least recently used, least frequently used, or oldest."""

    l2_enabled: bool = True
    """Whether entries are kept in the disk tier."""

    l2_backend: Literal["jsonl", "sqlite"] = "jsonl"
    """What the disk tier keeps its entries in: files that a person can read, or a database.

    The database is the better choice beyond 100,000 entries."""

    l2_max_entries: Annotated[Count, Field(ge=1, le=MAX_ENTRIES)] = 5000
    """Entries that the disk tier holds at most."""

    l2_eviction_policy: EvictionPolicy = "lru"
    """Which entry leaves the disk tier when it is full."""

    l3_enabled: bool = True
    """Whether entries are kept in the database tier, the one that holds everything."""

    l3_max_entries: Annotated[Count, Field(ge=0, le=MAX_ENTRIES)] = 0
    """Entries that the database tier holds at most; 0 means as many as there are."""

    l3_eviction_policy: EvictionPolicy = "lru"
    """Which entry leaves the database tier when it is bounded and full."""

    cleanup_interval: Annotated[Seconds, Field(ge=1, le=MAX_TTL_SECONDS)] = 60
    """Pause between two passes of the cleaner, which removes expired entries. Seconds, or with a unit."""

    threads: Annotated[Count, Field(ge=1, le=256)] = 8
    """Worker threads for requests. Streams hold none."""

    max_stats_streams: Annotated[Count, Field(ge=1, le=1_000_000)] = 1000
    """StreamStats calls that may be open at once."""

    max_watch_streams: Annotated[Count, Field(ge=1, le=1_000_000)] = 1000
    """Watch calls that may be open at once."""

    watch_history: Annotated[Count, Field(ge=1, le=10_000_000)] = 100_000
    """Latest changes that are kept in memory for watches to resume from, once anybody watches.

    A change has about a kilobyte if its entry is in memory for nothing else."""

    pool_enabled: bool = True
    """Whether PoolService lends the cached proxies."""

    pool_max_leases: Annotated[Count, Field(ge=1, le=1_000_000)] = 1
    """Leases of one proxy that may be held at once, where its entry does not say how many."""

    pool_policy: Literal["balanced", "least_recently_used", "random", "best"] = "balanced"
    """How Acquire chooses where it does not say."""

    pool_labels: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_read_list)] = ()
    """Labels that Acquire can filter by, separated by commas. Unset: all, which suits up to a few thousand
    combinations of source, health and labels."""

    grace_period: Annotated[Seconds, Field(ge=0, le=24 * 3600)] = 10
    """How long calls under way may take once the server is told to stop. Seconds, or with a unit."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least important lines that are logged."""

    log_format: Literal["auto", "human", "json"] = "auto"
    """How log lines look: for people, or one JSON object each; auto is human on a terminal."""

    encryption_key: EncryptionKey | None = None
    """Fernet key that seals usernames and passwords on disk. Unset: secret.key in the data directory."""

    encryption_key_previous: Annotated[tuple[EncryptionKey, ...], NoDecode, BeforeValidator(_read_list)] = ()
    """Keys that were used before, separated by commas: what they sealed can still be opened."""

    @model_validator(mode="after")
    def _some_tier_is_enabled(self) -> Self:
        if not (self.l1_enabled or self.l2_enabled or self.l3_enabled):
            raise ValueError("one of l1_enabled, l2_enabled and l3_enabled must be true")
        return self


# A command line is visible to every user of the machine.
SECRETS: Final = frozenset({"encryption_key", "encryption_key_previous"})
FLAGS: Final[Mapping[str, str]] = {
    name: f"--{name.replace('_', '-')}" for name in Settings.model_fields if name not in SECRETS
}


def choices_of(name: str) -> tuple[str, ...]:
    """What a setting may be, if that is one of a few words; else nothing."""
    kind = Settings.model_fields[name].annotation
    if kind is bool:
        return ("true", "false")
    return get_args(kind) if get_origin(kind) is Literal else ()


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


@dataclass(frozen=True)
class LoadedSettings:
    """Settings, and where each that is no default came from."""

    settings: Settings
    origins: Mapping[str, str]


def load_settings(flags: Mapping[str, str], config: Path | None) -> LoadedSettings:
    """Read all sources; `flags` by their settings' names. Raises SettingsError with every fault there is."""
    variables = EnvSettingsSource(Settings)()
    file = _read_file(config) if config is not None else {}
    origins = dict.fromkeys(file, f"file {config}")
    origins.update((name, f"environment variable {variable_of(name)}") for name in variables)
    origins.update((name, f"flag {FLAGS[name]}") for name in flags)
    faults = _unknown_variables()
    try:
        settings = Settings(**{**file, **variables, **flags})
    except ValidationError as error:
        faults += [
            _describe(fault, origins) for fault in error.errors(include_input=False, include_url=False)
        ]
    else:
        if not faults:
            return LoadedSettings(settings, origins)
    raise SettingsError(faults)


def _read_file(config: Path) -> dict[str, Any]:
    try:
        with config.open("rb"):
            pass
        return TomlConfigSettingsSource(Settings, toml_file=config)()
    except OSError as error:
        raise SettingsError([f"file {config}: cannot be read: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError([f"file {config}: is not TOML: {error}"]) from None


def _unknown_variables() -> list[str]:
    known = {variable_of(name) for name in Settings.model_fields} | {CONFIG_VARIABLE} | CLIENT_VARIABLES
    unknown = sorted(
        name
        for name, value in os.environ.items()
        if name.upper().startswith(PREFIX)
        and name.upper() not in known
        and not _OF_KUBERNETES.fullmatch(f"{name}={value}")
    )
    return [
        f"environment variable {name}: unknown setting{_suggest(name.upper(), known)}" for name in unknown
    ]


def _describe(fault: ErrorDetails, origins: Mapping[str, str]) -> str:
    name = str(fault["loc"][0]) if fault["loc"] else ""
    path = ".".join(map(str, fault["loc"]))
    origin = f" ({origins[name]})" if name in origins else ""
    if fault["type"] == "extra_forbidden":
        return f"{name}{origin}: unknown setting{_suggest(name, set(Settings.model_fields))}"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{path}{origin}: {message}" if path else message


def _suggest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
