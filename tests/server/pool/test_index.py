"""The selection index against a model that looks at every entry."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from operator import ne
from typing import Any, ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from proxystash.models import HealthStatus
from proxystash_server.cache import EntryFilter
from proxystash_server.pool.index import Facets, SelectionIndex, State

_FACETS = [
    Facets(scheme, source, health, labels)
    for scheme in ("http", "socks5")
    for source in ("", "free")
    for health in (HealthStatus.UNKNOWN, HealthStatus.DEAD)
    for labels in ((), (("country", "DE"),))
]
_FILTERS = [
    EntryFilter(),
    EntryFilter(schemes=frozenset({"http"})),
    EntryFilter(source="free", labels={"country": "DE"}),
    EntryFilter(health_statuses=frozenset({HealthStatus.DEAD})),
    EntryFilter(labels={"country": "FR"}),
]
_TARGETS = (0, 1, 2)


class Model:
    """One entry as a naive pool would have it."""

    def __init__(self, facets: Facets) -> None:
        self.facets = facets
        self.state = State.READY
        self.blocked: set[int] = set()

    def fits(self, wanted: EntryFilter, target: int) -> bool:
        return self.state is State.READY and target not in self.blocked and self.facets.match(wanted)


class IndexAgainstModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = SelectionIndex(random.Random(1).random)
        self.model: dict[str, Model] = {}
        self.now = 0.0

    @rule(key=st.sampled_from("abcdefghij"), facets=st.sampled_from(_FACETS))
    def put(self, key: str, facets: Facets) -> None:
        slot = self.index.slot_of(key)
        if slot is None:
            self.index.add(key, facets)
            self.model[key] = Model(facets)
        else:
            assert self.index.change(slot, facets) == (self.model[key].facets != facets)
            self.model[key].facets = facets

    @rule(key=st.sampled_from("abcdefghij"))
    def remove(self, key: str) -> None:
        slot = self.index.slot_of(key)
        assert (slot is not None) == (key in self.model)
        if slot is not None:
            self.index.remove(slot)
            del self.model[key]

    @rule(key=st.sampled_from("abcdefghij"), state=st.sampled_from(list(State)))
    def set_state(self, key: str, state: State) -> None:
        slot = self.index.slot_of(key)
        if slot is not None:
            self.index.set_state(slot, state)
            self.model[key].state = state

    @rule(key=st.sampled_from("abcdefghij"), at=st.sampled_from(_TARGETS), blocks=st.booleans())
    def block(self, key: str, at: int, blocks: bool) -> None:
        slot = self.index.slot_of(key)
        if slot is None:
            return
        if blocks:
            self.index.block(slot, at)
            self.model[key].blocked.add(at)
        else:
            self.index.unblock(slot, at)
            self.model[key].blocked.discard(at)

    @rule(
        wanted=st.sampled_from(_FILTERS), at=st.sampled_from(_TARGETS), later=st.sampled_from([0.0, 0.4, 3.0])
    )
    def draw(self, wanted: EntryFilter, at: int, later: float) -> None:
        """What is drawn can be lent; nothing is drawn only if there is nothing."""
        self.now += later
        view = self.index.view(wanted, at)
        fitting = {key for key, model in self.model.items() if model.fits(wanted, at)}
        drawn = [self.index.key_of(slot) for slot in self.index.candidates(view, 3, self.now)]
        assert set(drawn) <= fitting
        assert bool(drawn) == bool(fitting)
        every = [self.index.key_of(slot) for slot in self.index.candidates(view, 1, self.now, all_of=64)]
        assert sorted(every) == sorted(fitting)
        for key in sorted(fitting)[:1]:
            excluded = self.index.slot_of(key)
            rest = self.index.candidates(view, 3, self.now, partial(ne, excluded))
            assert {self.index.key_of(slot) for slot in rest} <= fitting - {key}
            assert bool(rest) == (len(fitting) > 1)

    @rule(wanted=st.sampled_from(_FILTERS))
    def held_back(self, wanted: EntryFilter) -> None:
        found = self.index.held_back(self.index.view(wanted, 0))
        matching = [model for model in self.model.values() if model.facets.match(wanted)]
        assert found.matching == len(matching)
        assert found.leased_out == sum(model.state is State.LEASED_OUT for model in matching)

    @invariant()
    def sizes(self) -> None:
        states = Counter(model.state for model in self.model.values())
        assert self.index.sizes() == (states[State.READY], states[State.LEASED_OUT], states[State.RESTING])
        for target in _TARGETS:
            assert self.index.blocked(target) == sum(target in model.blocked for model in self.model.values())
            for key, model in self.model.items():
                slot = self.index.slot_of(key)
                assert slot is not None
                assert self.index.is_blocked(slot, target) == (target in model.blocked)


IndexAgainstModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestIndexAgainstModel = IndexAgainstModel.TestCase


def _filled(count: int, facets: Facets = _FACETS[0]) -> SelectionIndex:
    index = SelectionIndex(random.Random(2).random)
    for number in range(count):
        index.add(f"k{number}", facets)
    return index


def test_each_that_can_be_lent_is_as_likely_as_the_other() -> None:
    """Given cohorts of different sizes, and a target that blocks half of one."""
    index = _filled(30)
    for number in range(10):
        index.add(f"s{number}", _FACETS[-1]._replace(health=HealthStatus.UNKNOWN))
    for number in range(0, 30, 2):
        index.block(number, 7)
    view = index.view(EntryFilter(), 7)
    drawn = Counter(slot for _ in range(5000) for slot in index.candidates(view, 1, 0.0))
    assert len(drawn) == 25
    assert max(drawn.values()) < 2 * min(drawn.values())


def test_the_last_ten_of_many_are_found() -> None:
    index = _filled(5000)
    view = index.view(EntryFilter(), 3)
    assert index.candidates(view, 1, 0.0)
    for slot in range(10, 5000):
        index.block(slot, 3)
    assert {slot for _ in range(300) for slot in index.candidates(view, 1, 0.0)} == set(range(10))
    for slot in range(10):
        index.set_state(slot, State.LEASED_OUT)
    assert index.candidates(view, 1, 0.0) == []
    index.set_state(4, State.READY)
    assert index.candidates(view, 1, 0.0) == [4]


def test_a_draw_looks_at_no_more_entries_where_there_are_more() -> None:
    """Counted in random numbers drawn: O(1) with half of them blocked, whatever their number."""
    drawn: dict[int, int] = {}
    for size in (1000, 20_000):
        count = 0
        source = random.Random(5)

        def counted(source: random.Random = source) -> float:
            nonlocal count
            count += 1
            return source.random()

        index = SelectionIndex(counted)
        for number in range(size):
            index.add(f"k{number}", _FACETS[0])
        for number in range(0, size, 2):
            index.block(number, 1)
        view = index.view(EntryFilter(), 1)
        for _ in range(1000):
            assert index.candidates(view, 1, 0.0)
        drawn[size] = count
    assert drawn[20_000] < 1.5 * drawn[1000]


def test_cohorts_are_bounded_and_what_has_no_room_is_found_by_scheme_and_health() -> None:
    index = SelectionIndex(random.Random(1).random, max_cohorts=3)
    for number in range(10):
        index.add(f"k{number}", Facets("http", f"source{number}", HealthStatus.UNKNOWN, ()))
    assert index.overflowed
    assert len(index._cohorts) == 4
    assert len(index.candidates(index.view(EntryFilter(), 0), 1, 0.0, all_of=64)) == 10
    assert index.candidates(index.view(EntryFilter(source="source9"), 0), 1, 0.0) == []
    assert index.change(9, Facets("http", "source11", HealthStatus.UNKNOWN, ())) is False


def test_cohorts_go_with_their_last_entry() -> None:
    index = SelectionIndex(random.Random(1).random)
    view = index.view(EntryFilter(), 0)
    for number in range(100):
        slot = index.add(f"k{number}", Facets("http", f"source{number}", HealthStatus.UNKNOWN, ()))
        index.remove(slot)
    assert not index._cohorts
    assert not view.cohorts
    assert len(index._keys) == 1


def test_only_labels_that_count_are_looked_at() -> None:
    index = SelectionIndex(random.Random(1).random, labels=frozenset({"country"}))

    class Entry:
        proxy_url, source, health_status = "http://192.0.2.1:80", "", HealthStatus.UNKNOWN
        labels: ClassVar[Any] = {"country": "DE", "rack": "17"}

    facets = index.facets_of_entry(Entry())  # type: ignore[arg-type]
    assert facets.labels == (("country", "DE"),)
