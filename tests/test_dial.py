"""Connect to names with several addresses, of which some are silent or refuse."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from harness.looping import in_loop
from harness.names import ALIVE, NAME, REFUSING, SILENT, NamingLoop, silence
from ws2api.gateway.dial import Destination


class Connected(asyncio.Protocol):
    """Say which address it is connected to."""

    peer = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.peer = transport.get_extra_info("peername")[0]


@contextlib.asynccontextmanager
async def listening(address: str, port: int) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    async with await loop.create_server(asyncio.Protocol, address, port):
        yield


async def connect(loop: NamingLoop, destination: Destination) -> str:
    """Connect and hang up; return the address."""
    protocol = Connected()
    await destination.connect(cast(Any, loop), lambda: protocol)
    protocol.transport.abort()
    return protocol.peer


@in_loop
async def test_address_that_is_silent_does_not_hide_one_that_is_not() -> None:
    with silence() as port:
        async with listening(ALIVE, port):
            loop, destination = NamingLoop(SILENT, ALIVE), Destination(NAME, port, None)
            assert await connect(loop, destination) == ALIVE
            assert loop.tried == [SILENT, ALIVE]


@in_loop
async def test_address_that_was_silent_is_not_tried_first_again() -> None:
    with silence() as port:
        async with listening(ALIVE, port):
            loop, destination = NamingLoop(SILENT, ALIVE), Destination(NAME, port, None)
            for _ in range(3):
                assert await connect(loop, destination) == ALIVE
            assert loop.tried == [SILENT, ALIVE, ALIVE, ALIVE]
            assert loop.asked == 3


@in_loop
async def test_address_that_refuses_does_not_hide_one_that_does_not() -> None:
    with silence() as port:
        async with listening(ALIVE, port):
            loop, destination = NamingLoop(REFUSING, SILENT, ALIVE), Destination(NAME, port, None)
            assert await connect(loop, destination) == ALIVE


@in_loop
async def test_name_that_has_moved_is_followed() -> None:
    with silence() as port:
        async with listening(ALIVE, port), listening(REFUSING, port):
            loop, destination = NamingLoop(ALIVE), Destination(NAME, port, None)
            assert await connect(loop, destination) == ALIVE
            loop.addresses = (REFUSING,)
            assert await connect(loop, destination) == REFUSING
            assert not loop.tried, "a single address needs no race"


@pytest.mark.parametrize("addresses", [[REFUSING], [REFUSING, "127.0.0.5"]])
@in_loop
async def test_says_why_none_can_be_connected_to(addresses: list[str]) -> None:
    with silence() as port, pytest.raises(ConnectionRefusedError) as caught:
        await connect(NamingLoop(*addresses), Destination(NAME, port, None))
    assert caught.value.strerror == "Connection refused"


@pytest.mark.parametrize("host", [ALIVE, "::1"])
@in_loop
async def test_asks_nobody_about_an_address(host: str) -> None:
    loop = NamingLoop()
    with contextlib.suppress(OSError):  # there may be no IPv6
        async with await asyncio.get_running_loop().create_server(
            asyncio.Protocol, host, 0
        ) as server:
            port = server.sockets[0].getsockname()[1]
            assert await connect(loop, Destination(host, port, None)) == host
    assert not loop.asked
