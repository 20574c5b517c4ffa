"""What a group of changes makes of its entries: the rules of puts, failures, deletes and expiry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from proxystash.models import HealthStatus
from proxystash_server.cache.coherence.failures import FailureHistory, Failures, claimed_at_us
from proxystash_server.cache.coherence.feed import Change, ChangeKind
from proxystash_server.cache.counting.statistics import EvictionCause
from proxystash_server.cache.entry.entry import CacheEntry, stamped, with_health
from proxystash_server.cache.entry.limits import MAX_COUNT, check_not_expired
from proxystash_server.cache.entry.merging import Combine, keep_credentials_of_key, may_lack_credentials
from proxystash_server.cache.errors import BannedError, CacheError, CacheUnavailableError
from proxystash_server.cache.tiers.base import PERHAPS_HELD, Held, Read, Write


class Put(NamedTuple):
    """Store an entry under a key, with its credentials as they go to disk.

    It takes the place of what is stored, unless `combine` has something else in mind. The failure count of an
    entry that is replaced goes on, unless the new one is healthy, and was found so after the last failure.
    """

    key: str
    entry: CacheEntry
    sealed: bytes | None
    combine: Combine | None = None


class Delete(NamedTuple):
    """Remove a key."""

    key: str


class Expire(NamedTuple):
    """Remove a key if its entry has expired."""

    key: str


class ReportFailure(NamedTuple):
    """Count one failure of a key, mark it unhealthy, and evict it at the threshold."""

    key: str


class ReportSuccess(NamedTuple):
    """Start the count of a key's failures over; an entry that was unhealthy is healthy then."""

    key: str


Request = Put | Delete | Expire | ReportFailure | ReportSuccess


class Invalidation(NamedTuple):
    """What recording a failure, or a success, did. `banned_until_us` is 0 if it banned nobody."""

    found: bool
    evicted: bool
    health_status: HealthStatus | None
    failure_count: int
    banned_until_us: int = 0


NOT_FOUND = Invalidation(False, False, None, 0)


class Rules(NamedTuple):
    """What the configuration says of failures."""

    failure_threshold: int
    evicts_by_health: bool


