"""What a group of changes makes of its keys, given what is held of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from proxystash_server.cache import CacheEntry, CacheUnavailableError, ChangeKind, HealthStatus, Invalidation
from proxystash_server.cache.coherence.failures import BanRules, FailureHistory
from proxystash_server.cache.coherence.plan import (
    NOT_FOUND,
    Delete,
    Expire,
    Plan,
    Put,
    ReportFailure,
    Request,
    Rules,
)
from proxystash_server.cache.counting.statistics import EvictionCause
from proxystash_server.cache.entry.entry import with_use
from proxystash_server.cache.entry.limits import MAX_COUNT
from proxystash_server.cache.tiers.base import HeldEntry, Write
from tests.server.cache.support import HOUR, START_US, stored

EARLIER = 100
THRESHOLD = 3


def unavailable(_key: str) -> NoReturn:
    raise CacheUnavailableError("nobody knows")


def unexpected(key: str) -> NoReturn:
    pytest.fail(f"{key} was read")


class Decision:
    """A plan that was decided on, given the entries that are held."""

    def __init__(
        self,
        requests: Sequence[Request],
        *entries: CacheEntry,
        read: Callable[[str], CacheEntry | None] | None = None,
        in_memory: Callable[[str], CacheEntry | None] = lambda _key: None,
        as_used: Callable[[CacheEntry], CacheEntry] = lambda entry: entry,
        evicts_by_health: bool = True,
        now_us: int = START_US,
        history: FailureHistory | None = None,
    ) -> None:
        held = {entry.key: entry for entry in entries}
        rules = Rules(THRESHOLD, evicts_by_health)
        history = history or FailureHistory(Path("nowhere"), BanRules(), sync=False)
        self.plan = Plan(requests, EARLIER, now_us, rules, history, in_memory, as_used)
        self._held = {entry.key: HeldEntry(entry.version, entry.failure_count > 0) for entry in entries}
        self._read = held.get if read is None else read
        self.writes = self.decide()

    def decide(self) -> list[Write]:
        return self.plan.decide(self._held, self._read)

    @property
    def written(self) -> dict[str, int | None]:
        """For each key that is written, the failures of its entry, or None if it is removed."""
        return {
            write.key: None if write.entry is None else write.entry.failure_count for write in self.writes
        }

    @property
    def events(self) -> list[tuple[int, ChangeKind, str]]:
        """What is to be told, with revisions counted from the one before."""
        return [(event.revision - EARLIER, event.kind, event.key) for event in self.plan.events]


def put(key: str, **fields: Any) -> Put:
    return Put(key, stored(key, **fields), b"sealed")


# -- puts


def test_a_put_stores_its_entry_under_its_key_with_its_revision() -> None:
    decision = Decision([Put("b", stored("a", source="shop"), b"sealed"), put("c")])
    assert [(write.key, write.version) for write in decision.writes] == [("b", 101), ("c", 102)]
    entry = decision.writes[0].entry
    assert entry is not None
    assert (entry.key, entry.version, entry.source, entry.sealed) == ("b", 101, "shop", b"sealed")
    assert decision.events == [(1, ChangeKind.PUT, "b"), (2, ChangeKind.PUT, "c")]
    assert decision.plan.events[0].entry is entry
    assert decision.plan.last_revision == 102


@pytest.mark.parametrize(
    ("status", "brings", "held", "expected"),
    [
        (HealthStatus.UNKNOWN, 0, 2, 2),
        (HealthStatus.UNHEALTHY, 1, 2, 2),
        (HealthStatus.DEGRADED, 5, 2, 5),
        (HealthStatus.HEALTHY, 0, 2, 0),
        (HealthStatus.HEALTHY, 4, 2, 0),
    ],
)
def test_the_failure_count_goes_on_unless_the_new_entry_is_healthy(
    status: HealthStatus, brings: int, held: int, expected: int
) -> None:
    request = put("a", health_status=status, failure_count=brings)
    assert Decision([request], stored("a", failure_count=held)).written == {"a": expected}


def test_a_put_reads_nothing_where_nothing_has_failed() -> None:
    decision = Decision([put("a"), put("b")], stored("a", failure_count=0), read=unexpected)
    assert decision.written == {"a": 0, "b": 0}


def test_what_has_expired_has_no_failures_that_go_on() -> None:
    held = stored("a", failure_count=2, ttl=1)
    assert Decision([put("a")], held, now_us=START_US + 1_000_000).written == {"a": 0}
    assert Decision([put("a")], held, now_us=START_US + 999_999).written == {"a": 2}


def test_a_put_does_not_fail_because_the_failures_before_cannot_be_read() -> None:
    assert Decision([put("a")], stored("a", failure_count=2), read=unavailable).written == {"a": 0}


# -- failures


def test_a_failure_is_counted_and_marks_the_entry_unhealthy() -> None:
    held = stored("a", failure_count=1, source="shop")
    held.content.sealed = b"sealed"
    decision = Decision([ReportFailure("a")], held)
    [write] = decision.writes
    assert write.entry == stored("a", failure_count=2, source="shop", health_status=HealthStatus.UNHEALTHY)
    assert write.entry is not None
    assert write.entry.version == write.version == 101
    assert write.entry.sealed == b"sealed"
    assert decision.plan.outcomes == {0: Invalidation(True, False, HealthStatus.UNHEALTHY, 2)}
    assert decision.events == [(1, ChangeKind.HEALTH, "a")]
    assert decision.plan.updates == {"a"}


def test_the_failure_at_the_threshold_evicts() -> None:
    decision = Decision([ReportFailure("a")], stored("a", failure_count=THRESHOLD - 1))
    assert decision.written == {"a": None}
    assert decision.plan.outcomes == {0: Invalidation(True, True, HealthStatus.UNHEALTHY, THRESHOLD)}
    assert decision.events == [(1, ChangeKind.EVICTION, "a")]
    assert decision.plan.causes == {"a": EvictionCause.HEALTH}
    assert decision.plan.updates == set()


def test_where_health_does_not_evict_failures_are_counted_as_far_as_can_be() -> None:
    for held, expected in ((THRESHOLD, THRESHOLD + 1), (MAX_COUNT, MAX_COUNT)):
        decision = Decision([ReportFailure("a")], stored("a", failure_count=held), evicts_by_health=False)
        assert decision.written == {"a": expected}


def test_a_failure_of_what_is_not_held_is_not_found_and_changes_nothing() -> None:
    decision = Decision([ReportFailure("a")])
    assert decision.writes == []
    assert decision.plan.events == []
    assert decision.plan.outcomes == {0: NOT_FOUND}
    assert decision.plan.last_revision == EARLIER


def test_a_failure_of_what_has_expired_is_not_found_and_removes_it() -> None:
    decision = Decision([ReportFailure("a")], stored("a", ttl=-HOUR))
    assert decision.written == {"a": None}
    assert decision.plan.outcomes == {0: NOT_FOUND}
    assert decision.events == [(1, ChangeKind.EXPIRY, "a")]
    assert decision.plan.causes == {"a": EvictionCause.TTL}


def test_a_failure_of_what_nobody_can_tell_fails_alone() -> None:
    def read(key: str) -> CacheEntry | None:
        return unavailable(key) if key == "a" else stored(key)

    decision = Decision([ReportFailure("a"), ReportFailure("b")], stored("a"), stored("b"), read=read)
    assert decision.written == {"b": 1}
    assert isinstance(decision.plan.outcomes[0], CacheUnavailableError)
    assert decision.plan.outcomes[1] == Invalidation(True, False, HealthStatus.UNHEALTHY, 1)


def test_an_entry_in_memory_is_taken_if_it_is_the_one_that_is_held() -> None:
    in_memory = stored("a", version=5, source="in memory", access_count=3)
    same = Decision(
        [ReportFailure("a")], stored("a", version=5), in_memory=lambda _key: in_memory, read=unexpected
    )
    another = Decision(
        [ReportFailure("a")], stored("a", version=6, source="held"), in_memory=lambda _key: in_memory
    )
    [mine], [theirs] = same.writes, another.writes
    assert mine.entry is not None
    assert theirs.entry is not None
    assert (mine.entry.source, mine.entry.access_count) == ("in memory", 3)
    assert (theirs.entry.source, theirs.entry.access_count) == ("held", 0)


def test_an_entry_goes_on_with_the_uses_that_the_authority_was_not_told_of() -> None:
    decision = Decision(
        [ReportFailure("a")],
        stored("a"),
        as_used=lambda entry: with_use(entry, 7, START_US + 1, evicted_from_l1=True),
    )
    entry = decision.writes[0].entry
    assert entry is not None
    assert (entry.access_count, entry.last_accessed_us, entry.evicted_from_l1) == (7, START_US + 1, True)


# -- removals


def test_a_delete_removes_what_is_held_and_what_may_be_held_by_who_does_not_say() -> None:
    decision = Decision([Delete("a"), Delete("nothing")], stored("a"))
    assert decision.writes == [Write("a", None, 101), Write("nothing", None, 101)]
    assert decision.plan.found == {0: True, 1: False}
    assert decision.events == [(1, ChangeKind.DELETE, "a")]


def test_only_what_has_expired_expires() -> None:
    requests = [Expire(key) for key in ("old", "young", "nothing")]
    decision = Decision(requests, stored("old", ttl=-HOUR), stored("young"))
    assert decision.written == {"old": None}
    assert decision.plan.found == {0: True, 1: False, 2: False}
    assert decision.events == [(1, ChangeKind.EXPIRY, "old")]
    assert decision.plan.causes == {"old": EvictionCause.TTL}


def test_what_nobody_can_tell_does_not_expire() -> None:
    decision = Decision([Expire("a")], stored("a", ttl=-HOUR), read=unavailable)
    assert decision.writes == []
    assert decision.plan.found == {0: False}


# -- several requests for one key


def test_each_request_sees_what_the_one_before_makes_of_its_key() -> None:
    requests: list[Request] = [
        put("a", source="first"),
        ReportFailure("a"),
        put("a", source="second"),
        ReportFailure("a"),
        ReportFailure("a"),
        Delete("a"),
        ReportFailure("a"),
        put("a", source="last"),
        Expire("a"),
    ]
    decision = Decision(requests, stored("a", failure_count=2), read=unexpected_unless_asked_once())
    kinds = [kind for _, kind, _ in decision.events]
    put_, health, eviction = ChangeKind.PUT, ChangeKind.HEALTH, ChangeKind.EVICTION
    assert kinds == [put_, eviction, put_, health, health, ChangeKind.DELETE, put_]
    assert [revision for revision, _, _ in decision.events] == list(range(1, 8))
    [write] = decision.writes
    assert write.version == 107
    assert write.entry is not None
    assert (write.entry.source, write.entry.failure_count) == ("last", 0)
    assert decision.plan.found == {5: True, 8: False}
    assert decision.plan.outcomes[6] == NOT_FOUND
    # What was put is no update of what was held.
    assert decision.plan.updates == set()


def unexpected_unless_asked_once() -> Callable[[str], CacheEntry | None]:
    """Reads an entry that has failed twice, once."""
    asked: list[str] = []

    def read(key: str) -> CacheEntry | None:
        if asked:
            unexpected(key)
        asked.append(key)
        return stored(key, failure_count=2)

    return read


def test_two_failures_of_one_key_are_counted_in_one_write() -> None:
    decision = Decision([ReportFailure("a")] * 2, stored("a"))
    assert decision.written == {"a": 2}
    assert decision.writes[0].version == 102
    assert decision.plan.updates == {"a"}


def test_what_is_put_again_after_it_was_evicted_is_held() -> None:
    decision = Decision([ReportFailure("a"), put("a")], stored("a", failure_count=THRESHOLD - 1))
    assert decision.written == {"a": 0}
    assert [kind for _, kind, _ in decision.events] == [ChangeKind.EVICTION, ChangeKind.PUT]


@pytest.mark.parametrize(
    ("requests", "goes_on"),
    [
        ([ReportFailure("a")], True),
        ([ReportFailure("a"), ReportFailure("a")], True),
        ([ReportFailure("a"), put("a")], False),
        ([put("a"), ReportFailure("a")], False),
        ([ReportFailure("a"), Delete("a")], False),
        ([ReportFailure("a"), Delete("a"), put("a"), ReportFailure("a")], False),
    ],
)
def test_an_entry_goes_on_with_its_uses_unless_another_was_put(
    requests: Sequence[Request], goes_on: bool
) -> None:
    assert Decision(requests, stored("a")).plan.updates == ({"a"} if goes_on else set())


def test_a_delete_finds_what_was_put_before_it_and_not_what_was_deleted_before_it() -> None:
    decision = Decision([Delete("a"), Delete("a"), put("b"), Delete("b")], stored("a"))
    assert decision.plan.found == {0: True, 1: False, 3: True}
    assert decision.written == {"a": None, "b": None}
    assert [key for _, _, key in decision.events] == ["a", "b", "b"]


def test_deciding_again_comes_to_the_same() -> None:
    requests: list[Request] = [
        put("a"),
        ReportFailure("b"),
        Delete("c"),
        Expire("d"),
        ReportFailure("nothing"),
    ]
    decision = Decision(requests, stored("b"), stored("c"), stored("d", ttl=-HOUR), stored("e"), stored("f"))
    plan = decision.plan
    first = (plan.last_revision, list(plan.events), dict(plan.found), dict(plan.outcomes), dict(plan.causes))
    writes = decision.writes
    assert decision.decide() == writes
    again = (plan.last_revision, plan.events, plan.found, plan.outcomes, plan.causes)
    assert again == first
