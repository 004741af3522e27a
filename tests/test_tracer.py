"""Trace what an upstream and a push port do, against an API on loopback."""

from __future__ import annotations

from typing import Any, cast

import pytest
import structlog
from harness.looping import in_loop
from harness.upstream import API_TIMEOUT_S, TICK_S, Gateway, gateway
from ws2api.gateway import outcomes
from ws2api.gateway.ask import Ask
from ws2api.gateway.counters import Counters
from ws2api.gateway.exchange import CONNECT, DISCONNECT, MESSAGE
from ws2api.gateway.line import Line
from ws2api.gateway.push import PushConnection, PushHub
from ws2api.gateway.sweeper import Sweeper
from ws2api.gateway.tracer import WorkerTracer
from ws2api.gateway.traces import EVERYBODY, Trace, Traces
from ws2api.gateway.upstream import Upstream

FOR_EVER_US = 1 << 62


class Traced:
    """Trace one gateway, for whom the test says.

    Args:
        route: answers pushes.
    """

    def __init__(self, gw: Gateway, *, logs_requests: bool = False) -> None:
        self.traces = Traces(1, 1)
        self._ring = self.traces.ring(0)
        self._seen = 0
        sweeper = Sweeper(cast(Any, gw.clock))
        self.hub = PushHub(
            slot=Counters(1).bank(0, 0),
            sweeper=sweeper,
            route=self._route,
            max_message_size=1000,
            token=None,
            totals=bytes,
            connections=set(),
        )
        self.tracer = WorkerTracer(
            self.traces, self._ring, gw.upstream, self.hub, sweeper, logs_requests=logs_requests
        )

    def _route(self, ask: Ask) -> None:
        ask.finish(outcomes.OK if ask.client_id == b"here" else outcomes.NOT_FOUND, b"")

    def watches(self, client_id: bytes = EVERYBODY) -> None:
        self.traces.watch(0, client_id, FOR_EVER_US)
        self.tracer.on_tick(0.0)

    def leaves(self) -> None:
        self.traces.leave(0)
        self.tracer.on_tick(0.0)

    def pushes(self, request: bytes) -> PushConnection:
        connection = self.tracer.new_push_connection()
        connection.connection_made(cast(Any, SilentTransport()))
        connection.data_received(request)
        return connection

    @property
    def new(self) -> list[Trace]:
        """What was traced since the last time."""
        payloads, self._seen, _ = self._ring.read(self._seen)
        return [Trace.decode(payload) for payload in payloads]


class SilentTransport:
    """Take what is written."""

    def write(self, data: bytes) -> None:
        pass

    def get_extra_info(self, _name: str) -> tuple[str, int]:
        return "192.0.2.7", 4000

    def pause_reading(self) -> None:
        pass

    def write_eof(self) -> None:
        pass

    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        pass


def summary(trace: Trace) -> tuple[object, ...]:
    return trace.kind, trace.method, trace.client_id, trace.status, trace.reason


def post(target: str) -> bytes:
    return f"POST {target} HTTP/1.1\r\nHost: p\r\nContent-Length: 2\r\n\r\nhi".encode()


@in_loop
async def test_costs_nothing_while_nobody_watches() -> None:
    async with gateway() as gw:
        traced = Traced(gw)
        line = vars(gw.upstream)["_line"]
        connection = traced.pushes(post("/here"))
        await gw.exchanges()
        for is_on in (False, True, False):
            (traced.watches if is_on else traced.leaves)()
            assert (type(gw.upstream) is Upstream) is not is_on
            assert (type(line) is Line) is not is_on
            assert (type(connection) is PushConnection) is not is_on
            assert (type(traced.pushes(post("/here"))) is PushConnection) is not is_on
            await gw.exchanges()
            assert len(traced.new) == 2 * is_on


@in_loop
async def test_notes_each_outcome_of_a_request_once() -> None:
    async with gateway() as gw:
        traced = Traced(gw)
        traced.watches()
        for submit, status, body, reason in (
            (gw.connects, 200, b"ok", ""),
            (gw.connects, 200, b"who?", "refused by the API"),
            (gw.connects, 401, b"", "refused by the API"),
            (gw.posts, 204, b"", ""),
            (gw.posts, 500, b"", "refused by the API"),
            (gw.reports, 201, b"", ""),
        ):
            sent = submit("ann")
            request = await gw.api.next()
            request.answers(status, body)
            await sent.is_answered(status, body)
            (trace,) = traced.new
            assert summary(trace) == ("request", request.method, "ann", status, reason)
            assert trace.took_us >= 0
            assert trace.reply_bytes == len(body)


