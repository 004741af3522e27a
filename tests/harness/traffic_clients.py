"""Be a WebSocket client that numbers what it sends; one loop bears hundreds."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import Final, Protocol, cast

from .traffic_api import GENERATION_COOKIE
from .ws import Frame, Op, close_payload, upgrade_request

PUSH_MARK: Final = b"push "
RECONNECT_S: Final = 0.05
"""Pause before the first attempt to come back; it doubles with each that fails, up to MAX."""
MAX_RECONNECT_S: Final = 1.0

_STATUS = re.compile(rb"HTTP/1\.1 (\d\d\d) ")
_COOKIE = re.compile(rb"\r\nSet-Cookie: " + GENERATION_COOKIE.encode() + rb"=(\d+)\r\n")
_NO_LINGER: Final = struct.pack("ii", 1, 0)


def message(client_id: str, number: int, padding: int = 0) -> bytes:
    """Return the body of a client's message; the number is unique to the client."""
    return f"{client_id} {number}".encode() + b"." * padding


def number_of(body: bytes) -> int:
    """Return the number in a message, or in the answer that repeats it."""
    return int(body.partition(b" ")[2].rstrip(b"."))


def push(number: int) -> bytes:
    """Return the body of a push; the number is unique among all."""
    return PUSH_MARK + b"%d" % number


@dataclass(slots=True)
class Stay:
    """Hold what a client saw of one connection."""

    client_id: str
    status: int = 0
    """What the gateway answered to the handshake; 0 when nothing."""
    generation: int = 0
    first: int = 0
    """Number of the first message that was sent, 0 if none was."""
    last: int = 0
    answered: list[int] = field(default_factory=list)
    """Numbers of the messages whose answers arrived, in order."""
    pushes: list[int] = field(default_factory=list)
    """Numbers of the pushes that arrived, in order."""
    close_code: int | None = None
    """Of the gateway's close frame, None when there was none."""
    left: str = ""
    """How the client ended the connection itself: `close`, `reset` or `hang up`; else empty."""
    has_ended: bool = False
    violations: list[str] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        """Whether the client is connected."""
        return self.status == 101 and not self.has_ended

    @property
    def sent(self) -> int:
        """How many messages were sent."""
        return self.last - self.first + 1 if self.first else 0

    @property
    def unanswered(self) -> int:
        """How many messages came after the last one that was answered."""
        return self.last - max(self.answered[-1] if self.answered else 0, self.first - 1)


class Home(Protocol):
    """Be what the clients share."""

    address: tuple[str, int]
    ends: Counter[str]
    answers: int

    def start(self, client: TrafficClient) -> None:
        """Let a client try to connect."""


