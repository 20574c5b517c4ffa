"""Timers keep nothing of what is done or cancelled."""

from __future__ import annotations

import gc
import weakref

import pytest

from proxystash_server.pool.timers import Timer, Timers


class Owner:
    """Has a timer that refers to it, as a lease has."""

    timer: Timer


@pytest.mark.parametrize("how", ["done", "cancelled"])
def test_what_has_its_timer_goes_without_the_collector(how: str) -> None:
    timers, owner = Timers(), Owner()
    owner.timer = timers.add(1.0, lambda _owner: None, owner)
    gone = weakref.ref(owner)
    if how == "done":
        timers.run_due(1.0, 9)
    else:
        timers.cancel(owner.timer)
    gc.disable()
    try:
        del owner
        assert gone() is None
    finally:
        gc.enable()
