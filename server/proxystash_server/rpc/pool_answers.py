"""What the pool answers, as messages of PoolService."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Final

from google.protobuf.duration_pb2 import Duration

from proxystash.v1 import cache_service_pb2
from proxystash.v1 import pool_service_pb2 as pb
from proxystash_server.pool.requests import (
    Answer,
    Granted,
    HealthEffect,
    Lease,
    PoolStatistics,
    ProxyHealth,
    StandingSnapshot,
    TargetSummary,
)
from proxystash_server.rpc import encoding
from proxystash_server.rpc.convert import fill_timestamp, health_status_number, latency_message

# Makes microseconds since the epoch of a steady time.
ToWall = Callable[[float], int]

_LEASES: Final = bytes((pb.AcquireResponse.DESCRIPTOR.fields_by_name["leases"].number << 3 | 2,))
_ENTRY: Final = bytes((pb.Lease.DESCRIPTOR.fields_by_name["entry"].number << 3 | 2,))


def acquire_response(answer: Answer, room: int, to_wall: ToWall) -> tuple[bytes, list[Granted]]:
    """A serialized AcquireResponse of `room` bytes, but one lease at least; and those that had no room."""
    parts: list[bytes] = []
    for place, granted in enumerate(answer.granted):
        entry = encoding.entry_message(granted.entry)
        lease = lease_message(granted.lease, to_wall).SerializeToString()
        lease += _ENTRY + encoding.varint(len(entry)) + entry
        room -= len(lease)
        if room < 0 and place:
            return b"".join(parts), answer.granted[place:]
        parts.append(_LEASES + encoding.varint(len(lease)) + lease)
    if answer.shortage:
        rest = pb.AcquireResponse(shortage=pb.Shortage.ValueType(answer.shortage))
        if answer.retry_after is not None:
            fill_duration(rest.retry_after, answer.retry_after)
        parts.append(rest.SerializeToString())
    return b"".join(parts), []


def lease_message(lease: Lease, to_wall: ToWall) -> pb.Lease:
    """A lease without its entry."""
    message = pb.Lease(
        lease_id=lease.id,
        key=lease.key,
        holder=lease.holder,
        target=lease.target,
        session_id=lease.session_id,
        session_moved=lease.moved,
        score=lease.score,
        trial=lease.trial,
    )
    fill_timestamp(message.acquired_at, to_wall(lease.acquired_at))
    fill_timestamp(message.expires_at, to_wall(lease.expires_at))
    return message


def fill_effect(message: pb.HealthEffect, effect: HealthEffect, to_wall: ToWall) -> None:
    """Write what a result did into an empty message."""
    message.found = effect.found
    message.evicted = effect.evicted
    message.score = effect.score
    if effect.health_status is not None:
        message.health_status = health_status_number(effect.health_status)
    message.failure_count = effect.failure_count
    if effect.resting_until is not None:
        fill_timestamp(message.resting_until, to_wall(effect.resting_until))
    if effect.resting_at_target_until is not None:
        fill_timestamp(message.resting_at_target_until, to_wall(effect.resting_at_target_until))


def health_message(key: str, health: ProxyHealth, to_wall: ToWall) -> pb.ProxyHealth:
    """What is known of one proxy."""
    message = pb.ProxyHealth(key=key, leases=health.leases, max_leases=health.max_leases)
    _fill_standing(message.overall, health.overall, to_wall)
    for standing in health.targets:
        at = message.targets.add(target=standing.target)
        _fill_standing(at.standing, standing, to_wall)
    if health.last_leased is not None:
        fill_timestamp(message.last_leased, to_wall(health.last_leased))
    return message


def _fill_standing(message: pb.Standing, standing: StandingSnapshot, to_wall: ToWall) -> None:
    message.score = standing.score
    message.successes = standing.successes
    message.failures = standing.failures
    message.breaker = pb.BreakerState.ValueType(standing.breaker)
    message.rests = standing.rests
    message.last_outcome = pb.Outcome.ValueType(standing.last_outcome)
    if standing.latency is not None:
        fill_duration(message.latency, standing.latency)
    if standing.resting_until is not None:
        fill_timestamp(message.resting_until, to_wall(standing.resting_until))
    if standing.last_result is not None:
        fill_timestamp(message.last_result, to_wall(standing.last_result))


def target_messages(targets: Iterable[TargetSummary], to_wall: ToWall) -> list[pb.TargetSummary]:
    """How targets fare."""
    messages = []
    for target in targets:
        results = target.successes + target.failures
        message = pb.TargetSummary(
            target=target.target,
            success_rate=target.successes / results if results else 0.0,
            successes=target.successes,
            failures=target.failures,
            resting=target.resting,
            leases=target.leases,
        )
        if target.last_result is not None:
            fill_timestamp(message.last_result, to_wall(target.last_result))
        messages.append(message)
    return messages


def statistics_message(statistics: PoolStatistics) -> cache_service_pb2.PoolStatistics:
    """One snapshot of what the pool does."""
    values = asdict(statistics) | {"acquire_latency": latency_message(statistics.acquire_latency)}
    return cache_service_pb2.PoolStatistics(**values)


def fill_duration(message: Duration, seconds: float) -> None:
    """Write seconds into a Duration."""
    whole, microseconds = divmod(round(seconds * 1_000_000), 1_000_000)
    message.seconds = whole
    message.nanos = microseconds * 1000
