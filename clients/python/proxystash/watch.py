"""Changes of the cache, as a stream that outlives its connection and tells where something was missed."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Final

from proxystash.messages import read_change
from proxystash.models import Change, ChangeKind, WatchPosition
from proxystash.streams import AsyncResumingStream, Progress, ResumingStream
from proxystash.v1 import cache_service_pb2 as pb

if TYPE_CHECKING:
    from proxystash._retry import RetryPolicy
    from proxystash.errors import ProxystashError
    from proxystash.streams import LostCallback

COMPACTED: Final = "REVISION_COMPACTED"
# The server's, where a request says nothing.
_PROGRESS_SECONDS = 10.0


class WatchProgress(Progress[pb.WatchResponse, Change]):
    """How far a watch has come, and how it goes on.

    `request` is that of a beginning. A watch that lost its connection goes on behind the last response; where
    the server cannot do that, or existing entries were still being sent, it begins anew, and says so. With
    `include_progress` it tells of a message without changes, too.
    """

    def __init__(
        self,
        target: str,
        timeout: float,
        retry: RetryPolicy | None,
        on_lost: LostCallback | None,
        request: pb.WatchRequest,
        after: WatchPosition | None,
        *,
        include_progress: bool,
    ) -> None:
        super().__init__(target, timeout, retry, on_lost)
        self._request = request
        self._include_progress = include_progress
        self.position = after
        self._synced = after is not None or not request.include_existing
        self._begins_anew = False

    def request(self) -> pb.WatchRequest:
        """The request for the next call."""
        request = pb.WatchRequest()
        request.CopyFrom(self._request)
        if self.position is not None:
            request.ClearField("include_existing")
            request.history, request.after_revision = self.position.history, self.position.revision
        return request

    @property
    def _longest_silence(self) -> float:
        interval = self._request.progress_interval.ToTimedelta() / timedelta(seconds=1)
        return 2 * (interval or _PROGRESS_SECONDS)

    def _read(self, message: pb.WatchResponse) -> list[Change]:
        changes: list[Change] = []
        if self._begins_anew:
            self._begins_anew = False
            changes.append(Change(ChangeKind.RESET))
        changes += [self._change(change, message) for change in message.changes]
        if message.synced:
            self.position = WatchPosition(message.history, message.revision)
            if not self._synced:
                self._synced = True
                changes.append(Change(ChangeKind.SYNCED, position=self.position))
        if self._include_progress and not message.changes:
            changes.append(Change(ChangeKind.PROGRESS, position=self.position))
        return changes

    def _change(self, message: pb.Change, response: pb.WatchResponse) -> Change:
        is_place = response.synced and self._synced
        return read_change(message, WatchPosition(response.history, message.version) if is_place else None)

    def pause_after(self, failure: ProxystashError) -> float:
        # Also of a first call, where its position was of another run of the server.
        if failure.reason == COMPACTED:
            self.position = None
            return self._resume_after(failure)
        return super().pause_after(failure)

    def _resume_after(self, failure: ProxystashError) -> float:
        if self.position is None:
            self._begins_anew = True
            self._synced = not self._request.include_existing
        return super()._resume_after(failure)


class WatchStream(ResumingStream[pb.WatchResponse, Change]):
    """Changes as they come, to be read by one thread; any thread may close it.

    The iteration ends when the stream is closed, by `close`, by leaving its `with` block, or with its client.
    """

    _progress: WatchProgress
    _given: WatchPosition | None = None

    def __next__(self) -> Change:
        change = super().__next__()
        self._given = change.position
        return change

    @property
    def position(self) -> WatchPosition | None:
        """Behind the last change that was given, and where nothing matched since; None while it has no place.

        A later `watch(after=...)` goes on here.
        """
        return self._given if self._items else self._progress.position


class AsyncWatchStream(AsyncResumingStream[pb.WatchResponse, Change]):
    """Changes as they come, to be read by one task; any task of the same loop may close it.

    The iteration ends when the stream is closed, by `aclose`, by leaving its `async with` block, or with its
    client.
    """

    _progress: WatchProgress
    _given: WatchPosition | None = None

    async def __anext__(self) -> Change:
        change = await super().__anext__()
        self._given = change.position
        return change

    @property
    def position(self) -> WatchPosition | None:
        """As that of WatchStream."""
        return self._given if self._items else self._progress.position