class TrafficClient(asyncio.Protocol):
    """Connect, send numbered messages, note every answer and push, come back if told to.

    Args:
        fleet: to which it belongs.
        client_id: under which it connects.
    """

    def __init__(self, fleet: Home, client_id: str) -> None:
        self._fleet = fleet
        self.client_id = client_id
        self.stays: list[Stay] = []
        """One for each attempt to connect, the oldest first."""
        self.comes_back = False
        self.renames = False
        """Whether it comes back under another id each time."""
        self.padding = 0
        """Bytes to add to each message."""
        self.number = 0
        """Of the last message that was sent."""
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._failures = 0
        self._timer: asyncio.TimerHandle | None = None
        self._window = 0
        self._pause_s = 0.0
        self._is_connecting = False

    @property
    def stay(self) -> Stay:
        """The present connection, or the last one."""
        return self.stays[-1]

    @property
    def is_open(self) -> bool:
        """Whether the client is connected."""
        return bool(self.stays) and self.stays[-1].is_open

    @property
    def unsent_bytes(self) -> int:
        """Count what waits here for the gateway to read."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    # To be called in the loop's thread.

    async def connect(self) -> None:
        """Try once; the outcome is in `stay`."""
        self._is_connecting = True
        if self.renames and self.stays:
            self.client_id = f"{self.client_id.partition('~')[0]}~{len(self.stays)}"
        stay = Stay(self.client_id)
        self.stays.append(stay)
        self._buffer = b""
        try:
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: self, *self._fleet.address)
        except OSError as error:
            self._on_end(stay, f"connect: {type(error).__name__}")
        finally:
            self._is_connecting = False

    def send(self) -> None:
        """Send the next message."""
        assert self._transport is not None
        self.number += 1
        stay = self.stays[-1]
        stay.first = stay.first or self.number
        stay.last = self.number
        self._write(Op.TEXT, message(self.client_id, self.number, self.padding))

    def talk(self, window: int, pause_s: float) -> None:
        """Keep `window` messages unanswered, each sent so long after an answer; 0 is silence."""
        self._window, self._pause_s = window, pause_s
        self._say_more()

    def close(self, code: int = 1000, reason: str = "bye") -> None:
        """Begin to close in good order."""
        if self.is_open and not self.stay.left:
            self.stay.left = "close"
            self._write(Op.CLOSE, close_payload(code, reason))

    def hang_up(self, *, reset: bool = False) -> None:
        """End the connection without a close frame, with a FIN or a RST."""
        if self._transport is None or self._transport.is_closing():
            return
        self.stay.left = "reset" if reset else "hang up"
        if reset:
            sock = self._transport.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self._transport.abort()

    def read_on(self, on: bool) -> None:
        """Stop reading, or go on."""
        if self._transport is not None and not self._transport.is_closing():
            (self._transport.resume_reading if on else self._transport.pause_reading)()

    def stop(self) -> None:
        """Neither send nor come back any more."""
        self.comes_back = False
        self._window = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # The socket.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(upgrade_request(f"/{self.client_id}"))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        stay = self.stays[-1]
        if not stay.status and not self._read_head(stay):
            return
        while (frame := self._next_frame(stay)) is not None:
            self._on_frame(stay, *frame)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        stay = self.stays[-1]
        if stay.status not in (0, 101):
            self._on_end(stay, str(stay.status))
        elif stay.left:
            self._on_end(stay, stay.left)
        elif stay.close_code is not None:
            self._on_end(stay, str(stay.close_code))
        else:
            self._on_end(stay, "reset" if exc else "end")

    def _read_head(self, stay: Stay) -> bool:
        """Take the answer to the handshake; tell whether frames follow it."""
        head, end, rest = self._buffer.partition(b"\r\n\r\n")
        if not end:
            return False
        found = _STATUS.match(head)
        if not found:
            stay.violations.append(f"answered with {head[:80]!r}")
            return False
        stay.status = int(found[1])
        if stay.status != 101:
            return False
        cookie = _COOKIE.search(head + b"\r\n")
        stay.generation = int(cookie[1]) if cookie else 0
        self._buffer = rest
        self._failures = 0
        self._say_more()
        return True

    def _next_frame(self, stay: Stay) -> tuple[int, bytes] | None:
        buffer = self._buffer
        if stay.status != 101 or len(buffer) < 2:
            return None
        size, start = buffer[1] & 0x7F, 2
        if size >= 126:
            start = 4 if size == 126 else 10
            if len(buffer) < start:
                return None
            size = int.from_bytes(buffer[2:start], "big")
        if len(buffer) < start + size:
            return None
        if buffer[1] & 0x80 or buffer[0] & 0xF0 != 0x80:
            stay.violations.append(f"frame begins with {buffer[:2]!r}")
        self._buffer = buffer[start + size :]
        return buffer[0] & 0x0F, buffer[start : start + size]

    def _on_frame(self, stay: Stay, opcode: int, payload: bytes) -> None:
        if opcode == Op.PING:
            self._write(Op.PONG, payload)
        elif opcode == Op.CLOSE:
            stay.close_code = int.from_bytes(payload[:2], "big") if payload else 1005
            if not stay.left:
                self._write(Op.CLOSE, payload)
        elif payload.startswith(PUSH_MARK):
            stay.pushes.append(int(payload[len(PUSH_MARK) :]))
        elif opcode == Op.TEXT:
            self._on_answer(stay, payload)

    def _on_answer(self, stay: Stay, payload: bytes) -> None:
        number = number_of(payload)
        if not payload.startswith(stay.client_id.encode() + b" "):
            stay.violations.append(f"answer for another client: {payload!r}")
        stay.answered.append(number)
        self._fleet.answers += 1
        if self._window:
            self._say_later(self._pause_s)

    # Talking.

    def _say_later(self, pause_s: float) -> None:
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(pause_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._say_more()

    def _say_more(self) -> None:
        while self.is_open and not self.stay.left and self.stay.unanswered < self._window:
            self.send()

    def _write(self, opcode: int, payload: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(Frame(opcode, payload).encode())

    # The end.

    def _on_end(self, stay: Stay, reason: str) -> None:
        stay.has_ended = True
        self._fleet.ends[reason] += 1
        if not self.comes_back:
            return
        self._failures += 1
        pause_s = min(MAX_RECONNECT_S, RECONNECT_S * 2 ** (self._failures - 1))
        loop = asyncio.get_running_loop()
        loop.call_later(pause_s * (0.5 + random.random() / 2), self._come_back)

    def _come_back(self) -> None:
        if self.comes_back and not self.is_open and not self._is_connecting:
            self._fleet.start(self)
