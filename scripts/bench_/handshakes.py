"""Open WebSockets: connect, send the handshake, and judge the answer."""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING, Final

from bench_ import board, frames
from bench_.plan import DIALLING, HEAD_BYTES, SHAKING, Plan
from bench_.sockets import dialler

if TYPE_CHECKING:
    from bench_.clients import Clients

_DIALLING_EVENTS: Final = select.EPOLLIN | select.EPOLLOUT


class Handshakes:
    """Bring clients in.

    Args:
        clients: the loop, which has those whose handshake is done.
        plan: says who connects, where from and where to.
    """

    def __init__(self, clients: Clients, plan: Plan) -> None:
        self.under_way = 0
        self._clients = clients
        self._paths = plan.paths
        self._numbers = iter(plan.numbers)
        self._dial = dialler(plan.target, plan.sources)
        self._parts: dict[int, bytes] = {}  # of a handshake or its answer, when it is not whole
        clients.handle(DIALLING, self._on_dialling)
        clients.handle(SHAKING, self._on_shaking)

    def begin(self) -> bool:
        """Begin the connect of the next client; False when there is no next one."""
        number = next(self._numbers, None)
        if number is None:
            return False
        clients = self._clients
        try:
            fd = self._dial()
        except OSError as error:  # no port is left, or no file
            clients.complain(f"connect failed: {error}", board.REFUSED)
            return True
        self.under_way += 1
        clients.since_ns[fd] = time.monotonic_ns()
        handshake = frames.upgrade(self._paths.format(number))
        try:
            os.write(fd, handshake)  # over loopback the connection is most often there already
        except BlockingIOError:
            self._parts[fd] = handshake
            clients.add(fd, DIALLING, _DIALLING_EVENTS)
        except OSError as error:
            self._refuse(fd, str(error))
        else:
            clients.add(fd, SHAKING)
        return True

    def _on_dialling(self, fd: int, events: int) -> None:
        try:
            os.write(fd, self._parts.pop(fd))
        except OSError as error:
            self._refuse(fd, str(error))
        else:
            self._clients.kinds[fd] = SHAKING
            self._clients.watch(fd, select.EPOLLIN)

    def _on_shaking(self, fd: int, events: int) -> None:
        try:
            data = os.read(fd, HEAD_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._refuse(fd, str(error))
            return
        head, end, rest = (self._parts.pop(fd, b"") + data).partition(b"\r\n\r\n")
        if not data:
            self._refuse(fd, f"end of file after {head!r}")
        elif not end:
            self._parts[fd] = head
        elif head.startswith(b"HTTP/1.1 101 ") and frames.ACCEPT in head:
            self.under_way -= 1
            clients = self._clients
            clients.note_latency(time.monotonic_ns() - clients.since_ns[fd], board.CONNECT_NS)
            clients.welcome(fd, rest)
        else:
            self._refuse(fd, f"{head[:80]!r} {rest[:80]!r}")

    def _refuse(self, fd: int, why: str) -> None:
        self.under_way -= 1
        self._parts.pop(fd, None)
        self._clients.complain(f"connect failed: {why}", board.REFUSED)
        self._clients.forget(fd)
