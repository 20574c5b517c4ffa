"""Made-up proxies. Needs the standard library alone, so that every environment has the same ones."""

from __future__ import annotations

import hashlib
from typing import Final

COUNTRIES: Final = ("DE", "FR", "NL", "PL", "SE")
SOURCE: Final = "bench"
RARE_SOURCE: Final = "rare"
# Long enough for nothing to expire during a run.
TTL_SECONDS: Final = 7 * 24 * 3600


def proxy_url(number: int) -> str:
    """The URL of a made-up proxy; `number` up to 16 million."""
    return f"http://10.{number >> 16}.{number >> 8 & 255}.{number & 255}:8080"


def key_of(number: int) -> str:
    """The key of a made-up proxy."""
    return hashlib.sha256(proxy_url(number).encode()).hexdigest()[:16]


def labels_of(number: int) -> dict[str, str]:
    """What a made-up proxy can be selected by."""
    return {"country": COUNTRIES[number % len(COUNTRIES)]}
