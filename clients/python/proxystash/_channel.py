"""What both kinds of client share: the options of their channels, and what a timeout is."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence

from proxystash._defaults import DEFAULT_TARGET, TARGET_VARIABLE
from proxystash.errors import InvalidArgumentError
from proxystash.proxies import redact_url

_MAX_PORT = 65_535
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
    # A scraper's environment names proxies for what it scrapes: passwords must not pass through one of those.
    "grpc.enable_http_proxy": 0,
}
# Where gRPC may find a server other than by host:port.
_SCHEMES = ("dns", "ipv4", "ipv6", "unix", "unix-abstract", "xds")
_HOST_PORT = re.compile(r"(?:[^\s:/\[\]]+|\[[0-9a-fA-F:.%\w]+\]):([0-9]{1,5})")


def channel_options(options: ChannelOptions) -> list[tuple[str, object]]:
    """The options of a channel, the caller's counting for more."""
    return list((_OPTIONS | dict(options)).items())


def find_target(target: str | None) -> str:
    """The address that was given, else that of PROXYSTASH_TARGET, else the default one.

    Raises InvalidArgumentError for what is no address.
    """
    if target is None:
        target = os.environ.get(TARGET_VARIABLE) or DEFAULT_TARGET
    if target.partition(":")[0] in _SCHEMES and not _HOST_PORT.fullmatch(target):
        return target
    match = _HOST_PORT.fullmatch(target)
    if match is None or not 0 < int(match[1]) <= _MAX_PORT:
        shown = redact_url(target) if target.isprintable() else "what was given"
        raise InvalidArgumentError(
            f"{shown!r} is no address of a server: it must be host:port, such as {DEFAULT_TARGET}",
            code="INVALID_ARGUMENT",
            reason="INVALID_TARGET",
            field="target",
        )
    return target


def check_timeout(timeout: float) -> float:
    """Raises ValueError for what is no deadline: every call has one."""
    if not 0 < timeout < math.inf:
        raise ValueError("a timeout is a number of seconds greater than zero")
    return timeout
