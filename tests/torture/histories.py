"""Recording what many threads ask of a store, and what it answers."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

from tests.torture.linearizability import Operation, OperationKind
from tests.torture.stores import RefusedError, numbered_keys

THREADS: Final = 8
KEYS: Final = numbered_keys(5)
_KINDS: Final[Sequence[OperationKind]] = ("get", "get", "get", "get", "put", "put", "put", "delete")


class Register(Protocol):
    """A store of one value for each key. Every method may raise RefusedError."""

    def put(self, keys: Sequence[str], value: str) -> None:
        """Store the value under each key."""

    def delete(self, key: str) -> None:
        """Remove what the key holds."""

    def get(self, keys: Sequence[str]) -> list[str | None]:
        """What each key holds."""


def record(
    connect: Callable[[], Register],
    seed: int,
    goes_on: Callable[[], bool],
    *,
    after_refusal: Callable[[], object] = lambda: None,
) -> list[Operation]:
    """Let threads, each with a connection of its own, use the store at random; all they did.

    After a refusal a thread waits for `after_refusal`, and connects anew.
    """
    history: list[Operation] = []
    numbers = itertools.count()
    start = threading.Barrier(THREADS)

    def use(thread: int) -> None:
        chance = random.Random(f"{seed} {thread}")
        register = connect()
        start.wait(60)
        while goes_on():
            kind = chance.choice(_KINDS)
            # Some go in batches, which are one operation on each key.
            keys = chance.sample(KEYS, 2 if chance.random() < 0.2 and kind != "delete" else 1)
            value = f"v{next(numbers)}" if kind == "put" else None
            found: Sequence[str | None] = [value] * len(keys)
            invoked = time.monotonic()
            answered = True
            try:
                if value is not None:
                    register.put(keys, value)
                elif kind == "delete":
                    register.delete(keys[0])
                else:
                    found = register.get(keys)
            except RefusedError:
                answered = False
            returned = time.monotonic() if answered else float("inf")
            history.extend(
                Operation(key, kind, one, invoked, returned)
                for key, one in zip(keys, found, strict=True)
                if answered or kind != "get"
            )
            if not answered:
                after_refusal()
                register = connect()

    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(use, thread) for thread in range(THREADS)]:
            future.result()
    return history
