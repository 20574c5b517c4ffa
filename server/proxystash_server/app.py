"""The composition root: settings in, a running server out."""

from __future__ import annotations

import gc
import ipaddress
import os
import select
import signal
import socket
import time
from contextlib import AbstractContextManager, nullcontext
from types import FrameType, TracebackType
from typing import Final, Self

import structlog

from proxystash_server import __version__
from proxystash_server.cache import (
    CacheConfig,
    CacheManager,
    CacheTierConfig,
    Durability,
    L2BackendType,
    StoreError,
    StoreLock,
    TierState,
    TierStatistics,
)
from proxystash_server.descriptors import DescriptorLimitError, connections_within, raise_limit
from proxystash_server.logs import configure_logging
from proxystash_server.metrics.metrics import Metrics
from proxystash_server.pool.pool import Pool, check_journals
from proxystash_server.pool.requests import SelectionPolicy
from proxystash_server.rpc.pool_service import PoolService
from proxystash_server.rpc.server import BindError, RpcServer, check_free
from proxystash_server.settings import Settings

# How long clients are told to go elsewhere before their connections are closed, in seconds.
_FAREWELL: Final = 0.25

# By default 700, of which a batch of puts makes several thousand.
_NEW_OBJECTS_PER_COLLECTION: Final = 50_000

_log = structlog.stdlib.get_logger(__name__)


class StartupError(Exception):
    """The server cannot start; the message is one line for whoever started it."""


def serve(settings: Settings) -> int:
    """Serve until told to stop; return the exit code. Must run in the main thread. Raises StartupError."""
    configure_logging(settings.log_level, settings.log_format)
    started = time.monotonic()
    try:
        max_connections = connections_within(raise_limit(), settings.threads)
        # What can be refused is refused before anything is made or opened.
        check_free(settings.listen)
        config = cache_config(settings)
        with (
            StopSignals() as signals,
            _listen_for_scrapes(settings.metrics_listen) as metrics,
            StoreLock(config, "starting") as lock,
        ):
            if settings.pool_enabled:
                check_journals(settings.data_dir / "pool")
            manager = CacheManager(config, lock=lock)
            pool: Pool | None = None
            try:
                pool = make_pool(settings, manager, lock) if settings.pool_enabled else None
                server = RpcServer(
                    manager,
                    settings.listen,
                    threads=settings.threads,
                    max_stats_streams=settings.max_stats_streams,
                    max_watch_streams=settings.max_watch_streams,
                    watch_history=settings.watch_history,
                    pool=None if pool is None else pool_service(settings, pool),
                    max_connections=max_connections,
                    observe=None if metrics is None else metrics.observe_call,
                )
                lock.tell(f"serving on {server.address}")
                server.start()
                if metrics is not None:
                    pool_statistics = None if pool is None else pool.statistics
                    metrics.start(manager.get_statistics, pool_statistics, server.open_streams)
                _calm_collector()
                _log_start(settings, server, manager, metrics)
                _warn_of_strangers(
                    server.address,
                    "other machines may reach this address, and nobody is asked for a password",
                )
                if metrics is not None:
                    _warn_of_strangers(
                        metrics.address,
                        "other machines may reach this address, and its metrics are for everybody",
                    )
                reason = signals.wait()
                _log.info("server stopping", reason=reason, grace_period=settings.grace_period)
                finished = _stop(server, signals, settings.grace_period)
            finally:
                if metrics is not None:
                    metrics.close()
                if pool is not None:
                    pool.close()
                manager.close()
            _log.info("server stopped", reason=reason, uptime_seconds=round(time.monotonic() - started, 3))
    except (DescriptorLimitError, BindError, StoreError) as error:
        raise StartupError(str(error)) from None
    except Exception:  # noqa: BLE001 - the log redacts what a traceback on the terminal would show
        _log.exception("server failed")
        return 1
    return 0 if finished and not manager.entries_lost else 1


