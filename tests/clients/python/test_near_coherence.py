"""Near caches beside a real server: clients that write and read at the same time, cuts, kills and silence."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from proxystash import CacheEntry, ChangeKind, Client, NotFoundError, ProxystashError
from tests.support.server import running_server

from .near_script import SUBJECTS, Subject
from .relay import Relay
from .restarting import restarting_server
from .waiting import wait_until

pytestmark = pytest.mark.usefixtures("_resumes_quickly")

_SECONDS = 60
_KEYS = [f"key-{number}" for number in range(6)]
_OPERATIONS = 500
# What a call may fail with here: its connection was cut.
_LOST = {"UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED"}
REMOVALS = {ChangeKind.DELETED, ChangeKind.EVICTED_BY_HEALTH}


@pytest.fixture(params=SUBJECTS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def call(subject: Subject, owner: Any, method: str, *arguments: Any, **settings: Any) -> Any:
    return subject.run(getattr(owner, method), arguments, settings).result(_SECONDS)


def get(subject: Subject, key: str) -> CacheEntry | None:
    entry: CacheEntry | None = call(subject, subject.near, "get", key)
    return entry


def wait_until_heard(subject: Subject) -> None:
    wait_until(lambda: subject.statistics().age is not None)


# -- the truth, and what was seen of it


@dataclass
class Truth:
    """What became of the keys: the version that each value was put with, and those that removed a key."""

    versions: dict[str, int] = field(default_factory=dict)
    removals: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def follow(self, client: Client, end: str, begun: threading.Event) -> None:
        """Note every change until the key `end` is put."""
        with client.watch(include_progress=True) as changes:
            for change in changes:
                begun.set()
                if change.key == end:
                    return
                if change.entry is not None:
                    self.versions.setdefault(change.entry.source, change.version)
                elif change.key:
                    assert change.kind in REMOVALS
                    self.removals[change.key].append(change.version)


@dataclass
class Worker:
    """Reads and writes through one near cache, and notes what it was told.

    `acknowledged` is shared by the workers of a client: what of theirs was acknowledged, in that order. A
    read notes how many those were when it began.
    """

    name: str
    subject: Subject
    acknowledged: list[tuple[str, str]]
    reads: list[tuple[str, int | None, int]] = field(default_factory=list)
    lost: int = 0

    def run(self) -> None:
        rand = random.Random(self.name)
        for number in range(_OPERATIONS):
            try:
                self._step(rand.random(), rand.choice(_KEYS), f"{self.name}-{number}")
            except NotFoundError:
                pass
            except ProxystashError as error:
                if error.code not in _LOST:
                    raise
                self.lost += 1

    def _step(self, choice: float, key: str, value: str) -> None:
        subject, client, before = self.subject, self.subject.client, len(self.acknowledged)
        if choice < 0.75:
            self._read([key], [get(subject, key)], before)
        elif choice < 0.80:
            self._read(_KEYS, call(subject, subject.near, "get_many", _KEYS), before)
        elif choice < 0.90:
            call(subject, client, "put", CacheEntry("http://192.0.2.1:1", key=key, source=value))
            self.acknowledged.append((key, value))
        elif choice < 0.95:
            call(subject, client, "update", key, source=value)
            self.acknowledged.append((key, value))
        elif choice < 0.98:
            call(subject, client, "invalidate_by_health", key)
        else:
            call(subject, client, "delete", key)

    def _read(self, keys: list[str], entries: list[CacheEntry | None], before: int) -> None:
        for key, entry in zip(keys, entries, strict=True):
            self.reads.append((key, None if entry is None else entry.version, before))

    def check(self, truth: Truth) -> None:
        """No read was older than what its client had written before it, or than what it had read before."""
        own: dict[str, int] = defaultdict(int)
        seen: dict[str, int] = defaultdict(int)
        counted = 0
        for key, version, before in self.reads:
            for written, value in self.acknowledged[counted:before]:
                own[written] = max(own[written], truth.versions[value])
            counted = max(counted, before)
            if version is None:
                # It had been removed, at the earliest by the first removal since then.
                least = max(own[key], seen[key])
                version = min(one for one in [0, *truth.removals[key]] if one >= least)
            assert version >= own[key], f"{self.name} read {version} of {key} after its own {own[key]}"
            assert version >= seen[key], f"{self.name} read {version} of {key} after {seen[key]}"
            seen[key] = version


def test_no_read_is_older_than_an_own_write_and_copies_converge(tmp_path: Path) -> None:
    """Given four clients of both kinds that write the same keys, and connections that are cut meanwhile."""
    truth = Truth()
    with ExitStack() as stack:
        server = stack.enter_context(running_server(tmp_path))
        witness = stack.enter_context(Client(server.target))
        begun = threading.Event()
        follower = threading.Thread(target=truth.follow, args=(witness, "end", begun))
        follower.start()
        assert begun.wait(_SECONDS)
        relay = stack.enter_context(Relay(server.target))
        workers: list[Worker] = []
        for number, (make, target) in enumerate(
            (make, target) for make in SUBJECTS.values() for target in (server.target, relay.target)
        ):
            subject = stack.enter_context(make(target))
            wait_until_heard(subject)
            acknowledged: list[tuple[str, str]] = []
            workers += [Worker(f"worker-{number}-{of_it}", subject, acknowledged) for of_it in range(2)]

        threads = [threading.Thread(target=worker.run) for worker in workers]
        for thread in threads:
            thread.start()
        cuts = 0
        while any(thread.is_alive() for thread in threads):
            relay.cut()
            cuts += 1
            threads[0].join(0.3)
        for thread in threads:
            thread.join(_SECONDS)
        witness.put(CacheEntry("http://192.0.2.1:1", key="end"))
        follower.join(_SECONDS)
        assert not follower.is_alive()

        for worker in workers:
            worker.check(truth)
            subject = worker.subject
            found = subject.statistics()
            assert found.hits
            assert found.invalidations
            wait_until(lambda: _is_connected(subject))  # noqa: B023 -- at once
            for key in _KEYS:
                # From the copy, if there is one.
                wait_until(lambda: _version(get(subject, key)) == _version_at(witness, key))  # noqa: B023
    assert cuts > 1


def _is_connected(subject: Subject) -> bool:
    try:
        return get(subject, "end") is not None
    except ProxystashError:
        return False


def _version(entry: CacheEntry | None) -> int | None:
    return None if entry is None else entry.version


def _version_at(client: Client, key: str) -> int | None:
    found = client.get(key)
    return None if found is None else found.entry.version


# -- one at a time


@pytest.fixture
def subject(kind: str, target: str) -> Iterator[Subject]:
    """A near cache beside a server that others use, too."""
    with SUBJECTS[kind](target) as subject:
        wait_until_heard(subject)
        yield subject


def test_a_copy_goes_with_every_change_that_another_client_makes(subject: Subject, target: str) -> None:
    with Client(target) as other:
        key = other.put(CacheEntry("http://192.0.2.1:1")).key
        for change in (
            lambda: other.put(CacheEntry("http://192.0.2.1:1", source="another")),
            lambda: other.update(key, labels={"country": "DE"}),
            lambda: other.invalidate_by_health(key),
            lambda: other.invalidate_by_health(key),
            lambda: other.invalidate_by_health(key),
            lambda: other.put(CacheEntry("http://192.0.2.1:1", health_status="healthy")),  # type: ignore[arg-type]
            lambda: other.delete(key),
            lambda: other.put(CacheEntry("http://192.0.2.1:1", health_status="healthy")),  # type: ignore[arg-type]
            other.clear,
        ):
            change()
            version = _version_at(other, key)
            wait_until(lambda: _version(get(subject, key)) == version)  # noqa: B023 -- at once
            get(subject, key)
        assert subject.statistics().hits


def test_a_copy_is_never_served_past_its_end(subject: Subject) -> None:
    """Given a server whose cleaner has not come by yet, and looks by as fast as they can be had."""
    key = call(subject, subject.client, "put", CacheEntry("http://192.0.2.1:1", ttl=timedelta(seconds=1))).key
    served = 0
    while True:
        before = datetime.now(UTC)
        entry = get(subject, key)
        if entry is None:
            break
        assert entry.expires_at is not None
        assert entry.expires_at > before
        served += 1
    assert served > 1
    assert subject.statistics().expirations == 1


def test_a_key_that_is_refused_is_named_as_the_caller_gave_it(subject: Subject) -> None:
    key = call(subject, subject.client, "put", CacheEntry("http://192.0.2.1:1")).key
    get(subject, key)
    with pytest.raises(ProxystashError) as caught:
        call(subject, subject.near, "get_many", [key, "another", "x" * 300])
    assert (caught.value.code, caught.value.field) == ("INVALID_ARGUMENT", "keys[2]")


def test_copies_are_right_after_each_restart_of_the_server(kind: str, tmp_path: Path) -> None:
    with Relay(None) as relay, restarting_server(tmp_path, relay) as restart:
        server = restart(False)
        with SUBJECTS[kind](relay.target) as subject:
            wait_until_heard(subject)
            with Client(server.target) as direct:
                key = direct.put(CacheEntry("http://192.0.2.1:1", source="first")).key
            assert get(subject, key)
            for killed in (False, True):
                emptied = subject.statistics().emptied
                server = restart(killed)
                with Client(server.target) as direct:
                    entry = direct.put(CacheEntry("http://192.0.2.1:1", source=f"killed {killed}"))
                    assert entry.key == key
                wait_until(lambda: subject.statistics().emptied > emptied)  # noqa: B023 -- at once
                wait_until_heard(subject)
                found = get(subject, key)
                assert found is not None
                assert found.source == f"killed {killed}"
                hits = subject.statistics().hits
                assert get(subject, key) == found
                assert subject.statistics().hits == hits + 1


def test_a_silent_connection_ends_the_trust_in_copies(kind: str, target: str) -> None:
    """Given a connection that stays open and brings nothing any more, then a copy is not served for long."""
    with Relay(target) as relay, Client(target) as other:
        key = other.put(CacheEntry("http://192.0.2.1:1", source="before")).key
        with SUBJECTS[kind](relay.target, max_silence=timedelta(seconds=2)) as subject:
            wait_until_heard(subject)
            assert get(subject, key)
            relay.silence()
            silent_since = time.monotonic()
            other.update(key, source="after")
            while True:
                asked = time.monotonic()
                try:
                    call(subject, subject.near, "get", key, timeout=0.1)
                except ProxystashError:
                    break
                assert asked < silent_since + _SECONDS
            assert subject.statistics().age is None
            relay.cut()
            wait_until_heard(subject)
            found = get(subject, key)
            assert found is not None
            assert found.source == "after"


def test_a_near_cache_ends_with_its_client(kind: str, target: str) -> None:
    with SUBJECTS[kind](target) as subject, Client(target) as other:
        wait_until_heard(subject)
        key = call(subject, subject.client, "put", CacheEntry("http://192.0.2.1:1")).key
        assert get(subject, key)
        call(subject, subject.client, "close")
        with pytest.raises(ProxystashError) as caught:
            get(subject, key)
        assert caught.value.reason == "CLIENT_CLOSED"
        wait_until(lambda: other.stats().watch_subscribers == 0)
        assert subject.statistics().entries == 0


def test_a_closed_near_cache_asks_the_server(kind: str, subject: Subject) -> None:
    key = call(subject, subject.client, "put", CacheEntry("http://192.0.2.1:1")).key
    assert get(subject, key)
    for _ in range(2):
        call(subject, subject.near, "close" if kind == "threads" else "aclose")
    misses = subject.statistics().misses
    assert get(subject, key)
    assert get(subject, key)
    found = subject.statistics()
    assert (found.entries, found.misses, found.age) == (0, misses + 2, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_entries": 0}, "max_entries must be at least 1"),
        ({"max_silence": timedelta(seconds=1)}, "max_silence must be from 2 seconds to 20 minutes"),
        ({"max_silence": timedelta(hours=1)}, "max_silence must be from 2 seconds to 20 minutes"),
    ],
)
def test_bounds_that_cannot_be_kept_are_refused(
    kind: str, target: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message), SUBJECTS[kind](target, **settings):
        pass


def test_a_closed_client_makes_no_near_cache(target: str) -> None:
    client = Client(target)
    client.close()
    with pytest.raises(ProxystashError) as caught:
        client.near_cache()
    assert caught.value.reason == "CLIENT_CLOSED"
