"""Ask the kernel what has arrived, of bytes that were written to a connection."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from harness.waiting import until
from ws2api.gateway.tcp_progress import TcpProgress, progress


class Transport:
    """Be what owns a socket."""

    def __init__(self, sock: object) -> None:
        self._sock = sock

    def get_extra_info(self, name: str) -> Any:
        assert name == "socket"
        return self._sock


def known(sock: socket.socket) -> TcpProgress:
    found = progress(Transport(sock))
    assert found is not None
    return found


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        here = stack.enter_context(socket.create_connection(listener.getsockname()))
        there = stack.enter_context(listener.accept()[0])
        here.sendall(b"x" * 100)
        there.recv(100, socket.MSG_WAITALL)
        there.sendall(b"y")
        here.recv(1)
        yield here, there


def test_all_has_arrived(ends: tuple[socket.socket, socket.socket]) -> None:
    here, there = ends
    until(lambda: known(here)[:2] == (100, -1))
    here.sendall(b"z" * 50)
    there.close()  # resets, because it has not read
    until(lambda: known(here).taken == 150)


def test_what_came_after_the_end_has_not_arrived(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    here, there = ends
    there.close()
    here.sendall(b"z" * 50)
    assert here.recv(1) == b""
    assert known(here)[:2] == (150, 49)


def test_what_came_before_the_end_has_arrived(ends: tuple[socket.socket, socket.socket]) -> None:
    here, there = ends
    here.sendall(b"z" * 50)
    there.recv(50, socket.MSG_WAITALL)
    there.close()
    assert here.recv(1) == b""
    assert known(here)[:2] == (150, -1)


def test_nothing_is_known_of_what_is_no_tcp_connection() -> None:
    here, there = socket.socketpair()
    with here, there:
        assert progress(Transport(here)) is None
    assert progress(Transport(None)) is None
