"""Serve the push port: HTTP/1.1 requests of the API in, asks to the router, honest answers back.

Requests on one connection may be pipelined. Each is routed as it arrives, and the answers are
written in the order of the requests (RFC 9112, 9.3.2).
"""

from __future__ import annotations

import asyncio
import hmac
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import Final, cast

import httptools

from . import counters as c
from . import outcomes
from .ask import Ask
from .client_paths import IDS, ClientPaths
from .door import Door
from .envelope import DESCRIBE, PUSH
from .errors import HandshakeError
from .handshake import (
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    check_host,
    plain_address,
    split_target,
    to_origin_form,
)
from .http_wire import MAX_FRAMING
from .known_fields import KnownFields
from .media_type import charset_of, is_binary
from .push_request import OK, encode_answer, fill
from .sweeper import Sweeper

_IDLE_TIMEOUT_S: Final = 75.0
_LINGER_S: Final = 2.0
# One that was idle for so long has to go when others wait for its place.
_EXPENDABLE_S: Final = 1.0
_MAX_PIPELINED: Final = 256
# What may surround a field's value and is no part of it (RFC 9112, 5.1); the parser leaves it.
_BLANKS: Final = b" \t"
# Kind of a request that has not said what it asks for, beside those of envelopes. It counts as a
# push when it is refused; looking a client up and closing one do not.
_UNREAD: Final = 0
_NO_PUSHES: Final = (b"GET", b"HEAD", b"DELETE")
# Of these a request has one at most. Of two, somebody in front may have believed the other one; the
# parser looks after Content-Length.
_SINGLE: Final = frozenset(
    (b"authorization", b"content-type", b"host", b"origin", b"ws2api-generation")
)


@dataclass(slots=True)
class PushHub:
    """Hold what all connections to the push port of a worker share."""

    slot: memoryview
    sweeper: Sweeper
    route: Callable[[Ask], None]
    max_message_size: int
    token: bytes | None
    """What the Authorization header must hold, None when anyone may push."""
    totals: Callable[[], bytes]
    """Return the plain counters for GET /."""
    connections: set[PushConnection]
    share: int = sys.maxsize
    """How many connections there are files for in any case."""
    doors: Sequence[Door] = ()
    """Where connections come in."""
    on_surplus: Callable[[int], None] = lambda change: None
    """Learn that there is one beyond the share more (1) or less (-1)."""
    has_room: Callable[[], bool] = lambda: True
    """Tell whether there is a file for one beyond the share."""
    on_refused: Callable[[bytes, int, str, str], None] = lambda *_: None
    """Learn of a push that was refused: id, status, reason, address."""
    paths: ClientPaths = IDS[False]
    """Where in a target the id is."""
    known: KnownFields = field(init=False)

    def __post_init__(self) -> None:
        self.known = KnownFields(self.paths.takes_several)

    def enter(self, connection: PushConnection) -> None:
        """Count a connection; if there is no file for another, let the next ones wait."""
        self.connections.add(connection)
        if len(self.connections) > self.share:
            self.on_surplus(1)
        if self._is_full:
            for door in self.doors:
                door.shut()

    def leave(self, connection: PushConnection) -> None:
        """Make room."""
        if len(self.connections) > self.share:
            self.on_surplus(-1)
        self.connections.discard(connection)
        self._let_in()

    def make_room(self, now: float) -> None:
        """While connections have to wait, end the one that was of no use for longest; each tick."""
        if not any(door.is_shut for door in self.doors):
            return
        idle = [each for each in self.connections if each.is_idle]
        if self._is_full and idle:
            longest = min(idle, key=lambda each: each.active_at)
            if longest.active_at <= now - _EXPENDABLE_S:
                longest.close_when_idle()
        self._let_in()

    @property
    def _is_full(self) -> bool:
        return len(self.connections) >= self.share and not self.has_room()

    def _let_in(self) -> None:
        if not self._is_full:
            for door in self.doors:
                door.reopen()


class _Refused(Exception):
    """Leave the parser: the outcome is in `PushConnection._refused`."""


