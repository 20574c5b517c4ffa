"""Clocks that a test sets."""

from __future__ import annotations

from proxystash_server.pool.clocks import Clocks

START_US = 1_700_000_000_000_000


class FakeClocks:
    """Both clocks: `pass_time` moves both, `step` the wall clock alone, `reboot` restarts the steady one."""

    def __init__(self) -> None:
        self.wall_us = START_US
        self.steady = 1000.0
        self.boot = "first"

    def clocks(self) -> Clocks:
        return Clocks(lambda: self.wall_us, lambda: self.steady, self.boot)

    def pass_time(self, seconds: float) -> None:
        self.wall_us += round(seconds * 1_000_000)
        self.steady += seconds

    def step(self, seconds: float) -> None:
        self.wall_us += round(seconds * 1_000_000)

    def reboot(self, seconds: float = 30.0) -> None:
        self.pass_time(seconds)
        self.steady = 5.0
        self.boot += "x"
