"""Messages of the contract and models: each made from the other, field by field.

What is called the same in both is the same; its type in the model says how it gets from one into the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, TypeVar

from proxystash.compiled import compile_function, field_sources
from proxystash.errors import InternalError
from proxystash.models import (
    SET_BY_SERVER,
    Ban,
    CacheEntry,
    CacheStatistics,
    Change,
    ChangeKind,
    GetResult,
    HealthMonitoring,
    HealthStatus,
    Int32,
    Int64,
    InvalidationResult,
    LatencySummary,
    PoolStatistics,
    PutResult,
    Tier,
    TierState,
    TierStatistics,
    WatchPosition,
)
from proxystash.pool_models import (
    BreakerState,
    HealthEffect,
    Lease,
    Outcome,
    ProxyHealth,
    ReleaseResult,
    RenewResult,
    SelectionPolicy,
    Session,
    Shortage,
    Standing,
    TargetStanding,
    TargetSummary,
    UseResult,
)
from proxystash.times import as_utc
from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import pool_service_pb2 as pool_pb

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.timestamp_pb2 import Timestamp

_Model = TypeVar("_Model")
_Known = TypeVar("_Known", bound=StrEnum)

HEALTH_STATUS_NUMBERS: Final[Mapping[str, pb.HealthStatus.ValueType]] = {
    status: pb.HealthStatus.Value(f"HEALTH_STATUS_{status.name}") for status in HealthStatus
}
HEALTH_STATUSES: Final[Mapping[int, HealthStatus]] = {
    HEALTH_STATUS_NUMBERS[status]: status for status in HealthStatus
}
_TIERS: Final[Mapping[int, Tier]] = {pb.Tier.Value(f"TIER_{tier.name}"): tier for tier in Tier}
_STATES: Final[Mapping[int, TierState]] = {
    pb.TierState.Value(f"TIER_STATE_{state.name}"): state for state in TierState
}
# Those of the contract; the others are the client's own.
CHANGE_KIND_NUMBERS: Final[Mapping[str, pb.ChangeKind.ValueType]] = {
    kind: pb.ChangeKind.Value(f"CHANGE_KIND_{kind.name}")
    for kind in ChangeKind
    if kind not in {ChangeKind.SYNCED, ChangeKind.RESET, ChangeKind.PROGRESS}
}
_CHANGE_KINDS: Final[Mapping[int, ChangeKind]] = {
    number: ChangeKind(kind) for kind, number in CHANGE_KIND_NUMBERS.items()
}
OUTCOME_NUMBERS: Final[Mapping[str, pool_pb.Outcome.ValueType]] = {
    outcome: pool_pb.Outcome.Value(f"OUTCOME_{outcome.name}") for outcome in Outcome
}
_OUTCOMES: Final[Mapping[int, Outcome]] = {number: Outcome(name) for name, number in OUTCOME_NUMBERS.items()}
POLICY_NUMBERS: Final[Mapping[str, pool_pb.SelectionPolicy.ValueType]] = {
    policy: pool_pb.SelectionPolicy.Value(f"SELECTION_POLICY_{policy.name}") for policy in SelectionPolicy
}
SHORTAGES: Final[Mapping[int, Shortage]] = {
    pool_pb.Shortage.Value(f"SHORTAGE_{shortage.name}"): shortage for shortage in Shortage
}
_BREAKERS: Final[Mapping[int, BreakerState]] = {
    pool_pb.BreakerState.Value(f"BREAKER_STATE_{state.name}"): state for state in BreakerState
}
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_UNFIT: Final = (AttributeError, KeyError, TypeError, ValueError, OverflowError)

# What a field of a type is in a model, by its name in the message.
_READ: Final[Mapping[object, str]] = {
    **dict.fromkeys((str, int, float, bool, Int32, Int64), "message.{0}"),
    str | None: "message.{0} or None",
    datetime: "_time(message.{0})",
    datetime | None: "_time(message.{0}) if message.HasField('{0}') else None",
    timedelta: "_duration(message.{0})",
    timedelta | None: "_duration(message.{0}) if message.HasField('{0}') else None",
    HealthStatus: "HEALTH_STATUSES.get(message.{0}, HealthStatus.UNKNOWN)",
    HealthMonitoring | None: "read_monitoring(message.{0}) if message.HasField('{0}') else None",
    Mapping[str, str]: "_texts(message.{0})",
    CacheEntry: "read_entry(message.{0})",
    CacheEntry | None: "read_entry(message.{0}) if message.HasField('{0}') else None",
    ChangeKind: "_known(_CHANGE_KINDS, message.{0}, 'kind of change')",
    # Where a change stands is its response's to say.
    WatchPosition | None: "position",
    Tier: "_known(_TIERS, message.{0}, 'tier')",
    tuple[Tier, ...]: "tuple([_known(_TIERS, tier, 'tier') for tier in message.{0}])",
    TierState: "_known(_STATES, message.{0}, 'tier state')",
    LatencySummary: "_read_latency(message.{0})",
    PoolStatistics | None: "_read_pool(message.{0}) if message.HasField('{0}') else None",
    tuple[TierStatistics, ...]: "tuple([_read_tier(tier) for tier in message.{0}])",
    # Where no result has been reported.
    Outcome | None: "_OUTCOMES.get(message.{0})",
    BreakerState: "_known(_BREAKERS, message.{0}, 'breaker state')",
    Standing: "_read_standing(message.{0})",
    tuple[TargetStanding, ...]: "tuple([_read_target_standing(target) for target in message.{0}])",
    HealthEffect | None: "read_health_effect(message.{0}) if message.HasField('{0}') else None",
}
# And how it gets into a message.
_FILL: Final[Mapping[object, str]] = {
    **dict.fromkeys((str, Int32, Int64), "message.{0} = model.{0}"),
    str | None: "message.{0} = model.{0} or ''",
    datetime | None: "if model.{0} is not None: _fill_time(message.{0}, model.{0})",
    timedelta | None: "if model.{0} is not None: message.{0}.FromTimedelta(model.{0})",
    HealthStatus: "message.{0} = HEALTH_STATUS_NUMBERS[model.{0}]",
    HealthMonitoring | None: "if model.{0} is not None: fill_monitoring(message.{0}, model.{0})",
    Mapping[str, str]: "message.{0}.update(model.{0})",
    bool: "message.{0} = model.{0}",
    Outcome | str: "message.{0} = OUTCOME_NUMBERS[model.{0}]",
}


def _reader(model: type[_Model], also: str = "") -> Callable[..., _Model]:
    """Makes a model of a message, and of what `also` names."""
    name = model.__name__
    values = ", ".join(field_sources(model, _READ).values())
    return compile_function(f"read_{name}(message{also})", [f"return {name}({values})"], globals())


read_monitoring: Callable[[pb.HealthMonitoring], HealthMonitoring] = _reader(HealthMonitoring)
read_entry: Callable[[pb.CacheEntry], CacheEntry] = _reader(CacheEntry)
read_change: Callable[[pb.Change, WatchPosition | None], Change] = _reader(Change, ", position")
read_get_result: Callable[[pb.GetResponse], GetResult] = _reader(GetResult)
read_put_result: Callable[[pb.PutResponse], PutResult] = _reader(PutResult)
read_ban: Callable[[pb.Ban], Ban] = _reader(Ban)
read_invalidation_result: Callable[[pb.InvalidateByHealthResponse], InvalidationResult] = _reader(
    InvalidationResult
)
_read_latency: Callable[[pb.LatencySummary], LatencySummary] = _reader(LatencySummary)
_read_tier: Callable[[pb.TierStatistics], TierStatistics] = _reader(TierStatistics)
_read_pool: Callable[[pb.PoolStatistics], PoolStatistics] = _reader(PoolStatistics)
read_statistics: Callable[[pb.CacheStatistics], CacheStatistics] = _reader(CacheStatistics)
read_lease: Callable[[pool_pb.Lease], Lease] = _reader(Lease)
read_health_effect: Callable[[pool_pb.HealthEffect], HealthEffect] = _reader(HealthEffect)
read_release_result: Callable[[pool_pb.ReleaseResult], ReleaseResult] = _reader(ReleaseResult)
read_renew_result: Callable[[pool_pb.RenewResult], RenewResult] = _reader(RenewResult)
_read_standing: Callable[[pool_pb.Standing], Standing] = _reader(Standing)
_read_target_standing: Callable[[pool_pb.TargetStanding], TargetStanding] = _reader(TargetStanding)
read_proxy_health: Callable[[pool_pb.ProxyHealth], ProxyHealth] = _reader(ProxyHealth)
read_target_summary: Callable[[pool_pb.TargetSummary], TargetSummary] = _reader(TargetSummary)

fill_monitoring: Callable[[pb.HealthMonitoring, HealthMonitoring], None] = compile_function(
    "fill_monitoring(message, model)",
    ["message.SetInParent()", *field_sources(HealthMonitoring, _FILL).values()],
    globals(),
)


def _filler(model: type) -> Callable[[Any, Any], str]:
    """Fills an empty message with what a client may say of a model.

    It returns the name of the field whose value does not fit, if there is one: what is raised for it quotes
    the value.
    """
    set_by_server: dict[object, str] = {
        field.name: "" for field in fields(model) if field.metadata == SET_BY_SERVER
    }
    body = ["try:"]
    for name, fill in field_sources(model, {**_FILL, **set_by_server}).items():
        body += [f"    field = {name!r}", f"    {fill}"]
    body += ["except _UNFIT:", "    return field", "return ''"]
    return compile_function(f"fill_{model.__name__}(message, model)", body, globals())


fill_entry: Callable[[pb.CacheEntry, CacheEntry], str] = _filler(CacheEntry)
fill_use_result: Callable[[pool_pb.UseResult, UseResult], str] = _filler(UseResult)
fill_session: Callable[[pool_pb.Session, Session], str] = _filler(Session)


def _time(message: Timestamp) -> datetime:
    # A third of what `ToDatetime` takes, of which every entry has three.
    return _EPOCH + timedelta(0, message.seconds, message.nanos // 1000)


def _fill_time(message: Timestamp, moment: datetime) -> None:
    message.FromDatetime(as_utc(moment))


def _duration(message: Duration) -> timedelta:
    return timedelta(0, message.seconds, message.nanos // 1000)


def _texts(message: Mapping[str, str]) -> dict[str, str]:
    # Its own `items` takes twice as long.
    return {name: message[name] for name in message}


def _known(names: Mapping[int, _Known], number: int, what: str) -> _Known:
    name = names.get(number)
    if name is None:
        raise InternalError(
            f"the server named a {what} that this client does not know; is it newer?",
            reason="UNEXPECTED_ANSWER",
        )
    return name
