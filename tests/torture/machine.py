"""A state machine over everything that can be asked of a cache and done to it, against a model."""

from __future__ import annotations

import shutil
import sqlite3
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any, ClassVar, Final

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from proxystash_server.cache import (
    CacheConfig,
    CacheManager,
    CacheTierConfig,
    CacheTierType,
    L2BackendType,
    StoreError,
    TierState,
)
from proxystash_server.cache.setup import missed_changes_path
from tests.torture.faults import JOURNAL, Fault, Faults, Part
from tests.torture.model import Model, Seen, State
from tests.torture.stores import (
    SECOND_US,
    Driver,
    FakeClock,
    FakeMonotonic,
    LibraryDriver,
    RefusedError,
    all_of,
    disagreements,
    eager_compaction,
    is_complete,
    l3_knows_all,
    make_config,
    numbered_keys,
    temporary_directory,
)
from tests.torture.subscriber import Subscriber
from tests.torture.tally import Tally

KEYS = numbered_keys(6)
_ROUNDS_TO_HEAL = 12
_LONGEST_PAUSE = 61

L2, L3 = CacheTierType.L2, CacheTierType.L3
_PARTS: Final[tuple[Part, ...]] = (L2, L3, JOURNAL)

_part = st.sampled_from(_PARTS)
_how: st.SearchStrategy[Fault] = st.sampled_from(["before", "after", "down"])
_faults = st.dictionaries(_part, _how)
_key = st.sampled_from(KEYS)
some_keys = st.lists(_key, min_size=1, max_size=3, unique=True)
some_ttl = st.sampled_from([1, 60, 3600])
_when = st.sampled_from(["after an end", "after a kill", "while it runs"])
_step = st.sampled_from([
    "put", "put", "put", "get", "get", "delete", "delete", "invalidate", "maintain", "list", "clear",
])  # fmt: skip
_steps = st.lists(st.tuples(_step, _key), min_size=1)
# So that more happens to the same key.
_steps_in_trouble = st.lists(st.tuples(_step, st.sampled_from(KEYS[:2])), max_size=6)


