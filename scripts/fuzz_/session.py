"""Any order of events that can happen to a session raises nothing and keeps its promises.

At most `max_in_flight` messages are under way, at most `max_queue` wait, they are numbered without
a gap, and the end is reported once and last. The gauges say what is so at any time, and nothing is
left of them in the end. Each byte is an event; the first two are the limits.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Final

from ws2api.gateway import causes, outcomes
from ws2api.gateway import counters as c
from ws2api.gateway.errors import ApiDisconnected
from ws2api.gateway.exchange import CONNECT, DISCONNECT, MESSAGE, Exchange
from ws2api.gateway.frames import TEXT
from ws2api.gateway.http_wire import ReplyReader
from ws2api.gateway.session import (
    ABNORMAL,
    ASKING,
    CLAIMING,
    CLOSED,
    CLOSING,
    HANDSHAKE,
    OPEN,
    REPORTING,
    WAITING,
    Session,
)


def _reply(wire: bytes) -> ReplyReader:
    reader = ReplyReader(100)
    reader.expect(want_headers=False)
    reader.feed(wire)
    assert reader.complete
    return reader


_OK: Final = _reply(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
_EMPTY: Final = _reply(b"HTTP/1.1 204 No Content\r\n\r\n")
_NO_TEXT: Final = _reply(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n\xff")
_REFUSED: Final = _reply(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")


class Life(Session):
    """Carry the actions out at once, or leave them to later events."""

    def __init__(self, max_in_flight: int, max_queue: int) -> None:
        self.slot = slot = memoryview(bytearray(8 * c.SLOT_LENGTH)).cast("q")
        super().__init__(
            SimpleNamespace(slot=slot, max_in_flight=max_in_flight, max_queue=max_queue)
        )
        self.max_in_flight, self.max_queue = max_in_flight, max_queue
        self.received = self.posted = self.answered = self.reports = 0
        self.is_announced = self.is_releasing = self.has_ended = False

    # Actions.

    def _post(self, first_byte: int, payload: bytes) -> None:
        self.posted += 1
        assert self.sequence == self.posted
        assert payload == b"%d" % self.posted, "out of order"
        assert not self.reports

    def _ask(self) -> None:
        assert self.state == ASKING

    def _abandon(self) -> None:
        self._forget()

    def _claim(self) -> None:
        assert self.state == CLAIMING

    def _take_over(self) -> None:
        assert self.state == OPEN

    def _welcome(self) -> None:
        assert self.state == OPEN

    def _judge(self, reply: ReplyReader) -> bool:
        if reply.body != b"ok":
            self._forget()
        return reply.body == b"ok"

    def _refuse(self, status: int, text: str, header_lines: bytes = b"") -> None:
        self._forget()

    def _write(self, wire: bytes) -> None:
        assert self.state == OPEN
        assert not self.has_ended

    def _send_close(self, code: int, reason: str) -> None:
        assert self.state == OPEN
        if not self._reading:  # the client's own close frame has to be read
            self._set_reading(True)

    def _read_on(self, on: bool) -> None:
        assert on == self._reading

    def _leave(self, cause: str) -> None:
        assert self.state == CLOSING
        assert cause in causes.CODES

    def _complain(self, exchange: Exchange, cause: str, error: str) -> None:
        assert cause in causes.OF_REQUESTS

    def _release(self) -> None:
        assert not self.is_releasing
        self.is_releasing = True

    def _report(self) -> None:
        self.reports += 1
        assert self.reports == 1
        assert self.answered == self.posted == self.received
        assert not self.replaced

    def _settle(self) -> None:
        assert self.state == REPORTING

    # Events, each at a time at which it can come.

    def is_read(self) -> None:
        if self.state == HANDSHAKE:
            self.state = WAITING

    def is_admitted(self) -> None:
        if self.state == WAITING:
            self.state = ASKING

    def is_marked(self) -> None:
        if self.state == ASKING and not self.is_announced:
            self.is_announced = True
            self.on_announced(17)

    def api_decides(self, reply: ReplyReader | None) -> None:
        if self.state == ASKING and self.is_announced:
            self._answer(CONNECT, reply)

    def is_claimed(self, owned: bool) -> None:
        if self.state == CLAIMING:
            self.on_claimed(owned)

    def sends(self) -> None:
        if self.state == OPEN and self.wants_messages and not self.has_ended:
            self.received += 1
            self.on_message(TEXT, b"%d" % self.received)

    def api_answers(self, reply: ReplyReader | None) -> None:
        if self.in_flight:
            self.answered += 1
            self._answer(MESSAGE, reply)

    def reads(self, on: bool) -> None:
        if not self.has_ended and on != self.writable:
            self.on_writable(on)

    def hangs_up(self) -> None:
        if not self.has_ended:
            self.has_ended = True
            self.end(ABNORMAL, "EOF")

    def is_pushed_to(self) -> None:
        if not self.has_ended:
            outcome = self.deliver(TEXT, b"push")
            assert (outcome == outcomes.NOT_FOUND) == (self.state != OPEN)

    def is_released(self, owned: bool) -> None:
        if self.is_releasing and not self._released:
            self.on_released(owned)

    def api_hears(self, how: str) -> None:
        if self.state != REPORTING:
            return
        if how == "parked":
            self.on_parked(Exchange(self, DISCONNECT, b""))
        else:
            self._answer(DISCONNECT, _EMPTY if how == "answered" else None)

    def _answer(self, event: int, reply: ReplyReader | None) -> None:
        exchange = Exchange(self, event, b"")
        if reply is None:
            self.on_failure(exchange, ApiDisconnected("gone"))
        else:
            self.on_reply(exchange, reply)

    # Promises.

    def assert_sound(self, last_state: int) -> None:
        """Check what holds after each event."""
        assert last_state <= self.state <= CLOSED
        assert self.in_flight == self.posted - self.answered <= self.max_in_flight
        assert self.queued <= self.max_queue
        assert self.posted + self.queued == self.received
        if self.queued and (self.writable or self.state != OPEN):
            assert self.in_flight == self.max_in_flight, "nobody goes on"
        if self.state == OPEN and self.writable and not self.queued and not self.in_flight:
            assert self._reading, "nobody reads on"
        if self.is_owed:
            assert self._released
        is_paused = self.state == OPEN and not self._reading
        assert self.slot[c.CLIENTS_PAUSED] == is_paused
        assert self.slot[c.MESSAGES_QUEUED] == self.queued
        closed = self.slot[c.CONNECTIONS_CLOSED]
        assert closed == (self.state > OPEN and self.slot[c.CONNECTIONS_OPENED])
        assert sum(self.slot[index] for index in c.CLOSES.values()) == closed
        assert self.sent == self.slot[c.MESSAGES_SENT]

    def finish(self) -> None:
        """Let it end; it owes nothing then."""
        self.is_read()
        self.is_admitted()
        self.is_marked()
        self.api_decides(_OK)
        self.is_claimed(owned=True)
        self.hangs_up()
        self.end(ABNORMAL, "EOF")
        while self.in_flight:
            self.api_answers(_EMPTY)
        self.is_released(owned=True)
        self.api_hears("answered")
        assert self.state == CLOSED
        assert self.posted == self.received == self.answered
        assert self.slot[c.CLIENTS_PAUSED] == self.slot[c.MESSAGES_QUEUED] == 0


_EVENTS: Final[dict[int, Callable[[Life], None]]] = {
    ord(letter): event
    for letter, event in {
        "h": Life.is_read,
        "a": Life.is_admitted,
        "g": Life.is_marked,
        "k": lambda life: life.api_decides(_OK),
        "n": lambda life: life.api_decides(_REFUSED),
        "u": lambda life: life.api_decides(None),
        "c": lambda life: life.is_claimed(owned=True),
        "C": lambda life: life.is_claimed(owned=False),
        "m": Life.sends,
        "+": lambda life: life.api_answers(_OK),
        "0": lambda life: life.api_answers(_EMPTY),
        "~": lambda life: life.api_answers(_NO_TEXT),
        "-": lambda life: life.api_answers(None),
        "w": lambda life: life.reads(on=False),
        "W": lambda life: life.reads(on=True),
        "p": Life.is_pushed_to,
        "e": Life.hangs_up,
        "x": lambda life: life.close(1001, "going away"),
        "d": lambda life: life.drain(1012, "service restart"),
        "r": lambda life: life.replace(),
        "G": lambda life: life.give_up(),
        "R": lambda life: life.is_released(owned=True),
        "Q": lambda life: life.is_released(owned=False),
        "y": lambda life: life.api_hears("answered"),
        "f": lambda life: life.api_hears("failed"),
        "P": lambda life: life.api_hears("parked"),
    }.items()
}
DICTIONARY = (*(bytes((event,)) for event in _EVENTS), b"hagkc", b"mm+", b"eR", b"ww", b"Wm")


def check(data: bytes) -> None:
    """Lead a session through the events; a byte that names none is passed over."""
    if len(data) < 2:
        return
    life = Life(max_in_flight=1 + data[0] % 3, max_queue=1 + data[1] % 4)
    for byte in data[2:]:
        event = _EVENTS.get(byte)
        if event is not None:
            last_state = life.state
            event(life)
            life.assert_sound(last_state)
    life.finish()
