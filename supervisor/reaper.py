"""See to it that the API hears of every disconnect of which no worker can tell it any more.

The reaper lives in the admin process, one in each gateway. It finds the workers that have died and
moves what they left to the stream in Redis; and it brings what is in the stream, also what workers
could not deliver, to the API. Any number of gateways may share a Redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import structlog
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from ws2api.gateway import counters as c
from ws2api.gateway.backoff import backoff
from ws2api.gateway.disconnects import LEASE_S, LEASES, TAKE_OVER
from ws2api.gateway.settings import Settings
from ws2api.gateway.tracer import Tracer

from .api_client import ApiClient
from .clock_agreement import ClockAgreement
from .delivery import MAX_AT_ONCE, Delivery, end_tasks
from .disconnect_queue import DisconnectQueue
from .eviction import harm_of, policy_of

_WATCH_EVERY_S: Final = 1.0
_MEASURE_EVERY_S: Final = 2.0
_LOOK_AT_POLICY_EVERY_S: Final = 10.0
# Between two looks at what can be sent, so that one round trip to Redis does for several.
_SEND_PAUSE_S: Final = 0.005
# Between two batches of a lost worker, so that Redis serves the pushes too.
_BATCH_PAUSE_S: Final = 0.02
_LOOK_AGAIN_S: Final = 5.0
_REDIS_TIMEOUT_S: Final = 5.0
# A Redis that takes longer for an answer has not been there for the workers either.
_SLOW_S: Final = 2.0
_FIRST_PAUSE_S: Final = 0.1
_MAX_PAUSE_S: Final = 2.0
_ABANDONED_MARGIN_S: Final = 30.0
_STOP_S: Final = 3.0
_LEAVE_S: Final = 0.5
_POLL_S: Final = 0.02
_LOG_EVERY_S: Final = 30.0
# A worker that lives renews for LEASE_S; what ends later than this was written before Redis' clock
# was put back.
_LATEST_END_MS: Final = (LEASE_S + 60.0) * 1000

# What redis-py raises when Redis is not there; a BusyLoadingError is a ConnectionError to it.
_AWAY: Final = (exceptions.ConnectionError, exceptions.TimeoutError, OSError, TimeoutError)

T = TypeVar("T")
_Step = Callable[[], Awaitable[object]]

_log = structlog.get_logger()


def is_redis_away(error: Exception) -> bool:
    """Tell whether an error means that Redis is not there, or not yet."""
    # uvloop's word for a write to a connection that was reset a moment ago.
    is_closed = isinstance(error, RuntimeError) and "closed" in str(error)
    return is_closed or isinstance(error, _AWAY)


@contextlib.asynccontextmanager
async def _give_up_after(timeout_s: float) -> AsyncIterator[None]:
    """Go on after this time, and when Redis is away: nothing may be in the way of the end."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except Exception as error:
        if not is_redis_away(error):
            _log.error("the reaper could not end in good order", error=str(error))


@dataclass(frozen=True, slots=True)
class _Leases:
    """Hold what Redis knows of the workers: until when each counts as alive, in ms of its clock."""

    until_ms: dict[str, float]
    now_ms: float

    def has_run_out(self, until_ms: float) -> bool:
        """Tell whether a lease is that of a worker that renews no more."""
        return not self.now_ms < until_ms < self.now_ms + _LATEST_END_MS


