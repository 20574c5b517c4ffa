"""A process that is killed at any named point leaves a store without lies."""

from __future__ import annotations

import random

import pytest

from proxystash_server.cache import L2BackendType
from tests.torture.kill_points import Store, find_points, kill_everywhere
from tests.torture.model import State
from tests.torture.stores import BACKENDS, temporary_directory
from tests.torture.tally import BreachError, Tally


def test_every_acknowledged_write_survives_a_kill_at_every_point() -> None:
    """Each point in the source is hit with each backend that has it, and no more is found than was put."""
    hits = kill_everywhere(Tally(), seed=1)

    for point, backends in find_points().items():
        for l2_backend in backends:
            assert hits[l2_backend][point], f"{point} was never reached with {l2_backend}"


@pytest.mark.parametrize("l2_backend", BACKENDS)
def test_a_lost_write_and_a_resurrection_would_be_noticed(l2_backend: L2BackendType) -> None:
    """Given a store and a model that was told of a put, or a delete, that never happened: the check fails."""
    with temporary_directory() as directory:
        store = Store(directory, l2_backend, Tally(), random.Random(1))
        store.run(operations=30, changes_only=True)
        missing, *_ = (key for key in store.model.possible if store.model.known(key, 0) is None)
        present, *_ = (key for key in store.model.possible if store.model.known(key, 0) is not None)

        store.model.put(missing, State("never"), 0)
        with pytest.raises(BreachError, match="lost"):
            store.check()
        store.model.delete(missing)
        store.model.delete(present)
        with pytest.raises(BreachError, match="resurrected"):
            store.check()


@pytest.mark.parametrize("file", ["pool/leases.jsonl", "failures.jsonl"])
def test_leases_and_bans_that_are_forgotten_would_be_noticed(file: str) -> None:
    """Given a store that has lent and banned, and a next start without the file that says so."""
    with temporary_directory() as directory:
        store = Store(directory, L2BackendType.JSONL, Tally(), random.Random(1))

        def forget_again_and_again() -> None:
            for _ in range(10):
                store.run()
                (directory / file).unlink()

        with pytest.raises(BreachError):
            forget_again_and_again()


def test_a_lease_too_many_and_one_too_few_would_be_noticed() -> None:
    """Given a store and a model that was told of a lease that ended, or that never was."""
    with temporary_directory() as directory:
        store = Store(directory, L2BackendType.JSONL, Tally(), random.Random(1))
        store.run(changes_only=True)
        lease, *_ = store.leases._held
        key = store.leases._held.pop(lease)
        with pytest.raises(BreachError, match="resurrected"):
            store.check()
        store.leases._held[lease] = key
        store.check()
        store.leases._held["never"] = "k0"
        with pytest.raises(BreachError, match="lost"):
            store.check()


@pytest.mark.parametrize("l2_backend", BACKENDS)
def test_a_journal_that_is_not_gone_through_would_be_noticed(l2_backend: L2BackendType) -> None:
    """Given a kill while L3 is away, and a next start that does not know what L3 has missed."""
    with temporary_directory() as directory:
        store = Store(directory, l2_backend, Tally(), random.Random(1))
        while not store.missed:
            assert store.run(kill_at="missed.after_append:10", l3_is_away=True)
        store.run(operations=0, l3_is_away=True)
        assert store.missed
        (directory / "missed-changes.jsonl").unlink()
        with pytest.raises(BreachError):
            store.check()
