"""Carry exchanges over one HTTP/1.1 connection to the API."""

from __future__ import annotations

import asyncio
from time import monotonic_ns
from typing import Protocol, cast

import httptools

from .exchange import CONNECT, MESSAGE, Exchange
from .http_wire import KnownReplies, ReplyReader, ReplyTooLarge


class Pool(Protocol):
    """Own connections, and learn what becomes of their exchanges."""

    def on_reply(self, connection: ApiConnection, exchange: Exchange, reply: ReplyReader) -> None:
        """Take a whole answer; the connection is free."""

    def on_invalid_reply(
        self, connection: ApiConnection, exchange: Exchange, error: Exception
    ) -> None:
        """Learn that an answer cannot be used; the connection ends."""

    def on_connection_lost(
        self, connection: ApiConnection, exchange: Exchange | None, closed_while_idle: bool
    ) -> None:
        """Learn that a connection has ended, and which exchange had no answer by then."""


class ApiConnection(asyncio.Protocol):
    """Carry one exchange at a time over one connection to the API."""

    def __init__(self, pool: Pool, max_reply_size: int, known: KnownReplies | None = None) -> None:
        self._pool = pool
        self._reply = ReplyReader(max_reply_size, known)
        self.transport: asyncio.Transport | None = None
        self.exchange: Exchange | None = None
        self.sent_at = 0.0
        """Clock at which the exchange was sent, or at which the connection fell idle."""
        self.sent_ns = 0
        """Precise clock at which the exchange was sent."""
        self.was_idle = False
        """Whether the connection has waited for something to do, or served before."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Be ready to send."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def send(self, exchange: Exchange, now: float) -> None:
        """Write the request of an exchange; no other may be under way."""
        assert self.transport is not None
        self.exchange = exchange
        self.sent_at = now
        if exchange.event != MESSAGE or not self._reply.is_fresh:
            self._reply.expect(want_headers=exchange.event == CONNECT)
        exchange.attempts += 1
        self.sent_ns = monotonic_ns()
        self.transport.write(exchange.wire)

    def data_received(self, data: bytes) -> None:
        """Read the reply and hand it on when it is whole."""
        exchange = self.exchange
        if exchange is None:
            self.abort()  # bytes that nobody asked for
            return
        reply = self._reply
        if reply.is_fresh and exchange.event == MESSAGE and reply.recognise(data):
            self.exchange = None
            self.was_idle = True
            self._pool.on_reply(self, exchange, reply)
            reply.body = b""  # an idle connection must not keep it
            return
        try:
            reply.feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, ReplyTooLarge) as error:
            if not reply.complete:
                self.exchange = None
                self.abort()
                self._pool.on_invalid_reply(self, exchange, error)
                return
            reply.keep_alive = False
        if reply.complete:
            if exchange.event == MESSAGE:
                reply.remember(data)
            self.exchange = None
            self.was_idle = True
            self._pool.on_reply(self, exchange, reply)
            reply.drop_body()

    def eof_received(self) -> bool:
        """Take a reply that is framed by the end of the stream; close."""
        exchange = self.exchange
        if exchange is not None and self._reply.feed_eof():
            self.exchange = None
            self._pool.on_reply(self, exchange, self._reply)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave the pool; an exchange under way fails or is tried again."""
        exchange, self.exchange = self.exchange, None
        # A server may close an idle connection in the very moment in which it is used again
        # (RFC 9112, 9.3.1): nothing of the answer was seen, so nothing was lost by it.
        closed_while_idle = self.was_idle and self._reply.is_fresh
        self._reply.close()
        self._pool.on_connection_lost(self, exchange, closed_while_idle)

    @property
    def is_closing(self) -> bool:
        """Tell whether nothing can be sent any more, or not yet."""
        return self.transport is None or self.transport.is_closing()

    def abort(self) -> None:
        """Drop the connection at once."""
        if self.transport is not None:
            self.transport.abort()

    def close(self) -> None:
        """Close the connection after what is still to be written."""
        if self.transport is not None:
            self.transport.close()
