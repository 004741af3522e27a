"""Send requests to the API, in turn, as fast as it takes them.

A request is an `Exchange`. It takes an idle connection, the one used last, or waits in line for the
next that is free, while further connections are opened up to the limit. What the API does not take
is tried again where the contract says so.

A breaker watches the answers. While it is not closed no connection counts as idle, so that every
request comes by `_pump`, which sends as many as the breaker lets go; connects are turned away.

`submit` calls no owner back before it returns.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import Callable
from time import monotonic_ns
from typing import Final

from . import counters as c
from .api_connection import ApiConnection
from .breaker import CLOSED, OPEN, Breaker
from .connection_pool import ConnectionPool
from .dial import describe
from .errors import ApiDisconnected, ApiError, ApiReplyInvalid, ApiTimeout
from .exchange import CONNECT, DISCONNECT, MESSAGE, Exchange
from .http_wire import KnownReplies, ReplyReader
from .line import Line
from .outage import Outage
from .recent import Ring
from .reply_body import BodyUnusable
from .settings import Settings
from .sweeper import Sweeper

# Attempts that follow each other at once while connections turn out to have been closed.
_QUICK_ATTEMPTS: Final = 4
_MOST_DISCONNECTS: Final = 32
# While the API cannot be connected to, and no request tries.
_LOOK_EVERY_S: Final = 2.0
# A failure so long ago, since which nothing was asked, says nothing of the present.
_STALE_S: Final = 60.0
# A tick that is so late was held up, and the answers lie unread in the sockets.
_STANDSTILL_S: Final = 1.0

# Statuses of a message that mean "again" as 503 does, if the API said that it may come twice; with
# those of the second kind the API, behind its proxy, is away.
_AGAIN_IF_SAFE: Final = frozenset((408, 425, 429, 502, 504))
_AWAY: Final = frozenset((502, 503, 504))
_REQUEST_TIMEOUT: Final = 408

# By event.
_LATENCIES: Final = (c.CONNECT_LATENCY, c.MESSAGE_LATENCY, c.DISCONNECT_LATENCY)
_MESSAGE_LATENCY: Final = c.MESSAGE_LATENCY


class Upstream:
    """Be the API to a worker.

    Args:
        settings: the options.
        slot: the worker's counters.
        tls: context for an https API, None for http.
        park: leaves a disconnect to Redis; True when Redis took it, and then its owner is told by
            `on_parked`. None when there is nobody to take it.
        most_connections: that there are files for; the settings may want more.
        outage: takes why the API is away.
    """

    def __init__(
        self,
        settings: Settings,
        slot: memoryview,
        sweeper: Sweeper,
        loop: asyncio.AbstractEventLoop,
        tls: ssl.SSLContext | None,
        park: Callable[[Exchange], bool] | None = None,
        most_connections: int = sys.maxsize,
        outage: Ring | None = None,
    ) -> None:
        self._api = settings.api
        self._timeout_s = settings.api_timeout
        self._slot = slot
        self._sweeper = sweeper
        self._loop = loop
        reply_limit = int(settings.max_message_size)
        known = KnownReplies()
        self._pool = ConnectionPool(
            settings,
            most_connections,
            slot,
            sweeper,
            loop,
            tls,
            lambda: ApiConnection(self, reply_limit, known),
            self._on_open,
            self._on_dial_failed,
        )
        # The pool's own list; empty while the breaker is not closed.
        self._idle = self._pool.idle
        most_disconnects = max(1, min(_MOST_DISCONNECTS, self._pool.limit // 4))
        self._line = Line(slot, settings.api_timeout, most_disconnects, park, loop.call_soon)
        # The line's own: connects and messages, and disconnects.
        self._queue = self._line.queue
        self._leaving = self._line.departures.waiting
        self._breaker = Breaker(self._pool.limit)
        # Whether the breaker is not closed.
        self._is_away = False
        # Whether a good answer would be news to it.
        self._is_doubtful = False
        self._outage = Outage(str(settings.api), slot, outage)
        self._is_ending = False
        self._ticked_at = sweeper.now
        sweeper.every_tick(self._on_tick)

    def __repr__(self) -> str:
        pool = self._pool
        return (
            f"<Upstream {self._api} connections={len(pool.members)} idle={len(pool.free)}"
            f" connecting={pool.opening} {self._line!r} {self._breaker!r}>"
        )

    def submit(self, exchange: Exchange) -> None:
        """Send a request as soon as a connection is free."""
        self._slot[c.REQUESTS_STARTED] += 1
        exchange.started = now = self._sweeper.now
        if self._idle and exchange.event != DISCONNECT:
            self._idle.pop().send(exchange, now)
            return
        self._wait(exchange, now)

    async def close(self) -> None:
        """Drop every connection; what has no outcome by now is parked, or fails."""
        self._is_ending = True
        under_way = [each.exchange for each in self._pool.members if each.exchange is not None]
        self._pool.close()
        self._queue.extendleft(reversed(under_way))
        self._line.give_up()
        await asyncio.sleep(0)  # the owners are told from the loop

    # Answers, as the connections report them.

    def on_reply(self, connection: ApiConnection, exchange: Exchange, reply: ReplyReader) -> None:
        """Reuse the connection and pass the answer on."""
        took_us = (monotonic_ns() - connection.sent_ns) // 1000
        status = reply.status
        if exchange.event != MESSAGE or status > 204 or self._is_doubtful:
            _LATENCIES[exchange.event].observe(self._slot, took_us)
            self._on_notable_reply(connection, exchange, reply)
            return
        _MESSAGE_LATENCY.observe(self._slot, took_us)
        if not reply.keep_alive:
            self._pool.drop(connection)
        elif (self._queue or self._leaving) and (following := self._line.next()) is not None:
            connection.send(following, self._sweeper.now)
        elif self._pool.max_idle:
            connection.sent_at = self._sweeper.now
            self._idle.append(connection)
        else:
            self._pool.drop(connection)
        ok = status == 200 or status == 204
        self._slot[c.REQUESTS_SUCCEEDED if ok else c.REQUESTS_FAILED] += 1
        exchange.owner.on_reply(exchange, reply)

    def _on_notable_reply(
        self, connection: ApiConnection, exchange: Exchange, reply: ReplyReader
    ) -> None:
        """Do the same when the breaker wants to know, or the request may go again."""
        now, status, event = self._sweeper.now, reply.status, exchange.event
        # The server has waited for a request for long enough, and this one came too late
        # (RFC 9110, 15.5.9).
        was_late = status == _REQUEST_TIMEOUT and connection.was_idle
        if was_late and exchange.attempts < _QUICK_ATTEMPTS:
            self._send_elsewhere(connection, exchange)
            return
        is_again = event == MESSAGE and (
            status == 503 or was_late or (status in _AGAIN_IF_SAFE and exchange.owner.retry_safe)
        )
        if status == 503 or (is_again and status in _AWAY):
            cause = f"status {status}"
            self._learn_of_refusal(exchange, connection.sent_at, cause, reply.retry_after_s)
        elif self._is_doubtful:
            self._learn_of_success(exchange, connection.sent_at)
        ok = status == 200 or (event == MESSAGE and status == 204)
        goes_again = False
        if event == DISCONNECT:
            ok = 200 <= status < 300
            goes_again = not ok
            self._line.departures.on_answer(exchange, now, taken=ok)
        if reply.keep_alive:
            self._keep(connection, now)
        else:
            self._pool.drop(connection)
            self._pump(now)
        if is_again:
            goes_again = self._line.retry_later(exchange, now, reply.retry_after_s)
        if not goes_again:
            self._slot[c.REQUESTS_SUCCEEDED if ok else c.REQUESTS_FAILED] += 1
            exchange.owner.on_reply(exchange, reply)

    def _send_elsewhere(self, connection: ApiConnection, exchange: Exchange) -> None:
        """Send a request on another connection at once, which the API cannot have begun with."""
        self._pool.drop(connection)
        self._breaker.on_nothing(connection.sent_at)
        self._line.put_back(exchange)
        self._pump(self._sweeper.now)

    def on_keep_alive(self, timeout_s: float) -> None:
        """Keep idle connections for no longer than the API does."""
        self._pool.heed_keep_alive(timeout_s)

    def on_invalid_reply(
        self, connection: ApiConnection, exchange: Exchange, error: Exception
    ) -> None:
        """Count an answer that is no HTTP or exceeds a limit; it may have been acted on."""
        self._slot[c.API_REPLIES_INVALID] += 1
        self._pool.discard(connection)
        self._breaker.on_nothing(connection.sent_at)
        # The parser wraps what is raised within it.
        cause = error if isinstance(error, BodyUnusable) else error.__context__ or error
        failure = ApiReplyInvalid(f"the API's reply cannot be used: {cause}")
        if isinstance(cause, BodyUnusable):  # the next one would be no better
            self._line.fail(exchange, failure)
        else:
            self._retry_or_fail(exchange, failure, was_seen=True)

    def on_connection_lost(
        self, connection: ApiConnection, exchange: Exchange | None, was_unseen: bool
    ) -> None:
        """Forget a connection; try its exchange again where that is safe."""
        self._pool.discard(connection)
        if exchange is not None:
            is_stale = was_unseen and connection.was_idle
            if is_stale:
                self._breaker.on_nothing(connection.sent_at)
                self._pool.drop_aside()  # they have been idle for longer
            else:
                self._learn_of_refusal(exchange, connection.sent_at, "closed without an answer")
            if is_stale and exchange.attempts < _QUICK_ATTEMPTS:
                self._line.put_back(exchange)
            else:
                error = ApiDisconnected("the API closed the connection")
                self._retry_or_fail(exchange, error, was_seen=not was_unseen)
        self._pump(self._sweeper.now)

    def _retry_or_fail(self, exchange: Exchange, error: ApiError, *, was_seen: bool) -> None:
        """Send it again later where that does no harm."""
        now = self._sweeper.now
        if exchange.event == DISCONNECT:
            self._line.departures.on_answer(exchange, now, taken=False)
        elif not (
            exchange.event == MESSAGE
            and (exchange.owner.retry_safe or not was_seen)
            and self._line.retry_later(exchange, now)
        ):
            self._line.fail(exchange, error)

    # The line.

    def _wait(self, exchange: Exchange, now: float) -> None:
        """Get in line, or be turned away."""
        if exchange.event == CONNECT and self._turns_away(now):
            self._line.turn_away(exchange, self._outage.cause)
            return
        self._line.append(exchange)
        if self._is_ending:
            self._loop.call_soon(self._line.give_up)
        elif self._pool.has_room or self._pool.free:  # else the next answer finds it
            self._pump(now)

    def _turns_away(self, now: float) -> bool:
        """Tell whether a connect cannot go; one may, to find out whether the API is back."""
        room = self._breaker.room(now)
        if self._breaker.is_proven:
            return False
        suspects = self._breaker.suspects
        return room <= self._pool.opening or self._line.has_trial(suspects, asks_all=False)

    def _pump(self, now: float) -> None:
        """Send what waits on the connections that are free, and open more for the rest."""
        if not self._queue and not self._leaving:
            return
        room = self._breaker.room(now)
        if not self._breaker.is_proven:
            self._try_out(room, now)
            return
        free = self._pool.free
        while room > 0 and free:
            exchange = self._line.next()
            if exchange is None:
                return
            self._breaker.admit()
            free.pop().send(exchange, now)
            room -= 1
        self._pool.open(min(room, self._line.ready))

    def _try_out(self, room: int, now: float) -> None:
        """Find out whether the API is back."""
        breaker, line, free = self._breaker, self._line, self._pool.free
        suspects, asks_all = breaker.suspects, breaker.asks_suspects(now)
        while room > 0 and free:
            exchange = line.next_trial(suspects, asks_all=asks_all)
            if exchange is None:
                return
            breaker.admit()
            free.pop().send(exchange, now)
            room -= 1
        if room > 0 and line.has_trial(suspects, asks_all=asks_all):
            self._pool.open(1)

    # Connections.

    def _keep(self, connection: ApiConnection, now: float) -> None:
        """Give a free connection to the next in line, or keep it, whatever the breaker says."""
        connection.sent_at = now
        self._pool.free.append(connection)
        self._pump(now)
        self._pool.trim()

    def _on_open(self, connection: ApiConnection) -> None:
        if self._outage.is_shown and self._line.is_empty:
            self._outage.hide()  # the next request tells the rest
        self._keep(connection, self._sweeper.now)
        connection.was_idle = connection.exchange is None

    def _on_dial_failed(self, error: Exception, began_at: float) -> None:
        breaker, pool, now = self._breaker, self._pool, self._sweeper.now
        cause = describe(error, pool.dial_timeout_s)
        if self._line.is_empty and self._outage.is_shown:
            self._outage.show(cause, now)  # this was a look only
            return
        # An API that is just coming back may want no more connections than it has.
        if not (pool.members and breaker.state != CLOSED and breaker.is_proven):
            self._learn_of_failure(began_at, None, cause)
        if not pool.members and not pool.opening:
            self._outage.may_begin(cause, now)
            self._outage.show(cause, now)
            self._line.turn_away_connects(cause)

    # The breaker.

    def _learn_of_success(self, exchange: Exchange, sent_at: float) -> None:
        if exchange.event == DISCONNECT and self._breaker.state == CLOSED:
            return  # who takes DELETEs may refuse messages all the same
        waits = bool(self._queue or self._leaving)
        self._breaker.on_success(self._sweeper.now, sent_at, something_waits=waits)
        self._follow_breaker("")

    def _learn_of_refusal(
        self, exchange: Exchange, sent_at: float, cause: str, retry_after_s: float = 0.0
    ) -> None:
        """Learn what befell one request; a DELETE's failure is no reason to ask less."""
        if exchange.event == DISCONNECT:
            self._breaker.on_old_news(self._sweeper.now, sent_at)
        else:
            self._learn_of_failure(sent_at, exchange.owner.client_id, cause, retry_after_s)

    def _learn_of_failure(
        self, sent_at: float, client: bytes | None, cause: str, retry_after_s: float = 0.0
    ) -> None:
        was_open = self._breaker.state == OPEN
        self._breaker.on_failure(self._sweeper.now, sent_at, client, retry_after_s)
        self._follow_breaker(cause)
        if self._breaker.state == OPEN and not was_open:
            self._line.turn_away_connects(cause)

    def _follow_breaker(self, cause: str) -> None:
        """Act on a change; `cause` is the last failure."""
        breaker = self._breaker
        self._is_doubtful = not breaker.is_calm
        self._slot[c.BREAKER_STATE] = breaker.state
        is_away = breaker.state != CLOSED
        if is_away and not self._is_away:
            self._pool.set_aside()
            self._slot[c.BREAKER_OPENED] += 1
            self._outage.begins(cause, self._sweeper.now)
        elif self._is_away and not is_away:
            self._pool.take_back()
        if is_away and cause:
            self._outage.show(cause, self._sweeper.now)
        self._is_away = is_away
        if not self._is_doubtful:
            self._outage.ends(self._sweeper.now)

    # Deadlines.

    def _on_tick(self, now: float) -> None:
        if now - self._ticked_at <= _STANDSTILL_S:
            self._expire_under_way(now)
            is_away = self._is_away or self._pool.is_cut_off
            self._line.expire(now, away_for=self._outage.cause if is_away else "")
        self._ticked_at = now
        self._line.on_tick(now, api_is_away=self._is_away)
        self._pool.close_old(now)
        self._pool.retire_old(now)
        self._pump(now)
        if self._is_away:
            self._breaker.room(now)  # so that the gauge shows when a pause is over
        self._slot[c.BREAKER_STATE] = self._breaker.state
        if self._outage.is_shown and self._line.is_empty:
            self._look_again(now)

    def _look_again(self, now: float) -> None:
        """Find out whether the API is still away when no request does."""
        silent_s = now - self._outage.heard_at
        if self._pool.is_cut_off:
            if silent_s >= _LOOK_EVERY_S:
                self._pool.open(1)
        elif silent_s >= _STALE_S:
            self._outage.hide()

    def _expire_under_way(self, now: float) -> None:
        for connection in self._pool.late(now - self._timeout_s):
            exchange, connection.exchange = connection.exchange, None
            assert exchange is not None
            connection.abort()
            if connection.settle(exchange):
                continue
            # An API that hangs must not look as fast as its last answer.
            took_us = (monotonic_ns() - connection.sent_ns) // 1000
            _LATENCIES[exchange.event].observe(self._slot, took_us)
            self._pool.discard(connection)
            self._breaker.on_nothing(connection.sent_at)
            error = ApiTimeout("the API did not answer in time")
            if exchange.event == DISCONNECT:
                self._retry_or_fail(exchange, error, was_seen=True)
            else:
                self._line.fail_soon(exchange, error)
