"""Join one client's socket to its session: bytes in, bytes out.

The story of a packet: `data_received` takes the one whole frame that it nearly always is, or lets
a `FrameReader` find out what it is; the session posts the message to the API; the API's reply comes
back through `on_reply` and is written. How a client comes in stands in the admission module.
"""

from __future__ import annotations

import asyncio
import json
from typing import Final, cast

from . import causes, outcomes
from . import counters as c
from .admission import MAX_EARLY_BYTES, Admission
from .ask import Ask
from .envelope import DESCRIBE, PUSH
from .errors import ApiError
from .exchange import CONNECT, DISCONNECT, MESSAGE, Exchange
from .frames import (
    PING_FRAME,
    TEXT,
    Answer,
    Closed,
    FrameReader,
    Message,
    decode_whole,
    is_utf8,
)
from .hub import Hub
from .session import (
    ABNORMAL,
    ASKING,
    CLAIMING,
    CLOSED,
    CLOSING,
    HANDSHAKE,
    NO_CLOSE_FRAME,
    OPEN,
    WAITING,
)

_EVENTS_AT_ONCE: Final = 256
# Bytes of a client whose messages wait that are read all the same, so that its pings are answered.
_MOST_AHEAD: Final = 65_536
_NEVER_S: Final = float("inf")
_NOUNS: Final = {CONNECT: "connect", MESSAGE: "message", DISCONNECT: "disconnect"}


