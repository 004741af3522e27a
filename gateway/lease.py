"""Tell the reapers that this worker lives, and face it when they thought otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import hiredis
import structlog

from .disconnects import AMEND, LEASE_S, RENEW, RENEW_EVERY_S
from .errors import RedisUnavailable
from .fence import Fence
from .redis_link import RedisLink, Reply, scan
from .redis_time import RedisTime
from .sweeper import Sweeper

_log = structlog.get_logger()


class Holder(Protocol):
    """Be a connection that may have been given up for lost."""

    generation: int

    def give_up(self) -> None:
        """Close without a word to the API, which was told already that the connection is lost."""


class Lease:
    """Renew the lease of one worker for as long as its loop turns.

    A worker that stood still, or was cut off from Redis while other hosts were not, may find that
    the API was told that its clients are gone. Then they must go: they connect again, and the API
    sees what is true.

    Args:
        link: connection for commands.
        prefix: of every key.
        fence: knows this worker.
        redis_time: learns Redis' time from each renewal.
        holders: the worker's clients by id: the open ones, and those that are being decided.
        on_forgotten: called when Redis has lost the lease, and so presumably all that it knew,
            although the connection held.
    """

    def __init__(
        self,
        link: RedisLink,
        prefix: str,
        fence: Fence,
        redis_time: RedisTime,
        holders: Sequence[Mapping[bytes, Holder]],
        loop: asyncio.AbstractEventLoop,
        sweeper: Sweeper,
        on_forgotten: Callable[[], None],
    ) -> None:
        self._link = link
        self._prefix = prefix.encode("ascii")
        self._fence = fence
        self._redis_time = redis_time
        self._holders = holders
        self._loop = loop
        self._sweeper = sweeper
        self._on_forgotten = on_forgotten
        # Whether Redis has known of the lease since the connection was made.
        self._is_entered = False
        self._renew_at = 0.0
        # Monotonic time of the last renewal.
        self._asked_at = 0.0
        self._is_over = False
        self._amends: asyncio.Task[None] | None = None
        sweeper.every_tick(self._on_tick)

    def enter(self) -> None:
        """Begin a new connection to Redis: what the one before it sent takes effect no longer."""
        if not self._is_over:
            self._fence.advance()
            self._is_entered = False
            self.renew()

    def renew(self) -> None:
        """Take the lease, or extend it."""
        if self._is_over:
            return
        self._renew_at = self._sweeper.now + RENEW_EVERY_S
        self._asked_at = time.monotonic()
        fence = self._fence
        self._link.call(
            self._on_renewed, RENEW, self._prefix, fence.worker, fence.epoch, int(LEASE_S * 1000)
        )

    def stop(self) -> None:
        """Renew no more."""
        self._is_over = True
        if self._amends is not None:
            self._amends.cancel()

    def _on_tick(self, now: float) -> None:
        if now >= self._renew_at and self._link.is_up:
            self.renew()

    def _on_renewed(self, reply: Reply) -> None:
        if isinstance(reply, Exception):
            return
        given_up, redis_ms, was_known = reply
        self._redis_time.learn(redis_ms, self._asked_at)
        was_entered, self._is_entered = self._is_entered, True
        if was_entered and not was_known and not self._is_over:
            self._on_forgotten()  # which checks as well
        elif given_up and (self._amends is None or self._amends.done()):
            self._amends = self._loop.create_task(self._amend_quietly())

    async def _amend_quietly(self) -> None:
        # Where Redis is lost in the middle, the next renewal finds the rest.
        with contextlib.suppress(RedisUnavailable, hiredis.HiredisError):
            await self.check()

    async def check(self) -> None:
        """Close the clients of whose loss the API was told, if there are any.

        Raises:
            RedisUnavailable: if Redis is lost meanwhile.
        """
        key = self._prefix + b"x:" + self._fence.worker
        count = 0
        async for entries in scan(self._link, b"SSCAN", key):
            for entry in entries:
                client_id, _, generation = entry.partition(b" ")
                for holders in self._holders:
                    holder = holders.get(client_id)
                    if holder is not None and holder.generation == int(generation):
                        holder.give_up()
                        count += 1
            if entries:  # not all: more may have been added meanwhile
                await self._link.ask(
                    b"EVALSHA", AMEND.digest, 1, self._prefix, self._fence.worker, *entries
                )
        if count:
            _log.warning("clients were given up for lost, closing them", count=count)