class CacheMachine(RuleBasedStateMachine):
    """The cache as a library, with its disk tiers and the journal failing in every combination."""

    l2_backend: ClassVar[L2BackendType]
    l1: ClassVar[CacheTierConfig] = CacheTierConfig(max_entries=3)
    l2_max_entries: ClassVar[Sequence[int | None]] = (None, 4)
    faulty: ClassVar[bool] = True
    tally: ClassVar[Tally]

    def __init__(self) -> None:
        super().__init__()
        self.resources = ExitStack()
        self.directory = self.resources.enter_context(temporary_directory()) / "data"
        self.resources.enter_context(eager_compaction())
        self.clock = FakeClock()
        self.monotonic = FakeMonotonic()
        self.faults = Faults()
        self.resources.enter_context(self.faults.installed())
        self.model = Model(KEYS, threshold=3)
        self.tags = 0
        self.copies = 0
        self.lookups = 0
        # L2 was not opened in this run: it may say of itself that it is up to date, and only L3 knows better.
        self.l2_left_out = False
        self.subscriber = Subscriber()
        self.session = ExitStack()

    @initialize(policy=st.sampled_from(["lru", "lfu", "fifo"]), l2_has_bounds=st.booleans())
    def start(self, policy: str, l2_has_bounds: bool) -> None:
        self.l2 = CacheTierConfig.model_validate(
            {"max_entries": self.l2_max_entries[l2_has_bounds], "eviction_policy": policy}
        )
        self.open()

    def open(self) -> None:
        if self.l2_left_out:
            self.faults.heal(L3)
        config = make_config(self.directory, self.l2_backend, l1=self.l1, l2=self.l2)
        is_refused = missed_changes_path(config).exists() and self.faults.may_strike(JOURNAL)
        try:
            self.manager = self.make_manager(config)
            assert not is_refused, "it has started, although nobody can say what L3 has missed"
        except StoreError:
            assert is_refused
            self.faults.heal(JOURNAL)
            self.manager = self.make_manager(config)
        self.lookups = 0
        self.l2_left_out = not self.manager._cache.guard.is_open
        self.session.callback(self.manager.close)
        self.subscriber = Subscriber()
        self.manager.subscribe(self.subscriber.hear)
        self.driver: Driver = self.connect()
        if self.l3_knows_all:
            self.list()

    def make_manager(self, config: CacheConfig) -> CacheManager:
        return CacheManager(config, clock=self.clock, monotonic=self.monotonic, background=False)

    def connect(self) -> Driver:
        return LibraryDriver(self.manager)

    def take_leave(self) -> None:
        """Take note of what the end of this run leaves behind."""
        self.l2_left_out = self.l2_left_out and not self.manager._cache.guard.is_open

    # -- what must be known

    @property
    def complete(self) -> bool:
        """Whether nothing can fail, and nothing that has failed has left a trace."""
        return not self.faults.any and is_complete(self.manager)

    @property
    def l3_knows_all(self) -> bool:
        """Whether every answer must be exact, whatever becomes of L2 and of the journal."""
        return not self.faults.may_strike(L3) and l3_knows_all(self.manager)

    @property
    def l3_takes_changes(self) -> bool:
        return not self.faults.may_strike(L3) and self.manager._authority.works

    @property
    def l2_takes_changes(self) -> bool:
        return not self.faults.may_strike(L2) and self.manager._cache.works

    @property
    def journal_works(self) -> bool:
        return not self.faults.may_strike(JOURNAL)

    def is_known(self, key: str) -> bool:
        """Whether whoever has the last change of a key, L3 or the journal, can be asked."""
        missed = self.manager._authority.missed
        if missed.covers(key):
            # Not so by a Clear alone, which the journal may have kept although L3 has had it, and more since.
            return self.journal_works and key in set(missed.keys()).difference(missed.unsaved_keys())
        return self.l3_takes_changes and not self.manager._authority.is_incomplete

    def unknown(self) -> frozenset[str]:
        """The keys of which a read may fail to find what is there."""
        return frozenset(key for key in KEYS if not self.is_known(key))

    def may_be_refused(self, keys: Sequence[str]) -> bool:
        """Whether a change of these keys may find nobody who keeps it."""
        in_journal = any(map(self.manager._authority.missed.holds, keys))
        return not self.journal_works and (not self.l3_takes_changes or in_journal)

    def attempt(self, operation: Any, *args: Any, may_be_refused: bool, **kwargs: Any) -> Any:
        """The answer; None if it was refused."""
        self.tally.add("operations")
        try:
            return operation(*args, **kwargs)
        except RefusedError:
            if not may_be_refused:
                raise
            return None

    # -- operations

    @rule(keys=some_keys, ttl=some_ttl, failures=st.integers(0, 3), healthy=st.booleans())
    def put(self, keys: list[str], ttl: int, failures: int, healthy: bool) -> None:
        tag = self.new_tag()
        unknown, may_be_refused = self.unknown(), self.may_be_refused(keys)
        sure = {
            "l1": self.l1.enabled and len(keys) == 1,
            "l2": self.l2_takes_changes and self.l3_knows_all and len(keys) == 1,
            "l3": self.l3_knows_all,
        }
        stored = self.attempt(
            self.driver.put,
            keys,
            tag,
            ttl_seconds=ttl,
            failures=failures,
            healthy=healthy,
            may_be_refused=may_be_refused,
        )
        for key, tiers in zip(keys, stored or [()] * len(keys), strict=True):
            assert tiers or may_be_refused, f"nobody took {key!r}"
            for tier in (tier for tier, is_sure in sure.items() if is_sure):
                # Others of a batch may have pushed it out of L1 and L2.
                assert tier in tiers or may_be_refused, f"{key!r} is only in {tiers}"
            if self.faults.is_down(L3, JOURNAL):
                assert set(tiers) <= {"l1"}, f"{key!r} is said to be in {tiers}, where it does not last"
            new = State(tag, failures, self.clock.now_us + ttl * SECOND_US)
            lasts = "l3" in tiers or not may_be_refused
            self.has_put(key, new, healthy=healthy, taken=bool(tiers), lasts=lasts, blind=key in unknown)

    def has_put(
        self,
        key: str,
        new: State,
        *,
        blind: bool,
        healthy: bool = False,
        taken: bool = True,
        lasts: bool = True,
    ) -> None:
        before = self.model.possible[key]
        self.model.put(key, new, self.clock.now_us, healthy=healthy, certain=taken)
        if blind and not healthy:
            self.model.put_blindly(key, new)
        if taken and not lasts:
            self.model.may_fall_back(key, before)

    @rule(keys=some_keys)
    def get(self, keys: list[str]) -> None:
        unknown = self.unknown()
        seen = self.attempt(self.driver.get, keys, may_be_refused=not unknown.isdisjoint(keys))
        if seen is not None:
            self.lookups += len(keys)
            self.has_seen(dict(zip(keys, seen, strict=True)), unknown, "a get")

    @rule()
    def list(self) -> None:
        unknown, exact = self.unknown(), self.l3_knows_all
        seen = self.attempt(self.driver.list, may_be_refused=self.faults.any and not exact)
        if seen is not None:
            self.has_seen(dict(all_of(KEYS, seen)), unknown, "a list")
            if exact and self.l3_knows_all:
                self.subscriber.compare(seen, self.manager, self.clock.now_us)

    def has_seen(self, seen: Mapping[str, Seen | None], unknown: frozenset[str], how: str) -> None:
        unknown |= self.unknown()
        for key, one in seen.items():
            self.model.read(key, one, self.clock.now_us, lenient=key in unknown, how=how)

    @rule(key=_key)
    def delete(self, key: str) -> None:
        unknown, may_be_refused = self.unknown(), self.may_be_refused([key])
        held = self.attempt(self.driver.delete, key, may_be_refused=may_be_refused)
        if self.faults.is_down(L3, JOURNAL):
            assert held is None, "a delete was acknowledged that nobody keeps"
        if held is not None and key not in unknown and not self.model.in_doubt(key):
            assert held == (self.model.known(key, self.clock.now_us) is not None), f"delete told {held}"
        self.model.delete(key, certain=held is not None)

    @rule(key=_key)
    def invalidate(self, key: str) -> None:
        unknown, may_be_refused = self.unknown(), self.may_be_refused([key])
        answer = self.attempt(self.driver.invalidate, key, may_be_refused=may_be_refused or key in unknown)
        before = self.model.possible[key]
        self.model.invalidate(key, answer, self.clock.now_us, lenient=key in unknown)
        if answer is not None and answer.found and not answer.evicted and may_be_refused:
            self.model.may_fall_back(key, before)

    @rule()
    def clear(self) -> None:
        exact = self.l3_knows_all
        takers = self.l3_takes_changes and not self.manager._authority.missed.is_in_use
        count = self.attempt(self.driver.clear, may_be_refused=not (takers or self.journal_works))
        if exact and count is not None and not any(map(self.model.in_doubt, KEYS)):
            assert count == sum(self.model.known(key, self.clock.now_us) is not None for key in KEYS)
        self.model.clear(certain=count is not None)

    @rule(steps=_steps)
    def use(self, steps: Sequence[tuple[str, str]]) -> None:
        """Several operations in a row, so that there is more use than there are restarts."""
        for kind, key in steps:
            match kind:
                case "put":
                    self.put([key], 3600, 0, False)
                case "get":
                    self.get([key])
                case "delete":
                    self.delete(key)
                case "invalidate":
                    self.invalidate(key)
                case "list":
                    self.list()
                case "maintain":
                    self.maintain()
                case _:
                    self.clear()

    @precondition(lambda self: self.faulty)
    @rule(
        first=_faults,
        before=_steps_in_trouble,
        end=st.sampled_from(["restart", "crash", "maintain", "damage", "nothing"]),
        then=_faults,
        after=_steps_in_trouble,
    )
    def trouble(
        self,
        first: dict[Part, Fault],
        before: Sequence[tuple[str, str]],
        end: str,
        then: dict[Part, Fault],
        after: Sequence[tuple[str, str]],
    ) -> None:
        """Faults come, others take their place, where the run may end in between, and all of them go."""
        self.break_parts(first)
        self.use(before)
        if end == "restart":
            self.restart(then)
        elif end == "crash":
            self.crash(then)
        elif end == "damage":
            self.faults.heal()
            if self.l3_knows_all:
                self.damage(KEYS[1])
            self.break_parts(then)
        else:
            self.break_parts(then)
        if end == "maintain":
            self.maintain()
        self.use(after)
        self.faults.heal()
        self.list()

    @rule()
    def statistics(self) -> None:
        statistics = self.manager.get_statistics()
        if not self.faulty:
            assert statistics.hits + statistics.misses == self.lookups
        for stats in (statistics.l1_stats, statistics.l2_stats, statistics.l3_stats):
            assert stats.max_entries == 0 or stats.entries <= stats.max_entries
        if self.l3_knows_all and not any(map(self.model.in_doubt, KEYS)):
            live = sum(self.model.known(key, self.clock.now_us) is not None for key in KEYS)
            assert statistics.entries == live

    # -- what goes on around them

    @rule(seconds=st.sampled_from([-5, 1, 30, 70, 4000]))
    def pass_time(self, seconds: int) -> None:
        self.clock.now_us += seconds * SECOND_US
        self.model.time_passed(self.clock.now_us)

    @rule()
    def maintain(self) -> None:
        self.monotonic.seconds += _LONGEST_PAUSE
        self.manager.maintain()

    @rule()
    def clean_up(self) -> None:
        self.manager.cleanup_expired()

    @rule(then=_faults)
    def restart(self, then: dict[Part, Fault] | None = None) -> None:
        """The next run begins with other faults."""
        self.close()
        self.break_parts(then or {})
        self.open()

    @rule(then=_faults)
    def crash(self, then: dict[Part, Fault] | None = None) -> None:
        """The same after a kill."""
        self.kill()
        self.break_parts(then or {})
        self.open()

    def close(self) -> None:
        self.tally.add("restarts")
        self.take_leave()
        self.session.close()

    def kill(self) -> None:
        """Go on with the files as they are at this moment, which is all that a kill leaves."""
        self.tally.add("kills")
        self.take_leave()
        abandoned = self.directory
        self.copies += 1
        self.directory = abandoned.with_name(f"data-{self.copies}")
        shutil.copytree(abandoned, self.directory)
        with self.faults.suspended():
            self.session.close()
        shutil.rmtree(abandoned)

    @precondition(lambda self: not self.faults.any)
    @rule(when=_when)
    def lose_l2(self, when: str) -> None:
        """L2's directory is gone."""
        self.lose(L2, when)

    @precondition(lambda self: self.complete and self.l2_has_everything)
    @rule(when=_when, meanwhile=_steps_in_trouble)
    def lose_l3(self, when: str, meanwhile: Sequence[tuple[str, str]]) -> None:
        """L3's directory is gone, and L2 has everything, and will keep it."""
        self.lose(L3, when)
        self.use(meanwhile)
        self.maintain()
        assert self.complete

    def lose(self, tier: CacheTierType, when: str) -> None:
        self.tally.add("corruptions")
        if when == "after a kill":
            self.kill()
        elif when == "after an end":
            self.close()
        # It is not there if it was lost before.
        shutil.rmtree(self.directory / tier, ignore_errors=True)
        if when == "while it runs":
            # Noticed by the next write.
            guard = self.manager._reads.guards[tier is L3]
            assert not guard.is_open or not guard.write(guard.tier.probe)
        else:
            self.open()

    @precondition(lambda self: self.l3_knows_all and not self.faults.may_strike(L2))
    @rule(key=_key)
    def damage(self, key: str) -> None:
        """A row of L3 is damaged, and L1 or L2 have what stood in it."""
        is_listed = not self.model.in_doubt(key) and self.model.known(key, self.clock.now_us) is not None
        in_l2 = self.manager._cache.serves(key) and key in self.held_by(L2)
        if not (is_listed and (in_l2 or key in self.manager.l1_tier)):
            return
        self.tally.add("corruptions")
        with closing(sqlite3.connect(self.directory / "l3" / "proxystash.db")) as l3, l3:
            l3.execute("UPDATE entries SET source = 'damaged' WHERE key = ?", (key,))
        # Whoever reads sees it after the next commit.
        self.manager.l3_tier.probe()
        self.list()
        assert self.l3_knows_all

    @property
    def l2_has_everything(self) -> bool:
        return self.l2.max_entries is None and {*self.held_by(L2)} == {*self.held_by(L3)}

    def held_by(self, tier: CacheTierType) -> Sequence[str]:
        return (self.manager.l2_tier if tier is L2 else self.manager.l3_tier).keys()

    def break_parts(self, faults: dict[Part, Fault]) -> None:
        """Let just these faults be there from now on."""
        self.faults.heal()
        for part, how in faults.items() if self.faulty else ():
            self.break_part(part, how)

    @precondition(lambda self: self.faulty)
    @rule(part=_part, how=_how)
    def break_part(self, part: Part, how: Fault) -> None:
        if how == "down":
            self.faults.take_down(part)
        else:
            self.faults.fail_once(part, how)

    @precondition(lambda self: self.faults.any)
    @rule(part=_part)
    def heal_part(self, part: Part) -> None:
        self.faults.heal(part)

    @precondition(lambda self: self.faults.any)
    @rule()
    def heal(self) -> None:
        self.faults.heal()

    def teardown(self) -> None:
        try:
            if hasattr(self, "manager") and sys.exception() is None:
                self.finish()
        finally:
            self.tally.add("faults", self.faults.injected)
            with self.faults.suspended():
                self.session.close()
                self.resources.close()

    def finish(self) -> None:
        """Once every fault is gone, everything is found again, in every tier alike, also in the next run."""
        self.faults.heal()
        for _ in range(_ROUNDS_TO_HEAL):
            self.maintain()
        for _ in range(2):
            assert self.complete, f"a tier is still behind: {self.states()}"
            assert not disagreements(self.manager)
            self.list()
            for key in KEYS:
                self.get([key])
            self.restart()

    def states(self) -> dict[str, TierState]:
        statistics = self.manager.get_statistics()
        return {"l2": statistics.l2_stats.state, "l3": statistics.l3_stats.state}

    def new_tag(self) -> str:
        self.tags += 1
        return f"t{self.tags}"
