"""Accept connections on one listening socket, or let them wait in the kernel for a while."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final

import structlog

_BACKLOG: Final = 4096

_log = structlog.get_logger()


class Door:
    """Own a listening socket.

    While it is shut, the kernel completes connections and keeps them in the socket's queue: the
    client finds itself connected, and its request waits. Shutting has effect at once: the loop
    accepts one connection in a turn, and tells its protocol before it accepts the next.

    Args:
        listener: bound and listening; somebody else has it open, too, so that closing it here does
            not end its queue.
        factory: makes the protocol of a connection.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        factory: Callable[[], asyncio.Protocol],
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._factory = factory
        # None while nothing is accepted.
        self._server: asyncio.AbstractServer | None = None
        self._opening: asyncio.Task[None] | None = None
        self._is_closed = False
        self.is_shut = False
        """Whether connections are kept waiting."""

    async def open(self) -> None:
        """Begin to accept."""
        self._server = await self._loop.create_server(
            self._factory, sock=self._listener, backlog=_BACKLOG
        )

    def shut(self) -> None:
        """Let connections wait from here on. Does nothing when it is shut."""
        if self.is_shut or self._is_closed:
            return
        if self._server is not None:
            try:
                listener = self._listener.dup()  # the server closes the one that it was given
            except OSError:
                return  # not even one file is left; the next connection brings the next attempt
            self._server.close()
            self._server, self._listener = None, listener
        self.is_shut = True
        if self._opening is not None:
            self._opening.cancel()

    def reopen(self) -> None:
        """Accept again, at the end of this tick. Does nothing when it is not shut."""
        if self.is_shut and not self._is_closed:
            self.is_shut = False
            self._opening = self._loop.create_task(self._reopen())

    async def _reopen(self) -> None:
        try:
            await self.open()
        except OSError as error:
            _log.error("cannot accept connections", reason=str(error))
            self.is_shut = True  # whoever shut it opens it again

    def close(self) -> None:
        """Accept no more, for ever; what waits in the kernel waits for others."""
        self._is_closed = True
        if self._opening is not None:
            self._opening.cancel()
        if self._server is not None:
            self._server.close()
            self._server = None
        else:
            self._listener.close()
