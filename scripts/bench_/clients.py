"""Be thousands of WebSocket clients in one process: an epoll loop over bare file descriptors.

A client is a number that indexes a few arrays, so that it costs some dozen bytes here, and a
message costs a read, a comparison with the only frame there can be, and a write.
"""

from __future__ import annotations

import os
import select
import sys
import time
from array import array
from collections.abc import Callable
from typing import Final

from bench_ import board, frames
from bench_.board import MESSAGE_NS
from bench_.handshakes import Handshakes
from bench_.histogram import bucket
from bench_.plan import CLOSING, CONTROL, DEAD, HEAD_BYTES, KINDS, OPEN, TIMER, Plan
from bench_.timer import Timer

IN: Final = select.EPOLLIN
OUT: Final = select.EPOLLOUT
CLOSE_FRAME: Final = frames.client_frame((1000).to_bytes(2, "big"), frames.CLOSE)

clock = time.monotonic_ns


class Errand:
    """Do something at each turn of the loop; this one does nothing."""

    def tick(self) -> None:
        """Do what is due."""


class Traffic(Errand):
    """Decide when a client sends; this one keeps all silent."""

    def answered(self, fd: int) -> None:
        """Take note that a client has got a frame."""

    def opened(self, fd: int) -> None:
        """Take note of a new client."""

    def stop(self) -> None:
        """Send nothing more."""


