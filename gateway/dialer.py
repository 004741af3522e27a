"""Open connections to the API."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Final

from .api_connection import ApiConnection
from .dial import Destination
from .settings import ApiUrl

MAX_DIALS: Final = 128
"""Connections that are being opened at once, at most."""


class Dialer:
    """Open connections, some at a time.

    Args:
        api: whose host and port are dialled.
        timeout_s: for one attempt.
        tls: context for an https API, None for http.
        new_connection: makes the protocol of a connection.
        on_open: takes a connection that is open.
        on_failed: learns that an attempt failed, and on which clock reading it had begun.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        api: ApiUrl,
        timeout_s: float,
        tls: ssl.SSLContext | None,
        new_connection: Callable[[], ApiConnection],
        on_open: Callable[[ApiConnection], None],
        on_failed: Callable[[Exception, float], None],
    ) -> None:
        self._loop = loop
        self._api = Destination(api.host, api.port, tls)
        self._timeout_s = timeout_s
        self._new_connection = new_connection
        self._on_open = on_open
        self._on_failed = on_failed
        self._under_way: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Count the attempts under way."""
        return len(self._under_way)

    def dial(self, count: int, now: float) -> None:
        """Begin so many attempts, as far as the limit allows."""
        for _ in range(min(count, MAX_DIALS - len(self._under_way))):
            task = self._loop.create_task(self._dial(now))
            self._under_way.add(task)
            # What comes first: the end of the attempt, or of a task that never began to run.
            task.add_done_callback(self._under_way.discard)

    def cancel(self) -> None:
        """Give up every attempt; neither callback follows."""
        for task in list(self._under_way):
            task.cancel()

    async def _dial(self, now: float) -> None:
        connection = self._new_connection()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._api.connect(self._loop, lambda: connection)
            if connection.is_closing:
                raise ConnectionResetError("the API closed the connection at once")
        except asyncio.CancelledError:
            connection.abort()
            raise
        except (OSError, TimeoutError, ValueError) as error:  # ValueError: a name that is none
            self._forget_attempt()
            connection.abort()
            self._on_failed(error, now)
        else:
            self._forget_attempt()
            self._on_open(connection)

    def _forget_attempt(self) -> None:
        """Let what is submitted from here on not count on this attempt any more."""
        task = asyncio.current_task()
        assert task is not None
        self._under_way.discard(task)
