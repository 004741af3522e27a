"""Bring one client from the first byte of its request to the 101, or to a refusal.

The head is read and checked; the gate says when the API may be asked; Redis marks the connect and
gives it its generation; the API decides; the registry gets the id; the 101 is written, and after it
what had to wait: frames that the client sent early, and pushes that the API made early.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from . import causes, outcomes
from . import counters as c
from .address_limit import AddressLimit
from .ask import Ask
from .errors import ApiError, HandshakeError
from .exchange import CONNECT, Exchange
from .gate import retry_after
from .handshake import (
    allows_retry,
    error_response,
    is_for_client,
    is_nearly_ok,
    plain_address,
    refusal,
)
from .http_wire import ReplyReader
from .hub import Hub
from .opening import Opening
from .session import ASKING, WAITING, Session

MAX_EARLY_BYTES: Final = 65_536
_HOLD_S: Final = 1.0
# How long a client that was refused before it said anything has to read so.
_REFUSED_LINGER_S: Final = 2.0


class Admission(Session):
    """Be the first part of a client's life; `Client` is the rest.

    Args:
        hub: what the worker's clients share.
    """

    __slots__ = ("_close_by", "_hub", "_opening", "_transport", "subprotocol")

    def __init__(self, hub: Hub) -> None:
        super().__init__(hub)
        self._hub = hub
        # None before connection_made and after connection_lost.
        self._transport: asyncio.Transport | None = None
        # None once the connection is open or refused.
        self._opening: Opening | None = Opening(hub.serve_http is not None)
        # Time at which the socket is dropped, 0.0 while there is none.
        self._close_by = 0.0
        self.subprotocol = b""

    # What the rest of the client's life does.

    def _read_frames(self, data: bytes) -> None:
        """Read frames."""
        raise NotImplementedError

    def _linger(self) -> None:
        """Close so that the client can read the last bytes."""
        raise NotImplementedError

    def _drop_after(self, delay_s: float) -> None:
        """Drop the socket if it is still there by then."""
        raise NotImplementedError

    def apply(self, ask: Ask) -> tuple[int, bytes]:
        """Do what is asked of this client; return the outcome and a body of its own."""
        raise NotImplementedError

    # The request.

    def _read_head(self, data: bytes) -> None:
        opening = self._opening
        if opening is None or opening.head is None:
            return  # refused already: what still comes is not read
        if opening.raw is not None:
            opening.raw += data
        head = opening.head
        hub = self._hub
        try:
            if not head.feed(data):
                return
            if hub.serve_http is not None and not head.wants_websocket:
                self._hand_over(opening)
                return
            peer = self._peer()
            opening.handshake = hub.policy.check(head, peer)
        except HandshakeError as error:
            self._refuse(error.status, str(error), error.header_lines)
            return
        if hub.limit is not None and hub.policy.trusts(peer):
            remote = opening.handshake.remote
            if remote != peer and not self._count_address(hub.limit, remote):
                return
        opening.early += head.rest
        opening.head = opening.raw = None
        self._enter(opening.handshake.client_id)

    def _refuse_at_the_door(self) -> None:
        """Refuse a client that there is no file for; the next may have to wait to be told so."""
        hub = self._hub
        hub.note_full()
        self._refuse(503, "the gateway has as many clients as it can bear", retry_after(1.0))
        self._drop_after(min(_REFUSED_LINGER_S, hub.handshake_timeout_s))

    def _count_address(self, limit: AddressLimit, address: str) -> bool:
        """Count a connection of an address; refuse it and return False if it is one too many."""
        if not limit.enter(self, address):
            return True
        self._hub.slot[c.CONNECTIONS_LIMITED] += 1
        if limit.is_flood(self) and self._transport is not None:
            self._transport.abort()
        else:
            self._refuse(429, "too many connections from this address", retry_after(1.0))
        return False

    def _hand_over(self, opening: Opening) -> None:
        """Let the push side serve a plain HTTP request on this port (--single-port)."""
        transport, self._transport = self._transport, None
        assert transport is not None and opening.raw is not None
        assert self._hub.serve_http is not None
        self._opening = None
        self._hub.socket_ended()
        if self._hub.limit is not None:
            self._hub.limit.leave(self)
        self._forget()
        self._hub.serve_http(transport, bytes(opening.raw))

    def _peer(self) -> str:
        assert self._transport is not None
        peer = self._transport.get_extra_info("peername")
        return plain_address(peer[0]) if peer else "0.0.0.0"  # noqa: S104  (gone already)

    # The connect.

    def _enter(self, client_id: bytes) -> None:
        hub = self._hub
        if hub.refusing:
            self._refuse(503, "the gateway is shutting down", retry_after(1.0))
            return
        self.state = WAITING
        self.client_id = client_id
        wait_s = hub.gate.enter(self)
        if wait_s:
            self.turn_back(wait_s)

    def on_admitted(self) -> None:
        """Mark the connect; the API is asked when Redis has given it its generation."""
        hub = self._hub
        self.state = ASKING
        hub.connecting[self.client_id] = self
        hub.registry.announce(self.client_id, self)

    def turn_back(self, wait_s: float) -> None:
        """Refuse a client for whom the API has no time; it may come again."""
        text = "the gateway is shutting down" if self._hub.refusing else "too many are connecting"
        self._refuse(503, text, retry_after(wait_s))

    def on_announced(self, generation: int | None = None) -> None:
        """Take the birth time that Redis gave, or one of this host's while Redis is away."""
        super().on_announced(generation or self._hub.next_generation())

    def _ask(self) -> None:
        hub = self._hub
        assert self._opening is not None and self._opening.handshake is not None
        handshake, client_id = self._opening.handshake, self.client_id
        wire = hub.encoder.connect(
            client_id,
            handshake.query,
            self.generation,
            b"%b/%b" % (hub.push_url, client_id),
            handshake.header_lines,
        )
        hub.upstream.submit(Exchange(self, CONNECT, wire))

    def _abandon(self) -> None:
        self._hub.gate.leave(self)
        self._leave_connecting()
        self._opening = None
        self._forget()

    def _judge(self, reply: ReplyReader) -> bool:
        opening = self._opening
        assert opening is not None and opening.handshake is not None
        self._hub.gate.leave(self)
        if reply.status != 200 or reply.body != b"ok":
            if not is_for_client(reply):
                text = f"status {reply.status}"
                self._hub.journal.complain("connect refused", self.client_id, causes.STATUS, text)
            elif reply.status == 200 and is_nearly_ok(reply.body):
                text = "connect refused: the API's answer must be ok and nothing else"
                self._hub.journal.hint(text, self.client_id)
            if is_for_client(reply):
                status = 403 if reply.status == 200 else reply.status
                self._note_refusal(status, "the API said no")
            self._turn_away(refusal(reply))
            return False
        try:
            opening.response, self.subprotocol = self._hub.policy.accept(opening.handshake, reply)
            self.retry_safe = allows_retry(reply)
        except HandshakeError as error:
            self._hub.journal.complain(
                "connect refused", self.client_id, causes.INVALID_REPLY, str(error)
            )
            if not self.left:
                self._send_refusal(error_response(error.status, f"{error}\n".encode()))
            # The API has accepted; so it hears of the end like that of any other client.
            self.left = True
        return True

    def _claim(self) -> None:
        self._hub.registry.claim(self.client_id, self.generation, self)

    def _welcome(self) -> None:
        opening, self._opening = self._opening, None
        hub = self._hub
        assert opening is not None and self._transport is not None
        self._close_by = 0.0
        self._transport.write(opening.response)
        assert opening.handshake is not None
        c.OPENING_TIME.observe(hub.slot, time.monotonic_ns() // 1000 - opening.began_us)
        hub.journal.opened(self, opening.handshake.remote)
        for ask in opening.take_held():
            ask.finish(*self.apply(ask))
        if len(opening.early) > MAX_EARLY_BYTES:
            self._transport.resume_reading()
        if opening.early:
            self._read_frames(bytes(opening.early))
        if hub.farewell is not None:
            self.close(*hub.farewell)

    def _refuse(self, status: int, text: str, header_lines: bytes = b"") -> None:
        self._note_refusal(status, text)
        self._hub.trace_refusal(self.client_id, status, text)
        self._turn_away(error_response(status, f"{text}\n".encode(), b"", header_lines))

    def _note_refusal(self, status: int, reason: str) -> None:
        opening = self._opening
        if opening is not None and opening.handshake is not None:
            remote = opening.handshake.remote
        else:
            remote = self._peer() if self._transport is not None else ""
        self._hub.journal.connect_refused(self.client_id, status, reason, remote)

    def _turn_off(self, error: ApiError) -> None:
        self._hub.gate.leave(self)
        if not self.left:
            text = f"{error}\n".encode()
            self._send_refusal(error_response(error.status, text, b"", error.header_lines))
        self.left = True

    def _turn_away(self, response: bytes) -> None:
        self._send_refusal(response)
        self._hub.gate.leave(self)
        if self.generation:
            self._leave_connecting()
        self._opening = None
        self._forget()

    def _send_refusal(self, response: bytes) -> None:
        self._hub.slot[c.of_status(response)] += 1
        if self._transport is not None:
            self._transport.write(response)
            self._linger()

    def _leave_connecting(self) -> None:
        """Take the pending mark back, and send pushes that waited for it on their way."""
        hub = self._hub
        if hub.connecting.get(self.client_id) is self:
            del hub.connecting[self.client_id]
        if not hub.is_over:
            hub.registry.withdraw(self.client_id, self.generation)
        if self._opening is not None:
            for ask in self._opening.take_held():
                hub.reroute(ask)

    # Asks that come early.

    def hold(self, ask: Ask) -> None:
        """Keep an ask until the upgrade is finished."""
        if self._opening is None:
            ask.finish(outcomes.NOT_FOUND, b"")
        elif self._opening.hold(ask):
            self._hub.sweeper.schedule(_Patience(self, ask), _HOLD_S)

    def hold_no_longer(self, ask: Ask) -> None:
        """Send an ask on its way if the API is still deciding."""
        opening = self._opening
        if self.state == ASKING and opening is not None and ask in opening.held:
            opening.held.remove(ask)
            ask.waited = True
            self._hub.reroute(ask)


class _Patience:
    """Bound the time for which an ask is held.

    An API may push to a client from the very handler that decides on its connect, and wait for
    the outcome before it answers; it must not wait for itself.
    """

    __slots__ = ("_ask", "_client")

    def __init__(self, client: Admission, ask: Ask) -> None:
        self._client = client
        self._ask = ask

    def on_tick(self, now: float) -> float:
        """Let the ask go."""
        self._client.hold_no_longer(self._ask)
        return 0.0
