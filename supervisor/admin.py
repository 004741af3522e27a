"""Answer /healthz, /readyz, /status and /metrics in a process of its own, that of the reaper.

It reads the workers' state from the shared counters and never asks a worker, so that it answers
just as well when one hangs.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from typing import Final

import structlog
import uvloop
from aiohttp import web
from redis import RedisError
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from ws2api.gateway import counters as c
from ws2api.gateway.settings import Settings

from .errors import EXIT_OK, EXIT_UNCLEAN
from .exposition import Bank, create_registry, render, serves
from .listeners import BACKLOG
from .reaper import Reaper

HEARTBEAT_LIMIT_S: Final = 5.0
"""A worker whose loop has not beaten for so long is not ready."""
PROBE_LIMIT_S: Final = 10.0
"""A worker that has not heard from itself through Redis for so long is not ready."""
REDIS_TIMEOUT_S: Final = 1.0
SHUTDOWN_TIMEOUT_S: Final = 0.5

_STATES: Final = {
    c.STATE_DOWN: "down",
    c.STATE_STARTING: "starting",
    c.STATE_SERVING: "serving",
    c.STATE_DRAINING: "draining",
}


_log = structlog.get_logger()


def run(
    listener: socket.socket,
    counters: c.Counters,
    redis_url: str,
    started_s: float,
    settings: Settings,
    instance: str,
) -> int:
    """Serve and reap until SIGTERM; return the exit status.

    Args:
        listener: the admin socket, bound and listening.
        counters: the shared mapping.
        redis_url: the Redis whose answer /readyz waits for, and where disconnects are.
        started_s: Unix time at which the supervisor started.
        settings: the options.
        instance: what the ids of this supervisor's workers begin with, up to a dash.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        left = runner.run(_serve(listener, counters, redis_url, started_s, settings, instance))
    if not left or settings.redis != "embedded" or list_living(counters, instance):
        return EXIT_OK
    _log.error("disconnects are lost with the embedded server", missing=left)
    return EXIT_UNCLEAN


async def _serve(
    listener: socket.socket,
    counters: c.Counters,
    redis_url: str,
    started_s: float,
    settings: Settings,
    instance: str,
) -> int | None:
    """Serve and reap until SIGTERM; return how many disconnects are left, None if unknown."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    reaper = Reaper(
        settings, redis_url, instance, lambda: list_living(counters, instance), counters.reaper
    )

    def on_stop_signal() -> None:
        if stop.is_set():
            reaper.hurry()
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, on_stop_signal)
    admin = Admin(counters, redis_url, started_s)
    runner = web.AppRunner(
        admin.application(), access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S
    )
    await runner.setup()
    await web.SockSite(runner, listener, backlog=BACKLOG).start()
    reaper.start()
    await stop.wait()
    left = await reaper.stop()
    await runner.cleanup()
    return left


def list_living(counters: c.Counters, instance: str) -> set[str]:
    """List the ids of the workers whose processes live, by the supervisor's account."""
    banks = [
        (worker, counters.bank(worker, which)[c.FORK])
        for worker in range(counters.workers)
        for which in range(c.BANKS)
    ]
    return {f"{instance}-{worker}-{fork - 1}" for worker, fork in banks if fork > 0}


