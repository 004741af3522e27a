"""Open a TCP connection to a host by any of its addresses, staggered (RFC 8305).

The loop's own `create_connection` tries one address after the other, so that a first one that is
silent takes the whole time there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import ssl
from collections.abc import Callable
from typing import Any, Final

import aiohappyeyeballs

# Pause before the next address is tried as well (RFC 8305, 5).
_STAGGER_S: Final = 0.25
# An address that another was faster than is not the first to be tried for so long.
_SHUNNED_S: Final = 60.0

AddressInfo = tuple[Any, Any, int, str, Any]
"""What getaddrinfo tells of one address: family, type, protocol, name, address."""


class Destination:
    """Be a host and port that are connected to again and again.

    Args:
        host: name or IP address; a name is resolved for each connection.
        tls: context for TLS, which checks the certificate against the host; None for plain TCP.
    """

    __slots__ = ("_host", "_is_literal", "_port", "_shunned", "_tls", "_tls_name")

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._tls_name = host if tls else None
        self._is_literal = _is_literal(host)
        # Addresses that are not to be tried first, and until when.
        self._shunned: dict[Any, float] = {}

    async def connect(
        self, loop: asyncio.AbstractEventLoop, new_protocol: Callable[[], asyncio.Protocol]
    ) -> None:
        """Connect a protocol; the caller bounds the time.

        Raises:
            OSError: if no address can be connected to, with the cause if it is the same for all.
            ValueError: if the host is no name.
        """
        host, sock = self._host, None
        if not self._is_literal:
            found = await loop.getaddrinfo(host, self._port, type=socket.SOCK_STREAM)
            if len(found) == 1:
                host = _literal(found[0])  # cheaper than a race with one runner
            else:
                sock = await self._race(loop, found)
        if sock is None:
            await loop.create_connection(
                new_protocol, host, self._port, ssl=self._tls, server_hostname=self._tls_name
            )
            return
        try:
            await loop.create_connection(
                new_protocol, sock=sock, ssl=self._tls, server_hostname=self._tls_name
            )
        except BaseException:
            sock.close()
            raise

    async def reach(self, loop: asyncio.AbstractEventLoop) -> socket.socket | None:
        """Return a socket that is connected; None if there is but one address, to nobody yet.

        Raises:
            OSError: if no address can be connected to, with the cause if it is the same for all.
        """
        if self._is_literal:
            return None
        found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        return await self._race(loop, found) if len(found) > 1 else None

    async def _race(
        self, loop: asyncio.AbstractEventLoop, found: list[AddressInfo]
    ) -> socket.socket:
        """Return a socket that is connected to the first address that answers."""
        now = loop.time()
        self._shunned = {each: end for each, end in self._shunned.items() if end > now}
        found.sort(key=lambda info: info[4] in self._shunned)
        try:
            sock = await aiohappyeyeballs.start_connection(
                found, happy_eyeballs_delay=_STAGGER_S, interleave=1, loop=loop
            )
        except RuntimeError as error:  # uvloop's, of a socket that was reset just now
            raise OSError(str(error)) from error
        except OSError as error:
            if error.errno:
                raise OSError(error.errno, os.strerror(error.errno)) from error
            raise
        first = found[0][4]
        with contextlib.suppress(OSError):  # of one that was reset just now
            if sock.getpeername() != first:
                self._shunned[first] = now + _SHUNNED_S
        return sock


def _is_literal(host: str) -> bool:
    """Tell whether a host is an IP address, which nobody needs to be asked for."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _literal(found: AddressInfo) -> str:
    """Return an address as text."""
    family, _, _, _, address = found
    scope = address[3] if family == socket.AF_INET6 else 0
    return f"{address[0]}%{scope}" if scope and "%" not in address[0] else str(address[0])


def describe(error: Exception, timeout_s: float) -> str:
    """Say for people why a connection could not be opened, without the number of the error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, TimeoutError):
        return f"no connection within {timeout_s:g} s"
    return str(error) or type(error).__name__
