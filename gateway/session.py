"""Live one client's life as a state machine: events in, actions out. Pure: it knows no socket.

    HANDSHAKE → WAITING → ASKING → CLAIMING → OPEN → CLOSING → REPORTING → CLOSED

HANDSHAKE reads the request, WAITING is there while too many others are being decided, ASKING waits
for the API's answer, CLAIMING for the registry to know the id; OPEN passes messages on; CLOSING
sends what was received before the end; REPORTING waits until the API has heard of the end; CLOSED
owes nothing to anybody. The socket may end at any point and is the subclass's affair: `Client`
carries the actions out, a recording subclass in the tests notes them.

The order of one client's messages is kept here: at most `max_in_flight` are under way to the API,
the next wait in a bounded queue, and beyond it no message is taken from the socket.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Protocol

from . import causes, outcomes
from . import counters as c
from .errors import ApiAbandoned, ApiError
from .exchange import CONNECT, MESSAGE, Exchange
from .frames import BINARY, TEXT, encode, is_utf8
from .http_wire import ReplyReader

HANDSHAKE: Final = 0
WAITING: Final = 1
ASKING: Final = 2
CLAIMING: Final = 3
OPEN: Final = 4
CLOSING: Final = 5
REPORTING: Final = 6
CLOSED: Final = 7

# The reason that the API gets when a connection ended without a close frame.
NO_CLOSE_FRAME: Final = "EOF"
ABNORMAL: Final = 1006
GOING_AWAY: Final = 1001
REPLACED_CODE: Final = 4008
SERVICE_RESTART: Final = 1012  # IANA's WebSocket Close Code Number Registry


class Limits(Protocol):
    """Give a session what is the same for all of a worker."""

    slot: memoryview
    max_in_flight: int
    max_queue: int


class Session:
    """Decide what happens to one client; subclasses do it.

    Args:
        limits: the worker's counters and limits.
    """

    __slots__ = (
        "_farewell",
        "_limits",
        "_queue",
        "_reading",
        "_released",
        "client_id",
        "close_code",
        "close_reason",
        "generation",
        "in_flight",
        "left",
        "replaced",
        "retry_safe",
        "sent",
        "sequence",
        "state",
        "writable",
    )

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.state = HANDSHAKE
        self.client_id = b""
        self.generation = 0
        """Birth of the connection in microseconds since the epoch; 0 until the handshake."""
        self.sequence = 0
        """Messages of the client so far that were sent to the API."""
        self.sent = 0
        """Messages to the client so far."""
        self.in_flight = 0
        # Messages that wait for their turn, None while none ever had to.
        self._queue: deque[tuple[int, bytes]] | None = None
        self._reading = True
        # Code and reason to close with when nothing is under way, None while there is no hurry.
        self._farewell: tuple[int, str] | None = None
        self.writable = True
        """False while the socket's write buffer is above its limit."""
        self.left = False
        """True when the socket ended before the API had answered the connect."""
        self.replaced = False
        """True when the API gets no DELETE: the id belongs to a newer connection, or it had one."""
        self.retry_safe = False
        """True when the API allows a message to be sent again that it may have seen already."""
        self._released = False
        self.close_code = 0
        self.close_reason: str | None = None

    # Actions, for the subclass to carry out.

    def _post(self, first_byte: int, payload: bytes) -> None:
        """Send one message to the API."""
        raise NotImplementedError

    def _ask(self) -> None:
        """Send the GET to the API."""
        raise NotImplementedError

    def _claim(self) -> None:
        """Enter the id into the registry; `on_claimed` follows."""
        raise NotImplementedError

    def _take_over(self) -> None:
        """Be the worker's client of this id; one that was before gives way."""
        raise NotImplementedError

    def _welcome(self) -> None:
        """Finish the upgrade: write the 101, then what was held back."""
        raise NotImplementedError

    def _abandon(self) -> None:
        """Forget a client that left before the API was asked."""
        raise NotImplementedError

    def _judge(self, reply: ReplyReader) -> bool:
        """Tell whether the API accepted; refuse the client and return False if not."""
        raise NotImplementedError

    def _refuse(self, status: int, text: str, header_lines: bytes = b"") -> None:
        """Answer the handshake with an error."""
        raise NotImplementedError

    def _turn_off(self, error: ApiError) -> None:
        """Answer the handshake with an error, and stay for what the API has yet to hear."""
        raise NotImplementedError

    def _write(self, wire: bytes) -> None:
        """Write a frame to the socket."""
        raise NotImplementedError

    def _send_close(self, code: int, reason: str) -> None:
        """Write a close frame and see to it that the socket ends."""
        raise NotImplementedError

    def _read_on(self, on: bool) -> None:
        """Start or stop taking messages from the socket."""
        raise NotImplementedError

    def _leave(self, cause: str) -> None:
        """Be the worker's client of this id no longer: pushes look elsewhere.

        Args:
            cause: what ended the connection, one of the causes module.
        """
        raise NotImplementedError

    def _release(self) -> None:
        """Take the id out of the registry; `on_released` follows."""
        raise NotImplementedError

    def _report(self) -> None:
        """Send the DELETE to the API."""
        raise NotImplementedError

    def _settle(self) -> None:
        """Note that the API has heard of the end."""
        raise NotImplementedError

    def _complain(self, exchange: Exchange, cause: str, error: str) -> None:
        """Tell the operator what became of a message or a disconnect; the connection stays."""
        raise NotImplementedError

    # Events of the connect.

    def on_announced(self, generation: int | None = None) -> None:
        """Ask the API: pushes that it makes from now on find this worker.

        Args:
            generation: birth of the connection; None to keep the one that it has.
        """
        if generation is not None:
            self.generation = generation
        if self.left:
            self._abandon()
        else:
            self._ask()

    def on_claimed(self, owned: bool = True) -> None:
        """Open: the registry knows the id, pushes find it.

        Args:
            owned: False when a younger connection has the id already, although this one's connect
                was decided later; then this one gives way at once.
        """
        if self.state != CLAIMING:
            return
        if not owned:
            self.replaced = True
        self.state = OPEN
        slot = self._limits.slot
        slot[c.CONNECTIONS_OPENED] += 1
        if not self._reading:  # its write buffer was full before
            slot[c.CLIENTS_PAUSED] += 1
        self._take_over()
        if self.left:
            self.end(ABNORMAL, NO_CLOSE_FRAME)
        else:
            self._welcome()
            if self.replaced:
                self.close(REPLACED_CODE, "replaced")
            elif self._farewell is not None:
                self.close(*self._farewell)

    # Events of the API.

    def on_reply(self, exchange: Exchange, reply: ReplyReader) -> None:
        """Take the API's answer to a connect, a message or a disconnect."""
        if exchange.event == MESSAGE:
            self.in_flight -= 1
            if reply.status == 200:
                body = reply.body
                if body and self.state == OPEN and not self._reply_back(reply.is_text, body):
                    self._complain(exchange, causes.INVALID_REPLY, "the answer is no UTF-8")
            elif reply.status != 204:
                self._complain(exchange, causes.STATUS, f"status {reply.status}")
            # Asked here, because nearly always there is nothing to proceed with.
            if self._queue or self.state != OPEN or self._farewell is not None:
                self._proceed()
        elif exchange.event == CONNECT:
            if not self._judge(reply):
                return
            # Also when the client has left: the API has accepted this generation, so it is the
            # one that the end must be reported of.
            self.state = CLAIMING
            self._claim()
        else:
            self._settle()
            self._forget()

    def on_parked(self, exchange: Exchange) -> None:
        """Have done: others will tell the API of the end."""
        self._forget()

    def on_failure(self, exchange: Exchange, error: ApiError) -> None:
        """Go on without the API's answer."""
        if exchange.event == MESSAGE:
            self.in_flight -= 1
            self._proceed()
        elif exchange.event == CONNECT:
            if exchange.attempts and not isinstance(error, ApiAbandoned):
                # Nobody knows whether the API has accepted: so it hears of the end in any case.
                self._turn_off(error)
                self._set_end(ABNORMAL, NO_CLOSE_FRAME)
                self._release()
            else:
                self._refuse(error.status, str(error), error.header_lines)
        else:
            self._forget()

    def _reply_back(self, is_text: bool, body: bytes) -> bool:
        """Write the API's answer to the client; tell whether that may be done."""
        slot = self._limits.slot
        if not body.isascii() and is_text and not is_utf8(body):
            # The client would have to fail the connection (RFC 6455, 8.1).
            slot[c.API_REPLIES_INVALID] += 1
            return False
        self.sent += 1
        slot[c.MESSAGES_SENT] += 1
        slot[c.BYTES_SENT] += len(body)
        self._write(encode(TEXT if is_text else BINARY, body))
        return True

    # Events of the client.

    def on_message(self, first_byte: int, payload: bytes) -> None:
        """Pass a message on, now or when it is its turn."""
        limits = self._limits
        slot = limits.slot
        slot[c.MESSAGES_RECEIVED] += 1
        slot[c.BYTES_RECEIVED] += len(payload)
        if self.in_flight < limits.max_in_flight and not self._queue and self.writable:
            self.in_flight += 1
            self.sequence += 1
            self._post(first_byte, payload)
            return
        if self._queue is None:
            self._queue = deque()
        self._queue.append((first_byte, payload))
        slot[c.MESSAGES_QUEUED] += 1
        self._regulate()

    def on_writable(self, writable: bool) -> None:
        """Follow the socket's write buffer: a client that does not read is not read either."""
        self.writable = writable
        if writable:
            self._proceed()
        self._regulate()

    def deliver(self, first_byte: int, payload: bytes) -> int:
        """Write a pushed message to the client; return the outcome."""
        if self.state != OPEN:
            return outcomes.NOT_FOUND
        if not self.writable:
            return outcomes.TOO_SLOW
        slot = self._limits.slot
        self.sent += 1
        slot[c.MESSAGES_SENT] += 1
        slot[c.BYTES_SENT] += len(payload)
        self._write(encode(first_byte, payload))
        return outcomes.OK

    @property
    def wants_messages(self) -> bool:
        """Tell whether the queue has room for what the client sends next."""
        return self._reading

    @property
    def queued(self) -> int:
        """Count the messages that wait for their turn."""
        return len(self._queue) if self._queue else 0

    @property
    def is_leaving(self) -> bool:
        """Tell whether the connection ends as soon as nothing is under way."""
        return self._farewell is not None

    def _proceed(self) -> None:
        """Send what waited for the exchange that has just ended."""
        queue = self._queue
        if queue:
            # No further replies for a client that does not read those it has.
            leaving = self.state >= CLOSING or self._farewell is not None
            can_answer = self.writable or leaving
            while can_answer and queue and self.in_flight < self._limits.max_in_flight:
                self.in_flight += 1
                self.sequence += 1
                self._limits.slot[c.MESSAGES_QUEUED] -= 1
                self._post(*queue.popleft())
            self._regulate()
        if self.state >= CLOSING:
            self._report_when_done()
        elif self._farewell is not None and not self.in_flight and not queue:
            self.close(*self._farewell)

    def _regulate(self) -> None:
        """Stop reading at a full queue, go on at half of it."""
        limit = self._limits.max_queue
        if self._farewell is not None or self.state >= CLOSING:
            return  # what comes now is no message any more
        if self._reading:
            if self.queued >= limit or not self.writable:
                self._set_reading(False)
                self._read_on(False)
        elif self.queued <= limit // 2 and self.writable:
            self._set_reading(True)
            self._read_on(True)

    def _set_reading(self, on: bool) -> None:
        if self.state == OPEN and on != self._reading:
            self._limits.slot[c.CLIENTS_PAUSED] += -1 if on else 1
        self._reading = on

    # The end.

    def end(self, code: int, reason: str, cause: str = causes.LOST) -> None:
        """Take the end of the connection, from whichever side, once.

        Args:
            cause: one of the causes module.
        """
        if self.state == OPEN:
            slot = self._limits.slot
            if not self._reading:
                slot[c.CLIENTS_PAUSED] -= 1
            self._set_end(code, reason)
            slot[c.CONNECTIONS_CLOSED] += 1
            slot[c.of_close(self.close_code, cause)] += 1
            self._leave(cause)
            if self.replaced:
                self._released = True
                self._report_when_done()
            else:
                self._release()
            if self._queue:
                self._proceed()  # it may have waited for the client to read, which is over
        elif self.state == ASKING or self.state == CLAIMING:
            # The API may say ok yet: then it must hear of the end, too.
            self.left = True
        elif self.state < ASKING:
            self.state = CLOSED

    def _set_end(self, code: int, reason: str) -> None:
        self.state = CLOSING
        self.close_code = int(code)  # the frame layer's are of an enumeration
        self.close_reason = reason

    def close(self, code: int, reason: str, cause: str | None = None) -> None:
        """End the connection from this side, with a close frame.

        Args:
            cause: one of the causes module; None for the one that the code stands for.
        """
        if self.state == OPEN:
            self._send_close(code, reason)
            self.end(code, reason, cause or causes.OF_OUR_CODES[code])

    def drain(self, code: int, reason: str) -> None:
        """End the connection from this side when the messages under way are answered.

        What the client sends from now on is not read.
        """
        if not self.in_flight and not self._queue:
            self.close(code, reason)
        elif self.state == OPEN:
            self._farewell = code, reason
            if self._reading:
                self._set_reading(False)
                self._read_on(False)
            self._proceed()

    def replace(self) -> None:
        """Give way to a newer connection of the same client."""
        self.replaced = True
        self.close(REPLACED_CODE, "replaced")  # while still claiming: as soon as it is open

    @property
    def is_owed(self) -> bool:
        """Tell whether the API has yet to hear of the end, as Redis knows."""
        if self.state == CLOSING:
            return self._released and not self.replaced
        return self.state == REPORTING

    def give_up(self) -> None:
        """End a connection of whose loss the API was told already, so that it is lost indeed."""
        if self.state == OPEN:
            self.replaced = True
            self.close(SERVICE_RESTART, "service restart")
        elif self.state == ASKING or self.state == CLAIMING:
            # The API may say yes after it was told of the end, so it is told again.
            self._farewell = SERVICE_RESTART, "service restart"

    def on_released(self, owned: bool) -> None:
        """Learn that the id is out of the registry.

        Args:
            owned: False when a newer connection had taken the id over: the client is connected,
                so that a DELETE would be wrong.
        """
        self._released = True
        if not owned:
            self.replaced = True
        self._report_when_done()

    def _report_when_done(self) -> None:
        """Report the end after the last message, so that the API sees it last."""
        if self.state != CLOSING or not self._released or self.in_flight or self._queue:
            return
        if self.replaced:
            self._forget()
        else:
            self.state = REPORTING
            self._report()

    def _forget(self) -> None:
        """Have done: nothing more is to be said to the API."""
        self.state = CLOSED
