"""Let names lead to addresses on loopback, and let some of these be silent."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

NAME = "api.example"
SILENT, ALIVE, REFUSING = "127.0.0.3", "127.0.0.1", "127.0.0.2"


class NamingLoop:
    """Be the loop, with addresses of the test's own for one name."""

    def __init__(self, *addresses: str) -> None:
        self._loop = asyncio.get_running_loop()
        self.addresses = addresses
        self.asked = 0
        """How often the name was resolved."""
        self.tried: list[str] = []
        """Addresses that were raced for, in their order."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    async def getaddrinfo(self, host: str, port: int, **options: Any) -> list[Any]:
        if host != NAME:
            return await self._loop.getaddrinfo(host, port, **options)
        self.asked += 1
        return [
            (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))
            for address in self.addresses
        ]

    async def sock_connect(self, sock: socket.socket, address: tuple[str, int]) -> None:
        self.tried.append(address[0])
        await self._loop.sock_connect(sock, address)


@contextlib.contextmanager
def silence(port: int = 0) -> Iterator[int]:
    """Give a port that answers no SYN at SILENT, because its backlog is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((SILENT, port))
        listener.listen(0)
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
