"""Hold the connections to the API: which are free, how many may be opened, which have been idle
for too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from collections.abc import Callable
from typing import Final

from . import counters as c
from .api_connection import ApiConnection
from .dialer import MAX_DIALS, Dialer
from .exchange import DISCONNECT
from .settings import Settings
from .sweeper import Sweeper

# Below the keep-alive timeouts of common proxies (nginx 75 s); servers that say theirs are heeded.
_IDLE_LIMIT_S: Final = 50.0
# So much earlier than the API a connection is closed, or after half of its time.
_BEFORE_THE_API_S: Final = 1.0
# Those that were opened together are not to be closed together: one may retire by this share of the
# greatest age earlier.
_AGE_SPREAD: Final = 0.2
_RETIRE_EVERY_S: Final = 1.0
# Surplus connections live on for so long: traffic that goes up and down by the millisecond would
# otherwise close connections, and open them again at once.
_SURPLUS_S: Final = 1.0


class ConnectionPool:
    """Keep a worker's share of the connections.

    Args:
        settings: the options; limits over all workers are divided by their number, rounding up.
        most: connections that there are files for.
        slot: the worker's counters.
        tls: context for an https API, None for http.
        new_connection: makes the protocol of a connection.
        on_open: takes a connection that was opened, and is a member already.
        on_failed: learns that an attempt to open one failed, and at which time it had begun.
    """

    def __init__(
        self,
        settings: Settings,
        most: int,
        slot: memoryview,
        sweeper: Sweeper,
        loop: asyncio.AbstractEventLoop,
        tls: ssl.SSLContext | None,
        new_connection: Callable[[], ApiConnection],
        on_open: Callable[[ApiConnection], None],
        on_failed: Callable[[Exception, float], None],
    ) -> None:
        self.limit = min(_share(settings.api_max_connections, settings.workers), most)
        self.max_idle = _share(settings.api_max_idle, settings.workers)
        self._slot = slot
        self._sweeper = sweeper
        self._on_open = on_open
        self._on_failed = on_failed
        self.dial_timeout_s = min(settings.api_connect_timeout, settings.api_timeout)
        self._dialer = Dialer(
            loop,
            settings.api,
            self.dial_timeout_s,
            tls,
            new_connection,
            self._on_dialled,
            self._on_dial_failed,
        )
        self._max_age_s = settings.api_max_age
        self._retire_at = sweeper.now
        # Time of the last attempt, if that failed.
        self._failed_at: float | None = None
        self._idle_limit_s = _IDLE_LIMIT_S
        self._is_closed = False
        self.members: set[ApiConnection] = set()
        self.idle: list[ApiConnection] = []
        """Those that are free; the one used last is at the end."""
        self.aside: list[ApiConnection] = []
        """Those that are free, while none is to be taken without thought; then `idle` is empty."""
        self.free = self.idle
        """The one of the two that free connections go to."""

    @property
    def opening(self) -> int:
        """Count the connections that are being opened."""
        return len(self._dialer)

    @property
    def has_room(self) -> bool:
        """Tell whether there are fewer connections than allowed."""
        return len(self.members) < self.limit

    @property
    def is_cut_off(self) -> bool:
        """Tell whether there is no connection, and the last attempt to open one failed."""
        return not self.members and self._failed_at is not None

    def set_aside(self) -> None:
        """Let nobody find a connection idle."""
        self.free = self.aside
        self.aside += self.idle
        self.idle.clear()

    def take_back(self) -> None:
        """End what `set_aside` began."""
        self.free = self.idle
        self.idle += self.aside
        self.aside.clear()
        self.trim()

    def trim(self) -> None:
        """Close those that are too many to be kept idle, and have not been needed for a while."""
        recent = self._sweeper.now - (_SURPLUS_S if self.max_idle else 0.0)
        while len(self.free) > self.max_idle and self.free[0].sent_at <= recent:
            self.drop(self.free[0])

    def close_old(self, now: float) -> None:
        """Close those that have been idle for so long that the API may be about to, and surplus."""
        self.trim()
        while self.free and self.free[0].sent_at + self._idle_limit_s < now:
            self.drop(self.free[0])

    def heed_keep_alive(self, timeout_s: float) -> None:
        """Close idle connections before the API does, which closes them after a time of its own."""
        limit_s = max(timeout_s - _BEFORE_THE_API_S, timeout_s / 2)
        self._idle_limit_s = min(_IDLE_LIMIT_S, limit_s)

    def retire_old(self, now: float) -> None:
        """End those that have reached the greatest age, once a second: the API may have moved.

        What is under way is brought to its end. While no other can be opened, what there is stays.
        """
        if now < self._retire_at:
            return
        self._retire_at = now + _RETIRE_EVERY_S
        old = [member for member in self.members if member.retires_at <= now]
        if old and self._failed_at is not None:
            if self.has_room:
                self.open(1)
                return
            del old[1:]
        for connection in old:
            if connection.exchange is None:
                self.drop(connection)
            else:
                connection.retire()

    def drop(self, connection: ApiConnection) -> None:
        """Close a connection, and forget it."""
        connection.close()
        self.discard(connection)

    def drop_aside(self) -> None:
        """Close those that are set aside."""
        while self.aside:
            self.drop(self.aside[-1])

    def late(self, oldest: float) -> list[ApiConnection]:
        """Return those whose exchange has waited for an answer for too long.

        Time in line counts, but not for a disconnect.

        Args:
            oldest: time before which an exchange that is in time was not submitted.
        """
        return [
            connection
            for connection in self.members
            if (exchange := connection.exchange) is not None
            and (
                connection.sent_at < oldest
                or (exchange.event != DISCONNECT and exchange.started < oldest)
            )
        ]

    def discard(self, connection: ApiConnection) -> None:
        """Forget a connection."""
        if connection in self.members:
            self.members.remove(connection)
            self._slot[c.API_CONNECTIONS] = len(self.members)
            with contextlib.suppress(ValueError):
                self.free.remove(connection)

    def open(self, wanted: int) -> None:
        """Have so many connections being opened, within the limits."""
        if self._is_closed:
            return
        now = self._sweeper.now
        most = MAX_DIALS
        if self._failed_at is not None and self.members:
            # The API has connections but wants no more at the moment: one attempt per tick.
            most = 1 if self._failed_at < now else 0
        most = min(most, wanted, self.limit - len(self.members))
        self._dialer.dial(most - self.opening, now)

    def close(self) -> None:
        """Drop every connection, and open no more; those that were busy are not told of it."""
        self._is_closed = True
        self._dialer.cancel()
        for connection in list(self.members):
            connection.exchange = None
            connection.abort()
        self.idle.clear()
        self.aside.clear()

    def _on_dialled(self, connection: ApiConnection) -> None:
        self._failed_at = None
        self.members.add(connection)
        if self._max_age_s:
            share = 1.0 - _AGE_SPREAD * random.random()
            connection.retires_at = self._sweeper.now + self._max_age_s * share
        self._slot[c.API_CONNECTIONS] = len(self.members)
        self._on_open(connection)

    def _on_dial_failed(self, error: Exception, began_at: float) -> None:
        self._failed_at = self._sweeper.now
        self._on_failed(error, began_at)


def _share(limit: int, workers: int) -> int:
    """Divide a limit among the workers; nobody's share of something is nothing."""
    return -(-limit // workers)
