"""StreamStats: who subscribed, and when each is due for a snapshot."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Final

import grpc
import structlog

from proxystash.v1 import cache_service_pb2 as pb
from proxystash_server.rpc.errors import Failure, Reason, RequestError
from proxystash_server.rpc.streams import Outgoing, OutgoingStream, StreamSender

# Snapshots are taken at multiples of this many seconds, so that subscribers who came at odd moments share
# them.
_BEAT: Final = 0.05

_log = structlog.stdlib.get_logger(__name__)


class _Subscriber:
    __slots__ = ("due", "interval", "sequence", "stream")

    def __init__(self, stream: OutgoingStream, interval: float) -> None:
        self.stream = stream
        self.interval = interval
        # Not due before the first snapshot has been sent, by the thread that subscribes.
        self.due = math.inf
        self.sequence = 1


class StatsHub:
    """Sends each subscriber a snapshot at once and then one each interval; all who are due get the same one.

    `take_snapshot` is called with the number of subscribers. `clock` is monotonic, in seconds. Thread-safe:
    the lock guards the subscribers, and is never held while a snapshot is taken or handed to the sender.
    """

    def __init__(
        self,
        take_snapshot: Callable[[int], pb.CacheStatistics],
        sender: StreamSender,
        *,
        max_subscribers: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._take_snapshot = take_snapshot
        self._sender = sender
        self._max_subscribers = max_subscribers
        self._clock = clock
        self._changed = threading.Condition()
        self._subscribers: set[_Subscriber] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="stats-hub", daemon=True)

    @property
    def subscribers(self) -> int:
        """StreamStats calls open now."""
        return len(self._subscribers)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Send no more snapshots. The streams stay open until the sender ends them."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def subscribe(self, interval: float, call: Outgoing) -> None:
        """Open a stream of snapshots, one each `interval` seconds.

        Raises RequestError when there are too many, or when all streams are to end.
        """
        subscriber = _Subscriber(OutgoingStream(call), interval)
        with self._changed:
            if len(self._subscribers) >= self._max_subscribers:
                raise RequestError(self._full())
            self._subscribers.add(subscriber)
        try:
            first = self._take_snapshot(self.subscribers)
            is_open = self._sender.open(subscriber.stream, on_close=lambda: self._remove(subscriber))
        except BaseException:
            self._remove(subscriber)
            raise
        if not is_open:
            self._remove(subscriber)
            return
        self._sender.offer(subscriber.stream, pb.StreamStatsResponse(sequence=1, statistics=first))
        with self._changed:
            subscriber.due = self._clock() + interval
            self._changed.notify()

    def send_due(self) -> None:
        """Send one snapshot, the same, to everyone who is due."""
        now = self._clock()
        due: list[tuple[OutgoingStream, int]] = []
        with self._changed:
            for subscriber in self._subscribers:
                if subscriber.due <= now:
                    # Times that were missed altogether are skipped, not made up for.
                    subscriber.due += subscriber.interval * (
                        1 + (now - subscriber.due) // subscriber.interval
                    )
                    subscriber.sequence += 1
                    due.append((subscriber.stream, subscriber.sequence))
        if due:
            statistics = self._take_snapshot(self.subscribers)
            for stream, sequence in due:
                self._sender.offer(stream, pb.StreamStatsResponse(sequence=sequence, statistics=statistics))

    def _run(self) -> None:
        while self._wait_until_due():
            try:
                self.send_due()
            except Exception:  # noqa: BLE001 - see below
                # A snapshot that fails now may work at the next beat; its subscribers see a gap in the
                # sequence.
                _log.exception("snapshot failed")

    def _wait_until_due(self) -> bool:
        """Wait for the next beat at which someone is due; False when closing."""
        with self._changed:
            while not self._closing:
                due = min((subscriber.due for subscriber in self._subscribers), default=math.inf)
                if math.isinf(due):
                    self._changed.wait()
                elif (pause := math.ceil(due / _BEAT) * _BEAT - self._clock()) > 0:
                    self._changed.wait(pause)
                else:
                    return True
            return False

    def _remove(self, subscriber: _Subscriber) -> None:
        with self._changed:
            self._subscribers.discard(subscriber)

    def _full(self) -> Failure:
        return Failure(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            Reason.TOO_MANY_SUBSCRIBERS,
            f"{self._max_subscribers} statistics streams are open, which is the limit",
        )