def cache_config(settings: Settings) -> CacheConfig:
    """The cache's configuration, with everything it keeps below the data directory."""
    return CacheConfig(
        l1_config=CacheTierConfig(
            enabled=settings.l1_enabled,
            max_entries=settings.l1_max_entries,
            eviction_policy=settings.l1_eviction_policy,
        ),
        l2_config=CacheTierConfig(
            enabled=settings.l2_enabled,
            max_entries=settings.l2_max_entries,
            eviction_policy=settings.l2_eviction_policy,
        ),
        l2_backend=L2BackendType(settings.l2_backend),
        l2_cache_dir=settings.data_dir / "l2",
        l3_config=CacheTierConfig(
            enabled=settings.l3_enabled,
            max_entries=settings.l3_max_entries or None,
            eviction_policy=settings.l3_eviction_policy,
        ),
        l3_database_path=settings.data_dir / "l3" / "proxystash.db",
        default_ttl_seconds=settings.default_ttl,
        per_source_ttl=settings.source_ttl,
        enable_background_cleanup=True,
        cleanup_interval_seconds=settings.cleanup_interval,
        encryption_key=settings.encryption_key,
        previous_encryption_keys=settings.encryption_key_previous,
        encryption_key_file=settings.data_dir / "secret.key",
        health_check_invalidation=settings.health_check_invalidation,
        failure_threshold=settings.failure_threshold,
        ban_seconds=settings.ban_period,
        max_ban_seconds=settings.max_ban_period,
        refuse_banned=settings.banned_puts == "refuse",
        durability=Durability(settings.durability),
    )


def make_pool(settings: Settings, manager: CacheManager, lock: StoreLock) -> Pool:
    """The pool over a cache, with its journals below the data directory."""
    return Pool(
        manager,
        settings.data_dir / "pool",
        max_leases=settings.pool_max_leases,
        labels=_pool_labels(settings),
        sync=settings.durability == "full",
        check_store=lock.check,
    )


def pool_service(settings: Settings, pool: Pool) -> PoolService:
    """PoolService as it is configured."""
    policy = SelectionPolicy[settings.pool_policy.upper()]
    return PoolService(pool, policy=policy, labels=_pool_labels(settings))


def _pool_labels(settings: Settings) -> frozenset[str] | None:
    return frozenset(settings.pool_labels) or None


class StopSignals:
    """SIGTERM and SIGINT as something to wait for in the main thread, not something that interrupts it.

    SIGHUP, which the end of a terminal sends, is ignored meanwhile.
    """

    _SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        # The interpreter writes the number of each signal that has a handler to this file descriptor, at once
        # and whichever thread the kernel picks for it.
        self._previous_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _ignore) for number in self._SIGNALS}
        self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._read)
        os.close(self._write)

    def wait(self, timeout: float | None = None) -> str | None:
        """The name of the next signal; None if none comes within `timeout` seconds."""
        ready, _, _ = select.select([self._read], [], [], timeout)
        return self.poll() if ready else None

    def poll(self) -> str | None:
        """The name of a signal that has come; None if none has."""
        try:
            number = os.read(self._read, 1)[0]
        except BlockingIOError:
            return None
        return signal.Signals(number).name


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: StopSignals reads the number from its pipe."""


def _calm_collector() -> None:
    """Have the garbage collector look seldom, and not at what the start has made.

    Entries and calls form no cycles: nearly everything is freed as soon as nobody refers to it.
    """
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS_PER_COLLECTION)


def _stop(server: RpcServer, signals: StopSignals, grace: float) -> bool:
    """Stop serving; False when a second signal cut it short."""
    server.drain()
    name = signals.wait(min(_FAREWELL, grace))
    stopped = server.stop(grace)
    while name is None and not stopped.wait(0.05):
        name = signals.poll()
    if name is not None:
        _log.warning("stopping at once", reason=name)
    server.close()
    return name is None


def _listen_for_scrapes(listen: str) -> AbstractContextManager[Metrics | None]:
    if not listen:
        return nullcontext()
    try:
        return Metrics(listen)
    except OSError as error:
        raise BindError(f"cannot listen on {listen} for metrics: {error.strerror}") from None


def _log_start(settings: Settings, server: RpcServer, manager: CacheManager, metrics: Metrics | None) -> None:
    statistics = manager.get_statistics()
    _log.info(
        "server started",
        address=server.address,
        **({} if metrics is None else {"metrics_address": metrics.address}),
        data_dir=str(settings.data_dir.resolve()),
        version=__version__,
        l1=_describe_tier(statistics.l1_stats),
        l2=_describe_tier(statistics.l2_stats),
        l3=_describe_tier(statistics.l3_stats),
        entries=statistics.entries,
    )


def _warn_of_strangers(address: str, event: str) -> None:
    """Log `event` if other machines may reach an address."""
    host, _, port = address.rpartition(":")
    places = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    if not all(ipaddress.ip_address(str(place[0])).is_loopback for *_, place in places):
        _log.warning(event, address=address)


def _describe_tier(statistics: TierStatistics) -> str:
    if statistics.state is TierState.ACTIVE:
        return statistics.backend
    return f"{statistics.backend} ({statistics.state.value})"
