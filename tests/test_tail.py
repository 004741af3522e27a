"""Stream traces over an admin port in this process, to viewers of every kind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from harness.waiting import DEADLINE_S
from ws2api.gateway.traces import EVERYBODY, MOST_VIEWERS, NOBODY, REQUEST, Trace, Traces
from ws2api.supervisor import tail
from ws2api.supervisor.errors import RequestError
from ws2api.supervisor.tail import Tail

Client = TestClient[web.Request, web.Application]


def run(traces: Traces, use: Callable[[Client], Awaitable[None]]) -> None:
    """Serve the traces at /ID, of all clients at /-, as long as they are used."""
    tails = Tail(traces)

    async def show(request: web.Request) -> web.StreamResponse:
        name = request.match_info["id"]
        try:
            return await tails.stream(request, EVERYBODY if name == "-" else name.encode())
        except RequestError as error:
            return web.Response(status=error.status)

    async def serve() -> None:
        application = web.Application()
        application.router.add_get("/{id}", show)
        # The server notices that a viewer has gone, as the real admin port does.
        async with TestClient(TestServer(application, handler_cancellation=True)) as client:
            async with asyncio.timeout(4 * DEADLINE_S):
                await use(client)

    asyncio.run(serve())


@pytest.fixture
def traces() -> Traces:
    return Traces(2, 2)


def trace(client_id: str, time_s: float) -> bytes:
    return Trace(time_s, REQUEST, "POST", client_id, 0, -1, 3, 0, "").encode()


async def read_line(answer: Any) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(await answer.content.readline())
    return line


def now_us() -> int:
    return time.monotonic_ns() // 1000


def test_shows_all_processes_in_the_order_of_time(traces: Traces) -> None:
    traces.ring(0).append(trace("before", 0.5))

    async def use(client: Client) -> None:
        async with client.get("/-") as answer:
            assert traces.wanted(now_us()) == {EVERYBODY}
            traces.ring(1, 1).append(trace("second", 2.5))
            traces.ring(0).append(trace("first", 1.5))
            traces.ring(None).append(trace("third", 3.5))
            lines = [await read_line(answer) for _ in range(3)]
        assert [(line["client"], line["worker"]) for line in lines] == [
            ("first", 0),
            ("second", 1),
            ("third", None),
        ]
        assert (lines[0]["status"], lines[0]["ms"], lines[0]["reason"]) == (None, None, None)

    run(traces, use)


def test_shows_no_other_client(traces: Traces) -> None:
    async def use(client: Client) -> None:
        async with client.get("/bob") as answer:
            ring = traces.ring(0)
            for name in ("ann", "bobby", "bob"):
                ring.append(trace(name, 1.5))
            assert (await read_line(answer))["client"] == "bob"

    run(traces, use)


def test_tells_how_many_were_lost(traces: Traces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ws2api.gateway.traces.RECORDS", 4)

    async def use(client: Client) -> None:
        async with client.get("/-") as answer:
            for number in range(10):  # at once: nobody reads meanwhile
                traces.ring(1).append(trace(f"c{number}", 1.5))
            assert await read_line(answer) == {"lost": 6, "worker": 1}
            assert (await read_line(answer))["client"] == "c6"

    run(traces, use)


def test_sends_an_empty_line_now_and_then(traces: Traces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "KEEPALIVE_S", 0.1)

    async def use(client: Client) -> None:
        async with client.get("/-") as answer:
            assert await answer.content.readline() == b"\n"

    run(traces, use)


def test_has_places_for_some_and_for_others_when_they_leave(traces: Traces) -> None:
    async def use(client: Client) -> None:
        async with contextlib.AsyncExitStack() as viewers:
            for _ in range(MOST_VIEWERS):
                answer = await viewers.enter_async_context(client.get("/ann"))
                assert answer.status == 200
            async with client.get("/bob") as late:
                assert late.status == 503
            assert traces.wanted(now_us()) == {b"ann"}
        while traces.wanted(now_us()) != NOBODY:
            await asyncio.sleep(0.01)
        async with client.get("/bob") as late:
            assert late.status == 200

    run(traces, use)


def test_keeps_its_place(traces: Traces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "LEASE_S", 0.5)

    async def use(client: Client) -> None:
        async with client.get("/ann"):
            began_us = now_us()
            # Beyond the end of a lease that was never renewed.
            while traces.wanted(began_us + 600_000) != {b"ann"}:
                await asyncio.sleep(0.01)

    run(traces, use)


def test_cuts_off_a_viewer_that_does_not_read(
    traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "_WRITE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(tail, "_POLL_S", 0.0)

    async def use(client: Client) -> None:
        _, writer = await asyncio.open_connection(client.host, client.port, limit=1)
        writer.write(b"GET /- HTTP/1.1\r\nHost: gateway\r\n\r\n")
        while traces.wanted(now_us()) == NOBODY:
            await asyncio.sleep(0.01)
        while traces.wanted(now_us()) != NOBODY:
            for _ in range(500):
                traces.ring(0).append(
                    Trace(1.5, REQUEST, "POST", "a", 0, -1, 3, 0, "x" * 400).encode()
                )
            await asyncio.sleep(0.01)
        writer.close()

    run(traces, use)
