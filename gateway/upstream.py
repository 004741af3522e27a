"""Keep HTTP/1.1 connections to the API: pool, queue, deadlines, retries.

A request is an `Exchange`. It takes an idle connection, the one used last, or waits in one queue
for the next that is free, while further connections are opened up to the limit. `submit` never
calls its owner back before it returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
import ssl
from collections import deque
from typing import Final, Protocol, cast

import httptools
import structlog

from . import counters as c
from .errors import ApiDisconnected, ApiError, ApiReplyInvalid, ApiTimeout, ApiUnreachable
from .http_wire import ReplyReader, ReplyTooLarge
from .settings import Settings
from .sweeper import Sweeper

CONNECT: Final = 0
MESSAGE: Final = 1
DISCONNECT: Final = 2

# Below the keep-alive timeouts of common servers (nginx 75 s, Node 5 s is met by the retry).
_IDLE_LIMIT_S: Final = 50.0
_MAX_CONNECTING: Final = 128
_EXPIRE_QUEUE_EVERY_S: Final = 0.3
_MIN_BACKOFF_S: Final = 0.1
_MAX_BACKOFF_S: Final = 2.0
_MAX_DISCONNECT_BACKOFF_S: Final = 30.0
_MAX_UNSENT_DISCONNECTS: Final = 200_000

_log = structlog.get_logger()


class Owner(Protocol):
    """Wait for the outcome of an exchange; exactly one of the two is called, once."""

    def on_reply(self, exchange: Exchange, reply: ReplyReader) -> None:
        """Take the API's answer; `reply` is valid during the call only."""

    def on_failure(self, exchange: Exchange, error: ApiError) -> None:
        """Learn that no usable answer will come."""


class Exchange:
    """Stand for one request to the API until its outcome is known."""

    __slots__ = ("attempts", "event", "owner", "started", "wire")

    def __init__(self, owner: Owner, event: int, wire: bytes) -> None:
        self.owner = owner
        self.event = event
        self.wire = wire
        self.started = 0.0
        self.attempts = 0


class ApiConnection(asyncio.Protocol):
    """Carry one exchange at a time over one connection to the API."""

    def __init__(self, pool: Upstream, max_reply_size: int) -> None:
        self._pool = pool
        self._reply = ReplyReader(max_reply_size)
        self.transport: asyncio.Transport | None = None
        self.exchange: Exchange | None = None
        self.sent_at = 0.0
        """Clock at which the exchange was sent, or at which the connection fell idle."""
        self.served = 0
        self.was_idle = False
        """Whether the connection has ever waited for something to do."""
        self._answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Join the pool."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def send(self, exchange: Exchange, now: float) -> None:
        """Write the request of an exchange; no other may be under way."""
        assert self.transport is not None
        self.exchange = exchange
        self.sent_at = now
        self._answered = False
        self._reply.expect(want_headers=exchange.event == CONNECT)
        exchange.attempts += 1
        self.transport.write(exchange.wire)

    def data_received(self, data: bytes) -> None:
        """Read the reply and hand it on when it is whole."""
        exchange = self.exchange
        if exchange is None:
            self.abort()  # bytes that nobody asked for
            return
        self._answered = True
        reply = self._reply
        try:
            reply.feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, ReplyTooLarge) as error:
            if not reply.complete:
                self.exchange = None
                self.abort()
                self._pool.on_invalid_reply(exchange, error)
                return
            reply.keep_alive = False
        if reply.complete:
            self.exchange = None
            self.served += 1
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
        closed_while_idle = (self.was_idle or self.served > 0) and not self._answered
        self._reply.close()
        self._pool.on_connection_lost(self, exchange, closed_while_idle)

    def abort(self) -> None:
        """Drop the connection at once."""
        if self.transport is not None:
            self.transport.abort()

    def close(self) -> None:
        """Close the connection after what is still to be written."""
        if self.transport is not None:
            self.transport.close()


