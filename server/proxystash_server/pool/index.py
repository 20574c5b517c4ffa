"""The selection index: which proxies there are, and which can be lent for a target, drawn at random."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Final, NamedTuple

from proxystash.models import HealthStatus
from proxystash_server.cache import CacheEntry, EntryFilter
from proxystash_server.pool.sparse import SparsePermutation

MAX_COHORTS: Final = 4096
# Filters, with their targets, that are kept ready.
MAX_VIEWS: Final = 1024

# No slot, or no place.
ABSENT: Final = 0xFFFFFFFF
# How often a candidate is drawn, first trusting a count that may be old, and then with a new one.
_FIRST_DRAWS: Final = 8
_DRAWS: Final = 64
# Up to so many candidates are looked at one by one, so that "none" is exact.
_FEW: Final = 512
# For how many seconds the sizes of cohorts are taken as they were.
_FRESH: Final = 1.0

Accepts = Callable[[int], bool]


class State(IntEnum):
    """What keeps a slot from being lent, if anything does."""

    READY = 0
    LEASED_OUT = 1
    RESTING = 2


class Facets(NamedTuple):
    """What proxies are chosen by. Entries with equal facets form a cohort.

    `others` is the cohort of those that came when there were `MAX_COHORTS` others: it is found by scheme and
    health alone.
    """

    scheme: str
    source: str
    health: HealthStatus
    labels: tuple[tuple[str, str], ...]
    others: bool = False

    def match(self, wanted: EntryFilter) -> bool:
        """Whether a filter wants them. Dead proxies are wanted only by name."""
        if self.health not in wanted.health_statuses and (
            wanted.health_statuses or self.health is HealthStatus.DEAD
        ):
            return False
        if wanted.schemes and self.scheme not in wanted.schemes:
            return False
        if wanted.source and self.source != wanted.source:
            return False
        return not wanted.labels or wanted.labels.items() <= dict(self.labels).items()


class Cohort:
    """The entries with equal facets. `members` has their slots, `ready` those that can be lent."""

    __slots__ = ("blocks", "facets", "members", "ready", "resting")

    def __init__(self, facets: Facets) -> None:
        self.facets = facets
        self.members = array("I")
        self.ready = array("I")
        self.resting = 0
        # By target the numbers (places in `members`) that it blocks; only targets that block some.
        self.blocks: dict[int, SparsePermutation] = {}


class View:
    """The cohorts that a filter wants, with how many each can give for a target, as of a moment ago."""

    __slots__ = ("cohorts", "empty_at", "givers", "sums", "target", "total", "wanted", "weighed_at")

    def __init__(self, wanted: EntryFilter, target: int, cohorts: list[Cohort]) -> None:
        self.wanted = wanted
        self.target = target
        self.cohorts = cohorts
        self.givers: list[Cohort] = []
        self.sums: list[int] = []
        self.total = 0
        self.weighed_at = -_FRESH
        self.empty_at = -1

    def weigh(self, now: float) -> None:
        """Count anew what each cohort has to give: O(cohorts)."""
        self.givers, self.sums, self.total = [], [], 0
        for cohort in self.cohorts:
            give = len(cohort.ready)
            if give and cohort.blocks and (sparse := cohort.blocks.get(self.target)) is not None:
                give = min(give, sparse.free)
            if give:
                self.total += give
                self.givers.append(cohort)
                self.sums.append(self.total)
        self.weighed_at = now


class Held(NamedTuple):
    """How many of those that match there are, and how many of them cannot be lent, and why."""

    matching: int
    leased_out: int
    resting: int


class SelectionIndex:
    """Every entry as a slot, a small number that is used again; drawn from in O(1) of the number of entries.

    A slot is ready, leased out or resting; and each target may block some. `random` gives floats from 0 to
    below 1. Not thread-safe: the pool's lock guards it. Cohorts and views are bounded, slots are as many as
    there are entries.
    """

    def __init__(
        self,
        random: Callable[[], float],
        *,
        labels: frozenset[str] | None = None,
        max_cohorts: int = MAX_COHORTS,
    ) -> None:
        self._random = random
        self._labels = labels
        self._max_cohorts = max_cohorts
        self.overflowed = False
        self._slots: dict[str, int] = {}
        # By slot.
        self._keys: list[str] = []
        self._cohort_of: list[Cohort | None] = []
        self._number = array("I")
        self._ready_at = array("I")
        self._state = bytearray()
        self._unused: list[int] = []
        self._cohorts: dict[Facets, Cohort] = {}
        self._views: OrderedDict[tuple[object, ...], View] = OrderedDict()
        # Grows whenever something may be lent that could not be before.
        self._freed = 0

    def __len__(self) -> int:
        return len(self._slots)

    # -- entries

    def slot_of(self, key: str) -> int | None:
        return self._slots.get(key)

    def key_of(self, slot: int) -> str:
        return self._keys[slot]

    def is_used(self, slot: int) -> bool:
        return self._cohort_of[slot] is not None

    def slots(self) -> Iterator[int]:
        """Every slot in use."""
        return iter(self._slots.values())

    def facets_of(self, slot: int) -> Facets:
        return self._of(slot).facets

    def state_of(self, slot: int) -> State:
        return State(self._state[slot])

    def facets_of_entry(self, entry: CacheEntry) -> Facets:
        """What an entry is chosen by."""
        labels = entry.labels
        if labels:
            indexed = self._labels
            kept = tuple(sorted(item for item in labels.items() if indexed is None or item[0] in indexed))
        else:
            kept = ()
        return Facets(entry.proxy_url.partition("://")[0], entry.source, entry.health_status, kept)

    def add(self, key: str, facets: Facets) -> int:
        """The slot of a key that was not there, ready and blocked by nobody."""
        if self._unused:
            slot = self._unused.pop()
            self._keys[slot] = key
            self._state[slot] = State.READY
        else:
            slot = len(self._keys)
            self._keys.append(key)
            self._cohort_of.append(None)
            self._number.append(0)
            self._ready_at.append(ABSENT)
            self._state.append(State.READY)
        self._slots[key] = slot
        self._join(slot, facets)
        return slot

    def remove(self, slot: int) -> None:
        """Forget a slot, which will be used again."""
        self._leave(slot)
        del self._slots[self._keys[slot]]
        self._keys[slot] = ""
        self._unused.append(slot)

    def change(self, slot: int, facets: Facets) -> bool:
        """Whether the facets of a slot were others. It stays ready, leased out or resting, and blocked."""
        cohort = self._of(slot)
        if cohort.facets == facets or (cohort.facets.others and self._cohort_for(facets) is cohort):
            return False
        number = self._number[slot]
        blocking = [target for target, sparse in cohort.blocks.items() if sparse.is_blocked(number)]
        self._leave(slot)
        self._join(slot, facets)
        for target in blocking:
            self.block(slot, target)
        return True

    def _of(self, slot: int) -> Cohort:
        cohort = self._cohort_of[slot]
        assert cohort is not None
        return cohort

    def _cohort_for(self, facets: Facets) -> Cohort:
        cohort = self._cohorts.get(facets)
        if cohort is None and len(self._cohorts) >= self._max_cohorts:
            self.overflowed = True
            facets = Facets(facets.scheme, "", facets.health, (), others=True)
            cohort = self._cohorts.get(facets)
        if cohort is None:
            cohort = self._cohorts[facets] = Cohort(facets)
            for view in self._views.values():
                if facets.match(view.wanted):
                    view.cohorts.append(cohort)
        return cohort

    def _join(self, slot: int, facets: Facets) -> None:
        cohort = self._cohort_for(facets)
        self._cohort_of[slot] = cohort
        self._number[slot] = len(cohort.members)
        cohort.members.append(slot)
        for sparse in cohort.blocks.values():
            sparse.grow()
        self._ready_at[slot] = ABSENT
        self._enter(slot, cohort)

    def _leave(self, slot: int) -> None:
        cohort = self._of(slot)
        self._exit(slot, cohort)
        number = self._number[slot]
        for target, sparse in list(cohort.blocks.items()):
            sparse.shrink(number)
            if not sparse.blocked:
                del cohort.blocks[target]
        last = cohort.members.pop()
        if last != slot:
            cohort.members[number] = last
            self._number[last] = number
        self._cohort_of[slot] = None
        if not cohort.members:
            del self._cohorts[cohort.facets]
            for view in self._views.values():
                if cohort in view.cohorts:
                    view.cohorts.remove(cohort)

    # -- what can be lent

    def set_state(self, slot: int, state: State) -> None:
        """Say what keeps a slot from being lent."""
        if self._state[slot] != state:
            cohort = self._of(slot)
            self._exit(slot, cohort)
            self._state[slot] = state
            self._enter(slot, cohort)

    def block(self, slot: int, target: int) -> None:
        """Keep a slot from being lent for a target; idempotent."""
        cohort = self._of(slot)
        sparse = cohort.blocks.get(target)
        if sparse is None:
            sparse = cohort.blocks[target] = SparsePermutation(len(cohort.members))
        sparse.block(self._number[slot])

    def unblock(self, slot: int, target: int) -> None:
        """Undo `block`; idempotent."""
        cohort = self._of(slot)
        sparse = cohort.blocks.get(target)
        if sparse is None:
            return
        sparse.unblock(self._number[slot])
        if not sparse.blocked:
            del cohort.blocks[target]
        self._freed += 1

    def is_blocked(self, slot: int, target: int) -> bool:
        sparse = self._of(slot).blocks.get(target)
        return sparse is not None and sparse.is_blocked(self._number[slot])

    def blocked(self, target: int) -> int:
        """How many slots a target blocks: O(cohorts)."""
        return sum(
            sparse.blocked for cohort in self._cohorts.values() if (sparse := cohort.blocks.get(target))
        )

    def _enter(self, slot: int, cohort: Cohort) -> None:
        state = self._state[slot]
        if state == State.READY:
            self._ready_at[slot] = len(cohort.ready)
            cohort.ready.append(slot)
            self._freed += 1
        elif state == State.RESTING:
            cohort.resting += 1

    def _exit(self, slot: int, cohort: Cohort) -> None:
        state = self._state[slot]
        if state == State.READY:
            place = self._ready_at[slot]
            last = cohort.ready.pop()
            if last != slot:
                cohort.ready[place] = last
                self._ready_at[last] = place
            self._ready_at[slot] = ABSENT
        elif state == State.RESTING:
            cohort.resting -= 1

    # -- choosing

    def view(self, wanted: EntryFilter, target: int) -> View:
        """What a filter and a target come to; made once, in O(cohorts)."""
        identity = (
            wanted.source,
            wanted.health_statuses,
            wanted.schemes,
            tuple(sorted(wanted.labels.items())) if wanted.labels else (),
            target,
        )
        view = self._views.get(identity)
        if view is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.popitem(last=False)
            cohorts = [cohort for facets, cohort in self._cohorts.items() if facets.match(wanted)]
            view = self._views[identity] = View(wanted, target, cohorts)
        else:
            self._views.move_to_end(identity)
        return view

    def fits(self, slot: int, view: View) -> bool:
        """Whether a slot can be lent to whoever asks for what `view` is of."""
        return (
            self._state[slot] == State.READY
            and self._of(slot).facets.match(view.wanted)
            and not self.is_blocked(slot, view.target)
        )

    def candidates(
        self, view: View, count: int, now: float, accepts: Accepts | None = None, *, all_of: int = 0
    ) -> list[int]:
        """Up to `count` slots that can be lent, each drawn at random, perhaps some twice; none if none can.

        All of them if there are no more than `all_of`. Where both what is ready and what its target does not
        block exceed 512, and hardly overlap, "none" can be wrong.
        """
        if accepts is None and view.empty_at == self._freed:
            return []
        if not 0 <= now - view.weighed_at < _FRESH:
            view.weigh(now)
        if all_of:
            view.weigh(now)
            if view.total <= all_of:
                return list(self._one_by_one(view, accepts))
        found: list[int] = []
        draws = _FIRST_DRAWS
        while len(found) < count:
            slot = self._draw(view, draws, accepts)
            if slot != ABSENT:
                found.append(slot)
            elif draws == _DRAWS:
                break
            else:
                view.weigh(now)
                draws = _DRAWS
        if not found:
            found = [slot for slot, _ in zip(self._one_by_one(view, accepts), range(count), strict=False)]
            if not found and accepts is None:
                view.empty_at = self._freed
        return found

    def _draw(self, view: View, draws: int, accepts: Accepts | None) -> int:
        """One slot at random, or ABSENT: drawn from what is ready, or not blocked, whichever is less."""
        total, sums, givers, target = view.total, view.sums, view.givers, view.target
        if not total:
            return ABSENT
        random, ready_at = self._random, self._ready_at
        for _ in range(draws):
            cohort = givers[bisect_right(sums, int(random() * total))] if len(sums) > 1 else givers[0]
            ready = cohort.ready
            if not ready:
                continue
            sparse = cohort.blocks.get(target) if cohort.blocks else None
            if sparse is None:
                slot = ready[int(random() * len(ready))]
            elif (free := sparse.free) < len(ready):
                if not free:
                    continue
                slot = cohort.members[sparse.free_at(int(random() * free))]
                if ready_at[slot] == ABSENT:
                    continue
            else:
                slot = ready[int(random() * len(ready))]
                if sparse.is_blocked(self._number[slot]):
                    continue
            if accepts is None or accepts(slot):
                return slot
        return ABSENT

    def _one_by_one(self, view: View, accepts: Accepts | None) -> Iterator[int]:
        """Slots that can be lent, found by looking at up to 512."""
        looks = _FEW
        for cohort in view.givers:
            sparse = cohort.blocks.get(view.target)
            if sparse is not None and sparse.free < len(cohort.ready):
                few = [cohort.members[sparse.free_at(place)] for place in range(min(looks, sparse.free))]
            else:
                few = list(cohort.ready[:looks])
            looks -= len(few)
            for slot in few:
                if self._ready_at[slot] == ABSENT:
                    continue
                if sparse is not None and sparse.is_blocked(self._number[slot]):
                    continue
                if accepts is None or accepts(slot):
                    yield slot
            if looks <= 0:
                return

    def held_back(self, view: View) -> Held:
        """What keeps back those that match: O(cohorts)."""
        matching = leased_out = resting = 0
        for cohort in view.cohorts:
            members = len(cohort.members)
            matching += members
            leased_out += members - len(cohort.ready) - cohort.resting
            sparse = cohort.blocks.get(view.target)
            # Some may rest both altogether and at the target.
            resting += min(members, cohort.resting + (sparse.blocked if sparse is not None else 0))
        return Held(matching, leased_out, resting)

    def sizes(self) -> tuple[int, int, int]:
        """How many slots are ready, leased out and resting: O(cohorts)."""
        ready = sum(len(cohort.ready) for cohort in self._cohorts.values())
        resting = sum(cohort.resting for cohort in self._cohorts.values())
        return ready, len(self._slots) - ready - resting, resting
