"""Any bytes are messages, pongs to send, or an end: in every split the same, and in bounds.

websockets' own protocol, where it is at one with what the gateway makes of the bytes, sees the
same messages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN
from websockets.server import ServerProtocol
from ws2api.gateway.frames import (
    BINARY,
    TEXT,
    Answer,
    Closed,
    Event,
    FrameReader,
    Message,
    decode_whole,
    is_utf8,
)

from .splits import splits

_MASK: Final = b"\0\0\0\0"  # so that payloads can be read in the seeds
MAX_SIZE: Final = 200  # more than a control frame holds, and a length of two bytes

DICTIONARY = (
    *(b"\x81\x85" + _MASK, b"\x82\x85" + _MASK, b"\x01\x82" + _MASK, b"\x80\x82" + _MASK),
    *(b"\x88\x80" + _MASK, b"\x88\x82" + _MASK + b"\x03\xe8", b"\x89\x80" + _MASK),
    *(b"\x8a\x80" + _MASK, b"\x81\xfe\x00\x7e", b"\x82\xff\0\0\0\0\0\0\0\x05", b"\xc1\x80"),
    *(b"\xff" * 8, b"\xf0\x9f\x98\x80", b"\xed\xa0\x80", b"\x03\xed", b"\x0f\xa0"),
)


def check(data: bytes) -> None:
    """Read frames from the bytes, in several splits."""
    whole = _read([data])
    for pieces in splits(data):
        assert _read(pieces) == whole, f"in {len(pieces)} pieces"
        _answer_ahead(pieces, whole)
    if data:
        _compare_with_the_short_cut(data, whole)
    _compare_with_the_library(data)
    _close_in_the_middle(data)


def _read(pieces: Iterable[bytes], reader: FrameReader | None = None) -> list[Event]:
    reader = reader or FrameReader(MAX_SIZE)
    events: list[Event] = []
    for piece in pieces:
        reader.feed(piece)
        while (event := reader.next_event()) is not None:
            events.append(event)
            _assert_sound(event)
            if isinstance(event, Closed):
                return events
        assert reader.buffered_bytes <= MAX_SIZE + 14
        assert not reader.at_boundary or not reader.buffered_bytes
    return events


def _answer_ahead(pieces: Iterable[bytes], whole: list[Event]) -> None:
    """See that pings are answered before their turn, and nothing else changes by it."""
    reader, may_be_more = FrameReader(MAX_SIZE), False
    for piece in pieces:
        reader.feed(piece)
        pongs, may_be_more = reader.answer_pings(2)
        for pong in pongs:
            _assert_sound(Answer(pong))
    while may_be_more:
        _, may_be_more = reader.answer_pings(2)
    rest = _read([b""], reader)
    assert _without_answers(rest) == _without_answers(whole)
    if not any(isinstance(event, Closed) for event in rest):
        assert not any(isinstance(event, Answer) for event in rest), "a ping was passed over"


def _without_answers(events: list[Event]) -> list[Event]:
    return [event for event in events if not isinstance(event, Answer)]


def _assert_sound(event: Event) -> None:
    if isinstance(event, Message):
        assert event.first_byte in (TEXT, BINARY)
        assert len(event.payload) <= MAX_SIZE
        assert event.first_byte == BINARY or is_utf8(event.payload)
    elif isinstance(event, Answer):
        assert event.wire[0] == 0x8A
        assert event.wire[1] == len(event.wire) - 2 <= 125
    elif isinstance(event, Closed) and event.wire:
        assert event.wire[0] == 0x88
        assert event.wire[1] == len(event.wire) - 2 <= 125
        assert not event.failed or event.code in (1002, 1007, 1009)
        assert event.code != 1006


def _compare_with_the_short_cut(data: bytes, events: list[Event]) -> None:
    payload = decode_whole(data)
    if payload is None:
        return
    if len(payload) <= MAX_SIZE and (data[0] == BINARY or is_utf8(payload)):
        assert events == [Message(data[0], payload)]
    else:
        assert [type(event) for event in events] == [Closed]


def _compare_with_the_library(data: bytes) -> None:
    """See that the gateway reads what the library reads, up to the first error of either."""
    reader = FrameReader(MAX_SIZE)
    events = _read([data], reader)
    protocol = ServerProtocol(state=OPEN, max_size=None)
    protocol.receive_data(data)
    messages: list[Message] = []
    first = parts = b""
    for frame in protocol.events_received():
        assert isinstance(frame, Frame)
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY):
            first, parts = bytes((0x80 | frame.opcode,)), b""
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            parts += bytes(frame.data)
            if frame.fin:
                messages.append(Message(first[0], parts))
    received = [event for event in events if isinstance(event, Message)]
    assert received == messages[: len(received)]
    end = events[-1] if events else None
    if not isinstance(end, Closed):
        assert received == messages
        assert protocol.close_rcvd is None
        assert protocol.parser_exc is None or reader.buffered_bytes, "an error was overlooked"
    elif not end.failed:
        assert received == messages
        assert protocol.close_rcvd is not None
        assert (end.code, end.reason) == (protocol.close_rcvd.code, protocol.close_rcvd.reason)


def _close_in_the_middle(data: bytes) -> None:
    """Close from this side at a point that follows from the data; then only a close counts."""
    half = len(data) // 2
    reader = FrameReader(MAX_SIZE)
    events = _read([data[:half]], reader)
    if events and isinstance(events[-1], Closed):
        return
    assert reader.start_close(1001, "bye") == b"\x88\x05\x03\xe9bye"
    assert reader.start_close(1001, "bye") == b""
    for event in _read([data[half:]], reader):
        assert not isinstance(event, Closed) or not event.wire, event