class Upstream:
    """Send exchanges to the API over a bounded set of keep-alive connections.

    Args:
        settings: the options; limits over all workers are divided by their number.
        slot: the worker's counters.
        tls: context for an https API, None for http.
    """

    def __init__(
        self,
        settings: Settings,
        slot: memoryview,
        sweeper: Sweeper,
        loop: asyncio.AbstractEventLoop,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._api = settings.api
        self._timeout_s = settings.api_timeout
        self._connect_timeout_s = min(settings.api_connect_timeout, settings.api_timeout)
        self._max_connections = max(1, settings.api_max_connections // settings.workers)
        self._max_idle = settings.api_max_idle // settings.workers
        self._max_reply_size = int(settings.max_message_size)
        self._slot = slot
        self._sweeper = sweeper
        self._loop = loop
        self._tls = tls
        self._connections: set[ApiConnection] = set()
        self._idle: list[ApiConnection] = []
        self._queue: deque[Exchange] = deque()
        self._connecting: set[asyncio.Task[None]] = set()
        # (due, number, exchange) of what waits for its next attempt; the number breaks ties.
        self._retries: list[tuple[float, int, Exchange]] = []
        self._retry_number = 0
        self._unsent_disconnects = 0
        # Failures to connect in a row, and until when no connection is tried for waiting messages.
        self._connect_failures = 0
        self._connect_not_before = 0.0
        self._closing = False
        self._expire_queue_at = 0.0
        sweeper.every_tick(self._on_tick)

    def __repr__(self) -> str:
        return (
            f"<Upstream {self._api} connections={len(self._connections)} idle={len(self._idle)}"
            f" connecting={len(self._connecting)} queued={len(self._queue)}"
            f" retries={len(self._retries)}>"
        )

    @property
    def unfinished(self) -> int:
        """Count the exchanges whose outcome is not known yet."""
        busy = len(self._connections) - len(self._idle)
        return busy + len(self._queue) + len(self._retries)

    def submit(self, exchange: Exchange) -> None:
        """Send a request as soon as a connection is free."""
        self._slot[c.REQUESTS_STARTED] += 1
        exchange.started = now = self._sweeper.now
        if self._idle:
            self._idle.pop().send(exchange, now)
            return
        self._queue.append(exchange)
        if now >= self._connect_not_before or exchange.event == CONNECT:
            self._connect_more()

    # Outcomes, called by the connections.

    def on_reply(self, connection: ApiConnection, exchange: Exchange, reply: ReplyReader) -> None:
        """Reuse the connection and pass the answer on, or try again where the contract says so."""
        self._connect_failures = 0
        if reply.keep_alive and not self._closing:
            self._release(connection)
        else:
            connection.close()
            self._discard(connection)
        status = reply.status
        if exchange.event == MESSAGE:
            if status == 503 and self._retry_later(exchange):
                return
            ok = status == 200 or status == 204
        elif exchange.event == DISCONNECT:
            ok = 200 <= status < 300
            if not ok and self._retry_later(exchange):
                return
        else:
            ok = status == 200
        self._slot[c.REQUESTS_SUCCEEDED if ok else c.REQUESTS_FAILED] += 1
        exchange.owner.on_reply(exchange, reply)

    def on_invalid_reply(self, exchange: Exchange, error: Exception) -> None:
        """Count an answer that is no HTTP or exceeds a limit; it may have been acted on."""
        self._slot[c.API_REPLIES_INVALID] += 1
        cause = error.__context__ or error
        if exchange.event == DISCONNECT and self._retry_later(exchange):
            return
        self._fail(exchange, ApiReplyInvalid(f"the API's reply cannot be used: {cause}"))

    def on_connection_lost(
        self, connection: ApiConnection, exchange: Exchange | None, closed_while_idle: bool
    ) -> None:
        """Forget a connection; try its exchange again where that is safe."""
        self._discard(connection)
        if exchange is not None:
            if closed_while_idle and exchange.attempts < 4 and not self._closing:
                self._slot[c.REQUESTS_RETRIED] += 1
                self._queue.appendleft(exchange)
            elif not (exchange.event == DISCONNECT and self._retry_later(exchange)):
                self._fail(exchange, ApiDisconnected("the API closed the connection"))
        if self._queue:
            self._connect_more()

    def _fail(self, exchange: Exchange, error: ApiError) -> None:
        self._slot[c.REQUESTS_FAILED] += 1
        exchange.owner.on_failure(exchange, error)

    def _retry_later(self, exchange: Exchange) -> bool:
        """Put an exchange aside for another attempt; tell whether there will be one."""
        now = self._sweeper.now
        if exchange.event == DISCONNECT:
            if len(self._retries) >= _MAX_UNSENT_DISCONNECTS:
                return False
            limit_s = _MAX_DISCONNECT_BACKOFF_S
        else:
            limit_s = _MAX_BACKOFF_S
        delay_s = _backoff(exchange.attempts, limit_s)
        if exchange.event != DISCONNECT and now + delay_s >= exchange.started + self._timeout_s:
            return False
        self._slot[c.REQUESTS_RETRIED] += 1
        self._retry_number += 1
        heapq.heappush(self._retries, (now + delay_s, self._retry_number, exchange))
        return True

    # Connections.

    def _release(self, connection: ApiConnection) -> None:
        """Give a free connection to the next in the queue, or keep it idle."""
        now = self._sweeper.now
        if self._queue:
            connection.send(self._queue.popleft(), now)
        elif len(self._idle) < self._max_idle:
            connection.sent_at = now
            connection.was_idle = True
            self._idle.append(connection)
        else:
            connection.close()
            self._discard(connection)

    def _discard(self, connection: ApiConnection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
            self._slot[c.API_CONNECTIONS] = len(self._connections)
            with contextlib.suppress(ValueError):
                self._idle.remove(connection)

    def _connect_more(self) -> None:
        """Open as many connections as there are requests waiting, within the limits."""
        if self._closing:
            return
        room = self._max_connections - len(self._connections) - len(self._connecting)
        wanted = min(len(self._queue), _MAX_CONNECTING) - len(self._connecting)
        for _ in range(min(room, wanted)):
            task = self._loop.create_task(self._connect())
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self) -> None:
        connection = ApiConnection(self, self._max_reply_size)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._loop.create_connection(
                    lambda: connection,
                    self._api.host,
                    self._api.port,
                    ssl=self._tls,
                    server_hostname=self._api.host if self._tls else None,
                )
        except (OSError, TimeoutError, ValueError) as error:  # ValueError: a name that is none
            self._forget_task()
            if connection.transport is not None:
                connection.transport.abort()
            self._on_connect_failed(error)
            return
        self._forget_task()
        self._connections.add(connection)
        self._slot[c.API_CONNECTIONS] = len(self._connections)
        self._connect_failures = 0
        self._connect_not_before = 0.0
        assert connection.transport is not None
        if connection.transport.is_closing():
            self._discard(connection)
        else:
            self._release(connection)

    def _forget_task(self) -> None:
        """Let what is submitted from here on not count on this attempt any more."""
        task = asyncio.current_task()
        assert task is not None
        self._connecting.discard(task)

    def _on_connect_failed(self, error: Exception) -> None:
        """Fail the connects that wait, and let messages and disconnects wait for the next try."""
        self._connect_failures += 1
        self._connect_not_before = self._sweeper.now + _backoff(
            self._connect_failures, _MAX_BACKOFF_S
        )
        text = str(error) or type(error).__name__
        if self._connect_failures == 1 or self._connect_failures % 100 == 0:
            _log.warning("API unreachable", api=str(self._api), error=text)
        if self._connections:
            return  # the busy ones will come to serve the queue
        waiting, self._queue = self._queue, deque()
        for exchange in waiting:
            if exchange.event == CONNECT:
                self._fail(exchange, ApiUnreachable("the API is unreachable"))
            else:
                self._queue.append(exchange)
        if self._queue:
            self._slot[c.REQUESTS_RETRIED] += 1

    # Deadlines.

    def _on_tick(self, now: float) -> None:
        self._slot[c.API_QUEUE] = len(self._queue)
        self._expire_queue(now)
        self._expire_busy(now)
        while self._retries and self._retries[0][0] <= now:
            exchange = heapq.heappop(self._retries)[2]
            if self._idle:
                self._idle.pop().send(exchange, now)
            else:
                self._queue.append(exchange)
        while self._idle and self._idle[0].sent_at + _IDLE_LIMIT_S < now:
            connection = self._idle.pop(0)
            connection.close()
            self._discard(connection)
        if self._queue and now >= self._connect_not_before:
            self._connect_more()

    def _expire_queue(self, now: float) -> None:
        """Fail what has waited too long for a connection; disconnects wait as long as it takes."""
        if not self._queue or now < self._expire_queue_at:
            return
        # What was put off comes back behind younger ones, so the whole queue is looked at.
        self._expire_queue_at = now + _EXPIRE_QUEUE_EVERY_S
        oldest = now - self._timeout_s
        waiting, self._queue = self._queue, deque()
        disconnects = 0
        expired: list[Exchange] = []
        for exchange in waiting:
            is_disconnect = exchange.event == DISCONNECT
            disconnects += is_disconnect
            if is_disconnect:
                is_late = disconnects > _MAX_UNSENT_DISCONNECTS
            else:
                is_late = exchange.started < oldest
            (expired if is_late else self._queue).append(exchange)
        error = ApiUnreachable if self._connect_failures else ApiTimeout
        for exchange in expired:
            self._fail(exchange, error("no connection to the API was free in time"))

    def _expire_busy(self, now: float) -> None:
        oldest = now - self._timeout_s
        late = [
            connection
            for connection in self._connections
            if connection.exchange is not None
            and (
                connection.sent_at < oldest
                or (
                    connection.exchange.event != DISCONNECT and connection.exchange.started < oldest
                )
            )
        ]
        for connection in late:
            exchange, connection.exchange = connection.exchange, None
            connection.abort()
            self._discard(connection)
            assert exchange is not None
            if not (exchange.event == DISCONNECT and self._retry_later(exchange)):
                self._fail(exchange, ApiTimeout("the API did not answer in time"))

    async def close(self) -> None:
        """Drop every connection; what is under way is forgotten."""
        self._closing = True
        self._queue.clear()
        for task in list(self._connecting):
            task.cancel()
        for connection in list(self._connections):
            connection.exchange = None
            connection.abort()


def _backoff(attempt: int, limit_s: float) -> float:
    """Return a delay that doubles with each attempt, between half and the whole of it at random."""
    whole_s = min(limit_s, _MIN_BACKOFF_S * 2.0 ** min(attempt - 1, 16))
    return whole_s * (0.5 + random.random() / 2)
