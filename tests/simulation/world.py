"""What the pool cannot see: which proxies work, and which targets ban them.

Proxies of six kinds: good, slow, flaky, flapping (up and down for minutes), dying (for good) and dead on
arrival. Targets that ban a proxy for a while, the sooner the more often it has come lately; some proxies are
banned from the start. One target is down for everybody for five minutes. The same seed gives the same world.
"""

from __future__ import annotations

import math
import random
from typing import Final, NamedTuple

from proxystash_server.pool.health import Outcome

MINUTE: Final = 60.0
HOUR: Final = 3600.0
PROXIES: Final = 240
DURATION: Final = 1.5 * HOUR
# For how long a target remembers visits, in the sense of a decaying average.
_MEMORY: Final = 10 * MINUTE
_TIMEOUT: Final = 10.0


class Kind(NamedTuple):
    """A share of the proxies, with how often a use succeeds, and how long it takes in seconds."""

    share: float
    success: float
    latency: float


class Target(NamedTuple):
    """A share of the jobs, and whom a target bans.

    The share that is banned from the start, visits in ten minutes that are free, the chance of a ban at twice
    as many, and how long a ban lasts.
    """

    weight: float
    banned: float
    free: int
    chance: float
    ban: float


KINDS: Final = {
    "good": Kind(0.40, 0.97, 0.9),
    "slow": Kind(0.10, 0.90, 4.0),
    "flaky": Kind(0.18, 0.72, 1.5),
    "flapping": Kind(0.15, 0.95, 1.0),
    "dying": Kind(0.10, 0.95, 1.0),
    "dead": Kind(0.07, 0.00, 1.0),
}
TARGETS: Final = {
    "easy.example": Target(0.30, 0.00, 40, 0.03, 10 * MINUTE),
    "news.example": Target(0.22, 0.05, 20, 0.05, 15 * MINUTE),
    "shop.example": Target(0.22, 0.20, 10, 0.10, 20 * MINUTE),
    "hard.example": Target(0.14, 0.50, 5, 0.20, 40 * MINUTE),
    "outage.example": Target(0.12, 0.05, 20, 0.05, 15 * MINUTE),
}
_OUTAGE: Final = (40 * MINUTE, 45 * MINUTE)
_UP, _DOWN = 15 * MINUTE, 8 * MINUTE


class World:
    """The proxies, by number, and the targets, by name. Times are seconds from the beginning."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(f"world {seed}")
        draw = self.random
        self.kind: list[str] = []
        for name, kind in KINDS.items():
            self.kind += [name] * round(kind.share * PROXIES)
        draw.shuffle(self.kind)
        self._up = [kind != "dead" for kind in self.kind]
        self._toggles = [math.inf] * len(self.kind)
        for proxy, kind_name in enumerate(self.kind):
            if kind_name == "flapping":
                self._toggles[proxy] = draw.expovariate(1 / _UP)
            elif kind_name == "dying":
                self._toggles[proxy] = draw.uniform(0, DURATION)
        self._banned: dict[tuple[int, str], float] = {}
        self._visits: dict[tuple[int, str], tuple[float, float]] = {}
        for name, target in TARGETS.items():
            for proxy in range(len(self.kind)):
                if draw.random() < target.banned:
                    ends = math.inf if draw.random() < 0.5 else draw.expovariate(1 / HOUR)
                    self._banned[proxy, name] = ends

    def visit(self, proxy: int, name: str, now: float) -> tuple[Outcome, float]:
        """What becomes of one use, and how long it takes."""
        draw, kind, target = self.random, KINDS[self.kind[proxy]], TARGETS[name]
        took = min(_TIMEOUT, draw.lognormvariate(math.log(kind.latency), 0.4))
        if not self._is_up(proxy, now):
            return self._failure(took, 0.4)
        if draw.random() >= kind.success:
            return self._failure(took, 0.5)
        visits, stamp = self._visits.get((proxy, name), (0.0, now))
        pressure = visits * math.exp(-(now - stamp) / _MEMORY)
        self._visits[proxy, name] = (pressure + 1.0, now)
        if name == "outage.example" and _OUTAGE[0] <= now < _OUTAGE[1]:
            return Outcome.TARGET_ERROR, took
        if self._banned.get((proxy, name), 0.0) > now:
            return Outcome.BLOCKED, took
        if pressure > target.free and draw.random() < target.chance * (pressure - target.free) / target.free:
            self._banned[proxy, name] = now + draw.expovariate(1 / target.ban)
            return Outcome.BLOCKED, took
        return Outcome.SUCCESS, took

    def _failure(self, took: float, share_of_timeouts: float) -> tuple[Outcome, float]:
        if self.random.random() < share_of_timeouts:
            return Outcome.TIMEOUT, _TIMEOUT
        return Outcome.CONNECT_ERROR, min(took, 3.0)

    def _is_up(self, proxy: int, now: float) -> bool:
        while self._toggles[proxy] <= now:
            self._up[proxy] = not self._up[proxy]
            if self.kind[proxy] == "dying":
                self._toggles[proxy] = math.inf
            else:
                self._toggles[proxy] += self.random.expovariate(1 / (_UP if self._up[proxy] else _DOWN))
        return self._up[proxy]
