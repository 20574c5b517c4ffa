"""CacheConfig: checked, changeable until a manager is made of it, and fixed from then on."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from proxystash_server.cache import CacheConfig, CacheTierConfig
from proxystash_server.cache.config import MAX_ENTRIES, MAX_TTL_SECONDS
from tests.server.cache.stash import Stash
from tests.server.cache.support import put

HOUR_US = 3600 * 1_000_000


def test_it_can_be_changed_until_a_manager_is_made_of_it(stash: Stash) -> None:
    config = stash.config()
    config.default_ttl_seconds = 1800
    config.l1_config.max_entries = 2
    config.l2_config = CacheTierConfig(enabled=False)
    config.per_source_ttl["free"] = 60
    manager = stash.open(**dict(config))
    put(manager, "a", "b", "c")
    assert manager.l1_tier.size() == 2
    assert not manager.l2_tier.enabled
    assert manager.new_entry("http://192.0.2.1:1").ttl_seconds == 1800
    assert manager.new_entry("http://192.0.2.1:1", source="free").ttl_seconds == 60


def test_a_default_is_shared_by_no_two_configurations() -> None:
    CacheConfig().l1_config.max_entries = 1
    assert CacheConfig().l1_config.max_entries == 1000


def test_a_later_change_does_nothing_to_the_manager(stash: Stash) -> None:
    config = stash.config(per_source_ttl={"free": 60})
    manager = stash.open_of(config)
    config.default_ttl_seconds = 1800
    config.l1_config.max_entries = 1
    config.per_source_ttl["free"] = 5
    put(manager, "a", "b")
    assert manager.l1_tier.size() == 2
    assert manager.new_entry("http://192.0.2.1:1").ttl_us == HOUR_US
    assert manager.new_entry("http://192.0.2.1:1", source="free").ttl_seconds == 60


CHANGES: dict[str, Callable[[CacheConfig], object]] = {
    "a field": lambda config: setattr(config, "default_ttl_seconds", 5),
    "a tier": lambda config: setattr(config, "l1_config", CacheTierConfig()),
    "a tier's field": lambda config: setattr(config.l1_config, "max_entries", 5),
    "a field deleted": lambda config: delattr(config, "default_ttl_seconds"),
    "a source": lambda config: config.per_source_ttl.update(free=5),
    "a source's TTL": lambda config: config.per_source_ttl.__setitem__("free", 5),
    "a source deleted": lambda config: config.per_source_ttl.pop("free"),
    "all sources deleted": lambda config: config.per_source_ttl.clear(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_that_of_a_manager_cannot_be_changed(stash: Stash, change: Callable[[CacheConfig], object]) -> None:
    config = stash.config(per_source_ttl={"free": 60})
    manager = stash.open_of(config)
    with pytest.raises(TypeError, match="make another with model_copy"):
        change(manager.config)
    assert manager.config == config


def test_another_can_be_made_of_that_of_a_manager(stash: Stash) -> None:
    manager = stash.open(per_source_ttl={"free": 60}, failure_threshold=7)
    config = manager.config
    stash.close()
    assert stash.open_of(config.model_copy(update={"failure_threshold": 8})).failure_threshold == 8
    for same in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same == config
        assert CacheConfig.model_validate(same.model_dump()) == config


@pytest.mark.parametrize("value", [0, MAX_TTL_SECONDS + 1, "soon"])
def test_a_change_is_checked(value: object) -> None:
    config = CacheConfig()
    with pytest.raises(ValidationError, match="default_ttl_seconds"):
        config.default_ttl_seconds = value  # type: ignore[assignment]  # that is the point
    assert config.default_ttl_seconds == 3600
    with pytest.raises(ValidationError, match="ttl_of_default"):
        config.ttl_of_default = 5


def test_no_error_quotes_a_key() -> None:
    config = CacheConfig()
    with pytest.raises(ValidationError) as caught:
        config.encryption_key = 12345678901234567890  # type: ignore[assignment]  # as above
    assert "1234567890" not in str(caught.value)


NUMBERS = [
    (model, name)
    for model in (CacheConfig, CacheTierConfig)
    for name, field in model.model_fields.items()
    if field.annotation in (int, int | None)
]


MAY_BE_ZERO = {"ban_seconds", "max_ban_seconds"}


@pytest.mark.parametrize(("model", "name"), NUMBERS, ids=[name for _, name in NUMBERS])
def test_every_number_has_bounds(model: type[CacheConfig | CacheTierConfig], name: str) -> None:
    for number in (-1, *([] if name in MAY_BE_ZERO else [0]), 2**63, 10**30):
        with pytest.raises(ValidationError, match=name):
            model.model_validate({name: number})


def test_the_greatest_numbers_work(stash: Stash) -> None:
    greatest = CacheTierConfig(max_entries=MAX_ENTRIES)
    manager = stash.open(
        l1_config=greatest,
        l2_config=greatest,
        l3_config=greatest,
        default_ttl_seconds=MAX_TTL_SECONDS,
        cleanup_interval_seconds=MAX_TTL_SECONDS,
        enable_background_cleanup=True,
        failure_threshold=2**31 - 1,
    )
    put(manager, "a", failure_count=2**31 - 3)
    assert manager.ttl_manager is not None
    assert manager.ttl_manager.enabled
    assert [manager.invalidate_by_health("a").evicted for _ in range(2)] == [False, True]
    manager.maintain()