@in_loop
async def test_notes_each_failed_attempt_once() -> None:
    async with gateway() as gw:
        traced = Traced(gw)
        traced.watches(b"ann")
        sent = gw.posts("ann", size_bytes=7)
        (await gw.api.next()).resets()
        await sent.error()
        (trace,) = traced.new
        assert (trace.status, trace.request_bytes) == (0, 7)
        assert trace.reason == "the API closed the connection"
        # An answer that cannot be used, be it for its syntax or for its body.
        for wire in (
            b"HTTP/1.1 abc\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 1\r\n\r\nx",
        ):
            sent = gw.posts("ann")
            (await gw.api.next()).sends(wire)
            await sent.error()
            (trace,) = traced.new
            assert "cannot be used" in trace.reason
        # Two attempts, because the API allows it.
        sent = gw.posts("ann", retry_safe=True)
        (await gw.api.next()).resets()
        while not (noted := traced.new):
            await gw.turns()
        assert [trace.status for trace in noted] == [0]
        request = await gw.tries_again()
        request.answers()
        await sent.is_answered()
        assert [trace.status for trace in traced.new] == [200]


@in_loop
async def test_notes_a_request_that_was_never_sent() -> None:
    async with gateway() as gw:
        await gw.loses_the_api()
        traced = Traced(gw)
        traced.watches()
        error = await gw.connects("ann").error()
        (trace,) = traced.new
        assert summary(trace) == ("request", "GET", "ann", 0, str(error))
        assert trace.took_us == -1


@pytest.mark.parametrize("event", [CONNECT, MESSAGE, DISCONNECT])
@in_loop
async def test_notes_an_answer_that_does_not_come_in_time(event: int) -> None:
    async with gateway() as gw:
        traced = Traced(gw)
        traced.watches()
        gw.submits(event, "ann")
        request = await gw.api.next()
        gw.advance(API_TIMEOUT_S + 2 * TICK_S)
        await request.is_given_up()
        (trace,) = traced.new
        assert summary(trace) == (
            *("request", request.method, "ann", 0),
            "the API did not answer in time",
        )


@in_loop
async def test_notes_pushes_and_what_was_wrong_with_them() -> None:
    async with gateway() as gw:
        traced = Traced(gw)
        traced.watches()
        for wire, expected in (
            (post("/here"), ("POST", "here", 200, "")),
            (post("/gone"), ("POST", "gone", 404, "no such client")),
            (b"GET /here HTTP/1.1\r\nHost: p\r\n\r\n", ("GET", "here", 200, "")),
            (b"DELETE /here HTTP/1.1\r\nHost: p\r\n\r\n", ("DELETE", "here", 200, "")),
            (b"HEAD /here HTTP/1.1\r\nHost: p\r\n\r\n", ("HEAD", "here", 405, "no such method")),
            (b"PUT /here HTTP/1.1\r\nHost: p\r\n\r\n", ("PUT", "here", 405, "method not allowed")),
            (b"POST /here HTTP/1.1\r\n\r\n", ("POST", "here", 400, "Host is missing")),
            (b"\x00\x01\r\n\r\n", ("?", "", 400, "malformed request")),
        ):
            traced.pushes(wire)
            (trace,) = traced.new
            assert trace.kind == "push"
            got = (trace.method, trace.client_id, trace.status)
            assert got == expected[:3]
            assert bool(trace.reason) == bool(expected[3]), trace


@in_loop
async def test_notes_nobody_else() -> None:
    async with gateway() as gw:
        traced = Traced(gw)
        traced.watches(b"ann")
        await gw.exchanges("bob")
        traced.pushes(post("/bob"))
        traced.tracer.refused(b"bob", 503, "too many connects")
        traced.tracer.refused(b"ann", 503, "too many connects")
        assert [summary(trace) for trace in traced.new] == [
            ("connect", "GET", "ann", 503, "too many connects")
        ]


@in_loop
async def test_logs_all_if_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway() as gw:
        with structlog.testing.capture_logs() as logs:
            traced = Traced(gw, logs_requests=True)
            await gw.exchanges("ann")
            traced.pushes(post("/bob"))
        assert [(line["event"], line["client"], line["status"]) for line in logs] == [
            ("API request", "ann", 200),
            ("push request", "bob", 404),
        ]
        assert logs[1]["reason"] == "no such client"
        assert traced.new == []  # nobody watches
