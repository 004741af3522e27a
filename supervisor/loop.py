"""Be the event loop of a process whose libraries connect by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import uvloop
from ws2api.gateway.dial import Destination


class Loop(uvloop.Loop):
    """Do as uvloop does, but try all addresses of a name, staggered (RFC 8305).

    Else an address that is silent takes all the time that redis-py has for connecting, every time.
    """

    async def create_connection(
        self,
        protocol_factory: Callable[[], Any],
        host: Any = None,
        port: Any = None,
        **options: Any,
    ) -> tuple[Any, Any]:
        """Connect a protocol, as asyncio's loops do."""
        sock = None
        if host is not None and port is not None:
            sock = await Destination(host, port, None).reach(self)
        if sock is None:
            return await super().create_connection(protocol_factory, host, port, **options)
        if options.get("ssl"):
            options["server_hostname"] = options.get("server_hostname") or host
        try:
            return await super().create_connection(protocol_factory, sock=sock, **options)
        except BaseException:
            sock.close()
            raise
