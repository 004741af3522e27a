"""Trace requests and pushes while somebody wants to see them, at no cost while nobody does.

Nothing asks on the way of a message whether it is to be traced. While it is, the objects that know
the outcomes are of classes that note them first; otherwise they are of the plain classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final, cast

import structlog

from . import outcomes
from .api_connection import ApiConnection
from .envelope import CLOSE, DESCRIBE
from .envelope import PUSH as ASKS_PUSH
from .errors import ApiError
from .exchange import CONNECT, MESSAGE, Exchange
from .http_wire import ReplyReader
from .line import Line
from .push import PushConnection, PushHub, PushRequest
from .sweeper import Sweeper
from .traces import CONNECT as REFUSED
from .traces import EVERYBODY, NOBODY, PUSH, REQUEST, Trace, TraceRing, Traces
from .upstream import Upstream

_METHODS: Final = ("GET", "POST", "DELETE")
"""By event."""
_PUSH_METHODS: Final = {ASKS_PUSH: "POST", DESCRIBE: "GET", CLOSE: "DELETE"}
_TEXTS: Final = {REQUEST: "API request", PUSH: "push request", REFUSED: "connect request"}
_UNKNOWN_US: Final = -1

_log = structlog.get_logger()


class Tracer:
    """Log what is traced, and hand it to those who watch.

    Args:
        traces: says who watches what.
        ring: takes what they want to see.
        logs_requests: whether a line is logged for each request and push (--log-requests).
    """

    def __init__(self, traces: Traces, ring: TraceRing, *, logs_requests: bool) -> None:
        self._traces = traces
        self._ring = ring
        self._logs_requests = logs_requests
        self._ids = NOBODY
        self.is_on = logs_requests

    def look(self) -> bool:
        """See who watches what; tell whether anything is to be traced."""
        self._ids = self._traces.wanted(time.monotonic_ns() // 1000)
        self.is_on = self._logs_requests or bool(self._ids)
        return self.is_on

    def note(
        self,
        kind: str,
        method: str,
        client_id: bytes,
        status: int,
        *,
        took_us: int = _UNKNOWN_US,
        request_bytes: int = 0,
        reply_bytes: int = 0,
        reason: str = "",
    ) -> None:
        """Note what became of a request; see `Trace`. What it said is nobody's business."""
        client = client_id.decode("ascii")
        if self._logs_requests:
            _log.info(
                _TEXTS[kind],
                method=method,
                client=client,
                status=status or None,
                ms=None if took_us < 0 else took_us / 1000,
                request_bytes=request_bytes,
                reply_bytes=reply_bytes,
                **({"reason": reason} if reason else {}),
            )
        if EVERYBODY in self._ids or client_id in self._ids:
            trace = Trace(
                time.time(),
                kind,
                method,
                client,
                status,
                took_us,
                request_bytes,
                reply_bytes,
                reason,
            )
            self._ring.append(trace.encode())


