"""Judge whether this gateway should be sent clients."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from redis import RedisError
from redis.asyncio import Redis
from ws2api.gateway import counters as c
from ws2api.gateway.disconnects import LEASES
from ws2api.gateway.recent import ErrorRecord, Recent

from .exposition import Bank, serves
from .single_flight import SingleFlight

HEARTBEAT_LIMIT_S: Final = 5.0
"""A worker whose loop has not beaten for so long is not ready."""
PROBE_LIMIT_S: Final = 10.0
"""A worker that has not heard from itself through Redis for so long is not ready."""
REDIS_TIMEOUT_S: Final = 1.0

_STATES: Final = {
    c.STATE_DOWN: "down",
    c.STATE_STARTING: "starting",
    c.STATE_SERVING: "serving",
    c.STATE_DRAINING: "draining",
}


def state_of(bank: Bank) -> str:
    """Name the state of a worker."""
    return _STATES.get(bank[c.STATE], "unknown")


class Health:
    """Look at the workers and at Redis.

    A finding keeps this gateway from being ready. A note does not: it is of what is amiss with the
    API, where sending the clients to another gateway would not help.

    Args:
        counters: the shared mapping.
        recent: has why the API is away.
        redis: the Redis that workers need.
        monotonic_us: the clock of the heartbeats, in µs.
        prefix: of every key in Redis.
        instance: what the ids of this gateway's workers begin with, up to a dash.
    """

    def __init__(
        self,
        counters: c.Counters,
        recent: Recent,
        redis: Redis,
        monotonic_us: Callable[[], int],
        prefix: str,
        instance: str,
    ) -> None:
        self._counters = counters
        self._recent = recent
        self._redis = redis
        self._monotonic_us = monotonic_us
        self._leases = prefix + LEASES
        self._instance = instance
        # Worker and fork of those that Redis knew nothing of when it was last looked at.
        self._unknown: set[tuple[int, int]] = set()
        self._redis_look = SingleFlight(self._look_at_redis)

    async def findings(self) -> list[str]:
        """Say in a line each what keeps this gateway from being ready."""
        return self.findings_beside(await self.redis_findings())

    def findings_beside(self, redis_findings: list[str]) -> list[str]:
        """Return all findings, given those about Redis."""
        drained = ["draining on request"] if self._counters.host[c.HOST_DRAINING] else []
        return [*drained, *self.worker_findings(), *redis_findings]

    def notes(self) -> list[str]:
        """Say in a line whether the API is away, why, and since when; nothing if it is not."""
        records = [
            ErrorRecord.decode(payload)
            for worker in range(self._counters.workers)
            for bank in range(c.BANKS)
            if self._counters.bank(worker, bank)[c.API_AWAY]
            for payload in self._recent.outage(worker, bank).read()
        ]
        if not records:
            return []
        first = min(records)  # by time
        return [f"API away: {first.text}, since {_moment(first.time_s)}"]

    def worker_findings(self) -> list[str]:
        """Say in a line each which workers do not serve."""
        findings = []
        for worker in range(self._counters.workers):
            slot = self._counters.current(worker)
            last_beat_us = slot[c.HEARTBEAT_US]
            silent_s = (self._monotonic_us() - last_beat_us) / 1e6
            if not serves(slot):
                findings.append(f"worker {worker} is {state_of(slot)}")
            elif last_beat_us == 0:
                findings.append(f"worker {worker} has not beaten yet")
            elif silent_s >= HEARTBEAT_LIMIT_S:
                findings.append(f"worker {worker} has not beaten for {silent_s:.0f} s")
            elif not slot[c.REDIS_UP]:
                findings.append(f"worker {worker} has no connection to redis")
            elif slot[c.RESTORING] or (worker, slot[c.FORK]) in self._unknown:
                findings.append(f"worker {worker} has yet to enter its clients into redis")
            elif self._counters.connections_open(worker) >= slot[c.MOST_CLIENTS] > 0:
                findings.append(f"worker {worker} has no room for clients: the limit of open files")
            elif deafness := self._deafness(slot):
                findings.append(f"worker {worker}: pushes do not reach it ({deafness})")
        return findings

    def _deafness(self, bank: Bank) -> str:
        """Say since when a worker has not heard from itself; nothing if it has."""
        if bank[c.PROBED_US] == 0:
            lives_s = (self._monotonic_us() - bank[c.STARTED_US]) / 1e6
            return "never seen" if lives_s >= PROBE_LIMIT_S else ""
        silent_s = (self._monotonic_us() - bank[c.PROBED_US]) / 1e6
        return f"last seen {silent_s:.0f} s ago" if silent_s >= PROBE_LIMIT_S else ""

    def _serving(self) -> dict[tuple[int, int], bytes]:
        """Return the workers that serve, by slot and fork, with their names in Redis."""
        names = {}
        for worker in range(self._counters.workers):
            slot = self._counters.current(worker)
            if serves(slot) and (fork := slot[c.FORK]):
                names[worker, fork] = f"{self._instance}-{worker}-{fork - 1}".encode()
        return names

    async def redis_findings(self) -> list[str]:
        """Say in a line why Redis is not usable, within the timeout; nothing if it is."""
        return await self._redis_look.get()

    async def _look_at_redis(self) -> list[str]:
        self._unknown, serving = set(), self._serving()
        try:
            # Around everything, because the socket's timeouts hold for one step each.
            async with asyncio.timeout(REDIS_TIMEOUT_S):
                leases = await self._redis.zrange(self._leases, 0, -1)
            self._unknown = {key for key, name in serving.items() if name not in leases}
        except TimeoutError:
            return [f"redis did not answer within {REDIS_TIMEOUT_S:g} s"]
        except (RedisError, OSError, RuntimeError) as error:  # RuntimeError: reset just now, uvloop
            return [f"redis: {' '.join(str(error).split())}"]
        return []


def _moment(time_s: float) -> str:
    """Write a moment in UTC, as the log does: the time of day, before it the day if not today's."""
    moment, today = time.gmtime(time_s), time.gmtime()
    form = "%H:%M UTC" if moment[:3] == today[:3] else "%Y-%m-%d %H:%M UTC"
    return time.strftime(form, moment)
