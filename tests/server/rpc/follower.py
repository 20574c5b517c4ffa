"""A client that keeps a copy of what a watch tells, and finds out whether that can be right."""

from __future__ import annotations

from copy import copy

from proxystash.v1 import cache_service_pb2 as pb

UPSERTS = {pb.CHANGE_KIND_EXISTING, pb.CHANGE_KIND_PUT, pb.CHANGE_KIND_HEALTH}
REMOVALS = {
    pb.CHANGE_KIND_LEFT,
    pb.CHANGE_KIND_DELETED,
    pb.CHANGE_KIND_EXPIRED,
    pb.CHANGE_KIND_EVICTED,
    pb.CHANGE_KIND_EVICTED_BY_HEALTH,
}


class Follower:
    """The copy of one watch that began with the existing entries, and what may not happen to it."""

    def __init__(self) -> None:
        self.copy: dict[str, pb.Change] = {}
        self.history = ""
        self.revision = 0
        self.synced = False
        self.kinds: set[int] = set()
        # The latest version that was told of each key, and the latest change of any.
        self._versions: dict[str, int] = {}
        self._last_change = 0

    def snapshot(self) -> Follower:
        """The same as it is now."""
        other = copy(self)
        other.copy, other._versions = dict(self.copy), dict(self._versions)
        return other

    def hear(self, serialized: bytes) -> pb.WatchResponse:
        """Apply a response."""
        response = pb.WatchResponse.FromString(serialized)
        assert self.history in ("", response.history)
        self.history = response.history
        assert self.synced <= response.synced, "not synced any more"
        assert bool(response.revision) == response.synced
        for change in response.changes:
            self._apply(change)
        if response.synced:
            assert response.revision >= max(self.revision, self._last_change)
            self.revision = response.revision
            self.synced = True
        return response

    def _apply(self, change: pb.Change) -> None:
        self.kinds.add(change.kind)
        if change.kind == pb.CHANGE_KIND_EXISTING:
            assert not self.synced
            # The change that stored it may have been told by now.
            is_late = change.version < self._versions.get(change.key, 0)
        else:
            assert change.version > self._last_change, "out of order, or twice"
            self._last_change = change.version
            assert change.HasField("happened_at")
            is_late = change.version <= self._versions.get(change.key, 0)
        if change.kind == pb.CHANGE_KIND_CLEARED:
            self.copy.clear()
            # What existing entries told of the time after it is told again.
            self._versions.clear()
            return
        assert not is_late, "after a later one of this key"
        self._versions[change.key] = change.version
        if change.kind in UPSERTS:
            self.copy[change.key] = change
        else:
            assert change.kind in REMOVALS
            self.copy.pop(change.key, None)
