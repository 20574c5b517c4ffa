"""What is true of a pool whenever nothing is due."""

from __future__ import annotations

from collections import Counter

from proxystash_server.pool.index import State
from tests.server.pool.conftest import Fleet


def check_invariants(fleet: Fleet) -> None:
    """Compare what is counted and indexed with what it is made of."""
    _check_leases(fleet)
    _check_targets(fleet)
    _check_slots(fleet)
    _check_blocks(fleet)
    _check_line(fleet)


def _check_leases(fleet: Fleet) -> None:
    index = fleet.pool._index
    for lease in fleet.pool._leases:
        assert not lease.ended
        assert lease.claims > 0, "nobody was answered with it, and nobody will be"
        assert lease.expires_at > fleet.time.steady
        assert index.slot_of(lease.key) == lease.slot


def _check_targets(fleet: Fleet) -> None:
    leases = Counter(lease.target_number for lease in fleet.pool._leases)
    waiting = Counter(ticket.view.target for ticket in fleet.pool._line.all())
    numbers = dict(fleet.pool._health.numbered_targets())
    assert {number for number in (leases | waiting) if number} <= numbers.keys()
    for number, target in numbers.items():
        assert (target.leases, target.waiting) == (leases[number], waiting[number]), target.name
        assert target.slots == {slot for slot, at, _ in fleet.pool._health.pairs() if at == number}


def _check_slots(fleet: Fleet) -> None:
    pool, now = fleet.pool, fleet.time.steady
    leases = Counter(lease.key for lease in pool._leases)
    ids = {lease.id for lease in pool._leases}
    for slot in pool._index.slots():
        key = pool._index.key_of(slot)
        standing = pool._health.proxy(slot)
        assert pool._live[slot] == leases[key]
        if slot in pool._not_found or (standing is not None and standing.is_kept_back(now)):
            expected = State.RESTING
        else:
            expected = State.LEASED_OUT if leases[key] >= pool._limit(slot) else State.READY
        assert pool._index.state_of(slot) is expected
        assert standing is None or not standing.trial or standing.trial in ids, "a trial without a lease"
        for target, pair in pool._health.pairs_of(slot):
            assert pool._index.is_blocked(slot, target) is pair.is_kept_back(now)
            assert not pair.trial or pair.trial in ids, "a trial without a lease"


def _check_blocks(fleet: Fleet) -> None:
    for cohort in fleet.pool._index._cohorts.values():
        for target, sparse in cohort.blocks.items():
            assert sparse.size == len(cohort.members)
            blocked = {slot for number, slot in enumerate(cohort.members) if sparse.is_blocked(number)}
            assert len(blocked) == sparse.blocked > 0
            assert all(fleet.pool._health.pair(slot, target) is not None for slot in blocked)


def _check_line(fleet: Fleet) -> None:
    """Nobody waits for what is there."""
    pool, now = fleet.pool, fleet.time.steady
    assert len(pool._line) == len(pool._line.all())
    for ticket in pool._line.all():
        assert ticket.until > now
        assert ticket.delivers or not ticket.leases
        if ticket.only is not None:
            assert pool._index.is_used(ticket.only)
        if ticket.request.reuse_delay:
            # Looked at once a second.
            continue
        for slot in pool._index.slots():
            if ticket.only in (None, slot) and pool._index.fits(slot, ticket.view):
                assert not pool._allows(ticket.request, ticket.view.target, slot, now), ticket.request
