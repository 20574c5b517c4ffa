"""Ctrl-C at any moment: no lock stays held, and what the tiers hold still agrees."""

from __future__ import annotations

import dis
import random
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import proxystash_server.cache
from proxystash_server.cache import CacheManager, EntryFilter, L2BackendType
from proxystash_server.cache.entry.limits import SECOND_US
from tests.server.cache.invariants import check_agreement, check_nothing_is_held
from tests.server.cache.stash import Stash
from tests.server.cache.support import (
    FakeClock,
    bounded,
    content_of,
    missed_by_authority,
    put,
    run_in_threads,
)

_CACHE = str(Path(proxystash_server.cache.__file__).parent)
_LOCKING = tuple(f"{_CACHE}/{path}" for path in ("ground/keylocks", "ground/group", "tiers/sqlite/database"))
# So many, or fewer, are stepped over at a time: all of them would take minutes.
MOST_MOMENTS_AT_A_TIME = 40
# Where the interpreter looks for signals: as a function begins, after a call, and where a loop starts over.
_CHECKED = frozenset(["RESUME", "CALL", "CALL_FUNCTION_EX", "CALL_KW", "JUMP_BACKWARD"])


class Interrupt:
    """Raises KeyboardInterrupt in this thread, at the moment numbered `at` of those at which a signal could.

    Only those count at which a function of the modules `within` runs.
    """

    def __init__(self, at: int, within: tuple[str, ...] = (_CACHE,)) -> None:
        self.left = at
        self._within = within
        self.struck = ""
        self._checks: dict[CodeType, set[int]] = {}

    def _after_checks(self, code: CodeType) -> set[int]:
        """The offsets of instructions that follow one at which signals are looked for.

        But for those that another handler is for than for that one: an error here would go another way.
        """
        if code not in self._checks:
            bytecode = dis.Bytecode(code)

            def handler(offset: int) -> int | None:
                entries = bytecode.exception_entries  # type: ignore[attr-defined]  # the stubs lack it
                return next((one.target for one in entries if one.start <= offset < one.end), None)

            self._checks[code] = {
                after.offset
                for before, after in pairwise(bytecode)
                if before.opname in _CHECKED and handler(before.offset) == handler(after.offset)
            }
        return self._checks[code]

    def _trace(self, frame: FrameType, event: str, _argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(self._within):
            return None
        if event == "call":
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
        elif event == "opcode" and frame.f_lasti in self._after_checks(frame.f_code):
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                self.struck = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._trace

    def strikes(self, operation: Callable[[], object]) -> bool:
        """Run the operation: whether it was struck, or came to its end before that."""
        earlier = sys.gettrace()
        sys.settrace(self._trace)
        try:
            operation()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(earlier)
        # A finalizer that is struck says so on stderr, and the operation goes on.
        return self.left <= 0


NEW = [f"new-{number}" for number in range(6)]

OPERATIONS: dict[str, Callable[[CacheManager], object]] = {
    "put": lambda manager: put(manager, "a", source="after"),
    "put that evicts": lambda manager: put(manager, *NEW[:3]),
    "get below L1": lambda manager: manager.get("a"),
    "get of an expired entry": lambda manager: manager.get("old"),
    "delete": lambda manager: manager.delete("a"),
    "report of a failure": lambda manager: manager.invalidate_by_health("a"),
    "list": lambda manager: manager.list_entries("", 10, EntryFilter()),
    "clear": lambda manager: manager.clear(),
    "cleanup": lambda manager: manager.cleanup_expired(),
    "maintenance": lambda manager: manager.maintain(),
}
SMALL = {"l1_config": bounded(2), "l2_config": bounded(4), "l3_config": bounded(5)}


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


def _fill(manager: CacheManager, clock: FakeClock) -> None:
    """Whatever came before: three entries, one of which is in L1, and one that has expired."""
    manager.clear()
    put(manager, "old", ttl_us=SECOND_US, source="before")
    clock.advance(2)
    put(manager, "a", "b", "c", source="before")
    manager.get("b")


@pytest.mark.parametrize("name", OPERATIONS)
# An interrupt between opening a file and noting it leaves that to the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_after_an_interrupt_at_any_moment_no_lock_is_held_and_the_tiers_agree(
    stash: Stash, name: str
) -> None:
    """Given one at a moment after the other: others go on, and so does the interrupted thread."""
    check_interrupts_of(stash, name, (_CACHE,), MOST_MOMENTS_AT_A_TIME)


@pytest.mark.parametrize("name", ["put that evicts", "delete", "clear", "get below L1"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_so_it_is_at_every_single_moment_in_which_locks_and_transactions_begin_and_end(
    stash: Stash, name: str
) -> None:
    check_interrupts_of(stash, name, _LOCKING, 1)


def check_interrupts_of(stash: Stash, name: str, within: tuple[str, ...], most_at_a_time: int) -> None:
    stash.clock.tick_us = 1
    manager = stash.open(**SMALL)
    chance = random.Random(name)
    at = 0
    while True:
        _fill(manager, stash.clock)
        at += chance.randint(1, most_at_a_time)
        interrupt = Interrupt(at, within)
        if not interrupt.strikes(partial(OPERATIONS[name], manager)):
            break
        try:
            check_nothing_is_held(manager)
            check_agreement(manager)
            # Whoever waited for what the interrupted thread held would wait for ever.
            run_in_threads(partial(put, manager, *NEW), partial(manager.get, "a"))
            OPERATIONS[name](manager)
            stash.recover(manager)
            check_nothing_is_held(manager)
            check_agreement(manager)
            assert not missed_by_authority(manager)
            for tier in (manager.l1_tier, manager.l2_tier, manager.l3_tier):
                assert tier.size() == len(tier.keys()) <= (tier.config.max_entries or 0), tier.tier_type
        except BaseException as error:
            error.add_note(f"interrupted at {interrupt.struck}, moment {at}")
            raise
    assert at > 20
    # What an interrupt may leave until it is next evicted is a key in the order of eviction that is gone.
    stash.validated = False
    content = content_of(manager)
    assert content_of(stash.reopen(**SMALL)) == content


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_close_that_was_interrupted_at_any_moment_can_be_repeated(tmp_path: Path, stash: Stash) -> None:
    chance = random.Random("close")
    at = 0
    while True:
        at += chance.randint(1, MOST_MOMENTS_AT_A_TIME)
        stash.directory = tmp_path / f"data-{at}"
        manager = stash.open(**SMALL)
        put(manager, "a", "b", "c")
        if not (interrupt := Interrupt(at)).strikes(manager.close):
            break
        try:
            check_nothing_is_held(manager)
            manager.close()
            assert content_of(stash.open(**SMALL)).keys() == {"a", "b", "c"}
            stash.close()
        except BaseException as error:
            error.add_note(f"interrupted at {interrupt.struck}, moment {at}")
            raise
    assert at > 50
