"""What is remembered of failures beyond the entries that had them: when the last one was, and who is banned.

A file of JSON lines (see tiers/jsonl/log.py) beside the stores, apart from anything that may be emptied: a
header, then a line whenever what is known of a key changes; the last of a key counts.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from proxystash_server.cache.entry.entry import CacheEntry, to_microseconds
from proxystash_server.cache.ground.files import make_directory, replace_file
from proxystash_server.cache.ground.killpoints import kill_point
from proxystash_server.cache.tiers.jsonl.log import LogFile
from proxystash_server.cache.tiers.jsonl.records import Record, RecordFormat, encode

logger = logging.getLogger(__name__)

FORMAT: Final = RecordFormat(
    "proxystash-failures",
    1,
    "It says which proxies are banned; make it readable, or move it away to forget that",
)
# More than a fleet bans; what failed longest ago is forgotten first.
_MOST_KEYS: Final = 100_000
_WORTH_REWRITING: Final = 1024 * 1024


class Failures(NamedTuple):
    """What is known of the failures of a key: how many since the last success, and when the last one was.

    `bans` is how often they have evicted it, and `banned_until_us` how long that lasts; 0 if they have not.
    """

    failure_count: int
    last_failure_us: int
    bans: int = 0
    banned_until_us: int = 0


class BanRules(NamedTuple):
    """How long a first ban lasts, each one after it twice as long, up to `most_us`.

    0 bans nobody, and what is remembered of earlier failures counts no more. `refuses` says whether a put of
    a banned proxy is refused, or stored as unhealthy.
    """

    first_us: int = 0
    most_us: int = 0
    refuses: bool = False


class FailureHistory:
    """The failures by key, in `known`. Changed by one thread at a time (whoever makes changes), read by any.

    What cannot be written down is kept in memory, and written with the next change.
    """

    def __init__(
        self, path: Path, rules: BanRules, check_store: Callable[[], None] = lambda: None, *, sync: bool
    ) -> None:
        self.path = path
        # Raises OSError where the path may not be made.
        self._check_store = check_store
        self.rules = rules
        self._sync = sync
        self.known: dict[str, Failures] = {}
        self._log: LogFile | None = None
        # Whether the file may lack something that is known here.
        self._is_behind = False

    def open(self) -> int:
        """Read the file, if there is one; how many damaged lines it has.

        Raises StoreError if it is there and cannot be used.
        """
        damaged = 0
        if self.path.exists():
            with FORMAT.reading(self.path):
                self._log = LogFile(self.path, sync=self._sync)
                damaged = FORMAT.read(self._log, self._replay)
        # Then the next change writes it anew, without them.
        self._is_behind = damaged > 0
        return damaged

    def banned_until_us(self, key: str, now_us: int) -> int:
        """Until when a key is banned; 0 if it is not."""
        known = self.known.get(key) if self.rules.first_us else None
        return known.banned_until_us if known is not None and known.banned_until_us > now_us else 0

    def banned(self, now_us: int, after: str, limit: int) -> list[tuple[str, Failures]]:
        """The first `limit` keys greater than `after` that are banned now, in order."""
        known = list(self.known.items()) if self.rules.first_us else []
        bans = [(key, one) for key, one in known if one.banned_until_us > now_us]
        return heapq.nsmallest(limit, (ban for ban in bans if ban[0] > after))

    def close(self) -> None:
        """Let go of the file; idempotent."""
        self._log = None

    def after_failure(self, key: str, failure_count: int, now_us: int, *, evicts: bool) -> Failures:
        """What will be known of a key that fails now, and is evicted for it or not. Changes nothing."""
        before = self.known.get(key)
        bans = 0 if before is None else before.bans
        if not evicts:
            return Failures(failure_count, now_us, bans)
        # It has long reached the most by then.
        duration = min(self.rules.first_us << min(bans, 32), self.rules.most_us)
        return Failures(failure_count, now_us, bans + 1, now_us + duration)

    def update(self, changes: Mapping[str, Failures | None]) -> None:
        """Take changes by key, where None forgets it."""
        lines = []
        for key, failures in changes.items():
            if failures is not None:
                self.known.pop(key, None)
                self.known[key] = failures
            elif self.known.pop(key, None) is None:
                continue
            lines.append(_line(key, failures))
        while len(self.known) > _MOST_KEYS:
            forgotten = next(iter(self.known))
            del self.known[forgotten]
            lines.append(_line(forgotten, None))
        if lines:
            self._write(b"".join(lines))

    def clear(self) -> None:
        """Forget everything."""
        if self.known:
            self.known.clear()
            self._write_anew()

    def drop_past(self, now_us: int) -> None:
        """Forget what is too long ago to matter: no ban any more, and no failure within the longest ban."""
        since = now_us - self.rules.most_us
        past: dict[str, None] = {}
        # In the order of their last failures.
        for key, failures in self.known.items():
            if max(failures.last_failure_us, failures.banned_until_us) >= since:
                break
            past[key] = None
        self.update(past)

    def _write(self, lines: bytes) -> None:
        log = self._log
        if log is None or self._is_behind or log.end > max(_WORTH_REWRITING, 400 * len(self.known)):
            self._write_anew()
            return
        try:
            kill_point("failures.before_append")
            log.append(lines)
            log.sync()
            kill_point("failures.after_append")
            self._is_behind = not log.is_in_place
        except OSError as error:
            self._fell_behind(error)

    def _write_anew(self) -> None:
        content = FORMAT.header() + b"".join(_line(key, failures) for key, failures in self.known.items())
        try:
            self._check_store()
            make_directory(self.path.parent, sync=self._sync)
            replace_file(self.path, content, sync=self._sync)
            self._log = LogFile(self.path, sync=self._sync)
            self._log.end = len(content)
            self._is_behind = False
        except OSError as error:
            self._fell_behind(error)

    def _fell_behind(self, error: OSError) -> None:
        self._is_behind = True
        logger.warning("failures are kept in memory alone", extra={"error": str(error.strerror)})

    def _replay(self, record: Record, *_place: int) -> None:
        if record["op"] == "failures":
            self.known.pop(record["key"], None)
            self.known[record["key"]] = Failures(*(int(record[name]) for name in Failures._fields))
        elif record["op"] != "header":
            self.known.pop(record["key"], None)


def _line(key: str, failures: Failures | None) -> bytes:
    if failures is None:
        return encode({"op": "forget", "key": key})
    return encode({"op": "failures", "key": key, **failures._asdict()})


def claimed_at_us(entry: CacheEntry) -> int:
    """When the health that an entry claims was found: at its last check, else when it was fetched."""
    monitoring = entry.content.health_monitoring
    if monitoring is None or monitoring.last_health_check is None:
        return entry.content.fetch_time_us
    return to_microseconds(monitoring.last_health_check)
