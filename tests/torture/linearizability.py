"""Whether a history of one key's reads and writes can be explained by some order of them.

The search of Wing and Gong (1993) with Lowe's memory of configurations (2017), for a register with three
operations: put a value, delete, and get a value or a miss. A write whose outcome is not known may take effect
at any time after its invocation, or never.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tests.torture.tally import BreachError, Kind

OperationKind = Literal["put", "delete", "get"]


@dataclass(frozen=True, slots=True)
class Operation:
    """A call and its answer; `returned` is infinite if there was none. A delete and a miss have no value."""

    key: str
    kind: OperationKind
    value: str | None
    invoked: float
    returned: float = math.inf


class _Configuration(NamedTuple):
    """How far an attempt at an order has come.

    Of the answered operations all before `low` have their place, and those at `low + i` for each bit i of
    `ahead`; of the unanswered writes so many deletes, and these puts. The register holds `value`.
    """

    low: int
    ahead: int
    deletes: int
    puts: frozenset[int]
    value: str | None


def check_history(history: Iterable[Operation]) -> None:
    """Check every key; raises BreachError for the first whose operations have no explanation."""
    by_key: defaultdict[str, list[Operation]] = defaultdict(list)
    for operation in history:
        by_key[operation.key].append(operation)
    for operations in by_key.values():
        check_key(operations)


def check_key(history: Sequence[Operation]) -> None:
    """Check the operations of one key, which is absent at first; each value is put at most once."""
    answered = sorted((one for one in history if one.returned < math.inf), key=lambda one: one.invoked)
    shown = {one.value for one in answered if one.kind == "get"}
    unanswered = sorted((one for one in history if one.returned == math.inf), key=lambda one: one.invoked)
    deletes = [one for one in unanswered if one.kind == "delete"]
    # A put that no get shows explains nothing, so it may be taken not to have happened.
    puts = [one for one in unanswered if one.kind == "put" and one.value in shown]

    stack = [_Configuration(0, 0, 0, frozenset(), None)]
    known = {stack[0]}
    furthest = stack[0]
    while stack:
        configuration = stack.pop()
        if configuration.low == len(answered):
            return
        furthest = max(furthest, configuration, key=lambda one: one.low)
        for following in _following(configuration, answered, deletes, puts):
            if following not in known:
                known.add(following)
                stack.append(following)
    raise _explain(answered, furthest)


def _following(
    at: _Configuration, answered: list[Operation], deletes: list[Operation], puts: list[Operation]
) -> list[_Configuration]:
    """The configurations one operation further on, the likeliest last."""
    low, ahead, value = at.low, at.ahead, at.value
    candidates: list[int] = []
    first_return = math.inf
    for index in range(low, len(answered)):
        if answered[index].invoked > first_return:
            break
        if not ahead >> (index - low) & 1:
            candidates.append(index)
            first_return = min(first_return, answered[index].returned)
    following: list[_Configuration] = []
    for number, put in enumerate(puts):
        if number not in at.puts and put.invoked <= first_return:
            following.append(at._replace(puts=at.puts | {number}, value=put.value))
    # Unanswered deletes differ only in when they may begin to matter: the earliest is as good as any.
    if value is not None and at.deletes < len(deletes) and deletes[at.deletes].invoked <= first_return:
        following.append(at._replace(deletes=at.deletes + 1, value=None))
    for index in reversed(candidates):
        operation = answered[index]
        if operation.kind == "get" and operation.value != value:
            continue
        placed = ahead | 1 << (index - low)
        new_low = low
        while placed & 1:
            placed >>= 1
            new_low += 1
        step = at._replace(low=new_low, ahead=placed, value=operation.value)
        if operation.kind == "get":
            # It changes nothing, so that taking it now rules nothing out.
            return [step]
        following.append(step)
    return following


def _explain(answered: list[Operation], furthest: _Configuration) -> BreachError:
    stuck = answered[furthest.low]
    context = answered[max(0, furthest.low - 8) : furthest.low + 8]
    kind: Kind
    if stuck.kind == "get" and stuck.value is not None:
        gone = any(one.kind == "delete" and one.returned < stuck.invoked for one in context)
        kind = "resurrected" if gone and furthest.value is None else "stale"
    else:
        kind = "lost"
    lines = "\n".join(
        f"  {one.invoked:.6f}..{one.returned:.6f} {one.kind} {one.value or 'absent'}" for one in context
    )
    return BreachError(kind, f"no order explains {stuck.kind} of {stuck.key!r}: {stuck.value}\n{lines}")
