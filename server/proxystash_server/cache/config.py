"""Configuration of the cache; field names and defaults are those of proxywhirl.cache 0.3.3, paths aside."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from proxystash.models import MAX_INT32

MAX_TTL_SECONDS = 10 * 365 * 24 * 3600
# More than fit on any machine, and few enough for every counter.
MAX_ENTRIES = 10**12
_FIXED: Final = "a manager's configuration cannot be changed; make another with model_copy(update={...})"


class CacheTierType(StrEnum):
    """A storage level, fastest first."""

    L1 = "l1"
    L2 = "l2"
    L3 = "l3"


class L2BackendType(StrEnum):
    """What L2 keeps its entries in: files a person can read, or a database that scales further."""

    JSONL = "jsonl"
    SQLITE = "sqlite"


class Durability(StrEnum):
    """What an acknowledged write survives: the end of the process, or also a power cut."""

    PROCESS = "process"
    FULL = "full"


class _FixedTable(dict[str, int]):
    """A table that cannot be changed; its copies can."""

    def _refuse(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise TypeError(_FIXED)

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse

    def __reduce_ex__(self, _protocol: object) -> tuple[object, ...]:
        return dict, (dict(self),)


class _Configuration(BaseModel):
    """Fields that can be changed, and are checked then too, until `fixed` makes a copy that cannot."""

    # An error must not quote its input, which may be a key.
    model_config = ConfigDict(extra="forbid", validate_assignment=True, hide_input_in_errors=True)

    _is_fixed: ClassVar[bool] = False

    def fixed(self) -> Self:
        """A copy of this moment that cannot be changed."""
        copy = self.model_copy()
        for name, value in self:
            if isinstance(value, _Configuration):
                vars(copy)[name] = value.fixed()
            elif isinstance(value, dict):
                vars(copy)[name] = _FixedTable(value)
        # Not a private attribute, by which the two would differ.
        vars(copy)["_is_fixed"] = True
        return copy

    def __setattr__(self, name: str, value: object) -> None:
        if self._is_fixed:
            raise TypeError(_FIXED)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_fixed:
            raise TypeError(_FIXED)
        super().__delattr__(name)


class CacheTierConfig(_Configuration):
    """Capacity and eviction policy of one tier. `max_entries=None` means unlimited."""

    enabled: bool = True
    max_entries: int | None = Field(default=None, ge=1, le=MAX_ENTRIES)
    eviction_policy: Literal["lru", "lfu", "fifo"] = "lru"


class CacheConfig(_Configuration):
    """Everything a CacheManager is made from. Times are in seconds.

    May be changed until then; a manager has its own copy, `manager.config`, which cannot be changed, and a
    later change of this one does nothing to it.
    """

    l1_config: CacheTierConfig = CacheTierConfig(max_entries=1000)
    l2_config: CacheTierConfig = CacheTierConfig(max_entries=5000)
    l2_backend: L2BackendType = L2BackendType.JSONL
    l3_config: CacheTierConfig = CacheTierConfig(max_entries=None)

    default_ttl_seconds: int = Field(default=3600, ge=1, le=MAX_TTL_SECONDS)
    per_source_ttl: dict[str, Annotated[int, Field(ge=1, le=MAX_TTL_SECONDS)]] = Field(default_factory=dict)

    enable_background_cleanup: bool = False
    cleanup_interval_seconds: int = Field(default=60, ge=1, le=MAX_TTL_SECONDS)
    # proxywhirl reads neither of these two; they are accepted so that a configuration moves over unchanged.
    ttl_cleanup_interval: int = Field(default=60, ge=1, le=MAX_TTL_SECONDS)
    statistics_interval: int = Field(default=5, ge=1, le=MAX_TTL_SECONDS)

    l2_cache_dir: Path = Path("data/l2")
    l3_database_path: Path = Path("data/l3/proxystash.db")

    encryption_key: SecretStr | None = None
    previous_encryption_keys: tuple[SecretStr, ...] = ()
    encryption_key_file: Path | None = None

    health_check_invalidation: bool = True
    failure_threshold: int = Field(default=3, ge=1, le=MAX_INT32)
    # How long the failures of an evicted proxy outlive it the first time; doubled each time up to the most.
    ban_seconds: int = Field(default=0, ge=0, le=MAX_TTL_SECONDS)
    max_ban_seconds: int = Field(default=24 * 3600, ge=0, le=MAX_TTL_SECONDS)
    # Whether a put of a banned proxy is refused, or stored as unhealthy.
    refuse_banned: bool = False

    durability: Durability = Durability.PROCESS
    enable_statistics: bool = True

    def ttl_seconds_of(self, source: str) -> int:
        """The TTL of an entry that brings none of its own: its source's, else the default."""
        return self.per_source_ttl.get(source, self.default_ttl_seconds)
