"""File descriptors: how many the process may have, and how many of them connections may take."""

from __future__ import annotations

import resource
from typing import Final

# The disk tiers, the lock, the log, signals and gRPC's own, and connections that are about to be turned away.
_OTHERS: Final = 80
# A connection for reading in each of two databases: its file and its log.
_FOR_A_THREAD: Final = 4
_FEWEST_CONNECTIONS: Final = 16
_MOST_CONNECTIONS: Final = 1_000_000


class DescriptorLimitError(Exception):
    """The process may have too few files open; the message says how many it needs."""


def raise_limit() -> int:
    """Have the process take as many descriptors as it is allowed; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        # Some systems call it unlimited and mean less.
        hard = soft
    return _MOST_CONNECTIONS if hard == resource.RLIM_INFINITY else hard


def connections_within(limit: int, threads: int) -> int:
    """How many connections a server may accept so that what is on disk never lacks a descriptor.

    Raises DescriptorLimitError if that are too few to serve with.
    """
    others = _OTHERS + _FOR_A_THREAD * threads
    connections = min(limit - others, _MOST_CONNECTIONS)
    if connections < _FEWEST_CONNECTIONS:
        raise DescriptorLimitError(
            f"the process may have {limit} files open, and needs {others + _FEWEST_CONNECTIONS} with "
            f"{threads} threads; raise the limit (ulimit -n, or LimitNOFILE in a systemd unit)"
        )
    return connections
