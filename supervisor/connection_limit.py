"""Bound what strangers can hold open at the admin port.

The reaper lives in the same process: it must not run out of files because somebody opens one
connection after another, and a load balancer's check must get in however many wait there.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler

MOST_CONNECTIONS: Final = 256
KEEPALIVE_S: Final = 75.0
"""A connection without a whole request for so long is closed."""
_UNREAD_S: Final = 30
"""Whoever takes nothing of what was sent for so long is gone."""


class ConnectionLimit:
    """Accept connections for a server; when there are too many, drop the oldest that is idle.

    Args:
        most: connections that may be open.
    """

    def __init__(self, most: int = MOST_CONNECTIONS) -> None:
        self._most = most
        # Connections with a request under way.
        self._busy: set[web.RequestHandler] = set()

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note who has a request under way."""
        self._busy.add(request.protocol)
        try:
            return await handler(request)
        finally:
            self._busy.discard(request.protocol)

    async def listen(
        self, server: web.Server, listener: socket.socket, backlog: int
    ) -> asyncio.AbstractServer:
        """Begin to accept from a socket."""
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; what is accepted inherits it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_S * 1000)
        loop = asyncio.get_running_loop()
        return await loop.create_server(lambda: self._open(server), sock=listener, backlog=backlog)

    def _open(self, server: web.Server) -> asyncio.Protocol:
        known = server.connections
        is_open = [each for each in known if each.transport and not each.transport.is_closing()]
        has_room = len(is_open) < self._most or self._drop_one(is_open)
        # What is closed is known until the next turn of the loop, or until the peer has read all.
        return server() if has_room and len(known) < 2 * self._most else _Refusal()

    def _drop_one(self, connections: list[web.RequestHandler]) -> bool:
        """Drop the oldest connection that has no request under way; tell whether there was one."""
        for connection in connections:
            if connection not in self._busy and connection.transport is not None:
                connection.transport.abort()
                return True
        return False


class _Refusal(asyncio.Protocol):
    """Be a connection for which there is no room."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.abort()  # type: ignore[attr-defined]
