"""Connect as libraries do, to names with several addresses."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from harness.certificates import make_certificate
from harness.names import ALIVE, NAME, REFUSING, SILENT, silence
from ws2api.gateway.settings import load
from ws2api.supervisor.api_check import find_fault
from ws2api.supervisor.loop import Loop


class NamingLoop(Loop):
    """Know addresses of the test's own for one name, of which the first is silent."""

    addresses = (SILENT, ALIVE)

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> list[Any]:
        if host != NAME:
            return await super().getaddrinfo(host, port, **options)
        return [
            (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))
            for address in self.addresses
        ]


def run(coroutine: Coroutine[Any, Any, str]) -> str:
    with asyncio.Runner(loop_factory=NamingLoop) as runner:
        return runner.run(coroutine)


async def peer(host: str, port: int) -> str:
    """Connect and hang up; return the address."""
    _, writer = await asyncio.open_connection(host, port)
    name: str = writer.get_extra_info("peername")[0]
    writer.transport.abort()
    return name


async def listen(port: int, tls: Any = None) -> asyncio.AbstractServer:
    loop = asyncio.get_running_loop()
    return await loop.create_server(asyncio.Protocol, ALIVE, port, ssl=tls)


@pytest.mark.parametrize("host", [NAME, "localhost", ALIVE])
def test_connects_to_an_address_that_is_not_silent(host: str) -> None:
    async def connect(port: int) -> str:
        async with await listen(port):
            return await peer(host, port)

    with silence() as port:
        assert run(connect(port)) == ALIVE


def test_says_why_no_address_can_be_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NamingLoop, "addresses", (REFUSING, "127.0.0.5"))
    with silence() as port, pytest.raises(ConnectionRefusedError):
        run(peer(NAME, port))


def test_certificate_has_to_be_of_the_name(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path, "other")

    async def look(port: int) -> str:
        async with await listen(port, certificate.server_context()):
            return await find_fault(load(["--api", f"https://{NAME}:{port}/", *options]))

    options = ["--api-ca", str(certificate.certificate)]
    with silence() as port:
        assert f"its certificate is for another name than {NAME}" in run(look(port))


def test_api_is_seen_behind_an_address_that_is_silent() -> None:
    async def look(port: int) -> str:
        async with await listen(port):
            return await find_fault(load(["--api", f"http://{NAME}:{port}/"]))

    with silence() as port:
        assert run(look(port)) == ""