class Plan:
    """Decides what becomes of the keys of some requests, in their order, given what is held of them now.

    Of several requests for one key each sees what the one before makes of it, and the last one's result is
    what is written. `decide` may be called again, if whoever it was called by could not go through with it.

    `writes` is by key what is to be done, `updates` the keys whose entries go on with their uses, `causes`
    why a key is evicted, `failures` what is to be known of a key's failures, and `events` what is to be told.
    By the place of a request, `found` says whether a Delete or Expire found what it removes, and `outcomes`
    what a report did, which entry a Put has left as it was, or what either failed with.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        last_revision: int,
        now_us: int,
        rules: Rules,
        history: FailureHistory,
        in_memory: Callable[[str], CacheEntry | None],
        as_used: Callable[[CacheEntry], CacheEntry],
    ) -> None:
        self._requests = requests
        self._before = last_revision
        self._now_us = now_us
        self._rules = rules
        self._history = history
        self._in_memory = in_memory
        self._as_used = as_used
        self._begin()

    def _begin(self) -> None:
        self.last_revision = self._before
        self.writes: dict[str, Write] = {}
        self.events: list[Change] = []
        self.found: dict[int, bool] = {}
        self.outcomes: dict[int, Invalidation | CacheEntry | CacheError] = {}
        self.causes: dict[str, EvictionCause] = {}
        self.failures: dict[str, Failures | None] = {}
        self.updates: set[str] = set()

    def decide(self, held: Mapping[str, Held], read: Read) -> list[Write]:
        """What becomes of the keys; `read` gives an entry whole, and raises CacheUnavailableError."""
        if self.writes or self.found or self.outcomes:
            self._begin()
        for place, request in enumerate(self._requests):
            if type(request) is Put:
                key, entry, sealed, combine = request
                if combine is None and (key in held or key in self.writes):
                    combine = keep_credentials_of_key if may_lack_credentials(key, entry) else None
                if combine is None and not self._history.known:
                    self._put(request, entry, sealed, held, read)
                else:
                    self._put_with_regard(place, request, combine, held, read)
            elif type(request) is Delete:
                self._delete(place, request.key, held)
            elif type(request) is Expire:
                self.found[place] = self._expire(request.key, held, read)
            else:
                report = self._report_failure if type(request) is ReportFailure else self._report_success
                try:
                    self.outcomes[place] = report(request.key, held, read)
                except CacheUnavailableError as error:
                    self.outcomes[place] = error
        return list(self.writes.values())

    def _put_with_regard(
        self,
        place: int,
        request: Put,
        combine: Combine | None,
        held: Mapping[str, Held],
        read: Read,
    ) -> None:
        """Put with regard to what is stored and to what is known of earlier failures."""
        key, entry, sealed, _ = request
        try:
            stored = None
            if combine is not None:
                if key in held or key in self.writes:
                    stored = self._current_if_known(key, held, read, needed=request.combine is not None)
                stored = None if stored is None or self._is_expired(stored) else self._as_used(stored)
                combined = combine(stored, entry)
                if combined is stored:
                    self.outcomes[place] = stored
                    return
                if combined is not entry:
                    entry, sealed = combined, combined.sealed
                    check_not_expired(entry.expires_at_us, self._now_us)
            entry = self._in_view_of_failures(key, entry, claimed_at_us(request.entry))
        except CacheError as error:
            self.outcomes[place] = error
            return
        goes_on = stored is not None and entry.access_count == stored.access_count and key not in self.writes
        self._put(request, entry, sealed, held, read)
        if goes_on:
            self.updates.add(key)

    def _current_if_known(
        self, key: str, held: Mapping[str, Held], read: Read, *, needed: bool
    ) -> CacheEntry | None:
        try:
            return self._current(key, held, read)
        except CacheUnavailableError:
            # A put that says all there is to say does not wait for what nobody can read.
            if needed:
                raise
            return None

    def _in_view_of_failures(self, key: str, entry: CacheEntry, claimed_at_us: int) -> CacheEntry:
        """The entry with the health that is to be believed, as of when it was claimed. Raises BannedError."""
        known = self.failures[key] if key in self.failures else self._history.known.get(key)
        if known is None or not self._history.rules.first_us:
            return entry
        is_healthy = entry.health_status is HealthStatus.HEALTHY
        if is_healthy and claimed_at_us > known.last_failure_us:
            self.failures[key] = None
            return entry
        is_banned = known.banned_until_us > self._now_us
        if is_banned and self._history.rules.refuses:
            raise BannedError(f"{key} is banned after {known.failure_count} failures")
        if is_banned or is_healthy:
            return with_health(entry, HealthStatus.UNHEALTHY, max(known.failure_count, entry.failure_count))
        return entry

    def _put(
        self, request: Put, entry: CacheEntry, sealed: bytes | None, held: Mapping[str, Held], read: Read
    ) -> None:
        key, content = request.key, entry.content
        # Only a success starts the count over; being found again on a list is none.
        failures = 0
        if content.health_status is not HealthStatus.HEALTHY:
            failures = content.failure_count
            if key in self.writes or key in held:
                failures = max(failures, self._failures_of(key, held, read))
        revision = self.last_revision = self.last_revision + 1
        stored = stamped(entry, key, revision, failures, sealed)
        self.writes[key] = Write(key, stored, revision)
        self.updates.discard(key)
        self.events.append(Change(revision, ChangeKind.PUT, key, stored))

    def _failures_of(self, key: str, held: Mapping[str, Held], read: Read) -> int:
        if key not in self.writes and not held[key].has_failed:
            return 0
        try:
            entry = self._current(key, held, read)
        except CacheUnavailableError:
            return 0
        return 0 if entry is None or self._is_expired(entry) else entry.failure_count

    def _delete(self, place: int, key: str, held: Mapping[str, Held]) -> None:
        earlier = self.writes.get(key)
        there = held.get(key) if earlier is None else earlier.entry
        self.found[place] = there is not None and there is not PERHAPS_HELD
        if key in self._history.known:
            self.failures[key] = None
        # Also where it is not found: a tier that is away may have it, or one that should not.
        self._remove(key, None if there is None else ChangeKind.DELETE)

    def _expire(self, key: str, held: Mapping[str, Held], read: Read) -> bool:
        try:
            entry = self._current(key, held, read)
        except CacheUnavailableError:
            # Left to the next round of the cleaner.
            return False
        if entry is None or not self._is_expired(entry):
            return False
        self._remove(key, ChangeKind.EXPIRY, EvictionCause.TTL)
        return True

    def _report_failure(self, key: str, held: Mapping[str, Held], read: Read) -> Invalidation:
        entry = self._current(key, held, read)
        if entry is not None and self._is_expired(entry):
            self._remove(key, ChangeKind.EXPIRY, EvictionCause.TTL)
            entry = None
        if entry is None:
            return NOT_FOUND
        failures = min(entry.failure_count + 1, MAX_COUNT)
        evicts = self._rules.evicts_by_health and failures >= self._rules.failure_threshold
        banned_until_us = 0
        if self._history.rules.first_us:
            known = self._history.after_failure(key, failures, self._now_us, evicts=evicts)
            self.failures[key], banned_until_us = known, known.banned_until_us
        if evicts:
            self._remove(key, ChangeKind.EVICTION, EvictionCause.HEALTH)
            return Invalidation(True, True, HealthStatus.UNHEALTHY, failures, banned_until_us)
        return self._set_health(key, entry, HealthStatus.UNHEALTHY, failures)

    def _report_success(self, key: str, held: Mapping[str, Held], read: Read) -> Invalidation:
        entry = self._current(key, held, read)
        if entry is None or self._is_expired(entry):
            return NOT_FOUND
        if key in self._history.known:
            self.failures[key] = None
        status = entry.health_status
        if not entry.failure_count and status is not HealthStatus.UNHEALTHY:
            return Invalidation(True, False, status, 0)
        return self._set_health(
            key, entry, HealthStatus.HEALTHY if status is HealthStatus.UNHEALTHY else status, 0
        )

    def _set_health(self, key: str, entry: CacheEntry, status: HealthStatus, failures: int) -> Invalidation:
        revision = self.last_revision = self.last_revision + 1
        changed = with_health(self._as_used(entry), status, failures)
        changed = stamped(changed, key, revision, failures, entry.sealed)
        if key not in self.writes:
            self.updates.add(key)
        self.writes[key] = Write(key, changed, revision)
        self.events.append(Change(revision, ChangeKind.HEALTH, key, changed))
        return Invalidation(True, False, status, failures)

    def _current(self, key: str, held: Mapping[str, Held], read: Read) -> CacheEntry | None:
        earlier = self.writes.get(key)
        if earlier is not None:
            return earlier.entry
        entry = self._in_memory(key)
        if entry is not None and key in held and held[key].version == entry.version:
            # The very same; to read it would take longer than all that is done with it.
            return entry
        return read(key)

    def _remove(self, key: str, kind: ChangeKind | None, cause: EvictionCause | None = None) -> None:
        if kind is not None:
            self.last_revision += 1
            self.events.append(Change(self.last_revision, kind, key, cause=cause))
        self.writes[key] = Write(key, None, self.last_revision)
        self.updates.discard(key)
        if cause is not None:
            self.causes[key] = cause

    def _is_expired(self, entry: CacheEntry) -> bool:
        return entry.expires_at_us <= self._now_us
