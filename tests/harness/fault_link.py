"""Join two sockets, and let what passes between them suffer what it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, cast

MAX_HELD_BYTES: Final = 1 << 20
"""Bytes per direction that a delay may hold; more wait in the kernel, as in any network."""

NO_LINGER: Final = struct.pack("ii", 1, 0)
"""Value of SO_LINGER with which closing a socket sends a RST."""

Upstream = tuple[str, int] | Path
"""Host and port, or the path of a Unix socket."""


class Direction(enum.Flag):
    """Say which bytes a fault concerns, by where they go."""

    TO_UPSTREAM = enum.auto()
    TO_CLIENT = enum.auto()
    BOTH = TO_UPSTREAM | TO_CLIENT


class End(enum.Enum):
    """Name the ways in which a stream of bytes ends."""

    FIN = enum.auto()
    RST = enum.auto()


@dataclass
class Cut:
    """End the next connections that carry bytes in a direction."""

    direction: Direction
    size: int
    end: End
    left: int | None
    """How many connections; None for all until the proxy is restored."""


@dataclass
class Faults:
    """Hold what is wrong with the network at this moment."""

    delays_s: dict[Direction, float] = field(default_factory=dict)
    dropped: Direction = field(default=Direction(0))
    frozen: Direction = field(default=Direction(0))
    cuts: list[Cut] = field(default_factory=list)
    resets_at_accept: int = 0

    def take_cut(self, direction: Direction) -> Cut | None:
        for cut in self.cuts:
            if cut.direction & direction and cut.left != 0:
                if cut.left is not None:
                    cut.left -= 1
                return cut
        return None


class Network(Protocol):
    """Be what the links of one proxy share."""

    upstream: Upstream
    faults: Faults
    loop: asyncio.AbstractEventLoop
    connections_cut: int

    def count_bytes(self, direction: Direction, size: int) -> None:
        """Add to the bytes that were passed on."""

    def forget(self, link: Link) -> None:
        """Drop a link that is over."""


class _Pipe:
    """Carry what one end of a link sends to the other end, in order, and then its end."""

    def __init__(self, link: Link, direction: Direction) -> None:
        self._link = link
        self._proxy = link.proxy
        self._direction = direction
        self.source: asyncio.Transport | None = None
        # None before the connection is made and after it has ended.
        self.sink: asyncio.Transport | None = None
        self._held: deque[tuple[float, bytes | End]] = deque()
        self._held_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._is_blocked = False
        self.is_over = False
        """True once the source has ended, or what it sends is to go nowhere."""
        # None until the first byte has asked for a cut, then bytes to go before it.
        self._cut: tuple[int, End] | None = None
        self._may_be_cut = True
        self.has_ended = False
        """True when the sink has been told of the end, or is gone itself."""
        self.has_swallowed = False
        """True when bytes were dropped, so that the connection makes no sense any more."""

    def feed(self, data: bytes) -> None:
        """Take bytes of the source."""
        if self.is_over:
            return
        if self._proxy.faults.dropped & self._direction:
            self.has_swallowed = True
            return
        if self._cut is None and self._may_be_cut:
            cut = self._proxy.faults.take_cut(self._direction)
            self._cut = (cut.size, cut.end) if cut else None
        if self._cut is None:
            self._hold(data)
            return
        left, end = self._cut
        self._cut = (left - len(data), end)
        if data[:left]:
            self._hold(data[:left])
        if len(data) >= left:
            self._may_be_cut = False
            self._proxy.connections_cut += 1
            self.feed_end(end)
            _reset(self.source)

    def feed_end(self, end: End) -> None:
        """Take the end of the source; only the first one counts."""
        if not self.is_over:
            self.is_over = True
            self._hold(end)
            self._link.close_if_over()

    def cut_off(self) -> None:
        """Learn that the sink is gone."""
        self.sink = None
        self.is_over = self.has_ended = True
        self._held.clear()
        self._held_bytes = 0
        self.stop()

    def set_blocked(self, blocked: bool) -> None:
        """Follow the sink's write buffer."""
        self._is_blocked = blocked
        self.pump()

    def pump(self) -> None:
        """Pass on what is due, and read on if there is room."""
        while self._held and not self._is_blocked and not self._is_frozen and self.sink is not None:
            due, item = self._held[0]
            wait_s = due - time.monotonic()
            if wait_s > 0:
                self._wake_after(wait_s)
                break
            self._held.popleft()
            self._pass_on(item)
        self._regulate()

    def forget_cut(self) -> None:
        """Do not end where it was planned, if that point has not come."""
        self._cut = None

    def stop(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def _is_frozen(self) -> bool:
        return bool(self._proxy.faults.frozen & self._direction)

    def _hold(self, item: bytes | End) -> None:
        delay_s = self._proxy.faults.delays_s.get(self._direction, 0.0)
        due = time.monotonic() + delay_s
        if self._held:  # a delay that was taken back must not make bytes overtake each other
            due = max(due, self._held[-1][0])
        self._held.append((due, item))
        if isinstance(item, bytes):
            self._held_bytes += len(item)
        self.pump()

    def _pass_on(self, item: bytes | End) -> None:
        assert self.sink is not None
        if isinstance(item, bytes):
            self._held_bytes -= len(item)
            self._proxy.count_bytes(self._direction, len(item))
            self.sink.write(item)
        elif item is End.FIN:
            self.has_ended = True
            if self.sink.can_write_eof() and not self.sink.is_closing():
                self.sink.write_eof()
            self._link.close_if_over()
        else:
            self.has_ended = True
            self._link.reset()

    def _wake_after(self, delay_s: float) -> None:
        if self._timer is None:
            self._timer = self._proxy.loop.call_later(delay_s, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self.pump()

    def _regulate(self) -> None:
        source = self.source
        if source is None or source.is_closing():
            return
        has_room = self._held_bytes <= MAX_HELD_BYTES and not self._is_blocked
        is_wanted = self.sink is not None or self.is_over or self.has_swallowed
        if has_room and not self._is_frozen and is_wanted:
            source.resume_reading()
        else:
            source.pause_reading()


class _Side(asyncio.Protocol):
    """Be one of the two sockets of a link.

    Args:
        inbound: takes what this socket receives.
        outbound: writes to this socket.
    """

    def __init__(self, link: Link, inbound: _Pipe, outbound: _Pipe) -> None:
        self._link = link
        self._inbound = inbound
        self._outbound = outbound
        self.transport: asyncio.Transport | None = None
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=0)  # an end must not overtake what is buffered
        self._inbound.source = self._outbound.sink = self.transport
        self._outbound.pump()
        self._inbound.pump()

    def data_received(self, data: bytes) -> None:
        self._inbound.feed(bytes(data))

    def eof_received(self) -> bool:
        self._inbound.feed_end(End.FIN)
        return True

    def pause_writing(self) -> None:
        self._outbound.set_blocked(True)

    def resume_writing(self) -> None:
        self._outbound.set_blocked(False)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = self._inbound.source = None
        self.is_lost = True
        self._outbound.cut_off()
        self._inbound.feed_end(End.RST if exc else End.FIN)
        self._link.on_lost()


class Link:
    """Join a connection of a client with one to the upstream."""

    def __init__(self, proxy: Network, sock: socket.socket) -> None:
        self.proxy = proxy
        self._up = _Pipe(self, Direction.TO_UPSTREAM)
        self._down = _Pipe(self, Direction.TO_CLIENT)
        self._client = _Side(self, self._up, self._down)
        self._upstream = _Side(self, self._down, self._up)
        self._socket = sock
        self._is_doomed = False
        self._opening = proxy.loop.create_task(self._open())
        self._opening.add_done_callback(self._on_opened)

    @property
    def has_swallowed(self) -> bool:
        """Whether bytes of either direction were dropped."""
        return self._up.has_swallowed or self._down.has_swallowed

    async def _open(self) -> None:
        loop = self.proxy.loop
        await loop.connect_accepted_socket(lambda: self._client, self._socket)
        if self._is_doomed:
            return
        if self.proxy.faults.dropped & Direction.TO_UPSTREAM:
            self._up.has_swallowed = True  # the upstream is not to hear of it at all
            self._up.pump()
            return
        upstream = self.proxy.upstream
        try:
            if isinstance(upstream, Path):
                await loop.create_unix_connection(lambda: self._upstream, str(upstream))
            else:
                await loop.create_connection(lambda: self._upstream, *upstream)
        except OSError:  # it is away; a connection that was accepted for it can only be reset
            self._down.feed_end(End.RST)

    def _on_opened(self, task: asyncio.Task[None]) -> None:
        task.result()
        if self._is_doomed:
            self.reset()
        self.on_lost()

    def renew(self) -> None:
        """Go on after the end of all faults."""
        if self.has_swallowed:
            self.proxy.connections_cut += 1
            self.reset()
        for pipe in (self._up, self._down):
            pipe.forget_cut()
            pipe.pump()

    def pump(self) -> None:
        """Pass on what no fault holds back any more."""
        self._up.pump()
        self._down.pump()

    def close_if_over(self) -> None:
        """Close what is open when both directions have ended, or there is nobody to tell."""
        has_upstream = not self._opening.done() or self._upstream.transport is not None
        if (self._up.has_ended and self._down.has_ended) or (self._up.is_over and not has_upstream):
            for side in (self._client, self._upstream):
                if side.transport is not None:
                    side.transport.close()

    def reset(self) -> None:
        """End both connections with a RST."""
        self._is_doomed = (
            True  # in case it is not open yet: a loop that is cancelled half-way leaks
        )
        for side in (self._client, self._upstream):
            _reset(side.transport)

    def on_lost(self) -> None:
        """Leave the proxy when both sockets are gone."""
        self.close_if_over()
        if self._opening.done() and self._client.is_lost and self._upstream.transport is None:
            self._up.stop()
            self._down.stop()
            self.proxy.forget(self)


def _reset(transport: asyncio.Transport | None) -> None:
    if transport is None or transport.is_closing():
        return
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
    transport.abort()
