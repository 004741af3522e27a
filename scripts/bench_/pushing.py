"""Be the API that pushes: hear at connects who owns a client, and push over kept connections."""

from __future__ import annotations

import itertools
import os
import re
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Final

from bench_ import board
from bench_.clients import Clients, Traffic, clock
from bench_.plan import API_CONNECTION, API_LISTENER, HEAD_BYTES, PUSHER
from bench_.sockets import dialler

LOCAL, REMOTE, ADVERTISED = "local", "remote", "advertised"
_URL: Final = re.compile(rb"\r\nws2api-push-url: *http://[^/]+:(\d+)/", re.I)
_OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
_LOOPBACK: Final = "127.0.0.1"


class Api:
    """Answer ok to everything in the clients' own loop, and note the push URLs.

    Args:
        clients: the loop.
        listener: a socket that listens and does not block.
    """

    def __init__(self, clients: Clients, listener: socket.socket) -> None:
        self.owned: dict[int, list[bytes]] = defaultdict(list)
        """Port of a worker -> paths of its clients."""
        self.paths: list[bytes] = []
        self._clients = clients
        self._listener = listener
        self._parts: dict[int, bytes] = {}
        clients.handle(API_LISTENER, self._accept)
        clients.handle(API_CONNECTION, self._answer)
        clients.add(listener.fileno(), API_LISTENER)

    def _accept(self, fd: int, events: int) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            connection.setblocking(False)
            self._clients.add(connection.detach(), API_CONNECTION)

    def _answer(self, fd: int, events: int) -> None:
        try:
            data = os.read(fd, HEAD_BYTES)
        except OSError:
            data = b""
        if not data:
            self._clients.forget(fd)
            return
        data = self._parts.pop(fd, b"") + data
        if b"\r\n\r\n" not in data:
            self._parts[fd] = data
            return
        if data.startswith(b"GET "):
            path = data.split(b" ", 2)[1]
            self.paths.append(path)
            if url := _URL.search(data):
                self.owned[int(url[1])].append(path)
                self._clients.row[board.OWNERS] = len(self.owned)
        os.write(fd, _OK)


class Pushing(Traffic):
    """Push in a closed loop: each connection one push at a time, confirmed by 200.

    Args:
        clients: the loop.
        api: knows who owns whom.
        body: what is pushed.
    """

    def __init__(self, clients: Clients, api: Api, body: bytes) -> None:
        self._clients = clients
        self._api = api
        self._body = body
        self._running = False
        self._requests: dict[int, Callable[[], bytes]] = {}
        clients.handle(PUSHER, self._confirmed)

    def start(self, kind: str, in_flight: int, port: int) -> None:
        """Begin, over new connections.

        Args:
            kind: LOCAL pushes at one port to all clients; REMOTE at each worker's own port to the
                clients of the others; ADVERTISED at each worker's own port to its own clients.
            in_flight: connections.
            port: for LOCAL.
        """
        self._forget_all()
        self._running = True
        turns = self._turns(kind, port)
        for _, target in zip(range(in_flight), itertools.cycle(turns), strict=False):
            fd = dialler((_LOOPBACK, target), [_LOOPBACK])()
            os.set_blocking(fd, True)  # for the first write waits until it is connected
            self._clients.add(fd, PUSHER)
            self._requests[fd] = turns[target].__next__
            self._push(fd, clock())

    def stop(self) -> None:
        self._running = False

    def _turns(self, kind: str, port: int) -> dict[int, Iterator[bytes]]:
        owned = self._api.owned
        if kind == LOCAL:
            return {port: self._cycle(self._api.paths)}
        if kind == ADVERTISED:
            return {own: self._cycle(paths) for own, paths in owned.items()}
        return {
            own: self._cycle([path for other in owned if other != own for path in owned[other]])
            for own in owned
        }

    def _cycle(self, paths: list[bytes]) -> Iterator[bytes]:
        tail = b" HTTP/1.1\r\nHost: gateway\r\nContent-Type: text/plain\r\nContent-Length: "
        tail += b"%d\r\n\r\n" % len(self._body) + self._body
        return (b"POST " + path + tail for path in itertools.cycle(paths))

    def _push(self, fd: int, now: int) -> None:
        clients = self._clients
        clients.since_ns[fd] = now
        clients.sent += 1
        os.write(fd, self._requests[fd]())

    def _confirmed(self, fd: int, events: int) -> None:
        try:
            data = os.read(fd, HEAD_BYTES)
        except OSError as error:
            data = str(error).encode()
        clients = self._clients
        if clients.since_ns[fd] and not data.startswith(b"HTTP/1.1 200 "):
            clients.complain(f"push not confirmed: {data!r}")
        if not data:
            clients.forget(fd)
            return
        now = clock()
        clients.note_answer(fd, now)
        if self._running:
            self._push(fd, now)

    def _forget_all(self) -> None:
        for fd in self._requests:
            self._clients.forget(fd)
        self._requests.clear()
