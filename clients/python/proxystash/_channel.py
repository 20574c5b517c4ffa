"""What both kinds of client share: the options of their channels, and what a timeout is."""

from __future__ import annotations

import math
from collections.abc import Sequence

ChannelOptions = Sequence[tuple[str, object]]

_OPTIONS: dict[str, object] = {
    # A dead connection under a quiet stream is noticed within 40 seconds. The keepalive timeout alone does
    # not do that: when another ping is under way, its own timeout counts, which is a minute by default.
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.http2.ping_timeout_ms": 10_000,
    "grpc.http2.max_pings_without_data": 0,
    # gRPC waits a second and more between its attempts to connect, in which every call fails at once.
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 2_000,
    # gRPC itself repeats only calls that no server has seen, unless a service config tells it to repeat more;
    # what may be repeated is decided here, so none is taken from the name service.
    "grpc.service_config_disable_resolution": 1,
}


def channel_options(options: ChannelOptions) -> list[tuple[str, object]]:
    """The options of a channel, the caller's counting for more."""
    return list((_OPTIONS | dict(options)).items())


def check_timeout(timeout: float) -> float:
    """Raises ValueError for what is no deadline: every call has one."""
    if not 0 < timeout < math.inf:
        raise ValueError("a timeout is a number of seconds greater than zero")
    return timeout
