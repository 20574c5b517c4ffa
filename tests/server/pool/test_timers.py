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


def test_cancelled_timers_hide_none_of_the_first() -> None:
    timers = Timers()
    cancelled = [timers.add(float(when), print, "cancelled") for when in range(1000)]
    timers.add(2000.0, print, "later")
    timers.add(1500.0, print, "sooner")
    for timer in cancelled:
        timers.cancel(timer)
    assert timers.first(64) == [(1500.0, print, ("sooner",)), (2000.0, print, ("later",))]
    assert len(timers.first(1)) == 1