class Clients:
    """Run the loop.

    Args:
        row: this process's words of the board.
        plan: what the clients are.
        control: a file descriptor with orders.
        obey: called when it can be read.
    """

    def __init__(self, row: memoryview, plan: Plan, control: int, obey: Callable[[], None]) -> None:
        self.row = row
        self.open_fds = array("i")
        """All that were ever open, in the order of opening."""
        self.since_ns = array("q", bytes(8 * plan.files))
        """By file descriptor: when its unanswered message was sent or due; 0 for none."""
        self.kinds = bytearray(plan.files)
        self.traffic = Traffic()
        self.errand = Errand()
        self.closing = 0
        """Clients whose close is under way."""
        self.sent = self.done = self.frames = self.late = 0  # go to the board once a turn
        self._poller = select.epoll()
        self._message = frames.client_frame(plan.message)
        self._frame = frames.server_frame(plan.answer)
        self._beginning = self._frame[: len(self._frame) - len(plan.answer) + 1]
        self._room = min(len(self._frame) + 64, 1 << 18)
        self._unsent: dict[int, bytes] = {}
        self._missing: dict[int, int] = {}  # bytes of a frame whose first part has come
        self._parts: dict[int, bytes] = {}  # of a frame's head, or of a control frame
        self._timer = Timer()
        self._wakes: dict[Errand, int] = {}
        self._handlers: list[Callable[[int, int], None]] = [self._ignore] * KINDS
        self.handle(CONTROL, lambda *_: obey())
        self.handle(TIMER, lambda *_: self._timer.rearm())
        self.handle(OPEN, self._on_open)
        self.handle(CLOSING, self._on_closing)
        self.add(control, CONTROL)
        self.add(self._timer.fd, TIMER)
        self.handshakes = Handshakes(self, plan)
        self._rest_s = plan.rest_s
        self.ended = False

    def add(self, fd: int, kind: int, events: int = IN) -> None:
        """Watch a file descriptor."""
        self.kinds[fd] = kind
        self._poller.register(fd, events)

    def watch(self, fd: int, events: int) -> None:
        """Watch for other events than before."""
        self._poller.modify(fd, events)

    def handle(self, kind: int, handler: Callable[[int, int], None]) -> None:
        """Call this with a descriptor of the kind and its events."""
        self._handlers[kind] = handler

    def wake_every(self, interval_ns: int, errand: Errand) -> None:
        """Turn the loop at least this often for an errand; 0 for whenever something comes."""
        self._wakes[errand] = interval_ns
        self._timer.set(min((ns for ns in self._wakes.values() if ns), default=0))

    def run(self) -> None:
        """Serve until an order ends it."""
        poll, kinds, handlers = self._poller.poll, self.kinds, self._handlers
        read, room, frame = os.read, self._room, self._frame
        while not self.ended:
            if self._rest_s:
                time.sleep(self._rest_s)
            answered = self.traffic.answered
            for fd, events in poll():
                if kinds[fd] == OPEN and events == IN:
                    try:
                        data = read(fd, room)
                    except BlockingIOError:  # somebody else's bytes had this number before
                        continue
                    except OSError as error:
                        self._lose(fd, str(error))
                        continue
                    if data == frame:
                        self.frames += 1
                        answered(fd)
                    else:
                        self._receive_parts(fd, data)
                else:
                    handlers[kinds[fd]](fd, events)
            self.traffic.tick()
            self.errand.tick()
            self._publish()

    def _publish(self) -> None:
        row = self.row
        row[board.SENT] = self.sent
        row[board.DONE] = self.done
        row[board.FRAMES] = self.frames
        row[board.LATE] = self.late

    # Messages

    def send(self, fd: int, since_ns: int) -> None:
        """Let a client send its message."""
        self.since_ns[fd] = since_ns
        self.sent += 1
        self._write(fd, self._message)

    def note_answer(self, fd: int, now_ns: int) -> bool:
        """Enter the latency of an answer; False for a frame that answers nothing."""
        since = self.since_ns[fd]
        if not since:
            return False
        self.since_ns[fd] = 0
        self.done += 1
        self.note_latency(now_ns - since)
        return True

    def note_latency(self, value_ns: int, table: int = MESSAGE_NS) -> None:
        """Enter a latency."""
        self.row[table + bucket(value_ns)] += 1

    def _on_open(self, fd: int, events: int) -> None:
        if events & OUT and fd in self._unsent:
            self._write_rest(fd)
        if events & ~OUT and self.kinds[fd] == OPEN:
            try:
                self._receive_parts(fd, os.read(fd, self._room))
            except OSError as error:
                self._lose(fd, str(error))

    def _write(self, fd: int, data: bytes) -> None:
        """Write, and keep what the socket does not take until it takes more."""
        if fd in self._unsent:
            self._unsent[fd] += data
            return
        try:
            written = os.write(fd, data)
        except BlockingIOError:
            written = 0
        except OSError as error:
            self._lose(fd, str(error))
            return
        if written != len(data):
            self._unsent[fd] = data[written:]
            self.watch(fd, IN | OUT)

    def _write_rest(self, fd: int) -> None:
        data = self._unsent.pop(fd)
        self._write(fd, data)
        if fd not in self._unsent and self.kinds[fd] != DEAD:
            self.watch(fd, IN)

    def _receive_parts(self, fd: int, data: bytes) -> None:
        """Take what is not exactly one data frame."""
        if not data:
            self._lose(fd, "end of file")
            return
        if missing := self._missing.pop(fd, 0):
            if len(data) < missing:
                self._missing[fd] = missing - len(data)
                return
            data = data[missing:]
            self.frames += 1
            self.traffic.answered(fd)
        data = self._parts.pop(fd, b"") + data
        while data:
            taken = self._take_frame(fd, data)
            if not taken:
                return
            data = data[taken:]

    def _take_frame(self, fd: int, data: bytes) -> int:
        """Take the first frame; return its length, or 0 when the rest is to come."""
        if data.startswith(self._beginning):
            if (missing := len(self._frame) - len(data)) > 0:
                self._missing[fd] = missing
                return 0
            self.frames += 1
            self.traffic.answered(fd)
            return len(self._frame)
        split = frames.split_frame(data)
        known = data[0] in (frames.PING, frames.CLOSE) or self._beginning.startswith(data)
        if known and (split is None or split[1] > len(data)):
            self._parts[fd] = data
            return 0
        if data[0] == frames.PING and split:
            self.row[board.PINGS] += 1
            self._write(fd, frames.client_frame(data[split[0] : split[1]], frames.PONG))
            return split[1]
        if data[0] == frames.CLOSE and split:
            self._lose(fd, f"closed with {data[split[0] : split[1]]!r}")
            return 0
        self.complain(f"unexpected frame: {data[:80]!r}")
        return len(data)

    def welcome(self, fd: int, data: bytes) -> None:
        """Take in a client whose handshake is done, and what came behind the answer to it."""
        self.since_ns[fd] = 0
        self.kinds[fd] = OPEN
        self.row[board.OPENED] += 1
        self.open_fds.append(fd)
        self.traffic.opened(fd)
        if data:
            self._receive_parts(fd, data)

    # Closes

    def close_one(self, fd: int) -> None:
        """Begin a close."""
        if self.kinds[fd] == OPEN:
            self._write(fd, CLOSE_FRAME)
        if self.kinds[fd] == OPEN:  # still
            self.closing += 1
            self.kinds[fd] = CLOSING

    def _on_closing(self, fd: int, events: int) -> None:
        if events & OUT and fd in self._unsent:
            self._write_rest(fd)
            return
        try:
            if os.read(fd, HEAD_BYTES):  # its close frame, or frames that were under way
                return
        except OSError:
            pass
        self.closing -= 1
        self.row[board.CLOSED] += 1
        self.forget(fd)

    # Trouble

    def complain(self, why: str, word: int = board.UNEXPECTED) -> None:
        """Count something that should not be, and say what the first was."""
        self.row[word] += 1
        if self.row[word] == 1:
            print(f"clients: {why}", file=sys.stderr, flush=True)

    def _lose(self, fd: int, why: str) -> None:
        self.complain(f"connection lost: {why}", board.LOST)
        self.forget(fd)

    def forget(self, fd: int) -> None:
        """Close a descriptor; its number stays DEAD, lest late events of it meet a new client."""
        self.kinds[fd] = DEAD
        self.since_ns[fd] = 0
        self._unsent.pop(fd, None)
        self._missing.pop(fd, None)
        self._parts.pop(fd, None)
        os.close(fd)

    def _ignore(self, fd: int, events: int) -> None:
        """Do nothing about an event that came too late."""