class Reaper:
    """Watch the leases, deliver the stream, keep the figures.

    Args:
        settings: the options.
        redis_url: where the stream is.
        instance: unique id of this gateway; its workers' names begin with it and a dash.
        living: returns the names of this gateway's workers that live. It is asked after the
            leases were read, so that a worker that has just taken its first is among them.
        figures: the row of the reaper in the counters.
        trust_s: for how long Redis must have answered without a break, and its clock have agreed
            with this process', before a lease that has run out is believed: in that time every
            worker that lives has renewed its own.
        tracer: notes each DELETE while somebody wants to see it; None for nobody.
    """

    def __init__(
        self,
        settings: Settings,
        redis_url: str,
        instance: str,
        living: Callable[[], Collection[str]],
        figures: memoryview,
        *,
        trust_s: float = LEASE_S,
        tracer: Tracer | None = None,
    ) -> None:
        self._settings = settings
        self._tracer = tracer
        self._prefix = settings.redis_prefix
        self._family = f"{instance}-"
        self._living = living
        self._figures = figures
        self._trust_s = trust_s
        self._hold_ms = int(settings.api_timeout * 1000)
        # No second try behind the scenes: a restart of Redis is to be noticed.
        self._redis = Redis.from_url(
            redis_url,
            protocol=2,
            socket_timeout=_REDIS_TIMEOUT_S,
            socket_connect_timeout=_REDIS_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._take_over = self._redis.register_script(TAKE_OVER.source)
        self._queue = DisconnectQueue(
            self._redis,
            self._prefix,
            instance,
            os.getpid(),
            2 * settings.api_timeout + _ABANDONED_MARGIN_S,
        )
        # Both None until `start`.
        self._api: ApiClient | None = None
        self._delivery: Delivery | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._hurried = False
        self._undisturbed_since = 0.0
        self._heard_at = 0.0
        self._clock = ClockAgreement(trust_s, 0.0)
        # Worker of this gateway → when to see whether there is something of it in Redis yet.
        self._look_again_at: dict[str, float] = {}
        # What Redis drops when its memory is full, when last seen.
        self._policy = ""
        # Names of the loops to which Redis does not answer.
        self._cut_off: set[str] = set()
        self._log_error_at = 0.0

    def start(self) -> None:
        """Begin; a Redis or an API that is not there is waited for."""
        self._api = ApiClient(self._settings, MAX_AT_ONCE, self._tracer)
        self._delivery = Delivery(self._queue, self._api, self._settings.reap_rate, self._figures)
        self._undisturbed_since = self._heard_at = time.monotonic()
        self._clock = ClockAgreement(self._trust_s, self._heard_at)
        loops: dict[str, tuple[_Step, float]] = {
            "watch": (self._watch, _WATCH_EVERY_S),
            "measure": (self._measure, _MEASURE_EVERY_S),
            "policy": (self._look_at_policy, _LOOK_AT_POLICY_EVERY_S),
            "read": (self._delivery.read, 0.0),
            "send": (self._delivery.send, _SEND_PAUSE_S),
        }
        for name, (step, pause_s) in loops.items():
            task = asyncio.create_task(self._repeat(name, step, pause_s))
            self._tasks.append(task)

    async def stop(self) -> int | None:
        """End within a few seconds.

        When all workers have ended this is the end of the gateway: as much is delivered as the
        time allows. Otherwise a successor is about to go on, and only what is under way to the API
        is waited for.

        Returns:
            how many disconnects are left in the stream; None when Redis does not say.
        """
        left = None
        self._stopping = True
        if self._delivery is not None and self._api is not None:
            async with _give_up_after(_STOP_S):
                await self._finish(self._delivery)
            await end_tasks(self._tasks)
            await self._delivery.close()
            await self._api.close()
            async with _give_up_after(_LEAVE_S):
                await self._queue.leave()
                left = await self._measure()
        async with _give_up_after(_LEAVE_S):
            await self._redis.aclose()
        return left

    def hurry(self) -> None:
        """Let `stop` wait for nothing more."""
        self._hurried = True

    async def _finish(self, delivery: Delivery) -> None:
        if self._living():
            delivery.rest()
        else:  # not each may have had the time to hand over what it owed
            if self._settings.redis == "embedded":
                self._hold_ms = 0  # there is no later
            async with _give_up_after(_STOP_S):
                await self._watch()
            delivery.finish()
        while not (delivery.is_finished or self._cut_off or self._hurried):
            await asyncio.sleep(_POLL_S)

    # The loops.

    async def _repeat(self, name: str, step: _Step, pause_s: float) -> None:
        """Repeat a step for as long as the process lives, whatever comes."""
        failures = 0
        while True:
            try:
                await step()
            except Exception as error:
                failures += 1
                self._on_failure(name, error)
                await asyncio.sleep(backoff(failures, _FIRST_PAUSE_S, _MAX_PAUSE_S))
            else:
                failures = 0
                self._on_success(name)
                await asyncio.sleep(pause_s)

    def _on_success(self, name: str) -> None:
        if name in self._cut_off:
            self._cut_off.remove(name)
            if not self._cut_off:
                _log.info("the reaper has Redis back")

    def _on_failure(self, name: str, error: Exception) -> None:
        """Log it: an outage once, anything else now and then."""
        self._undisturbed_since = time.monotonic()
        if self._delivery is not None:
            self._delivery.on_redis_lost()
        if is_redis_away(error):
            if not self._cut_off and not self._stopping:
                _log.warning("the reaper has no Redis", error=str(error))
            self._cut_off.add(name)
            return
        if isinstance(error, exceptions.ResponseError) and "NOGROUP" in str(error):
            return  # Redis was emptied; the next step creates the group again
        now = time.monotonic()
        if now >= self._log_error_at:
            self._log_error_at = now + _LOG_EVERY_S
            is_redis = isinstance(error, exceptions.RedisError)
            _log.error("the reaper failed", error=str(error), exc_info=not is_redis)

    # Lost workers.

    async def _watch(self) -> None:
        """Take over from every worker that is dead.

        Of this gateway's own it is known who lives, so no lease is needed to tell.
        """
        leases = await self._read_leases()
        living = self._living()
        failure: exceptions.ResponseError | None = None
        for worker, until_ms in [*leases.until_ms.items(), *self._second_looks()]:
            is_own = worker.startswith(self._family)
            is_known = is_own and worker not in living
            has_run_out = leases.has_run_out(until_ms) and self._trusts_redis and not is_own
            if is_known or until_ms == 0 or has_run_out:
                try:
                    await self._take_over_from(worker, until_ms, is_known=is_known)
                except exceptions.ResponseError as error:  # what one left must not stop the others
                    failure = error
        if failure is not None:
            raise failure

    def _second_looks(self) -> list[tuple[str, float]]:
        """List the workers that it is time to look at again.

        What a worker sent to a distant Redis right before it died may arrive after all was taken.
        """
        now = time.monotonic()
        due = [worker for worker, at in self._look_again_at.items() if at <= now]
        for worker in due:
            del self._look_again_at[worker]
        return [(worker, 0.0) for worker in due]

    async def _read_leases(self) -> _Leases:
        entries: list[Any] = await self._ask(
            self._redis.zrange(self._prefix + LEASES, 0, -1, withscores=True)
        )
        began = time.monotonic()
        now_s, now_us = await self._ask(self._redis.time())
        self._look_at_clock(now_s + now_us / 1e6, began)
        until_ms = {worker.decode("ascii"): float(score) for worker, score in entries}
        return _Leases(until_ms, now_s * 1000 + now_us / 1000)

    def _look_at_clock(self, redis_s: float, began: float) -> None:
        """Believe no lease for a while when Redis' clock and this process' disagree."""
        jump_s = self._clock.sample(redis_s, began, self._heard_at)
        if jump_s:
            _log.warning("the clock of Redis has jumped, leases are not believed", by_s=jump_s)
            if self._delivery is not None:
                self._delivery.on_redis_lost()  # who is silent for long is told by that clock, too

    @property
    def _trusts_redis(self) -> bool:
        since = max(self._undisturbed_since, self._clock.agreed_since)
        return time.monotonic() - since >= self._trust_s

    async def _take_over_from(self, worker: str, until_ms: float, *, is_known: bool) -> None:
        """Move what a worker left to the stream, batch by batch; stop if it turns out to live."""
        bound = self._settings.max_pending_disconnects
        moved = reconnected = 0
        more: Any = 1
        try:
            while more and (is_known or until_ms == 0 or self._trusts_redis):
                reply = await self._ask(
                    self._take_over(
                        keys=[self._prefix],
                        args=[worker, bound, int(is_known), self._hold_ms, until_ms],
                    )
                )
                if reply is None:
                    break
                moved += reply[0]
                reconnected += reply[1]
                self._figures[c.REAPER_TAKEN_OVER] += reply[0]
                if more := reply[2]:
                    await asyncio.sleep(_BATCH_PAUSE_S)
            if is_known and until_ms:
                self._look_again_at[worker] = time.monotonic() + _LOOK_AGAIN_S
        finally:
            if moved or reconnected:
                _log.warning(
                    "took over from a worker that is gone",
                    incarnation=worker,
                    disconnects=moved,
                    reconnected=reconnected,
                )

    async def _ask(self, command: Awaitable[T]) -> T:
        """Await a reply, and note whether Redis, or this process, stood still meanwhile."""
        began = time.monotonic()
        if began - self._heard_at > _WATCH_EVERY_S + _SLOW_S:
            self._undisturbed_since = began
        reply = await command
        self._heard_at = time.monotonic()
        if self._heard_at - began > _SLOW_S:
            self._undisturbed_since = self._heard_at
        return reply

    async def _look_at_policy(self) -> None:
        """Warn when Redis was told to drop what stands there for clients."""
        try:
            memory: Any = await self._redis.info("memory")
        except exceptions.ResponseError:
            return  # not everybody may ask
        policy = policy_of(memory)
        before, self._policy = self._policy, policy
        if policy != before and (harm := harm_of(policy)):
            _log.error("Redis may drop what it must keep", reason=harm)

    # Figures.

    async def _measure(self) -> int:
        """Note the figures of the stream; return its length."""
        measure = await self._queue.measure()
        self._figures[c.DISCONNECTS_PENDING] = measure.length
        self._figures[c.DISCONNECTS_OLDEST_S] = measure.oldest_s
        self._figures[c.DISCONNECTS_DROPPED] = measure.dropped
        return measure.length
