"""Open TCP connections as bare, non-blocking file descriptors."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Sequence
from typing import Final

_BIND_ADDRESS_NO_PORT: Final = 24  # linux/in.h; Python has the name from 3.12 on


def dialler(target: tuple[str, int], sources: Sequence[str]) -> Callable[[], int]:
    """Return a function that begins a connection and returns its file descriptor.

    Args:
        target: where to.
        sources: addresses to connect from, in turns. The port is chosen at the connect and not at
            the bind, so that it need only be free towards the target.
    """
    take_source = itertools.cycle(sources).__next__

    def dial() -> int:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
        sock.bind((take_source(), 0))
        sock.connect_ex(target)  # what came of it shows at the first write or read
        return sock.detach()

    return dial
