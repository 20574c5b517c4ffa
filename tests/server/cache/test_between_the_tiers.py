"""Between L3 and L2: a kill or an interrupt there leaves an L2 that is not believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest

from proxystash_server.cache import CacheManager, CacheUnavailableError, L2BackendType
from proxystash_server.cache.tiers.base import Applied, Write
from tests.server.cache.stash import Stash
from tests.server.cache.support import (
    bounded,
    broken,
    check_disk_tiers,
    content_of,
    content_of_tier,
    nothing_writable,
    put,
)
from tests.server.cache_tools.stopped import StoppedCache, told


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


def kill_before_l2_takes_it(stash: Stash, manager: CacheManager) -> None:
    """Go on in a copy of the files as they are when L3 has taken the next change, and L2 has not."""
    apply = manager.l2_tier.apply

    def killed(writes: Sequence[Write]) -> list[Applied]:
        stash.kill()
        return apply(writes)

    manager.l2_tier.apply = killed  # type: ignore[method-assign]


CHANGES: dict[str, tuple[Callable[[CacheManager], Any], dict[str, tuple[str, int]]]] = {
    "a put": (lambda manager: put(manager, "a", source="after"), {"a": ("after", 0), "b": ("before", 0)}),
    "an invalidation": (
        lambda manager: manager.invalidate_by_health("a"),
        {"a": ("before", 1), "b": ("before", 0)},
    ),
    "a delete": (lambda manager: manager.delete("a"), {"b": ("before", 0)}),
    "a batch": (
        lambda manager: manager.put_many(
            [manager.new_entry("http://192.0.2.1:1", key=key, source="after") for key in "abc"]
        ),
        dict.fromkeys("abc", ("after", 0)),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_killed_between_the_two_l2_is_not_believed(stash: Stash, change: str) -> None:
    """What L2 still has is older than what L3 took, and may have been read."""
    make, expected = CHANGES[change]
    manager = stash.open()
    put(manager, "a", "b", source="before")
    kill_before_l2_takes_it(stash, manager)
    make(manager)

    manager = stash.open()
    assert content_of(manager) == expected
    assert {key: manager.get(key) is not None for key in "abc"} == {key: key in expected for key in "abc"}
    check_disk_tiers(manager, expected)


def test_killed_between_the_two_the_store_is_consistent(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a", source="before")
    kill_before_l2_takes_it(stash, manager)
    put(manager, "a", source="after")

    report = StoppedCache(stash.directory, stash.config().l2_backend).check()
    assert report.consistent, told(report)


def test_a_change_that_is_interrupted_between_the_two_leaves_what_l3_holds(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a", source="before")
    with (
        mock.patch.object(manager.l2_tier, "apply", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        put(manager, "a", source="after")
    assert content_of(manager) == {"a": ("after", 0)}
    entry = manager.get("a")
    assert entry is not None
    assert entry.source == "after"
    manager.maintain()
    check_disk_tiers(manager, {"a": ("after", 0)})


def test_what_l2_could_not_take_it_is_not_asked_for(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(1))
    put(manager, "a", "b", source="before")
    with broken(manager.l2_tier, {"apply"}):
        put(manager, "a", source="after")
    put(manager, "c")
    entry = manager.get("a")
    assert entry is not None
    assert entry.source == "after"
    manager = stash.reopen_after_kill(l1_config=bounded(1))
    assert content_of(manager)["a"] == ("after", 0)


def test_a_removal_that_nobody_could_make_changes_nothing(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a", source="before")
    with nothing_writable(manager, {"apply", "commit"}), pytest.raises(CacheUnavailableError):
        manager.delete("a")
    assert content_of_tier(manager.l3_tier) == {"a": ("before", 0)}
    assert content_of(manager) == {"a": ("before", 0)}
    manager.maintain()
    manager = stash.reopen_after_kill()
    assert content_of(manager) == {"a": ("before", 0)}
