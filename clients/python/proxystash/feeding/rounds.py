"""Sources read again and again, each on its own: when, and what became of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeVar

from proxystash.errors import ProxystashError
from proxystash.feeding.copying import unpacked
from proxystash.feeding.failures import SourceError
from proxystash.feeding.files import FileState, read_file
from proxystash.feeding.sources import Source
from proxystash.files import ProxyFileError
from proxystash.loading import LoadReport

if TYPE_CHECKING:
    from proxystash.feeding.download import Downloader, Validators

_MAX_BACKOFF = 16
_JITTER = 0.1
# How many rejected records of a list are told.
_REASONS = 10

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Round:
    """What became of a source: it was loaded, or is unchanged (no report), or has failed.

    A failure is the source's, or that of the server that should be filled; a report says how far it came.
    """

    source: Source
    report: LoadReport | None = None
    failure: str = ""
    server_failed: bool = False


class Observer(Protocol):
    """What is told of rounds."""

    def begins(self, source: Source) -> None:
        """A round begins."""

    def progresses(self, source: Source, part: float) -> None:
        """So much of a list has been loaded, from 0 to 1. Told from another thread."""

    def ended(self, result: Round, pause: timedelta | None) -> None:
        """A round has ended; the next begins after the pause, if there is one."""


# Loads a list: the source, the file, and what is told how much has been read. Blocking.
Load = Callable[[Source, BinaryIO, Callable[[float], None], LoadReport], None]


@dataclass
class _Known:
    """What is known of a source from earlier rounds."""

    failures: int = 0
    # Of what was loaded last.
    version: Validators | FileState | None = None
    # When that must be loaded again, so that what is still listed does not expire.
    reload_at: datetime | None = None


@dataclass
class Feed:
    """Loads sources every so often, each of them as if there were no other.

    A pause is `every`, give or take a tenth; it doubles with each failure of the source in a row, up to 16
    times. What is unchanged is not loaded, unless half of the time is over that it lives, or the next rounds
    might come too late. `load` runs on `executor`, which decides how many do at once; `abandon` makes it
    return early. For one event loop, whose `sleep` it uses.
    """

    every: timedelta
    limit: int
    load: Load
    abandon: Callable[[], None]
    executor: Executor
    observer: Observer
    downloader: Downloader | None = None
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    jitter: random.Random = field(default_factory=random.Random)

    async def once(self, sources: Sequence[Source]) -> list[Round]:
        """One round of each source."""

        async def one(source: Source) -> Round:
            result = await self._round(source, _Known())
            self.observer.ended(result, None)
            return result

        return await asyncio.gather(*map(one, sources))

    async def forever(self, sources: Sequence[Source]) -> None:
        """Rounds of each source, until cancelled."""
        await asyncio.gather(*map(self._keep, sources))

    async def _keep(self, source: Source) -> None:
        known = _Known()
        while True:
            result = await self._round(source, known)
            # The server's failures are not the source's.
            known.failures = known.failures + 1 if result.failure and not result.server_failed else 0
            factor = min(2 ** max(0, known.failures - 1), _MAX_BACKOFF)
            pause = self.every * factor * self.jitter.uniform(1 - _JITTER, 1 + _JITTER)
            self.observer.ended(result, pause)
            await self.sleep(pause.total_seconds())

    async def _round(self, source: Source, known: _Known) -> Round:
        self.observer.begins(source)
        report = LoadReport(reasons=_REASONS)
        if known.reload_at is not None and self.now() >= known.reload_at:
            known.version = None
        began = self.now()
        try:
            got = await self._get(source, known.version)
            if got is None:
                return Round(source)
            file, version = got
            await self._in_thread(lambda: self._load(source, file, report))
        except (SourceError, ProxyFileError) as error:
            return Round(source, report, str(error))
        except ProxystashError as error:
            return Round(source, report, error.message, server_failed=True)
        if not report.loaded and report.rejected:
            first = report.rejected[0]
            return Round(source, report, f"nothing could be loaded; {first.where}: {first.reason}")
        # What the server could not store is to be tried again.
        known.version = None if report.not_stored else version
        known.reload_at = self._reload_at(began, report.expires_at)
        return Round(source, report)

    async def _get(
        self, source: Source, known: Validators | FileState | None
    ) -> tuple[BinaryIO, Validators | FileState] | None:
        path = source.path
        if path is not None:
            assert known is None or isinstance(known, tuple)
            state = known
            return await self._in_thread(lambda: read_file(path, state, self.limit))
        assert self.downloader is not None
        assert not isinstance(known, tuple)
        return await self.downloader.fetch(source, known)

    def _load(self, source: Source, packed: BinaryIO, report: LoadReport) -> None:
        with unpacked(packed, self.limit) as file:
            self.load(source, file, partial(self.observer.progresses, source), report)

    def _reload_at(self, began: datetime, expires_at: datetime | None) -> datetime | None:
        if expires_at is None:
            return None
        return expires_at - max((expires_at - began) / 2, 2 * self.every)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        """What a blocking step gives. When cancelled, it is waited for, since it holds files."""
        step = asyncio.get_running_loop().run_in_executor(self.executor, work)
        try:
            return await asyncio.shield(step)
        except asyncio.CancelledError:
            self.abandon()
            await asyncio.wait([step])
            # Retrieved, so that nobody complains about what is no news.
            step.exception()
            raise