class Client(Admission, asyncio.Protocol):
    """Be the asyncio side of one connection on the client port.

    Args:
        hub: what the worker's clients share.
    """

    # No __dict__: there is one of these per connection, and memory per connection is what limits
    # how many a machine can hold.
    __slots__ = ("_heard_at", "_pinged_at", "_reader")

    def __init__(self, hub: Hub) -> None:
        super().__init__(hub)
        # None while the stream is at a message boundary, as it is nearly always.
        self._reader: FrameReader | None = None
        self._heard_at = hub.sweeper.now
        # Time of the ping that is not answered yet, 0.0 when there is none. Any bytes answer it.
        self._pinged_at = 0.0

    # The socket.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Give the client its time for the handshake."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        hub = self._hub
        hub.live.add(self)
        hub.sockets += 1
        self._transport.set_write_buffer_limits(high=hub.max_write_buffer)
        self._close_by = hub.sweeper.now + hub.handshake_timeout_s
        # One place in the wheel for the whole life of the connection, see on_tick.
        hub.sweeper.schedule(self, min(hub.handshake_timeout_s, hub.ping_interval_s or _NEVER_S))
        if hub.sockets > hub.most_clients:
            self._refuse_at_the_door()
        elif hub.limit is not None and not hub.policy.trusts(peer := self._peer()):
            self._count_address(hub.limit, peer)

    def data_received(self, data: bytes) -> None:
        """Read frames, or what comes before them."""
        self._heard_at = self._hub.sweeper.now
        if self.state == OPEN:
            if self._reader is None and self._reading:
                payload = decode_whole(data)
                if payload is not None and len(payload) <= self._hub.max_message_size:
                    if not payload.isascii() and data[0] == TEXT and not is_utf8(payload):
                        self._read_frames(data)  # it knows how to refuse
                        return
                    self.on_message(data[0], payload)
                    return
            self._read_frames(data)
        elif self.state == HANDSHAKE:
            self._read_head(data)
        elif self.state >= CLOSING:
            if self._reader is not None:  # we have closed, and wait for the client's close frame
                self._read_frames(data)
        elif self._opening is not None:
            self._opening.early += data
            if len(self._opening.early) > MAX_EARLY_BYTES and self._transport is not None:
                self._transport.pause_reading()

    def eof_received(self) -> bool:
        """Close our side, too; what is still to be written is written first."""
        if self._holds_messages:
            return True  # the end comes again when they have had their turn
        self._drop_after(self._hub.handshake_timeout_s)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """End the session, after what the client had sent before."""
        self._transport = None
        self._hub.socket_ended()
        self._hub.blocked.pop(self, None)
        if self._hub.limit is not None:
            self._hub.limit.leave(self)
        reader = self._reader
        if self.state == OPEN and reader is not None:
            # What goes beyond the queue's bound was held back from us by rights.
            while self.state == OPEN and self._reading:
                event = reader.next_event()
                if event is None:
                    break
                if isinstance(event, Message):
                    self.on_message(event.first_byte, event.payload)
                elif isinstance(event, Closed):
                    self._hub.slot[c.PROTOCOL_ERRORS] += event.failed
                    self.end(event.code, event.reason, _cause_of(event))
        self._reader = None
        if self.state == WAITING:
            self._hub.gate.leave(self)
        self.end(ABNORMAL, NO_CLOSE_FRAME)
        if self.state == CLOSED:
            self._hub.live.discard(self)

    def abort(self) -> None:
        """Drop the socket at once."""
        if self._transport is not None:
            self._transport.abort()

    def pause_writing(self) -> None:
        """Note that the client does not read."""
        self._hub.blocked[self] = self._hub.sweeper.now, self.write_buffer_bytes
        self.on_writable(False)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()  # nor is its next ping answered

    def resume_writing(self) -> None:
        """Note that the client reads again."""
        self._hub.blocked.pop(self, None)
        self.on_writable(True)
        if not self._reading:
            self._go_on()

    @property
    def write_buffer_bytes(self) -> int:
        """Count the bytes that wait for the client to read."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def drop_slow(self) -> None:
        """End the connection of a client that has not read for long."""
        if self.state == OPEN:
            self.close(1008, "too slow")
        else:
            self.abort()

    # Reading.

    def _read_frames(self, data: bytes) -> None:
        reader = self._reader
        if reader is None:
            reader = self._reader = FrameReader(self._hub.max_message_size)
        reader.feed(data)
        self._take_events(reader)

    def _take_events(self, reader: FrameReader) -> None:
        """Act on what the reader finds, as long as the session has room for it."""
        budget = _EVENTS_AT_ONCE
        while self._reading and (event := reader.next_event()) is not None:
            budget -= 1
            if budget == 0:
                self._rest()
            if isinstance(event, Message):
                if self.state == OPEN:
                    self.on_message(event.first_byte, event.payload)
            elif isinstance(event, Answer):
                self._write(event.wire)
            elif isinstance(event, Closed):
                self._on_closed(event)
                return
            if budget <= 0:
                return
        if reader.at_boundary and self.state == OPEN:
            self._reader = None
        elif not self._reading and self.writable and self.state == OPEN:
            self._look_ahead(reader)

    def _look_ahead(self, reader: FrameReader) -> None:
        """Answer the pings behind messages that have to wait."""
        pongs, may_be_more = reader.answer_pings(_EVENTS_AT_ONCE)
        if pongs:
            self._write(b"".join(pongs))
        if may_be_more:
            self._rest()
        elif not self._reads_ahead and self._transport is not None:
            self._transport.pause_reading()
        if reader.at_boundary:
            self._reader = None

    @property
    def _reads_ahead(self) -> bool:
        """Tell whether the socket is read although messages have to wait."""
        reader = self._reader
        return self.writable and (reader is None or reader.buffered_bytes <= _MOST_AHEAD)

    @property
    def _holds_messages(self) -> bool:
        """Tell whether something was read ahead that has yet to have its turn."""
        is_held_up = self.state == OPEN and not self._reading and not self.is_leaving
        return is_held_up and self._reader is not None

    def _rest(self) -> None:
        """Let others have their turn before the rest of a flood of small frames."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
            self._hub.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if self._reading or self._reads_ahead:
            self._transport.resume_reading()
        if self._reader is not None:
            self._take_events(self._reader)

    def _on_closed(self, event: Closed) -> None:
        """Finish the closing handshake (RFC 6455, 7.1)."""
        self._reader = None
        if event.wire:
            self._write(event.wire)
        if event.failed:
            self._hub.slot[c.PROTOCOL_ERRORS] += 1
            self._linger()
        elif self._transport is not None:
            self._transport.close()  # which waits for a client that does not read, so:
            self._drop_after(self._hub.handshake_timeout_s)
        self.end(event.code, event.reason, _cause_of(event))

    def on_failure(self, exchange: Exchange, error: ApiError) -> None:
        """Log what the session cannot: which client's request failed, and why."""
        if exchange.event != CONNECT or exchange.attempts:
            self._complain(exchange, error.cause, error.detail)
        elif not self.left:  # there are many at once, and the outage is logged as such
            self._hub.slot[c.ERRORS[error.cause]] += 1
        super().on_failure(exchange, error)

    def _complain(self, exchange: Exchange, cause: str, error: str) -> None:
        self._hub.journal.complain(
            f"the API did not take a {_NOUNS[exchange.event]}", self.client_id, cause, error
        )

    # What the push port asks.

    def apply(self, ask: Ask) -> tuple[int, bytes]:
        """Do what is asked of this client; return the outcome and a body of its own."""
        if ask.generation and ask.generation != self.generation:
            return outcomes.STALE, b""
        if self.state != OPEN:
            return outcomes.NOT_FOUND, b""
        transport = self._transport
        if transport is None or transport.is_closing():
            return outcomes.NOT_FOUND, b""  # what is written now goes nowhere
        if ask.kind == PUSH:
            return self.deliver(ask.code, ask.payload), b""
        if ask.kind == DESCRIBE:
            return outcomes.OK, self.describe()
        self.close(ask.code, ask.payload.decode(), causes.API)
        return outcomes.OK, b""

    def describe(self) -> bytes:
        """Return JSON about the connection."""
        return json.dumps(
            {
                "id": self.client_id.decode("ascii"),
                "generation": self.generation,
                "worker": self._hub.worker,
                "remote": self._peer() if self._transport is not None else None,
                "subprotocol": self.subprotocol.decode("latin-1") or None,
                "messages_received": self.sequence + self.queued,
                "messages_sent": self.sent,
                "in_flight": self.in_flight,
                "queued": self.queued,
                "writable": self.writable,
            }
        ).encode()

    # What the session wants done.

    def _take_over(self) -> None:
        hub = self._hub
        if hub.connecting.get(self.client_id) is self:
            del hub.connecting[self.client_id]
        previous = hub.clients.get(self.client_id)
        if previous is not None and previous.generation > self.generation:
            self.replaced = True
            return
        hub.clients[self.client_id] = self
        if previous is not None:
            previous.replace()

    def _post(self, first_byte: int, payload: bytes) -> None:
        hub = self._hub
        wire = hub.encoder.message(
            self.client_id, self.generation, self.sequence, first_byte == TEXT, payload
        )
        hub.upstream.submit(Exchange(self, MESSAGE, wire))

    def _write(self, wire: bytes) -> None:
        if self._transport is not None:
            self._transport.write(wire)

    def _read_on(self, on: bool) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if not on:
            if not self._reads_ahead:
                transport.pause_reading()
            return
        transport.resume_reading()
        self._heard_at = self._hub.sweeper.now
        if self._reader is not None:
            self._take_events(self._reader)

    def _send_close(self, code: int, reason: str) -> None:
        reader = self._reader
        if reader is None:
            reader = self._reader = FrameReader(self._hub.max_message_size)
        self._write(reader.start_close(code, reason))
        if not self._reading and self._transport is not None:
            self._set_reading(True)
            self._transport.resume_reading()  # to see the client's close frame
            self._hub.call_soon(self._go_on)  # which may have been read ahead
        self._drop_after(self._hub.handshake_timeout_s)

    def _linger(self) -> None:
        """Close so that the client can read the last bytes.

        Closing a socket with unread bytes resets it, and the reset overtakes what was written; so
        only our side is closed, and what still comes is read and dropped for a while.
        """
        transport = self._transport
        if transport is None:
            return
        if transport.can_write_eof():
            transport.write_eof()
        self._reader = None
        self._drop_after(self._hub.handshake_timeout_s)

    def _drop_after(self, delay_s: float) -> None:
        self._close_by = self._hub.sweeper.now + delay_s
        self._hub.sweeper.schedule(self, delay_s)

    def _leave(self, cause: str) -> None:
        hub = self._hub
        hub.journal.closed(self, cause)
        if hub.clients.get(self.client_id) is self:
            del hub.clients[self.client_id]

    def _release(self) -> None:
        hub = self._hub
        if hub.is_over:
            self.on_released(owned=False)  # the reapers find it as it stands, and report it once
        else:
            hub.registry.release(self)
        if self._opening is not None:  # left before it was open
            self._leave_connecting()
            self._opening = None

    def _report(self) -> None:
        hub = self._hub
        reason = (self.close_reason or "").encode()
        wire = hub.encoder.disconnect(self.client_id, self.generation, self.close_code, reason)
        hub.upstream.submit(Exchange(self, DISCONNECT, wire))

    def _settle(self) -> None:
        self._hub.outbox.settle(self)

    def _forget(self) -> None:
        super()._forget()
        if self._transport is None:
            self._hub.live.discard(self)
        opening, self._opening = self._opening, None
        if opening is not None:  # left while claiming, and replaced meanwhile
            for ask in opening.take_held():
                self._hub.reroute(ask)

    # Deadlines.

    def on_tick(self, now: float) -> float:
        """Ping, or drop what does not answer; return seconds until the next look."""
        if self._transport is None:
            return 0.0
        hub = self._hub
        interval_s = hub.ping_interval_s
        if self._close_by:
            if self.state == ASKING or self.state == CLAIMING:
                return interval_s or hub.handshake_timeout_s  # it is the API that takes its time
            if now < self._close_by:
                return min(self._close_by - now, interval_s or _NEVER_S)
            if self.state == WAITING:
                hub.slot[c.CONNECTS_OVERFLOWED] += 1
                self.turn_back(1.0)
                return hub.handshake_timeout_s
            self._transport.abort()
            return 0.0
        if self.state != OPEN or not interval_s:
            return 0.0
        if not self._reading:
            self._pinged_at = 0.0
            return interval_s  # it is we who do not listen
        if self._pinged_at and self._heard_at < self._pinged_at:
            left_s = self._pinged_at + hub.ping_timeout_s - now
            if left_s > 0:
                return left_s
            self.close(1011, "ping timeout")
            return 0.0
        self._pinged_at = 0.0
        silent_s = now - self._heard_at
        if silent_s < interval_s:
            return interval_s - silent_s
        self._pinged_at = now
        self._write(PING_FRAME)
        return min(hub.ping_timeout_s, interval_s)


def _cause_of(event: Closed) -> str:
    return causes.PROTOCOL if event.failed else causes.CLIENT
