"""Named places at which a test can have the process killed, to see what a crash there leaves behind.

Off unless the environment names one: `_PROXYSTASH_KILL_AT=NAME` kills at the first arrival, `NAME:3` at the
third.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "_PROXYSTASH_KILL_AT"

_name, _, _count = os.environ.get(VARIABLE, "").partition(":")
_left = int(_count or 1)


def kill_point(name: str) -> None:
    """Die here, as by `kill -9`, if the environment says so."""
    global _left  # noqa: PLW0603 -- counts arrivals in this process, and only under test
    if name == _name:
        _left -= 1
        if _left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
