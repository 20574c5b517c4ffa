"""A journal of what the pool holds in memory, so that it is there again after a kill.

A file of checksummed JSON lines: a header with the format, its version and the timeline of its times, then a
line for each change. It is written anew when it is four times as large as what counts of it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from errno import ENOENT
from pathlib import Path
from typing import Final

from proxystash_server.cache.ground.files import make_directory, sync_directory, unused_path
from proxystash_server.cache.ground.group_commit import GroupCommit
from proxystash_server.cache.ground.killpoints import kill_point
from proxystash_server.cache.tiers.jsonl.log import LogFile
from proxystash_server.cache.tiers.jsonl.records import Record, RecordFormat, encode
from proxystash_server.pool.clocks import Clocks, Timeline

logger = logging.getLogger(__name__)

FORMAT_VERSION: Final = 1
# From here on the journal is written anew when less than a quarter of it counts.
_WORTH_REWRITING: Final = 1024 * 1024
# Lines that are encoded and written in one go while the journal is written anew.
_CHUNK: Final = 1000

_REMEDY: Final = "Make it readable, or move it away to go on without what it has"


def journal_format(name: str) -> RecordFormat:
    """What the file of a journal is."""
    return RecordFormat(name, FORMAT_VERSION, _REMEDY)


class Journal:
    """The file, and what is on its way into it. Thread-safe.

    `record` is called under the lock of whoever owns the state, so that lines stand in the order of changes,
    and `commit` without it; `snapshot` gives records of the whole state, and is called with the journal's own
    lock held. So the journal's lock comes before the owner's. What is noted before a snapshot and committed
    after it stands behind it, so lines say what is, not by how much it has changed.

    A journal that cannot be written is *degraded*: nothing waits for it, nobody is told but by `is_degraded`
    and the log, and `maintain` tries to write it anew.
    """

    def __init__(
        self,
        path: Path,
        format_name: str,
        clocks: Clocks,
        snapshot: Callable[[], Iterable[Record]],
        check_store: Callable[[], None] = lambda: None,
        *,
        sync: bool,
    ) -> None:
        self.path = path
        # Raises OSError where the path may not be made.
        self._check_store = check_store
        self._format = journal_format(format_name)
        self.timeline = Timeline(clocks)
        self._snapshot = snapshot
        self._sync = sync
        self._log: LogFile | None = None
        self._size_when_new = 0
        self._outbox: deque[Record] = deque()
        # What is committed while the journal is written anew.
        self._tail: list[bytes] | None = None
        self._damaged = 0
        self._commits: GroupCommit[None, None] = GroupCommit(self._commit_group)
        self._rewriting = threading.Lock()
        self.is_degraded = False

    # -- the beginning

    def load(self) -> tuple[list[Record], Callable[[int], float]]:
        """The records of an earlier process, and what makes steady times of theirs.

        Raises StoreError if the file is there and cannot be used. Damaged lines are left out, and the file is
        kept aside then.
        """
        records: list[Record] = []
        from_disk = self.timeline.reader_of(self.timeline.to_dict())

        def take(record: Record, *_place: int) -> None:
            nonlocal from_disk
            if record["op"] == "header":
                from_disk = self.timeline.reader_of(record["timeline"])
            else:
                records.append(record)

        if self.path.exists():
            with self._format.reading(self.path):
                self._damaged = self._format.read(LogFile(self.path), take)
                if self._damaged:
                    logger.warning(
                        "damaged lines in a journal", extra={"path": str(self.path), "lines": self._damaged}
                    )
                    unused_path(self.path, "damaged").hardlink_to(self.path)
        return records, from_disk

    def start(self) -> None:
        """Write the journal anew, of the state as it is, and take changes from now on."""
        self._rewrite()

    def close(self) -> None:
        """Write what was recorded, and let go of the file."""
        self.commit()
        with self._commits.lock:
            self._log = None

    # -- changes

    def record(self, record: Record) -> None:
        """Note a change, under the lock of the state that was changed."""
        self._outbox.append(record)

    def commit(self) -> None:
        """Wait until what was noted before is durable, or the journal degraded."""
        if self._outbox or self._commits.lock.locked():
            self._commits.submit(None)

    @property
    def is_worth_rewriting(self) -> bool:
        """Whether there is something to gain, or to make good, by `maintain`."""
        return self.is_degraded or (
            self._log is not None and self._log.end > max(_WORTH_REWRITING, 4 * self._size_when_new)
        )

    def maintain(self) -> None:
        """Write the journal anew, if it is worth it."""
        if self.is_worth_rewriting:
            self._rewrite()

    # -- inside

    def _commit_group(self, waiting: Sequence[None]) -> Sequence[None]:
        # Whoever waits has noted what it waits for before.
        records = [self._outbox.popleft() for _ in range(len(self._outbox))]
        if not records or self._log is None:
            return waiting
        lines = b"".join([encode(record) for record in records])
        if self._tail is not None:
            self._tail.append(lines)
        if self.is_degraded:
            return waiting
        try:
            kill_point("pool.before_append")
            self._log.append(lines)
            self._log.sync()
            kill_point("pool.after_append")
            if not self._log.is_in_place:
                raise FileNotFoundError(ENOENT, "it was removed or replaced")
        except OSError as error:
            self._degrade(error)
        return waiting

    def _degrade(self, error: OSError) -> None:
        if not self.is_degraded:
            logger.warning(
                "a journal cannot be written: what it is for is in memory alone until it can",
                extra={"path": str(self.path), "error": error.strerror},
            )
        self.is_degraded = True

    def _rewrite(self) -> None:
        """Replace the file by one of the state as it is; changes go on meanwhile."""
        with self._rewriting:
            with self._commits.lock:
                records = list(self._snapshot())
                self._tail = []
            new = self.path.with_name(self.path.name + ".new")
            try:
                self._check_store()
                make_directory(self.path.parent, sync=self._sync)
                new.unlink(missing_ok=True)
                log = LogFile(new, sync=self._sync)
                log.append(self._format.header(timeline=self.timeline.to_dict()))
                for start in range(0, len(records), _CHUNK):
                    log.append(b"".join([encode(record) for record in records[start : start + _CHUNK]]))
                with self._commits.lock:
                    self._install(log)
            except OSError as error:
                with self._commits.lock:
                    self._tail = None
                    if self._log is None or self.is_degraded:
                        self._degrade(error)
                        return
                # The old one goes on growing, and this is tried again.
                logger.warning(
                    "a journal cannot be written anew",
                    extra={"path": str(self.path), "error": error.strerror},
                )

    def _install(self, log: LogFile) -> None:
        tail, self._tail = self._tail, None
        if tail:
            log.append(b"".join(tail))
        log.sync()
        kill_point("pool.before_rename")
        log.path.rename(self.path)
        kill_point("pool.after_rename")
        log.has_moved_to(self.path)
        if self._sync:
            sync_directory(self.path.parent)
        self._size_when_new = log.end
        self._log = log
        if self.is_degraded:
            logger.info("a journal can be written again", extra={"path": str(self.path)})
        self.is_degraded = False
