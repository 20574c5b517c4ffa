"""What two stores of an earlier format have noted of each other, taken over at their first start.

Up to format 2 of SQLite and 1 of JSONL, each disk tier kept by key the versions of changes that the other one
had missed. The tiers bring that along as the note `inherited`, until L3 has caught up on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from proxystash_server.cache.coherence.guard import GuardedTier
from proxystash_server.cache.coherence.missed import MissedChanges
from proxystash_server.cache.ground.parsing import parse_json
from proxystash_server.cache.tiers.base import DiskTier, Write

# The key that stood for all of them: a Clear was missed.
_EVERYTHING: Final = ""
# What stood in the place of the other store's name in one that had worked without another.
_ALONE: Final = "alone"


def inherit_from_cache(tier: DiskTier, missed: MissedChanges) -> None:
    """Write down in the journal what L2 has noted that L3 has missed. Raises TierError."""
    marks = _marks_in(tier.notes)
    if marks is None:
        return
    cleared_at = marks.pop(_EVERYTHING, 0)
    if cleared_at:
        missed.append_clear(cleared_at)
    for key, version in marks.items():
        entry = tier.get(key)
        if entry is not None and entry.version >= version:
            missed.append([Write(key, entry, entry.version)])
        else:
            missed.append([Write(key, None, version)])
    was_alone = tier.notes.get("partner") == _ALONE
    tier.note(inherited=None, partner=None, alone=1 if was_alone else None)


def inherited_by_authority(tier: DiskTier, missed: MissedChanges) -> dict[str, int]:
    """The keys that L3 knows better than L2, and from which version on. Raises TierError."""
    marks = _marks_in(tier.notes)
    partner = tier.notes.get("partner")
    if partner is not None and tier.notes.get("cache_id") is None:
        is_new = not partner and not tier.size()
        tier.note(cache_id=None if is_new else "" if partner == _ALONE else partner)
    if not marks:
        return {}
    cleared_at = marks.pop(_EVERYTHING, 0)
    if cleared_at:
        marks = {**dict.fromkeys(missed.keys(), cleared_at), **marks}
    return marks


def forget_inherited(guard: GuardedTier[Any]) -> None:
    """L3 has caught up on what the two had noted."""
    if {"inherited", "partner"} & guard.tier.notes.keys():
        guard.write(guard.tier.note, inherited=None, partner=None)


def _marks_in(notes: Mapping[str, object]) -> dict[str, int] | None:
    text = notes.get("inherited")
    if not isinstance(text, str):
        return None
    with suppress(ValueError):
        marks = parse_json(text)
        if isinstance(marks, dict):
            return {key: version for key, version in marks.items() if isinstance(version, int)}
    return {}
