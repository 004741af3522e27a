"""Open more connections to the admin port than there is room for."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing

from aiohttp import web
from harness.waiting import DEADLINE_S
from ws2api.supervisor.connection_limit import ConnectionLimit

MOST = 4
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Connection]]


class Gate(asyncio.Event):
    """Be an event that tells how many wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting = asyncio.Semaphore(0)

    async def wait_behind(self) -> None:
        self._waiting.release()
        await self.wait()

    async def until_waiting(self, count: int) -> None:
        for _ in range(count):
            await asyncio.wait_for(self._waiting.acquire(), DEADLINE_S)


@asynccontextmanager
async def limited(gate: Gate) -> AsyncIterator[Connect]:
    """Serve /, and /wait whose answer comes when the gate opens; yield what connects."""
    opened: list[Connection] = []

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def wait(_: web.Request) -> web.Response:
        await gate.wait_behind()
        return web.Response(text="ok")

    limit = ConnectionLimit(MOST)
    application = web.Application(middlewares=[limit.middleware])
    application.router.add_get("/", answer)
    application.router.add_get("/wait", wait)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        await runner.setup()
        assert runner.server is not None
        server = await limit.listen(runner.server, listener, 16)

        async def connect() -> Connection:
            opened.append(await asyncio.open_connection(*listener.getsockname()))
            return opened[-1]

        yield connect
        for _, writer in opened:
            writer.close()
        server.close()
        await runner.cleanup()


async def ask(connection: Connection, path: str = "/") -> bytes:
    """Return the status line; nothing from a connection that was dropped."""
    reader, writer = connection
    writer.write(f"GET {path} HTTP/1.1\r\nHost: gateway\r\n\r\n".encode())
    try:
        return await asyncio.wait_for(reader.readline(), DEADLINE_S)
    except ConnectionError:
        return b""


async def is_dropped(connection: Connection) -> bool:
    try:
        return await asyncio.wait_for(connection[0].read(1), DEADLINE_S) == b""
    except ConnectionError:
        return True


def test_drops_the_oldest_that_is_idle() -> None:
    async def run() -> None:
        async with limited(Gate()) as connect:
            idle = [await connect() for _ in range(MOST)]
            used = idle.pop()
            assert b"200" in await ask(used)
            for number in range(3 * MOST):
                late = await connect()
                assert b"200" in await ask(late), number
                if number < len(idle):
                    assert await is_dropped(idle[number])

    asyncio.run(run())


def test_keeps_those_whose_request_is_under_way() -> None:
    async def run() -> None:
        gate = Gate()
        async with limited(gate) as connect:
            first = await connect()
            answer = asyncio.create_task(ask(first, "/wait"))
            await gate.until_waiting(1)
            for _ in range(2 * MOST):
                assert b"200" in await ask(await connect())
            gate.set()
            assert b"200" in await answer

    asyncio.run(run())


def test_refuses_when_all_are_under_way() -> None:
    async def run() -> None:
        gate = Gate()
        async with limited(gate) as connect:
            waiting = [await connect() for _ in range(MOST)]
            answers = [asyncio.create_task(ask(each, "/wait")) for each in waiting]
            await gate.until_waiting(MOST)
            assert await is_dropped(await connect())
            gate.set()
            assert all(b"200" in line for line in await asyncio.gather(*answers))
            assert b"200" in await ask(await connect())

    asyncio.run(run())


def test_those_that_have_just_been_closed_take_no_room() -> None:
    async def run() -> None:
        async with limited(Gate()) as connect:
            for _ in range(20):
                idle = [await connect() for _ in range(MOST)]
                assert b"200" in await ask(idle[-1])
                for _, writer in idle:
                    writer.close()
                assert b"200" in await ask(await connect())

    asyncio.run(run())
