"""When a failed call is made again: how long to pause, and when to give up."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from proxystash.errors import DeadlineExceededError, ProxystashError, UnavailableError

Clock = Callable[[], float]
Random = Callable[[], float]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to pause before a repeated call, in seconds.

    The pause is drawn evenly from 0 to a ceiling that starts at `initial`, is multiplied by `multiplier`
    with each repetition and stops growing at `maximum` ("full jitter": a fleet whose server restarts does
    not come back all at once).
    """

    initial: float = 0.1
    multiplier: float = 2.0
    maximum: float = 2.0

    def __post_init__(self) -> None:
        if not (0 < self.initial <= self.maximum < math.inf and 1 <= self.multiplier < math.inf):
            raise ValueError("a retry policy needs 0 < initial <= maximum and multiplier >= 1")


class Backoff:
    """The growing pauses of one series of failures. Not for use by several threads."""

    def __init__(self, policy: RetryPolicy, rand: Random = random.random) -> None:
        self._policy = policy
        self._random = rand
        self._ceiling = policy.initial

    def next_pause(self, longest: float = math.inf) -> float:
        pause = min(self._ceiling, longest) * self._random()
        self._ceiling = min(self._policy.maximum, self._ceiling * self._policy.multiplier)
        return pause

    def reset(self) -> None:
        """Begin again with short pauses, after a success."""
        self._ceiling = self._policy.initial


class Attempts:
    """The attempts of one call within its deadline; `policy` None allows one. Not for several threads.

    Only UNAVAILABLE is tried again: at any time where repeating is harmless, else only when the call is
    known to have never been sent.
    """

    def __init__(
        self,
        timeout: float,
        policy: RetryPolicy | None,
        *,
        repeatable: bool,
        clock: Clock = time.monotonic,
        rand: Random = random.random,
    ) -> None:
        self._clock = clock
        self._deadline = clock() + timeout
        self._repeatable = repeatable
        self._policy = policy
        self._backoff = Backoff(policy or RetryPolicy(), rand)
        self._unavailable: UnavailableError | None = None

    def remaining(self) -> float:
        """Seconds until the deadline, never negative."""
        return max(0.0, self._deadline - self._clock())

    def pause_after(self, error: ProxystashError) -> float:
        """How long to pause before the next attempt; raises what the call fails with if there is none."""
        if (
            self._policy is None
            or not isinstance(error, UnavailableError)
            or not (self._repeatable or not error.sent)
        ):
            raise self.verdict(error)
        self._unavailable = error
        remaining = self.remaining()
        if remaining <= self._policy.initial:
            # Too little time for one more to succeed: the pauses would shrink to nothing.
            raise error
        return self._backoff.next_pause(remaining)

    def verdict(self, error: ProxystashError) -> ProxystashError:
        """What the call fails with when `error` ends it."""
        if isinstance(error, DeadlineExceededError) and self._unavailable is not None:
            # That the last attempt ran out of time matters less than why there was more than one.
            return self._unavailable
        return error
