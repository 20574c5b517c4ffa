"""The asyncio client with blocking methods, so that one suite can test both clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from datetime import timedelta
from typing import Any, Self, TypeVar

from proxystash import (
    AsyncClient,
    AsyncHeldLease,
    AsyncPool,
    Ban,
    CacheEntry,
    CacheStatistics,
    Change,
    EntryError,
    GetResult,
    HealthEffect,
    InvalidationResult,
    Lease,
    PutResult,
    StatsUpdate,
    TargetSummary,
)
from proxystash.streams import AsyncResumingStream

_Result = TypeVar("_Result")


class BlockingAsyncClient:
    """Runs each method of an AsyncClient in a loop of its own; its methods mirror those of Client."""

    def __init__(self, target: str, **settings: Any) -> None:
        self._runner = asyncio.Runner()
        try:
            self._client = self._run(self._connect(target, settings))
        except BaseException:
            self._runner.close()
            raise

    async def _connect(self, target: str, settings: dict[str, Any]) -> AsyncClient:
        return AsyncClient(target, **settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._runner.close()

    def close(self) -> None:
        self._run(self._client.close())

    def get(self, key: str | CacheEntry, **settings: Any) -> GetResult | None:
        return self._run(self._client.get(key, **settings))

    def get_many(self, keys: Iterable[str | CacheEntry], **settings: Any) -> list[GetResult | None]:
        return self._run(self._client.get_many(keys, **settings))

    def put(self, entry: CacheEntry, **settings: Any) -> PutResult:
        return self._run(self._client.put(entry, **settings))

    def put_many(self, entries: Iterable[CacheEntry], **settings: Any) -> list[PutResult | EntryError]:
        return self._run(self._client.put_many(entries, **settings))

    def update(self, key: str | CacheEntry, **changes: Any) -> PutResult:
        return self._run(self._client.update(key, **changes))

    def bans(self, **settings: Any) -> Iterator[Ban]:
        return _iterate(self._runner, self._client.bans(**settings))

    def unban(self, key: str | CacheEntry, **settings: Any) -> bool:
        return self._run(self._client.unban(key, **settings))

    def delete(self, key: str | CacheEntry, **settings: Any) -> bool:
        return self._run(self._client.delete(key, **settings))

    def clear(self, **settings: Any) -> int:
        return self._run(self._client.clear(**settings))

    def invalidate_by_health(self, key: str | CacheEntry, **settings: Any) -> InvalidationResult:
        return self._run(self._client.invalidate_by_health(key, **settings))

    def stats(self, **settings: Any) -> CacheStatistics:
        return self._run(self._client.stats(**settings))

    def list(self, **settings: Any) -> Iterator[CacheEntry]:
        return _iterate(self._runner, self._client.list(**settings))

    def stream_stats(
        self, interval: timedelta = timedelta(seconds=1), **settings: Any
    ) -> BlockingStream[StatsUpdate]:
        return BlockingStream(self._runner, self._client.stream_stats(interval, **settings))

    def watch(self, **settings: Any) -> BlockingStream[Change]:
        return BlockingStream(self._runner, self._client.watch(**settings))

    @property
    def pool(self) -> BlockingPool:
        return BlockingPool(self._runner, self._client.pool)

    def _run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return self._runner.run(work)


class BlockingPool:
    """The pool of an AsyncClient; its methods mirror those of Pool."""

    def __init__(self, runner: asyncio.Runner, pool: AsyncPool) -> None:
        self._runner = runner
        self._pool = pool

    def acquire(self, target: str = "", **settings: Any) -> BlockingLease:
        async def acquire() -> AsyncHeldLease:
            return await self._pool.acquire(target, **settings)

        return BlockingLease(self._runner, self._runner.run(acquire()))

    def targets(self, **settings: Any) -> Iterator[TargetSummary]:
        return _iterate(self._runner, self._pool.targets(**settings))

    def leases(self, **settings: Any) -> Iterator[Lease]:
        return _iterate(self._runner, self._pool.leases(**settings))

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._pool, name)
        return lambda *arguments, **settings: self._runner.run(method(*arguments, **settings))


class BlockingLease:
    """A lease of an AsyncClient, as HeldLease."""

    def __init__(self, runner: asyncio.Runner, held: AsyncHeldLease) -> None:
        vars(self).update(_runner=runner, _held=held)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ending: object) -> None:
        self._runner.run(self._held.__aexit__(*ending))

    def report(self, result: Any) -> HealthEffect:
        effect: HealthEffect = self._runner.run(self._held.report(result))
        return effect

    def release(self, result: Any = None) -> None:
        self._runner.run(self._held.release(result))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._held, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._held, name, value)


class BlockingStream(Iterator[_Result]):
    """A stream of an AsyncClient, read without a loop."""

    def __init__(self, runner: asyncio.Runner, stream: AsyncResumingStream[Any, _Result]) -> None:
        self._runner = runner
        self._stream = stream

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._runner.run(self._stream.aclose())

    def __next__(self) -> _Result:
        return next(_iterate(self._runner, self._stream))

    @property
    def position(self) -> Any:
        return self._stream.position  # type: ignore[attr-defined]  # of a watch


def _iterate(runner: asyncio.Runner, items: AsyncIterator[_Result]) -> Iterator[_Result]:
    async def read() -> list[_Result]:
        """The next item; none at the end, since no task may raise StopAsyncIteration unseen."""
        async for item in items:
            return [item]
        return []

    while found := runner.run(read()):
        yield found[0]
