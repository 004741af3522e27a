"""Exchange bytes over a blocking socket, with a deadline on every read and write."""

from __future__ import annotations

import contextlib
import select
import socket
import struct

from .waiting import DEADLINE_S

RECEIVE_BYTES = 1 << 16


class Stream:
    """Read and write one connection; what was read too much waits for the next read.

    Args:
        sock: connected; the stream owns it.
        timeout_s: for each read and write; None waits for ever.
    """

    def __init__(self, sock: socket.socket, *, timeout_s: float | None = DEADLINE_S) -> None:
        sock.settimeout(timeout_s)
        self.socket = sock
        self._received = bytearray()

    @classmethod
    def open(cls, address: tuple[str, int], *, receive_buffer_bytes: int | None = None) -> Stream:
        """Connect over TCP; a small receive buffer makes a reader that falls behind soon."""
        sock = socket.socket()
        if receive_buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        sock.settimeout(DEADLINE_S)
        try:
            sock.connect(address)
        except OSError:
            sock.close()
            raise
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(sock)

    def write(self, data: bytes, *, chop: int | None = None) -> None:
        """Send it all, in one piece or in pieces of `chop` bytes."""
        for start in range(0, len(data), chop or max(1, len(data))):
            self.socket.sendall(data[start : start + (chop or len(data))])

    def read_exactly(self, size: int) -> bytes:
        """Return the next bytes; EOFError if the connection ends before them."""
        while len(self._received) < size:
            self._receive()
        return self._take(size)

    def read_through(self, separator: bytes) -> bytes:
        """Return the bytes up to and including the separator."""
        while (found := self._received.find(separator)) < 0:
            self._receive()
        return self._take(found + len(separator))

    def read_to_end(self) -> bytes:
        """Return all that comes before the connection ends, cleanly or not."""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                self._receive()
        return self._take(len(self._received))

    def is_silent(self) -> bool:
        """Tell whether nothing, not even an end, has arrived at this moment."""
        return not self._received and not select.select([self.socket], [], [], 0)[0]

    def close(self) -> None:
        """Close with a FIN."""
        self.socket.close()

    def reset(self) -> None:
        """Close with a RST."""
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _receive(self) -> None:
        data = self.socket.recv(RECEIVE_BYTES)
        if not data:
            raise EOFError(f"connection ended after {bytes(self._received[:200])!r}")
        self._received += data

    def _take(self, size: int) -> bytes:
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken
