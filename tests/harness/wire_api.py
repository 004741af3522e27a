"""Play an API that notes the very bytes it got, so that nothing a parser forgives goes unseen."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

from .stream import RECEIVE_BYTES
from .waiting import DEADLINE_S, until

OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
NOTHING: Final = b"HTTP/1.1 204 No Content\r\n\r\n"

_LENGTH = re.compile(rb"\r\nContent-Length: (\d+)\r\n")
_END: Final = b"\r\n\r\n"


class WireApi:
    """Serve HTTP on a loopback port and keep each request as it came: head, empty line and body.

    A request ends where its Content-Length says, and where the head ends if it has none. Whatever
    comes after that is the next request, so what is smuggled behind one shows up as another.
    """

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        """All requests so far, in the order of their arrival."""
        self.unfinished: list[bytes] = []
        """What was left when a connection ended in the middle of a request."""
        self._answers: dict[bytes, bytes] = {}
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    @property
    def host(self) -> bytes:
        """What the Host header of each request must say."""
        return b"127.0.0.1:%d" % self.port

    def __enter__(self) -> WireApi:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            sockets = list(self._sockets)
        for connection in sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), f"{thread.name} does not end"
        self._listener.close()

    def answer(self, start: bytes, wire: bytes) -> None:
        """Answer requests that begin so with these very bytes, instead of an ok or a 204."""
        self._answers[start] = wire

    def await_requests(self, marker: bytes, count: int) -> list[bytes]:
        """Wait for so many requests that hold a marker, and return them."""

        def find() -> list[bytes]:
            return [request for request in self.requests if marker in request]

        until(lambda: len(find()) >= count, what=f"{count} × {marker!r} in {self.requests[-3:]}")
        return find()

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, name="wire api")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was shut down
            while True:
                connection, _ = self._listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self._sockets.append(connection)
                self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        received = bytearray()
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(RECEIVE_BYTES):
                received += data
                while request := _take_request(received):
                    self.requests.append(request)
                    connection.sendall(self._answer_to(request))
        if received:
            self.unfinished.append(bytes(received))

    def _answer_to(self, request: bytes) -> bytes:
        for start, wire in self._answers.items():
            if request.startswith(start):
                return wire
        return NOTHING if request.startswith(b"POST ") else OK


def _take_request(received: bytearray) -> bytes:
    """Cut the first request off, if it is whole."""
    head, end, _ = bytes(received).partition(_END)
    found = _LENGTH.search(head + b"\r\n")
    size = len(head) + len(_END) + (int(found[1]) if found else 0)
    if not end or len(received) < size:
        return b""
    request = bytes(received[:size])
    del received[:size]
    return request
