"""Stand between two processes and fail on command: delay, drop, cut, reset, freeze, refuse."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Final

from .fault_link import NO_LINGER, Cut, Direction, End, Faults, Link, Upstream
from .loop_thread import LoopThread

__all__ = ["Direction", "FaultProxy"]

BACKLOG: Final = 4096


class FaultProxy:
    """Forward TCP connections on a loopback port to an upstream, until told to do worse.

    Faults add up; `restore` ends them all. Every command has taken effect when it returns.

    Args:
        upstream: host and port, or the path of a Unix socket.
    """

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.faults = Faults()
        self.connections_accepted = 0
        self.bytes_to_upstream = 0
        self.bytes_to_client = 0
        self.connections_cut = 0
        """Connections that a fault has ended."""
        self._links: set[Link] = set()
        self._is_listening = False
        with socket.socket() as probe:  # only a port that was bound by number outlives `refuse`
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self.port))
        self._listener.setblocking(False)
        self._thread = LoopThread("fault proxy")
        self.loop: asyncio.AbstractEventLoop = self._thread.loop
        self._thread.call(self._listen)

    def __repr__(self) -> str:
        return (
            f"<FaultProxy {self.port} → {self.upstream} links={len(self._links)}"
            f" listening={self._is_listening} {self.faults}>"
        )

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def address(self) -> tuple[str, int]:
        """Where the proxy listens."""
        return "127.0.0.1", self.port

    @property
    def connections_open(self) -> int:
        """Count the connections that are not over at both ends."""
        return len(self._links)

    @property
    def swallowed_links(self) -> int:
        """Count the connections that have lost bytes to `drop`."""
        return sum(link.has_swallowed for link in list(self._links))

    # Faults.

    def delay(self, delay_s: float, direction: Direction = Direction.BOTH) -> None:
        """Hold bytes, and ends, for a time; 0 ends that for what comes from now on."""

        def set_delay() -> None:
            for each in Direction:
                if each & direction:
                    self.faults.delays_s[each] = delay_s

        self._thread.call(set_delay)

    def drop(self, direction: Direction = Direction.BOTH) -> None:
        """Accept and read, and pass nothing on.

        A connection that has lost bytes this way is reset by `restore`: TCP lost none, so nobody
        would send them again.
        """
        self._thread.call(setattr, self.faults, "dropped", direction)

    def truncate(self, size: int, *, count: int | None = 1) -> None:
        """End the next answers with a FIN after `size` bytes of them.

        Args:
            count: how many connections; None for every one until `restore`.
        """
        self._arm(Cut(Direction.TO_CLIENT, size, End.FIN, count))

    def reset_after(
        self, size: int, direction: Direction = Direction.TO_CLIENT, *, count: int | None = 1
    ) -> None:
        """Reset both ends of the next connections that have carried `size` bytes from now on.

        With 0 nothing of the first bytes is passed on. In the direction of the client that is
        an upstream that has taken a request, but whose answer never arrives.
        """
        self._arm(Cut(direction, size, End.RST, count))

    def reset_next(self, count: int = 1) -> None:
        """Reset the next connections as soon as they are accepted."""
        self._thread.call(setattr, self.faults, "resets_at_accept", count)

    def reset(self) -> None:
        """Reset every connection that is open now."""
        self._thread.call(self._reset_all)

    def freeze(self, direction: Direction = Direction.BOTH) -> None:
        """Keep every connection open and pass nothing on, neither bytes nor ends."""
        self._thread.call(self._set_frozen, direction)

    def thaw(self) -> None:
        """Pass on what was held, and go on."""
        self._thread.call(self._set_frozen, Direction(0))

    def refuse(self) -> None:
        """Refuse new connections; the port stays reserved, and open connections are left alone."""
        self._thread.call(self._stop_listening)

    def restore(self) -> None:
        """End every fault."""
        self._thread.call(self._restore)

    def close(self) -> None:
        """End every connection and stop."""
        if self.loop.is_closed():
            return
        self._thread.run(self._close())
        self._thread.close()
        self._listener.close()

    # In the loop's thread.

    def count_bytes(self, direction: Direction, size: int) -> None:
        """Add to the bytes that were passed on."""
        if direction is Direction.TO_UPSTREAM:
            self.bytes_to_upstream += size
        else:
            self.bytes_to_client += size

    def forget(self, link: Link) -> None:
        """Drop a link that is over."""
        self._links.discard(link)

    def _arm(self, cut: Cut) -> None:
        self._thread.call(self.faults.cuts.append, cut)

    def _set_frozen(self, direction: Direction) -> None:
        self.faults.frozen = direction
        for link in list(self._links):
            link.pump()

    def _restore(self) -> None:
        self.faults = Faults()
        for link in list(self._links):
            link.renew()
        if not self._is_listening:
            self._listen()

    def _reset_all(self) -> None:
        self.connections_cut += len(self._links)
        for link in list(self._links):
            link.reset()

    def _listen(self) -> None:
        self._listener.listen(BACKLOG)
        self.loop.add_reader(self._listener, self._accept)
        self._is_listening = True

    def _stop_listening(self) -> None:
        if self._is_listening:
            self.loop.remove_reader(self._listener)
            self._listener.shutdown(socket.SHUT_RDWR)
            self._is_listening = False

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            while True:
                sock, _ = self._listener.accept()
                self.connections_accepted += 1
                if self.faults.resets_at_accept:
                    self.faults.resets_at_accept -= 1
                    self.connections_cut += 1
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
                    sock.close()
                    continue
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._links.add(Link(self, sock))

    async def _close(self) -> None:
        self._stop_listening()
        self.faults = Faults()
        while self._links:
            self._reset_all()
            await asyncio.sleep(0.001)
