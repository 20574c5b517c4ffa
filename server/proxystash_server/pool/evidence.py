"""What is known of proxies and targets, as records of a journal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from proxystash_server.cache.tiers.jsonl.records import Record
from proxystash_server.pool.clocks import Timeline
from proxystash_server.pool.health import NO_TARGET, Evidence, Health, Standing


def standing_record(key: str, target: str, standing: Standing, timeline: Timeline) -> Record:
    """A standing of a proxy, or, where `target` is not empty, of a proxy at a target."""
    record = _evidence_record("standing", standing, timeline) | {
        "key": key,
        "latency": round(standing.latency, 6),
        "rests": standing.rests,
        "streak": standing.streak,
        "outcome": standing.last_outcome,
        "result_at": timeline.absolute(standing.last_result),
    }
    if target:
        record["target"] = target
    for name, moment in (
        ("until", standing.until), ("opened_at", standing.opened_at), ("used_at", standing.used_at),
    ):  # fmt: skip
        if moment != -math.inf:
            record[name] = timeline.absolute(moment)
    return record


def target_record(name: str, evidence: Evidence, last_result: float, timeline: Timeline) -> Record:
    """What is known of a target; of the whole fleet, if `name` is empty."""
    record = _evidence_record("target", evidence, timeline)
    return record | {"name": name, "result_at": timeline.absolute(last_result)}


def forget_record(key: str) -> Record:
    """Nothing is known of a proxy any more."""
    return {"op": "forget", "key": key}


def _evidence_record(operation: str, evidence: Evidence, timeline: Timeline) -> Record:
    return {
        "op": operation,
        "successes": round(evidence.successes, 6),
        "failures": round(evidence.failures, 6),
        "at": timeline.absolute(evidence.at),
    }


class RestoredEvidence:
    """What an earlier process knew of proxies, by key, until their entries are loaded.

    After a boot with an earlier wall clock its times may be later than `now`: what has been is taken as now
    then, and rests are as long as they were. Raises KeyError, TypeError or ValueError for records that are
    none of ours.
    """

    def __init__(self, records: Iterable[Record], from_disk: Callable[[int], float], now: float) -> None:
        self._from_disk = from_disk
        self._now = now
        self._standings: dict[str, dict[str, Record]] = {}
        self._targets: dict[str, Record] = {}
        for record in records:
            operation = record["op"]
            if operation == "standing":
                self._standings.setdefault(record["key"], {})[record.get("target", "")] = record
            elif operation == "target":
                self._targets[record["name"]] = record
            else:
                self._standings.pop(record["key"], None)

    def restore_targets(self, health: Health) -> None:
        """Tell what is known of targets and of the fleet."""
        for name, record in self._targets.items():
            number = health.target_number(name)
            target = health.target(number)
            self._fill(health.fleet if number == NO_TARGET else target, record)
            if target is not None:
                target.last_result = self._past(record["result_at"])

    def restore(self, key: str, slot: int, health: Health) -> None:
        """Tell what is known of the proxy that is now in `slot`; only once for each key."""
        for target, record in self._standings.pop(key, {}).items():
            number = health.target_number(target)
            standing = health.make_pair(slot, number) if number else health.make_proxy(slot)
            self._fill(standing, record)
            standing.latency = float(record["latency"])
            standing.rests = int(record["rests"])
            standing.streak = int(record["streak"])
            standing.last_outcome = int(record["outcome"])
            standing.last_result = self._past(record["result_at"])
            if "used_at" in record:
                standing.used_at = self._past(record["used_at"])
            if "until" in record:
                standing.opened_at = self._past(record["opened_at"])
                standing.until = standing.opened_at + (record["until"] - record["opened_at"]) / 1_000_000

    def records_left(self, timeline: Timeline) -> Iterator[Record]:
        """The records of proxies whose entries are not loaded yet, for a journal with another timeline."""
        for standings in self._standings.values():
            for record in standings.values():
                moved = dict(record)
                for name in ("at", "result_at", "until", "opened_at", "used_at"):
                    if name in moved:
                        moved[name] = timeline.absolute(self._from_disk(moved[name]))
                yield moved

    def _fill(self, evidence: Evidence | None, record: dict[str, Any]) -> None:
        if evidence is not None:
            evidence.successes = float(record["successes"])
            evidence.failures = float(record["failures"])
            evidence.at = self._past(record["at"])

    def _past(self, absolute: int) -> float:
        return min(self._now, self._from_disk(absolute))


def all_records(
    health: Health, key_of: Callable[[int], str], timeline: Timeline, restored: RestoredEvidence | None
) -> list[Record]:
    """All that is known, as records."""
    records = [target_record("", health.fleet, 0.0, timeline)]
    records += [
        target_record(target.name, target, target.last_result, timeline) for target in health.targets()
    ]
    names = {number: target.name for number, target in health.numbered_targets()}
    records += [standing_record(key_of(slot), "", one, timeline) for slot, one in health.proxies()]
    records += [
        standing_record(key_of(slot), names[target], one, timeline) for slot, target, one in health.pairs()
    ]
    if restored is not None:
        records += restored.records_left(timeline)
    return records


def changed_records(health: Health, key_of: Callable[[int], str], timeline: Timeline) -> Iterator[Record]:
    """What has changed since this was last asked, as records."""
    changed, health.changed = health.changed, set()
    changed_targets, health.changed_targets = health.changed_targets, set()
    for number in changed_targets:
        target = health.target(number)
        if target is not None:
            yield target_record(target.name, target, target.last_result, timeline)
        elif number == NO_TARGET:
            yield target_record("", health.fleet, 0.0, timeline)
    for slot, number in changed:
        target = health.target(number)
        standing = health.proxy(slot) if number == NO_TARGET else health.pair(slot, number)
        if standing is not None:
            yield standing_record(key_of(slot), target.name if target is not None else "", standing, timeline)
