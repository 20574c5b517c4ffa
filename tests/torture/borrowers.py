"""Threads that borrow a few proxies from a pool and give them back, and whether all they saw fits."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Final, Protocol, Self

import grpc
from google.protobuf.duration_pb2 import Duration

from proxystash.v1 import pool_service_pb2 as pb
from proxystash.v1 import pool_service_pb2_grpc as pb_grpc
from proxystash_server.cache import CacheManager, L2BackendType
from proxystash_server.pool.pool import Pool
from proxystash_server.pool.requests import AcquireRequest, Answer, Release
from tests.torture.lease_histories import LeaseOperation, check_leases
from tests.torture.stores import RefusedError, make_config, temporary_directory
from tests.torture.tally import BreachError, Tally

THREADS: Final = 8
# How many holders each proxy may have. Fewer than threads, so that there are refusals.
LIMITS: Final = {"k0": 1, "k1": 1, "k2": 2}
# Longer than any run.
_LEASE_SECONDS: Final = 3600
_DEADLINE: Final = 5


class Lender(Protocol):
    """A pool. Every method may raise RefusedError."""

    def acquire(self, request_id: str) -> tuple[str, str] | None:
        """The id of a lease and its proxy's key; None for none."""

    def release(self, lease_id: str) -> bool:
        """Whether it was held."""


class RpcLender:
    """A server's pool, asked over a connection of its own by one holder."""

    def __init__(self, target: str, holder: str) -> None:
        self._holder = holder
        self._channel = grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)])
        self._stub = pb_grpc.PoolServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def acquire(self, request_id: str) -> tuple[str, str] | None:
        request = pb.AcquireRequest(
            holder=self._holder, request_id=request_id, lease_duration=Duration(seconds=_LEASE_SECONDS)
        )
        with _refusals():
            leases = self._stub.Acquire(request, timeout=_DEADLINE).leases
        return (leases[0].lease_id, leases[0].key) if leases else None

    def release(self, lease_id: str) -> bool:
        request = pb.ReleaseRequest(releases=[pb.LeaseRelease(lease_id=lease_id)])
        with _refusals():
            return self._stub.Release(request, timeout=_DEADLINE).results[0].released


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        if error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
            raise RefusedError(str(error)) from error
        raise


class LibraryLender:
    """A pool in this process."""

    def __init__(self, pool: Pool, holder: str) -> None:
        self._pool = pool
        self._holder = holder

    def acquire(self, request_id: str) -> tuple[str, str] | None:
        answer = self._pool.acquire(
            AcquireRequest(holder=self._holder, request_id=request_id, duration=float(_LEASE_SECONDS))
        )
        assert isinstance(answer, Answer)
        return (answer.granted[0].lease.id, answer.granted[0].lease.key) if answer.granted else None

    def release(self, lease_id: str) -> bool:
        return self._pool.release([Release(lease_id)])[0].released


def record_leases(
    connect: Callable[[str], Lender],
    seed: int,
    goes_on: Callable[[], bool],
    *,
    after_refusal: Callable[[], object] = lambda: None,
) -> list[LeaseOperation]:
    """Let threads borrow and give back at random; all they did.

    What is not answered is repeated, an acquire under the same id, until it is.
    """
    history: list[LeaseOperation] = []
    start = threading.Barrier(THREADS)

    def borrow(thread: int) -> None:
        chance = random.Random(f"{seed} {thread}")
        holder = f"thread-{thread}"
        lender = connect(holder)
        held: list[tuple[str, str]] = []
        start.wait(60)
        number = 0
        while goes_on():
            number += 1
            attempts: list[float] = []
            given_back = chance.choice(held) if held and chance.random() < 0.6 else None
            lease = given_back
            invoked = time.monotonic()
            is_answered = False
            while not is_answered:
                begun = time.monotonic()
                try:
                    if given_back is None:
                        lease = lender.acquire(f"{holder}-{number}")
                    elif not lender.release(given_back[0]) and not attempts:
                        raise BreachError("lost", f"{given_back} was held, and is not any more")
                    is_answered = True
                except RefusedError:
                    attempts.append(begun)
                    after_refusal()
                    lender = connect(holder)
            returned = time.monotonic()
            if given_back is not None:
                held.remove(given_back)
            elif lease is not None:
                held.append(lease)
            key = None if lease is None else lease[1]
            history.append(LeaseOperation(key, given_back is not None, invoked, returned, tuple(attempts)))

    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(borrow, thread) for thread in range(THREADS)]:
            future.result()
    return history


def check_recorded(tally: Tally, history: Sequence[LeaseOperation], where: str) -> list[LeaseOperation]:
    """Count a history and check it; raises BreachError."""
    tally.add("operations", len(history))
    try:
        check_leases(history, LIMITS)
    except BreachError as error:
        tally.add(error.kind)
        error.add_note(where)
        raise
    return list(history)


def check_leases_in_process(
    tally: Tally, l2_backend: L2BackendType, seed: int, seconds: float, *, most: int = 20_000
) -> list[LeaseOperation]:
    """Record what threads see of a pool whose entries are put again all the time, and check it."""
    until = time.monotonic() + seconds
    ended = threading.Event()
    count = 0

    def goes_on() -> bool:
        nonlocal count
        count += 1
        return time.monotonic() < until and count < most

    with ExitStack() as stack:
        directory = stack.enter_context(temporary_directory())
        manager = stack.enter_context(CacheManager(make_config(directory, l2_backend)))

        def put_again_and_again() -> None:
            chance = random.Random(seed)
            while not ended.wait(chance.uniform(0, 0.002)):
                _put(manager, chance.choice(list(LIMITS)), chance.choice(["one list", "another"]))

        for key in LIMITS:
            _put(manager, key, "")
        pool = stack.enter_context(Pool(manager, directory / "pool"))
        pool.load()
        lists = threading.Thread(target=put_again_and_again, name="lists")
        lists.start()
        try:
            history = record_leases(lambda holder: LibraryLender(pool, holder), seed, goes_on)
        finally:
            ended.set()
            lists.join()
    return check_recorded(tally, history, f"with {l2_backend}, seed {seed}")


def _put(manager: CacheManager, key: str, source: str) -> None:
    entry = manager.new_entry(f"http://{key}.example:80", key=key, source=source, max_leases=LIMITS[key])
    assert manager.put(key, entry)
