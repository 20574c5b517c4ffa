"""The dataclasses that go into a client and come out of it."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
from hypothesis import given

from proxystash import CacheEntry, HealthMonitoring, HealthStatus

from .strategies import entries

SECRET = "s3cr3t-p4ss"


@pytest.mark.parametrize(
    "entry",
    [
        CacheEntry("http://h:1", username=SECRET, password=SECRET),
        CacheEntry(f"http://ann:{SECRET}@h:1"),
        CacheEntry(f"http://ann:{SECRET}/@x:1@h:1"),
        CacheEntry(f"ann:{SECRET}@h:1"),
        CacheEntry("http://h:1", key=f"ann:{SECRET}@h:1"),
        CacheEntry(
            "http://h:1", health_monitoring=HealthMonitoring(last_health_error=f"at http://a:{SECRET}@h:1")
        ),
    ],
)
def test_no_repr_shows_a_credential(entry: CacheEntry) -> None:
    for shown in (repr(entry), str(entry), f"{entry}", repr([entry]), repr(entry.health_monitoring)):
        assert SECRET not in shown
    assert "h:1" in repr(entry)


def test_a_repr_shows_the_other_fields() -> None:
    shown = repr(CacheEntry("http://h:1", health_status=HealthStatus.DEAD, labels={"country": "DE"}))

    assert "health_status=<HealthStatus.DEAD: 'dead'>" in shown
    assert "labels={'country': 'DE'}" in shown
    assert "password" not in shown


def test_entries_cannot_be_changed() -> None:
    entry = CacheEntry("http://h:1")

    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.source = "x"  # type: ignore[misc]  # what is tested


@given(entries())
def test_entries_are_values_that_can_be_hashed_and_pickled(entry: CacheEntry) -> None:
    copy = pickle.loads(pickle.dumps(entry))

    assert copy == entry
    assert hash(copy) == hash(entry)
    assert dataclasses.replace(entry, labels={"another": "label"}) != entry
