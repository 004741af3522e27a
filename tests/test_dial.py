"""Connect to names with several addresses, of which some are silent or refuse."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import pytest
from harness.looping import in_loop
from ws2api.gateway.dial import AddressInfo, Destination

NAME = "api.example"
SILENT, ALIVE, REFUSING = "127.0.0.1", "127.0.0.2", "127.0.0.3"


class Resolver:
    """Be the loop, with answers of the test's own to what it is asked about a name."""

    def __init__(self, *addresses: str) -> None:
        self._loop = asyncio.get_running_loop()
        self.addresses = addresses
        self.asked = 0
        self.connecting: list[str] = []
        """Addresses that were tried, in their order."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    async def getaddrinfo(self, host: str, port: int, **_: object) -> list[AddressInfo]:
        assert host == NAME
        self.asked += 1
        return [
            (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))
            for address in self.addresses
        ]

    async def sock_connect(self, sock: socket.socket, address: tuple[str, int]) -> None:
        self.connecting.append(address[0])
        await self._loop.sock_connect(sock, address)


class Connected(asyncio.Protocol):
    """Say which address it is connected to."""

    peer = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.peer = transport.get_extra_info("peername")[0]


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """Give a port that answers no SYN at SILENT: its backlog is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((SILENT, 0))
        listener.listen(0)
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@contextlib.asynccontextmanager
async def listening(address: str, port: int) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    async with await loop.create_server(asyncio.Protocol, address, port):
        yield


async def connect(loop: Resolver, destination: Destination) -> str:
    """Connect and hang up; return the address."""
    protocol = Connected()
    await destination.connect(cast(Any, loop), lambda: protocol)
    protocol.transport.abort()
    return protocol.peer


@in_loop
async def test_address_that_is_silent_does_not_hide_one_that_is_not() -> None:
    with silent_port() as port:
        async with listening(ALIVE, port):
            loop, destination = Resolver(SILENT, ALIVE), Destination(NAME, port, None)
            assert await connect(loop, destination) == ALIVE
            assert loop.connecting == [SILENT, ALIVE]


@in_loop
async def test_address_that_was_silent_is_not_tried_first_again() -> None:
    with silent_port() as port:
        async with listening(ALIVE, port):
            loop, destination = Resolver(SILENT, ALIVE), Destination(NAME, port, None)
            for _ in range(3):
                assert await connect(loop, destination) == ALIVE
            assert loop.connecting == [SILENT, ALIVE, ALIVE, ALIVE]
            assert loop.asked == 3


@in_loop
async def test_address_that_refuses_does_not_hide_one_that_does_not() -> None:
    with silent_port() as port:
        async with listening(ALIVE, port):
            loop, destination = Resolver(REFUSING, SILENT, ALIVE), Destination(NAME, port, None)
            assert await connect(loop, destination) == ALIVE


@in_loop
async def test_name_that_has_moved_is_followed() -> None:
    with silent_port() as port:
        async with listening(ALIVE, port), listening(REFUSING, port):
            loop, destination = Resolver(ALIVE), Destination(NAME, port, None)
            assert await connect(loop, destination) == ALIVE
            loop.addresses = (REFUSING,)
            assert await connect(loop, destination) == REFUSING
            assert not loop.connecting, "a single address needs no race"


@pytest.mark.parametrize("addresses", [[REFUSING], [REFUSING, "127.0.0.4"]])
@in_loop
async def test_says_why_none_can_be_connected_to(addresses: list[str]) -> None:
    with silent_port() as port, pytest.raises(ConnectionRefusedError) as caught:
        await connect(Resolver(*addresses), Destination(NAME, port, None))
    assert caught.value.strerror == "Connection refused"


@pytest.mark.parametrize("host", [SILENT, "::1"])
@in_loop
async def test_asks_nobody_about_an_address(host: str) -> None:
    loop = Resolver()
    with contextlib.suppress(OSError):  # there may be no IPv6
        async with await asyncio.get_running_loop().create_server(
            asyncio.Protocol, host, 0
        ) as server:
            port = server.sockets[0].getsockname()[1]
            assert await connect(loop, Destination(host, port, None)) == host
    assert not loop.asked
