"""Any bytes are requests, each of which gets exactly one answer, in order, or the connection ends.

The asks are the same in every split, and what offers another protocol says the same as what does
not. Nothing leaves the connection but asks that are sound.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, cast

from ws2api.gateway import outcomes
from ws2api.gateway.ask import Ask
from ws2api.gateway.client_id import normalise_client_id
from ws2api.gateway.counters import METRICS
from ws2api.gateway.envelope import CLOSE, DESCRIBE, PUSH
from ws2api.gateway.frames import BINARY, TEXT, is_utf8
from ws2api.gateway.push import PushConnection, PushHub
from ws2api.gateway.sweeper import Sweeper

from .http import TOKENS, read_message
from .splits import splits

DICTIONARY = (
    *TOKENS,
    *(b"Ws2api-Generation: 17\r\n", b"Authorization: Bearer t\r\n", b"?code=4000&reason=bye"),
    *(b"POST /me HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi", b"GET /me HTTP/1.1\r\n\r\n"),
)

MAX_MESSAGE_SIZE: Final = 100
_STATUSES: Final = {200, 400, 401, 404, 405, 413, 415, 431, 501}
_OFFER: Final = re.compile(rb"^upgrade:", re.IGNORECASE | re.MULTILINE)

AskFields = tuple[int, bytes, int, int, bytes]


class _Transport:
    """Be a socket whose other end reads everything."""

    def __init__(self) -> None:
        self.written = b""
        self.has_ended = False

    def write(self, data: bytes) -> None:
        assert data
        assert not self.has_ended
        self.written += data

    def get_extra_info(self, name: str) -> tuple[str, int]:
        assert name == "peername"
        return "192.0.2.7", 4711

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        assert not self.has_ended
        self.has_ended = True

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        self.has_ended = True


class _Clock:
    """Stand still."""

    now = 1000.0

    def schedule(self, timed: object, delay_s: float) -> None:
        pass


@dataclass
class _Run:
    """Lead one connection through its life.

    Args:
        at_once: whether the router answers before it returns, or when all has been sent.
    """

    at_once: bool
    asks: list[Ask] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slot = memoryview(bytearray(8 * len(METRICS))).cast("q")
        hub = PushHub(
            slot=self.slot,
            sweeper=cast(Sweeper, _Clock()),
            route=self._route,
            max_message_size=MAX_MESSAGE_SIZE,
            token=None,
            totals=lambda: b"",
            connections=set(),
        )
        self.connection = PushConnection(hub)
        self.transport = _Transport()
        self.connection.connection_made(cast(Any, self.transport))

    def _route(self, ask: Ask) -> None:
        self.asks.append(ask)
        if self.at_once:
            self._finish(len(self.asks) - 1)

    def _finish(self, number: int) -> None:
        outcome = outcomes.NOT_FOUND if number % 3 == 2 else outcomes.OK
        self.asks[number].finish(outcome, b"ask %d" % number)

    def feed(self, pieces: Iterable[bytes]) -> list[AskFields]:
        """Feed the pieces and the end of the stream; return what was asked."""
        for piece in pieces:
            self.connection.data_received(piece)
        stays_open = self.connection.eof_received()
        if not self.at_once:
            assert stays_open or not self.asks or self.transport.has_ended
            for number in reversed(range(len(self.asks))):
                self._finish(number)
        assert self.transport.has_ended or not stays_open
        self._check_answers()
        self.connection.connection_lost(None)
        return [(a.kind, a.client_id, a.generation, a.code, a.payload) for a in self.asks]

    def _check_answers(self) -> None:
        wire = self.transport.written
        bodies, count, is_last = [], 0, False
        while wire:
            assert not is_last, self.transport.written
            answer = read_message(wire)
            wire = answer.rest
            if answer.status == 100:
                continue
            assert answer.status in _STATUSES, answer
            count += 1
            is_last = answer.get(b"connection") == b"close"
            size = int(answer.get(b"content-length") or b"-1")
            assert size > 0, answer
            body = wire[:size]
            if body.startswith(b"HTTP/1.1 ") or not body:
                continue  # it answers a HEAD
            assert len(body) == size, answer
            wire = wire[size:]
            if body.startswith(b"ask "):
                bodies.append(body)
        assert bodies == [b"ask %d" % number for number in range(len(self.asks))]
        counted = (self.slot[i] for i, each in enumerate(METRICS) if each.name == "pushes")
        # Looking a client up and closing one are answered, but no pushes.
        assert sum(counted) <= count, "more outcomes than answers"
        assert count - len(self.asks) <= 256


def check(data: bytes) -> None:
    """Send the bytes, in several splits, to routers that answer soon or late."""
    whole = _Run(at_once=True).feed([data])
    for ask in whole:
        _assert_sound(*ask)
    assert _Run(at_once=False).feed([data]) == whole
    for pieces in splits(data):
        assert _Run(at_once=True).feed(pieces) == whole, f"in {len(pieces)} pieces"
    without_offer = _OFFER.sub(b"xpgrade:", data)
    if without_offer != data:
        plain = _Run(at_once=True).feed([without_offer])
        assert [_alike(a) for a in whole] == [_alike(a) for a in plain]


def _assert_sound(kind: int, client_id: bytes, generation: int, code: int, payload: bytes) -> None:
    assert normalise_client_id(client_id) == client_id
    assert 0 <= generation < 1 << 64
    assert len(payload) <= (MAX_MESSAGE_SIZE if kind == PUSH else 123)
    if kind == PUSH:
        assert code == BINARY or (code == TEXT and is_utf8(payload))
    elif kind == CLOSE:
        assert 1000 <= code <= 4999
        assert is_utf8(payload)
    else:
        assert kind == DESCRIBE


def _alike(ask: AskFields) -> AskFields:
    """Return the ask as if there were no difference between u and x."""
    kind, client_id, generation, code, payload = ask
    return kind, _unify(client_id), generation, code, _unify(payload)


def _unify(part: bytes) -> bytes:
    return part.lower().replace(b"x", b"u")
