"""Be the admin process: the admin port's server, and the reaper."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from typing import Final

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from ws2api.gateway import counters as c
from ws2api.gateway.settings import Address, Settings
from ws2api.gateway.tracer import Tracer
from ws2api.gateway.verbosity import Verbosity

from .admin_port import AdminPort
from .api_check import find_fault
from .connection_limit import KEEPALIVE_S, ConnectionLimit
from .errors import EXIT_OK, EXIT_UNCLEAN
from .listeners import BACKLOG
from .loop import Loop
from .reaper import Reaper
from .shared_state import SharedState

SHUTDOWN_TIMEOUT_S: Final = 0.5

_log = structlog.get_logger()


def run(
    listener: socket.socket,
    push_address: Address,
    shared: SharedState,
    redis_url: str,
    started_s: float,
    settings: Settings,
    instance: str,
) -> int:
    """Serve and reap until SIGTERM; return the exit status.

    Args:
        listener: the admin socket, bound and listening.
        push_address: where the push port listens.
        shared: what the workers share with this process.
        redis_url: the Redis whose answer /readyz waits for, and where disconnects are.
        started_s: Unix time at which the supervisor started.
        settings: the options.
        instance: what the ids of this supervisor's workers begin with, up to a dash.
    """
    with asyncio.Runner(loop_factory=Loop) as runner:
        left = runner.run(
            _serve(listener, push_address, shared, redis_url, started_s, settings, instance)
        )
    if not left or settings.redis != "embedded" or list_living(shared.counters, instance):
        return EXIT_OK
    _log.error("disconnects are lost with the embedded server", missing=left)
    return EXIT_UNCLEAN


async def _serve(
    listener: socket.socket,
    push_address: Address,
    shared: SharedState,
    redis_url: str,
    started_s: float,
    settings: Settings,
    instance: str,
) -> int | None:
    """Serve and reap until SIGTERM; return how many disconnects are left, None if unknown."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    counters = shared.counters
    traces = shared.traces
    reaper = Reaper(
        settings,
        redis_url,
        instance,
        lambda: list_living(counters, instance),
        counters.reaper,
        tracer=Tracer(traces, traces.ring(None), logs_requests=settings.log_requests),
    )

    def on_stop_signal() -> None:
        if stop.is_set():
            reaper.hurry()
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, on_stop_signal)
    loop.add_signal_handler(signal.SIGUSR1, Verbosity(loop).rise)
    logging.getLogger("aiohttp.server").addFilter(_is_own_fault)
    port = AdminPort(shared, settings, redis_url, push_address, started_s, instance)
    limit = ConnectionLimit()
    application = port.application()
    application.middlewares.append(limit.middleware)
    runner = web.AppRunner(
        application,
        access_log=None,
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        keepalive_timeout=KEEPALIVE_S,
        handler_cancellation=True,  # nobody waits for the profile that he asked for
    )
    await runner.setup()
    assert runner.server is not None
    server = await limit.listen(runner.server, listener, BACKLOG)
    reaper.start()
    checking = asyncio.create_task(_look_at_api(settings))
    await stop.wait()
    checking.cancel()
    left = await reaper.stop()
    server.close()
    await runner.cleanup()
    return left


async def _look_at_api(settings: Settings) -> None:
    """Warn of an API that cannot be reached: here, where nobody waits for a silent one."""
    if fault := await find_fault(settings):
        _log.warning(fault)


def _is_own_fault(record: logging.LogRecord) -> bool:
    """Leave out of the log what is no request: anybody may send it, and a token may be in it."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError)


def list_living(counters: c.Counters, instance: str) -> set[str]:
    """List the ids of the workers whose processes live, by the supervisor's account."""
    banks = [
        (worker, counters.bank(worker, which)[c.FORK])
        for worker in range(counters.workers)
        for which in range(c.BANKS)
    ]
    return {f"{instance}-{worker}-{fork - 1}" for worker, fork in banks if fork > 0}