class WorkerTracer(Tracer):
    """Trace what one worker does.

    Args:
        traces, ring, logs_requests: as for `Tracer`.
        upstream: the API.
        push_hub: the push port.
        sweeper: tells the time.
    """

    def __init__(
        self,
        traces: Traces,
        ring: TraceRing,
        upstream: Upstream,
        push_hub: PushHub,
        sweeper: Sweeper,
        *,
        logs_requests: bool,
    ) -> None:
        super().__init__(traces, ring, logs_requests=logs_requests)
        self._upstream = upstream
        self._push_hub = push_hub
        self._sweeper = sweeper
        self._is_followed = False
        self._noted: ApiError | None = None
        self._follow()

    def on_tick(self, _now: float) -> None:
        """Begin when somebody begins to watch, end when nobody does any more."""
        self.look()
        self._follow()

    def new_push_connection(self, *, shows_totals: bool = False) -> PushConnection:
        """Create a connection of the push port, traced or not."""
        connection = PushConnection(self._push_hub, shows_totals)
        self._follow_pushes([connection])
        return connection

    def refused(self, client_id: bytes, status: int, reason: str) -> None:
        """Note a connect that the gateway has refused by itself."""
        if self.is_on:
            self.note(REFUSED, "GET", client_id, status, reason=reason)

    def _follow(self) -> None:
        """Give those who know the outcomes the classes that note them, or the plain ones."""
        if self.is_on == self._is_followed:
            return
        self._is_followed = self.is_on
        self._upstream.__class__ = TracedUpstream
        cast(TracedUpstream, self._upstream).follow(self)
        if not self.is_on:
            self._upstream.__class__ = Upstream
        self._follow_pushes(self._push_hub.connections)

    def _follow_pushes(self, connections: Iterable[PushConnection]) -> None:
        for connection in connections:
            connection.__class__ = TracedPushConnection if self.is_on else PushConnection
            cast(TracedPushConnection, connection).tracer = self

    # What the traced classes tell.

    def on_reply(self, connection: ApiConnection, exchange: Exchange, reply: ReplyReader) -> None:
        """Note the answer to a request."""
        is_fine = reply.status in (200, 204)
        if exchange.event == CONNECT:
            is_fine = reply.status == 200 and reply.body == b"ok"
        elif exchange.event != MESSAGE:
            is_fine = 200 <= reply.status < 300
        self._note_request(
            exchange,
            reply.status,
            took_us=(time.monotonic_ns() - connection.sent_ns) // 1000,
            reply_bytes=len(reply.body),
            reason="" if is_fine else "refused by the API",
        )

    def on_failure(self, exchange: Exchange, error: ApiError) -> None:
        """Note a request that had no answer, unless it was noted when its last attempt failed."""
        if error is self._noted:
            return
        self._noted = error
        took_us = _UNKNOWN_US
        if exchange.attempts:  # by a coarse clock: the connection that knew better is gone
            took_us = max(0, int((self._sweeper.now - exchange.started) * 1e6))
        self._note_request(exchange, 0, took_us=took_us, reason=str(error))

    def _note_request(
        self, exchange: Exchange, status: int, *, took_us: int, reply_bytes: int = 0, reason: str
    ) -> None:
        body = exchange.wire.partition(b"\r\n\r\n")[2]
        self.note(
            REQUEST,
            _METHODS[exchange.event],
            exchange.owner.client_id,
            status,
            took_us=took_us,
            request_bytes=len(body),
            reply_bytes=reply_bytes,
            reason=reason,
        )

    def on_push(
        self, request: PushRequest, method: str, client_id: bytes, outcome: int, body: bytes
    ) -> None:
        """Note the answer to a request on the push port."""
        status, text, _ = outcomes.ANSWERS[outcome]
        is_fine = outcome == outcomes.OK
        self.note(
            PUSH,
            method,
            client_id,
            int(status[:3]),
            took_us=request.took_us,
            request_bytes=len(request.payload),
            reply_bytes=len(body or text),
            reason="" if is_fine else (body or text).decode().strip(),
        )


class TracedUpstream(Upstream):
    """Note each answer, and each attempt that had none."""

    tracer: WorkerTracer

    def follow(self, tracer: WorkerTracer) -> None:
        """Tell the tracer of everything, for as long as it is on."""
        self.tracer = tracer
        self._line.__class__ = TracedLine if tracer.is_on else Line
        cast(TracedLine, self._line).tracer = tracer

    def on_reply(self, connection: ApiConnection, exchange: Exchange, reply: ReplyReader) -> None:
        """Note the answer first."""
        self.tracer.on_reply(connection, exchange, reply)
        super().on_reply(connection, exchange, reply)

    def _retry_or_fail(self, exchange: Exchange, error: ApiError, *, was_seen: bool) -> None:
        self.tracer.on_failure(exchange, error)
        super()._retry_or_fail(exchange, error, was_seen=was_seen)


class TracedLine(Line):
    """Note each request that ends without an answer."""

    tracer: WorkerTracer

    def fail(self, exchange: Exchange, error: ApiError) -> None:
        """Note it first."""
        self.tracer.on_failure(exchange, error)
        super().fail(exchange, error)


class TracedPushConnection(PushConnection):
    """Note each answer on the push port."""

    tracer: WorkerTracer

    def encode_answer(self, request: PushRequest, outcome: int, body: bytes) -> bytes:
        """Note the outcome, too."""
        method = "HEAD" if request.wants_no_body else _PUSH_METHODS.get(request.kind, "")
        if not method:  # it was refused while it was read
            is_read = self._url and self._transport is not None
            method = self._parser.get_method().decode("ascii") if is_read else "?"
        client_id = request.client_id or self._meant_id()
        self.tracer.on_push(request, method, client_id, outcome, body)
        return super().encode_answer(request, outcome, body)