class PushRequest(Ask):
    """Be an ask that came over a connection of the push port."""

    __slots__ = ("_began_ns", "_connection", "answer", "is_kept_alive", "wants_no_body")

    def __init__(self, connection: PushConnection) -> None:
        Ask.__init__(self)
        self._connection = connection
        self.answer = b""
        """The whole HTTP answer; empty until the outcome is known."""
        self.wants_no_body = False
        self.is_kept_alive = False
        """Whether the connection stays open because the client, of HTTP/1.0, has asked for it."""
        self._began_ns = monotonic_ns()

    @property
    def took_us(self) -> int:
        """How long ago it was read."""
        return (monotonic_ns() - self._began_ns) // 1000

    def finish(self, outcome: int, body: bytes) -> None:
        """Answer the API."""
        connection = self._connection
        if self.kind == PUSH:
            took = c.REMOTE_PUSH_LATENCY if self.forwarded else c.LOCAL_PUSH_LATENCY
            took.observe(connection.slot, (monotonic_ns() - self._began_ns) // 1000)
            connection.slot[outcomes.ANSWERS[outcome][2]] += 1
        elif self.kind == _UNREAD:
            connection.slot[outcomes.ANSWERS[outcome][2]] += 1
        self.answer = connection.encode_answer(self, outcome, body)
        connection.write_answers()


class PushConnection(asyncio.Protocol):
    """Read requests from one connection; it is the sink of its own parser.

    Args:
        hub: what the worker's push connections share.
        shows_totals: whether GET / answers with the counters (--single-port).
    """

    def __init__(self, hub: PushHub, shows_totals: bool = False) -> None:
        self._hub = hub
        self.slot = hub.slot
        """The worker's counters."""
        self._shows_totals = shows_totals
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        # Requests whose answers are not written yet, oldest first.
        self._pending: deque[PushRequest] = deque()
        self.active_at = hub.sweeper.now
        """Time at which something came last."""
        # True after the last answer that this connection will carry.
        self._closing = False
        # True while the answers are not read, so that their buffer is full.
        self._blocked = False
        # True when the API may still be sending, and when the last answer is written.
        self._lingers = self._ended = False
        # True while data_received runs: answers of one packet are written together.
        self._reading = False
        # True while no request is under way, and none that the parser must see the rest of.
        self._is_between = True
        # The last push in the packet that is being read, if its fields are worth knowing.
        self._plain_push: PushRequest | None = None
        # The request under way.
        self._url = b""
        # Those of its fields that it has once at most.
        self._fields: dict[bytes, bytes] = {}
        # The last Content-Type, and what it says; most clients send the same one always.
        self._type = b""
        self._is_binary, self._is_utf8 = False, True
        # Values of those that are lists, with commas.
        self._codings = self._transfer_codings = b""
        self._announced_size = 0
        self._is_chunked = False
        self._header_count = 0
        # True from the first byte of a head to its last, and while it began in this packet.
        self._in_head = self._head_is_new = False
        # Bytes that were fed since that packet.
        self._fed_size = 0
        # Bytes of the body that the parser does not see, see _parse.
        self._body_left = 0
        self._expects_continue = False
        # Whether it is of HTTP/1.0.
        self._is_old = False
        # The last Host that was found in order; most clients send the same one always.
        self._sound_host: bytes | None = None
        # True while a parser reads a head that is not the request's, see _read_chunks.
        self._is_deaf = False
        self._head_size = 0
        self._body = b""
        # The body so far, None while it came in one piece; a bytearray, because a body of a million
        # tiny chunks must not cost more than its size.
        self._more: bytearray | None = None
        self._body_size = 0
        # Outcome that was decided before the request was complete, None while it is in order.
        self._refused: tuple[int, bytes] | None = None

    # The socket.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for requests."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._hub.enter(self)
        self._hub.sweeper.schedule(self, _IDLE_TIMEOUT_S)

    def data_received(self, data: bytes) -> None:
        """Parse, route, and write what could be answered at once."""
        if self._closing:
            return
        hub = self._hub
        self.active_at = hub.sweeper.now
        if self._is_between and (push := hub.known.recognise(data)) is not None:
            request = PushRequest(self)
            request.client_id, request.code, request.payload = push
            self._admit(request)
            hub.route(request)
            return
        self._reading = True
        try:
            self._read(data)
        except (httptools.HttpParserError, _Refused):
            if not self._closing:
                refused = self._refused
                if refused is None:
                    refused = outcomes.BAD_REQUEST, b"malformed HTTP request\n"
                self._answer_and_close(*refused)
        finally:
            self._reading = False
        self.write_answers()

    def _read(self, data: bytes) -> None:
        """Parse; learn the fields of a plain push that is all there is in a packet."""
        was_between = self._is_between
        self._plain_push = None
        self._parse(data)
        push = self._plain_push
        if push is not None and was_between and self._is_between:
            self._hub.known.remember(data, push.code, push.payload)
        self._plain_push = None

    def _parse(self, data: bytes) -> None:
        """Feed the parser, but for the body of a request that offers an upgrade.

        Clients that would rather speak HTTP/2 send `Upgrade: h2c` with their requests, which
        RFC 9110, 7.8 lets a server ignore. The parser stops at the end of such a head and leaves
        the body to us. One that is chunked is for another parser.
        """
        while data and not self._closing:
            if self._body_left:
                part, data = data[: self._body_left], data[self._body_left :]
                self._body_left -= len(part)
                self.on_body(part)
                if not self._body_left:
                    self._complete()
                continue
            self._head_is_new = False
            try:
                self._parser.feed_data(data)
                # The parser keeps a header or trailer to itself until it is whole. A request that
                # began in this packet is bounded by the packet.
                if (self._in_head or self._is_chunked) and not self._head_is_new:
                    self._fed_size += len(data)
                    if self._fed_size > MAX_HEAD_BYTES + MAX_FRAMING * self._body_size:
                        self._refuse(outcomes.HEAD_TOO_LARGE, b"")
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                if self._parser.get_method() == b"CONNECT":
                    self._refuse(outcomes.BAD_REQUEST, b"no upgrade on this port\n")
                if self._is_chunked:
                    self._read_chunks()
                    continue
                self._body_left = self._announced_size
                if not self._body_left:
                    self._complete()

    def _read_chunks(self) -> None:
        """Go on with a parser that has seen the same head, but for the offer of an upgrade."""
        before = self._parser
        connection = b"keep-alive" if before.should_keep_alive() else b"close"
        self._parser = httptools.HttpRequestParser(self)
        self._is_deaf = True
        self._parser.feed_data(
            b"%b / HTTP/%b\r\nConnection: %b\r\nTransfer-Encoding: chunked\r\n\r\n"
            % (before.get_method(), before.get_http_version().encode(), connection)
        )
        self._is_deaf = False

    def eof_received(self) -> bool:
        """Answer what is still open before closing."""
        self._closing = True
        self._lingers = False
        self.write_answers()
        return bool(self._pending)

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave; asks under way still reach their clients."""
        self._transport = None
        self._hub.leave(self)
        # The parser refers back to this object; without the cycle the last body goes at once.
        del self._parser
        self._body, self._more = b"", None

    def pause_writing(self) -> None:
        """Read no more requests while the answers are not read."""
        self._blocked = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Read on, unless too much is pending for another reason."""
        self._blocked = False
        if (
            self._transport is not None
            and not self._transport.is_closing()
            and len(self._pending) < _MAX_PIPELINED
        ):
            self._transport.resume_reading()

    def on_tick(self, now: float) -> float:
        """Close a connection that has been silent for long."""
        if self._transport is None:
            return 0.0
        left_s = self.active_at + _IDLE_TIMEOUT_S - now
        if left_s > 0 or self._pending:
            return max(left_s, 1.0)
        if self._transport.is_closing():
            self._transport.abort()  # it does not read what is still to be written
            return 0.0
        self._transport.close()
        return _LINGER_S

    def abort(self) -> None:
        """Drop the socket at once."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def is_idle(self) -> bool:
        """Tell whether no request is under way, or being read."""
        return self._is_between and not self._pending and not self._closing

    def close_when_idle(self) -> None:
        """Take no further request; close when the last is answered."""
        self._closing = True
        self.write_answers()

    # Called by httptools.

    def on_message_begin(self) -> None:
        if self._is_deaf:
            return
        self._is_between = False
        self._url = b""
        self._fields = {}
        self._codings = self._transfer_codings = b""
        self._expects_continue = self._is_chunked = False
        self._in_head = self._head_is_new = True
        self._fed_size = 0
        self._head_size = self._header_count = self._body_size = self._announced_size = 0
        self._body = b""
        self._more = None
        self._refused = None

    def on_url(self, url: bytes) -> None:
        if self._is_deaf:
            return
        self._url += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_deaf:
            return
        self._header_count += 1
        self._count(len(name) + len(value))
        if not self._in_head:
            return  # a trailer field, which must not pass for a header (RFC 9110, 6.5.1)
        name = name.lower()
        if name in _SINGLE:
            if name in self._fields:
                self._refuse(outcomes.BAD_REQUEST, b"%b is sent twice\n" % name)
            self._fields[name] = value
        elif name == b"content-length":
            # The parser has found it to be a number, which may begin with any count of zeros.
            self._announced_size = int(value.rstrip(_BLANKS).lstrip(b"0")[:20] or b"0")
        elif name == b"transfer-encoding":
            self._is_chunked = True
            self._transfer_codings += b"," + value
        elif name == b"content-encoding":
            self._codings += b"," + value
        elif name == b"expect":
            self._expects_continue = value.rstrip(_BLANKS).lower() == b"100-continue"

    def on_headers_complete(self) -> None:
        if self._is_deaf:
            return
        self._in_head = False
        self._is_old = self._parser.get_http_version() == "1.0"
        host = self._fields.get(b"host")
        if (host is None or host != self._sound_host) and not self._is_old:  # which had no Host
            self._check_host(host)
        if self._hub.token is not None and not hmac.compare_digest(
            self._fields.get(b"authorization", b"").rstrip(_BLANKS), self._hub.token
        ):
            self._refuse(outcomes.UNAUTHORIZED, b"")
        elif b"origin" in self._fields and self._hub.token is None:
            # A browser lets any page send a POST to 127.0.0.1, and says so with an Origin; with a
            # token it would have to ask first.
            self._refuse(outcomes.UNAUTHORIZED, b"a web page may not push without a token\n")
        if self._is_chunked:
            self._check_transfer()
        if self._announced_size > self._hub.max_message_size:
            self._refuse(outcomes.TOO_LARGE, b"")
        elif (
            self._expects_continue
            and not self._pending  # the answers to those come first; the client goes on by itself
            and self._transport is not None
            and not self._is_old
        ):
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _check_transfer(self) -> None:
        """Refuse a body that has another coding than the chunked one (RFC 9112, 6.1 and 6.3).

        The parser would do the latter itself, but not of a request that offers an upgrade.
        """
        if self._is_old:  # 6.1: whoever passed it on may have seen its end elsewhere
            self._refuse(outcomes.BAD_REQUEST, b"HTTP/1.0 has no Transfer-Encoding\n")
        names = _names(self._transfer_codings, b"")
        if names[-1:] != [b"chunked"]:
            self._refuse(outcomes.BAD_REQUEST, b"the last Transfer-Encoding must be chunked\n")
        if len(names) > 1:
            self._refuse(outcomes.UNKNOWN_TRANSFER, b"")

    def _check_host(self, host: bytes | None) -> None:
        try:
            check_host(None if host is None else host.rstrip(_BLANKS), self._url)
        except HandshakeError as error:
            self._refuse(outcomes.BAD_REQUEST, f"{error}\n".encode())
        if self._url.startswith(b"/"):
            self._sound_host = host

    def on_body(self, body: bytes) -> None:
        self._body_size += len(body)
        if self._body_size > self._hub.max_message_size:
            self._refuse(outcomes.TOO_LARGE, b"")
        if not self._body:
            self._body = body
        else:
            if self._more is None:
                self._more = bytearray(self._body)
            self._more += body

    def on_message_complete(self) -> None:
        if not self._parser.should_upgrade():
            self._complete()

    def _complete(self) -> None:
        """Route a request that is whole."""
        self._is_chunked = False
        self._is_between = True
        if self._closing:
            return
        method = self._parser.get_method()
        if self._more is not None:
            self._body, self._more = bytes(self._more), None
        request = PushRequest(self)
        if not self._parser.should_keep_alive():
            self._closing = self._lingers = True  # RFC 9112, 9.6
        elif self._is_old:
            request.is_kept_alive = True  # and has to be told so (RFC 9112, C.2.2)
        # No push, whose time counts, before `fill` says so.
        request.kind = DESCRIBE if method in _NO_PUSHES else _UNREAD
        request.wants_no_body = method == b"HEAD"  # RFC 9110, 9.3.2
        self._admit(request)
        if self._shows_totals and method == b"GET" and to_origin_form(self._url) == b"/":
            request.finish(outcomes.OK, self._hub.totals())
            return
        type_ = self._fields.get(b"content-type", b"")
        if type_ != self._type:
            self._type, self._is_binary = type_, is_binary(type_)
            self._is_utf8 = self._is_binary or not charset_of(type_)
        if method == b"POST" and (self._codings or not self._is_utf8):
            unknown = self._find_unknown()
            if unknown:
                self._body = b""
                request.finish(unknown, b"")
                return
        generation = None
        if b"ws2api-generation" in self._fields:
            generation = self._fields[b"ws2api-generation"].rstrip(_BLANKS)
        refused = fill(
            request, method, self._url, generation, self._is_binary, self._body, self._hub.paths
        )
        self._body = b""  # an idle connection must not keep it
        if refused is not None:
            request.finish(*refused)
            return
        if method == b"POST" and self._is_plain():
            self._plain_push = request
        self._hub.route(request)

    def _find_unknown(self) -> int:
        """Return the outcome of a message in a form that is not known here; 0 if it is known."""
        if _names(self._codings, b"identity"):
            return outcomes.UNKNOWN_CODING
        return 0 if self._is_utf8 else outcomes.UNKNOWN_CHARSET

    def _is_plain(self) -> bool:
        """Tell whether a push says nothing but where to, what, and of which type."""
        return (
            b"ws2api-generation" not in self._fields
            and self._url.startswith(b"/")
            and not self._expects_continue
            and not self._closing
            and not self._parser.should_upgrade()
            and not self._is_old
        )

    def _admit(self, request: PushRequest) -> None:
        """Give a request its place in the order of the answers."""
        self._pending.append(request)
        if len(self._pending) >= _MAX_PIPELINED and self._transport is not None:
            self._transport.pause_reading()

    def _count(self, size: int) -> None:
        self._head_size += size
        if self._head_size > MAX_HEAD_BYTES or self._header_count > MAX_HEADERS:
            self._refuse(outcomes.HEAD_TOO_LARGE, b"")

    def _refuse(self, outcome: int, body: bytes) -> None:
        """Give up the request in the middle, and the connection with it."""
        self._refused = outcome, body
        raise _Refused

    # Answers.

    def encode_answer(self, request: PushRequest, outcome: int, body: bytes) -> bytes:
        """Return the HTTP answer to an outcome."""
        if not (outcome or body or self._closing or request.wants_no_body or request.is_kept_alive):
            return OK  # as nearly always
        if outcome and request.kind <= PUSH:  # not OK
            self._note_refusal(request, outcome, body)
        is_last = self._closing and bool(self._pending) and self._pending[-1] is request
        return encode_answer(
            outcome,
            body,
            is_last=is_last,
            is_kept_alive=request.is_kept_alive,
            with_body=not request.wants_no_body,
        )

    def _note_refusal(self, request: PushRequest, outcome: int, body: bytes) -> None:
        status, text, _ = outcomes.ANSWERS[outcome]
        reason = (body or text).decode().strip()
        client_id = request.client_id or self._meant_id()
        peer = self._transport.get_extra_info("peername") if self._transport is not None else None
        remote = plain_address(peer[0]) if peer else ""
        self._hub.on_refused(client_id, int(status[:3]), reason, remote)

    def _meant_id(self) -> bytes:
        """Return the id in a request that was refused before its end; empty for none."""
        try:
            return split_target(self._url, self._hub.paths)[0]
        except HandshakeError:
            return b""

    def write_answers(self) -> None:
        """Write the answers that are due, in the order of their requests."""
        if self._reading:
            return
        pending = self._pending
        ready: list[bytes] = []
        was_full = len(pending) >= _MAX_PIPELINED
        while pending and pending[0].answer:
            ready.append(pending.popleft().answer)
        transport = self._transport
        if transport is None:
            return
        if ready:
            transport.write(ready[0] if len(ready) == 1 else b"".join(ready))
            if was_full and len(pending) < _MAX_PIPELINED and not self._blocked:
                transport.resume_reading()
        if self._closing and not pending and not self._ended:
            self._ended = True
            self._end(transport)

    def _end(self, transport: asyncio.Transport) -> None:
        """Close; where unread bytes would turn that into a reset, give the peer time to read."""
        if self._lingers and transport.can_write_eof():
            transport.write_eof()
            self.active_at = self._hub.sweeper.now + _LINGER_S - _IDLE_TIMEOUT_S
            self._hub.sweeper.schedule(self, _LINGER_S)
        else:
            transport.close()

    def _answer_and_close(self, outcome: int, body: bytes) -> None:
        self._closing = self._lingers = True
        request = PushRequest(self)
        request.kind = _UNREAD
        self._pending.append(request)
        request.finish(outcome, body)


def _names(values: bytes, without: bytes) -> list[bytes]:
    """Split a list (RFC 9110, 5.6.1); leave one name out."""
    names = [name.strip().lower() for name in values.split(b",")]
    return [name for name in names if name and name != without]
