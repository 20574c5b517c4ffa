"""Leases and sessions as records of a journal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from proxystash_server.cache.tiers.jsonl.records import Record
from proxystash_server.pool.index import ABSENT
from proxystash_server.pool.leases import Session
from proxystash_server.pool.requests import Lease

# After a restart each lease has at least so many seconds, so that its holder can renew it.
GRACE_AFTER_RESTART: Final = 10.0

# Makes absolute times of steady ones, and the other way round.
ToDisk = Callable[[float], int]
FromDisk = Callable[[int], float]


def grant_record(lease: Lease, to_disk: ToDisk) -> Record:
    """A lease as it is now."""
    record: Record = {
        "op": "grant",
        "id": lease.id,
        "key": lease.key,
        "at": to_disk(lease.acquired_at),
        "end": to_disk(lease.expires_at),
        "duration": lease.duration,
        "score": round(lease.score, 4),
    }
    for name, value in (
        ("target", lease.target), ("holder", lease.holder), ("session", lease.session_id),
        ("request", lease.request_id), ("trial", lease.trial), ("moved", lease.moved),
    ):  # fmt: skip
        if value:
            record[name] = value
    return record


def session_record(session: Session, to_disk: ToDisk) -> Record:
    """A session as it is now."""
    record: Record = {
        "op": "session",
        "id": session.id,
        "target": session.target,
        "key": session.key,
        "used_at": to_disk(session.used_at),
        "idle_timeout": session.idle_timeout,
    }
    if session.ends_at is not None:
        record["ends_at"] = to_disk(session.ends_at)
    return record


def read_records(
    records: Sequence[Record], from_disk: FromDisk, now: float
) -> tuple[list[Lease], list[Session]]:
    """The leases and sessions that an earlier process held, in the order of their granting."""
    held: dict[str, Record] = {}
    kept: dict[tuple[str, str], Record] = {}
    for record in records:
        match record["op"]:
            case "grant":
                held[record["id"]] = record
            case "renew" if record["id"] in held:
                held[record["id"]] |= {"end": record["end"], "duration": record["duration"]}
            case "end":
                held.pop(record["id"], None)
            case "session":
                kept[record["id"], record["target"]] = record
            case "end_session":
                kept.pop((record["id"], record["target"]), None)
            case _:
                # A renewal of what was lost with a damaged line.
                continue
    leases = [_lease(record, from_disk, now) for record in held.values()]
    sessions = [_session(record, from_disk, now) for record in kept.values()]
    return (
        sorted(leases, key=lambda lease: lease.sequence),
        [session for session in sessions if session.until() > now],
    )


def _lease(record: Record, from_disk: FromDisk, now: float) -> Lease:
    # One that ended by itself is here only if nothing was lent after it: nobody else has its proxy.
    lease = Lease(record["id"], int(record["id"][:-4], 16), record["key"], ABSENT)
    lease.target = record.get("target", "")
    lease.holder = record.get("holder", "")
    lease.session_id = record.get("session", "")
    lease.request_id = record.get("request", "")
    lease.trial = record.get("trial", False)
    lease.moved = record.get("moved", False)
    lease.score = record["score"]
    lease.acquired_at = min(now, from_disk(record["at"]))
    lease.duration = record["duration"]
    left = max(GRACE_AFTER_RESTART, from_disk(record["end"]) - now)
    lease.expires_at = now + min(left, max(lease.duration, GRACE_AFTER_RESTART))
    return lease


def _session(record: Record, from_disk: FromDisk, now: float) -> Session:
    session = Session(record["id"], record["target"], record["key"])
    session.used_at = min(now, from_disk(record["used_at"]))
    session.idle_timeout = record["idle_timeout"]
    if "ends_at" in record:
        session.ends_at = session.used_at + (record["ends_at"] - record["used_at"]) / 1_000_000
    return session
