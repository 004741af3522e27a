"""Carry exchanges over one HTTP/1.1 connection to the API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic_ns
from typing import Final, Protocol, cast

import httptools

from .exchange import CONNECT, DISCONNECT, MESSAGE, Exchange
from .http_wire import KnownReplies, ReplyReader, ReplyTooLarge
from .reply_body import BodyUnusable
from .tcp_progress import progress

# Servers read at least so much at once: one that has closed without reading that resets.
_READ_AT_ONCE_BYTES: Final = 4_096
# A host that has bytes says so sooner than this (RFC 9293, 3.8.6.3: within 0.5 s; Linux: 40 ms),
# and the kernel sends nothing for a second time (RFC 6298: 1 s; Linux: 200 ms).
_SOON_S: Final = 0.15
# Nobody's keep-alive timeout is shorter, give or take.
_IDLE_S: Final = 0.9


class Pool(Protocol):
    """Own connections, and learn what becomes of their exchanges."""

    def on_reply(self, connection: ApiConnection, exchange: Exchange, reply: ReplyReader) -> None:
        """Take a whole answer; the connection is free."""

    def on_invalid_reply(
        self, connection: ApiConnection, exchange: Exchange, error: Exception
    ) -> None:
        """Learn that an answer cannot be used; the connection ends."""

    def on_connection_lost(
        self, connection: ApiConnection, exchange: Exchange | None, was_unseen: bool
    ) -> None:
        """Learn that a connection has ended, and which exchange had no answer by then.

        Args:
            was_unseen: whether the API cannot have begun with the exchange.
        """

    def on_keep_alive(self, timeout_s: float) -> None:
        """Learn for how long the API keeps idle connections, as it says."""


class ApiConnection(asyncio.Protocol):
    """Carry one exchange at a time over one connection to the API."""

    def __init__(self, pool: Pool, max_reply_size: int, known: KnownReplies | None = None) -> None:
        self._pool = pool
        self._reply = ReplyReader(max_reply_size, known)
        self.transport: asyncio.Transport | None = None
        # The transport's method, looked up once; there is none before.
        self._write: Callable[[bytes], None]
        self.exchange: Exchange | None = None
        self.sent_at = 0.0
        """Clock at which the exchange was sent, or at which the connection fell idle."""
        self.sent_ns = 0
        """Precise clock at which the exchange was sent."""
        self.retires_at = float("inf")
        """Clock from which on it is too old to be used again."""
        self.was_idle = False
        """Whether the connection has waited for something to do, or served before the exchange."""
        # Bytes so far, whether or not the transport could still take them.
        self._written = 0
        # Whether the API had ended the connection before the exchange reached it; None while it
        # has not ended it.
        self._ended_before: bool | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Be ready to send."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._write = self.transport.write

    def send(self, exchange: Exchange, now: float) -> None:
        """Write the request of an exchange; no other may be under way."""
        self.exchange = exchange
        self.sent_at = now
        if exchange.event != MESSAGE or not self._reply.is_fresh:
            self._reply.expect(want_headers=exchange.event == CONNECT)
        exchange.attempts += 1
        self.sent_ns = monotonic_ns()
        wire = exchange.wire
        self._written += len(wire)
        self._write(wire)

    def data_received(self, data: bytes) -> None:
        """Read the reply and hand it on when it is whole."""
        exchange = self.exchange
        if exchange is None:
            self.abort()  # bytes that nobody asked for
            self._pool.on_connection_lost(self, None, False)
            return
        reply = self._reply
        if reply.is_fresh and not reply.want_headers and reply.recognise(data):
            self.exchange = None
            self._pool.on_reply(self, exchange, reply)
            self.was_idle = True
            reply.body = b""  # an idle connection must not keep it
            return
        try:
            reply.feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, ReplyTooLarge) as error:
            if not reply.complete:
                self._fail(exchange, error)
                return
            reply.keep_alive = False
        if reply.complete:
            if not reply.want_headers:
                reply.remember(data)
            if reply.keep_alive_s is not None:
                self._pool.on_keep_alive(reply.keep_alive_s)
            self.exchange = None
            self._pool.on_reply(self, exchange, reply)
            self.was_idle = True
            reply.drop_body()

    def _fail(self, exchange: Exchange, error: Exception) -> None:
        """End with an answer that cannot be used."""
        self.exchange = None
        self.abort()
        if not self.settle(exchange):
            self._pool.on_invalid_reply(self, exchange, error)

    def settle(self, exchange: Exchange) -> bool:
        """End a disconnect whose status has come: it is the answer, whatever is wrong behind it.

        Returns:
            Whether that was so; then the connection is of no more use.
        """
        if exchange.event != DISCONNECT or not self._reply.end_early():
            return False
        self._pool.on_reply(self, exchange, self._reply)
        return True

    def eof_received(self) -> bool:
        """Take a reply that is framed by the end of the stream; close."""
        exchange = self.exchange
        if exchange is None:
            self._pool.on_connection_lost(self, None, False)  # so that nobody finds it idle
            return False
        try:
            if self._reply.feed_eof():
                self.exchange = None
                self._pool.on_reply(self, exchange, self._reply)
                return False
        except BodyUnusable as error:
            self._fail(exchange, error)
            return False
        self._ended_before = self._was_unseen(exchange, was_reset=False)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave the pool; an exchange under way fails or is tried again."""
        exchange, self.exchange = self.exchange, None
        was_unseen = False
        if exchange is not None:
            if self.settle(exchange):
                exchange = None
            elif self._ended_before is not None:
                was_unseen = self._ended_before
            else:
                was_unseen = self._was_unseen(exchange, was_reset=exc is not None)
        self._reply.close()
        self._pool.on_connection_lost(self, exchange, was_unseen)

    def _was_unseen(self, exchange: Exchange, *, was_reset: bool) -> bool:
        """Tell whether the API cannot have begun with the request under way; False in doubt.

        A server may close an idle connection in the very moment in which it is used again
        (RFC 9112, 9.3.1). Of what its host has never acknowledged it had nothing. An orderly end
        acknowledges all that came before it. A reset does not, but a server that closes resets
        what it has not read: that counts after some idle time, when it is too soon for an
        acknowledgement, and what a server reads at once would have been the whole.
        """
        assert self.transport is not None
        known = progress(self.transport)
        if not self._reply.is_fresh or known is None:
            return False
        size = len(exchange.wire)
        if known.taken <= self._written - size:
            return True  # it was lost already when it was written
        waiting = known.unacknowledged + self.transport.get_write_buffer_size()
        # All before it was acknowledged, because it was answered; TLS only adds to the size.
        if waiting < size - 1:
            return False
        if not was_reset:
            return True
        elapsed_s = (monotonic_ns() - self.sent_ns) / 1e9
        was_idle = known.last_received_s - elapsed_s >= _IDLE_S
        return was_idle and elapsed_s < _SOON_S and size <= _READ_AT_ONCE_BYTES

    def retire(self) -> None:
        """Let the exchange under way be the last one."""
        self._reply.make_last()

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
