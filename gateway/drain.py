"""End one worker in good order: let what is under way finish, tell the clients, tell the API.

A worker that is replaced retires: others serve on, so it has time, and its clients leave one by one
so that they do not all come back in the same second. A worker that is stopped has only a deadline.
What the API has not heard by the end is left to the reapers.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final

import hiredis
import structlog

from .errors import RedisUnavailable
from .hub import Hub
from .outbox import Outbox
from .session import ASKING, CLAIMING, CLOSED, GOING_AWAY, SERVICE_RESTART, WAITING
from .upstream import Upstream

_POLL_S: Final = 0.02
# Of the shutdown time, what is kept for closing sockets and Redis after the last DELETE.
_CLOSING_SHARE: Final = 0.2
_CLOSING_LIMIT_S: Final = 1.0
# And how long the API's answers to messages under way are waited for, before clients are closed.
_PATIENCE_SHARE: Final = 0.4
# How often some of the clients of a retiring worker are told to go.
_PACE_S: Final = 0.05
# Number of calls of `stop` from which on nothing is waited for.
_HURRY: Final = 2

_log = structlog.get_logger()


class Drain:
    """Bring a worker that accepts no more to its end.

    Args:
        total_s: time to finish in, once the clients have been told.
        drain_s: time over which the clients of a retiring worker are told.
        on_last: called before what is left in Redis goes to the reapers.
    """

    def __init__(
        self,
        hub: Hub,
        upstream: Upstream,
        outbox: Outbox,
        loop: asyncio.AbstractEventLoop,
        total_s: float,
        drain_s: float,
        on_last: Callable[[], None],
    ) -> None:
        self._hub = hub
        self._upstream = upstream
        self._outbox = outbox
        self._on_last = on_last
        self._loop = loop
        self._total_s = total_s
        self._drain_s = drain_s
        self.closing_s = min(_CLOSING_LIMIT_S, total_s * _CLOSING_SHARE)
        """How long the sockets may take to close in the end."""
        self._stops = 0

    def stop(self) -> None:
        """Hurry: the first call ends the pacing of a retiring worker, the second all waiting."""
        self._stops += 1

    async def retire(self) -> None:
        """Tell the clients to connect again, a few at a time, in no order that they could share.

        Clients whose connect is being decided come in, and have their turn later.
        """
        hub = self._hub
        begun_at = self._loop.time()
        await asyncio.sleep(_PACE_S)  # for those whom the kernel has just handed to this process
        waiting = list(hub.clients.values())
        random.shuffle(waiting)
        count = len(waiting)
        left_s = self._drain_s
        while left_s > 0 and not self._stops:
            left_s = begun_at + self._drain_s - self._loop.time()
            target = count * max(0.0, left_s) / self._drain_s
            while len(waiting) > target + 0.5:
                waiting.pop().drain(SERVICE_RESTART, "service restart")
            if not waiting:
                waiting = [client for client in hub.clients.values() if not client.is_leaving]
                count = len(waiting)
            if not hub.clients and all(client.state > CLAIMING for client in hub.live):
                return
            await asyncio.sleep(_PACE_S * (0.5 + random.random()))

    async def finish(self, *, retiring: bool) -> int:
        """Tell all clients that are left, wait for what is under way, report every end.

        Returns:
            how many ends the API has not heard of and nobody will tell it.
        """
        hub = self._hub
        now = self._loop.time()
        # Redis, the sockets, and the connections to Redis are closed after it.
        deadline = now + self._total_s - 3 * self.closing_s
        if retiring and not self._stops:
            farewell = SERVICE_RESTART, "service restart"
        else:
            farewell = GOING_AWAY, "going away"
            self._turn_back()
        hub.farewell = farewell  # also for those whose connect is being decided
        for client in list(hub.clients.values()):
            client.drain(*farewell)
        await self._wait_until(
            lambda: not hub.clients and not hub.connecting, now + self._total_s * _PATIENCE_SHARE
        )
        self._turn_back()
        for client in list(hub.clients.values()):
            client.close(*farewell)
        await self._wait_until(lambda: not self._unreported, deadline)
        # No answer of the API changes anything from here on. A connect that it is still deciding
        # stays marked: should it say yes, a reaper tells it of the end.
        owing = self._unreported + self._outbox.unconfirmed
        hub.is_over = True
        await self._upstream.close()
        self._on_last()
        return await self._leave_to_reapers(owing)

    def _turn_back(self) -> None:
        """Let nobody in any more."""
        self._hub.refusing = True
        for client in list(self._hub.live):
            if client.state == WAITING:
                client.turn_back(1.0)

    async def _leave_to_reapers(self, owing: int) -> int:
        """Leave what stands in Redis to the reapers; return what does not stand there.

        Args:
            owing: how many ends the API had yet to hear of.
        """
        try:
            async with asyncio.timeout(self.closing_s):
                left = await self._outbox.hand_over()
        except TimeoutError:
            # Slow, but there: when the lease is over a reaper finds what stands there.
            return self._outbox.unconfirmed
        except (RedisUnavailable, hiredis.HiredisError):
            return owing
        if left:
            _log.warning("reapers will tell the API of disconnects", count=left)
        return 0

    @property
    def _unreported(self) -> int:
        """Count the clients of whom the API has yet to hear."""
        return sum(ASKING <= client.state < CLOSED for client in self._hub.live)

    async def _wait_until(self, done: Callable[[], bool], deadline: float) -> None:
        """Wait, unless a second stop says that there is no time."""
        while not done() and self._loop.time() < deadline and self._stops < _HURRY:
            await asyncio.sleep(_POLL_S)