class Admin:
    """Hold what the handlers look at.

    Args:
        counters: the shared mapping.
        redis_url: the Redis whose answer /readyz waits for.
        started_s: Unix time at which the supervisor started.
        monotonic_us: the clock of the heartbeats, in µs.
    """

    def __init__(
        self,
        counters: c.Counters,
        redis_url: str,
        started_s: float,
        monotonic_us: Callable[[], int] = lambda: time.monotonic_ns() // 1000,
    ) -> None:
        self._counters = counters
        self._started_s = started_s
        self._monotonic_us = monotonic_us
        self._registry = create_registry(counters, started_s)
        # One retry at once: the pooled connection may be one that Redis closed by restarting.
        self._redis = Redis.from_url(
            redis_url,
            socket_timeout=REDIS_TIMEOUT_S,
            socket_connect_timeout=REDIS_TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),
        )

    def application(self) -> web.Application:
        """Create the aiohttp application."""
        application = web.Application()
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/readyz", self._readyz)
        application.router.add_get("/status", self._status)
        application.router.add_get("/metrics", self._metrics)
        application.on_cleanup.append(self._close)
        return application

    async def _close(self, _application: web.Application) -> None:
        await self._redis.aclose()

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _request: web.Request) -> web.Response:
        findings = [*self.worker_findings(), *await self._redis_findings()]
        if findings:
            return web.Response(status=503, text="".join(f"{line}\n" for line in findings))
        return web.Response(text="ready\n")

    async def _status(self, _request: web.Request) -> web.Response:
        now_s = time.time()
        workers = [self._worker_status(w, now_s) for w in range(self._counters.workers)]
        reaper = self._counters.reaper
        disconnects = {
            "pending": reaper[c.DISCONNECTS_PENDING],
            "oldest_s": reaper[c.DISCONNECTS_OLDEST_S],
            "held": reaper[c.DISCONNECTS_HELD],
            "dropped": reaper[c.DISCONNECTS_DROPPED],
        }
        return web.json_response(
            {
                "uptime_s": int(now_s - self._started_s),
                "workers": workers,
                "disconnects": disconnects,
            }
        )

    async def _metrics(self, request: web.Request) -> web.Response:
        body, content_type = render(self._registry, request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    def worker_findings(self) -> list[str]:
        """Say in a line each which workers do not serve."""
        findings = []
        for worker in range(self._counters.workers):
            slot = self._counters.current(worker)
            last_beat_us = slot[c.HEARTBEAT_US]
            silent_s = (self._monotonic_us() - last_beat_us) / 1e6
            if not serves(slot):
                findings.append(f"worker {worker} is {_state(slot)}")
            elif last_beat_us == 0:
                findings.append(f"worker {worker} has not beaten yet")
            elif silent_s >= HEARTBEAT_LIMIT_S:
                findings.append(f"worker {worker} has not beaten for {silent_s:.0f} s")
            elif not slot[c.REDIS_UP]:
                findings.append(f"worker {worker} has no connection to redis")
            elif deafness := self._deafness(slot):
                findings.append(f"worker {worker}: pushes do not reach it ({deafness})")
        return findings

    def _deafness(self, bank: Bank) -> str:
        """Say since when a worker has not heard from itself; nothing if it has."""
        if bank[c.PROBED_US] == 0:
            return "never seen" if time.time() - bank[c.STARTED_S] >= PROBE_LIMIT_S else ""
        silent_s = (self._monotonic_us() - bank[c.PROBED_US]) / 1e6
        return f"last seen {silent_s:.0f} s ago" if silent_s >= PROBE_LIMIT_S else ""

    async def _redis_findings(self) -> list[str]:
        """Say in a line why Redis is not usable, within the timeout; nothing if it is."""
        try:
            # Around everything, because the socket's timeouts hold for one step each.
            async with asyncio.timeout(REDIS_TIMEOUT_S):
                await self._redis.ping()
        except TimeoutError:
            return [f"redis did not answer within {REDIS_TIMEOUT_S:g} s"]
        except (RedisError, OSError, RuntimeError) as error:  # RuntimeError: reset just now, uvloop
            return [f"redis: {' '.join(str(error).split())}"]
        return []

    def _worker_status(self, worker: int, now_s: float) -> dict[str, float | str | None]:
        slot = self._counters.current(worker)
        lives = slot[c.STATE] != c.STATE_DOWN
        return {
            "worker": worker,
            "state": _state(slot),
            "pid": slot[c.PID] if lives else None,
            "uptime_s": max(0, int(now_s - slot[c.STARTED_S])) if lives else None,
            "restarts": self._counters.value(worker, c.RESTARTS),
            "connections": self._counters.connections_open(worker),
            "push_lag_ms": slot[c.PROBE_LAG_US] / 1000 if lives and slot[c.PROBED_US] else None,
        }


def _state(bank: Bank) -> str:
    return _STATES.get(bank[c.STATE], "unknown")
