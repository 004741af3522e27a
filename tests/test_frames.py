"""Read frames in every split, and compare with what websockets itself makes of the same bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN
from websockets.server import ServerProtocol
from websockets.uri import parse_uri
from ws2api.gateway.frames import (
    BINARY,
    PING_FRAME,
    TEXT,
    Answer,
    Closed,
    Event,
    Fragment,
    FrameReader,
    Message,
    Pong,
    decode_whole,
    encode,
    is_utf8,
)

MASK = b"\x17\x2a\xf0\x5c"
MIB = 1 << 20
MAX_FRAGMENTS = 16_384

# Where the header changes its form.
SIZES = (0, 1, 5, 124, 125, 126, 127, 1000, 65_535, 65_536)


# Frames as a client sends them.


def frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, masked: bool = True, rsv: int = 0
) -> bytes:
    """Encode a frame, also one that no client may send."""
    length = len(payload)
    first, mask_bit = fin << 7 | rsv << 4 | opcode, masked << 7
    if length < 126:
        head = struct.pack("!BB", first, mask_bit | length)
    elif length < 65_536:
        head = struct.pack("!BBH", first, mask_bit | 126, length)
    else:
        head = struct.pack("!BBQ", first, mask_bit | 127, length)
    return head + MASK + masked_with(MASK, payload) if masked else head + payload


def masked_with(mask: bytes, payload: bytes) -> bytes:
    repeated = (mask * (len(payload) // 4 + 1))[: len(payload)]
    number = int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")
    return number.to_bytes(len(payload), "big")


def text(message: str) -> bytes:
    return frame(Opcode.TEXT, message.encode())


def ping(payload: bytes = b"") -> bytes:
    return frame(Opcode.PING, payload)


def close(code: int, reason: str = "") -> bytes:
    return frame(Opcode.CLOSE, struct.pack("!H", code) + reason.encode())


def fragments(opcode: int, *parts: bytes) -> list[bytes]:
    """Encode one message in several frames."""
    last = len(parts) - 1
    return [
        frame(opcode if i == 0 else Opcode.CONT, part, fin=i == last)
        for i, part in enumerate(parts)
    ]


# What comes out.


def read(pieces: Iterable[bytes], max_size: int = MIB) -> list[Event]:
    """Feed one piece after the other, as a socket would; stop at the end."""
    return read_with(FrameReader(max_size), pieces)


def test_each_fragment_is_a_place_to_pause() -> None:
    reader = FrameReader(MIB)
    reader.feed(b"".join(fragments(Opcode.TEXT, *[b"a"] * 100)))
    for _ in range(99):
        assert isinstance(reader.next_event(), Fragment)
    assert reader.next_event() == Message(TEXT, b"a" * 100)
    assert reader.next_event() is None


def read_with(reader: FrameReader, pieces: Iterable[bytes]) -> list[Event]:
    events: list[Event] = []
    for piece in pieces:
        reader.feed(piece)
        while (event := reader.next_event()) is not None:
            if not isinstance(event, Fragment):
                events.append(event)
            if isinstance(event, Closed):
                return events
    return events


def the_only(events: list[Event]) -> Event:
    (event,) = events
    return event


def assert_fails(code: int, *pieces: bytes, max_size: int = MIB) -> None:
    """Check that the last event refuses the client, and that its close frame says so."""
    event = read(pieces, max_size)[-1]
    assert isinstance(event, Closed)
    assert event.failed
    assert event.code == code
    assert server_close(event.wire) == (code, event.reason)


def server_close(wire: bytes) -> tuple[int, str]:
    """Read a close frame as a client does."""
    (received,) = received_by_client(wire)
    assert received.opcode is Opcode.CLOSE
    return struct.unpack("!H", received.data[:2])[0], bytes(received.data[2:]).decode()


def received_by_client(wire: bytes) -> list[Frame]:
    client = ClientProtocol(parse_uri("ws://gateway/"), state=OPEN, max_size=None)
    client.receive_data(wire)
    assert client.parser_exc is None
    return [event for event in client.events_received() if isinstance(event, Frame)]


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    """Split data; a cut is taken modulo the length."""
    positions = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in pairwise(positions)]


def bytes_of(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


# What hypothesis makes.


def text_of_size(size: int) -> bytes:
    """Return valid UTF-8 of so many bytes, with characters of every length in it."""
    head = ("aé€😀" * (size // 10)).encode()
    return head + b"z" * (size - len(head))


payloads = st.one_of(st.binary(max_size=200), st.sampled_from(SIZES).map(text_of_size))
texts = st.one_of(st.text(max_size=60).map(str.encode), st.sampled_from(SIZES).map(text_of_size))
cut_positions = st.lists(st.integers(0, 200_000), max_size=6)
small_payloads = st.binary(max_size=125)
controls = st.one_of(
    st.builds(frame, st.just(Opcode.PING), small_payloads),
    st.builds(frame, st.just(Opcode.PONG), small_payloads),
)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """Draw one message, in one frame or in fragments with control frames between them."""
    opcode = draw(st.sampled_from((Opcode.TEXT, Opcode.BINARY)))
    payload = draw(texts if opcode is Opcode.TEXT else payloads)
    parts = pieces_of(payload, draw(st.lists(st.integers(0, 200), max_size=3))) or [b""]
    wire = b""
    for piece in fragments(opcode, *parts):
        wire += piece if not wire else draw(st.just(b"") | controls) + piece
    return wire


closes = st.builds(
    close,
    st.sampled_from((1000, 1001, 1003, 1007, 1011, 3000, 4999)),
    st.text(max_size=30),
) | st.just(frame(Opcode.CLOSE))
valid_streams = st.builds(
    lambda items, end: b"".join([*items, end]),
    st.lists(messages() | controls, max_size=5),
    closes | st.just(b""),
)
broken_frames = st.one_of(
    st.builds(frame, st.integers(0, 15), payloads, fin=st.booleans()),
    st.builds(frame, st.integers(0, 15), small_payloads, rsv=st.integers(1, 7)),
    st.builds(frame, st.integers(0, 15), small_payloads, masked=st.just(False)),
    st.builds(close, st.integers(0, 65_535), st.text(max_size=30)),
    st.binary(min_size=1, max_size=20),
)
any_streams = st.lists(messages() | controls | broken_frames, max_size=5).map(b"".join)


def library_reads(data: bytes) -> tuple[list[tuple[int, bytes]], list[bytes], tuple[int, str]]:
    """Return messages, pings, and code and reason of the close as websockets sees them."""
    protocol = ServerProtocol(state=OPEN, max_size=MIB)
    protocol.receive_data(data)
    assert protocol.parser_exc is None
    messages: list[tuple[int, bytes]] = []
    pings: list[bytes] = []
    first_byte = 0
    payload = b""
    for event in protocol.events_received():
        assert isinstance(event, Frame)
        if event.opcode is Opcode.PING:
            pings.append(bytes(event.data))
        elif event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            if event.opcode is not Opcode.CONT:
                first_byte, payload = 0x80 | event.opcode, b""
            payload += bytes(event.data)
            if event.fin:
                messages.append((first_byte, payload))
    received = protocol.close_rcvd
    return messages, pings, (received.code, received.reason) if received else (0, "")


@settings(deadline=None, max_examples=150)
@given(valid_streams, cut_positions)
def test_agrees_with_the_library_on_valid_streams(data: bytes, cuts: list[int]) -> None:
    events = read(pieces_of(data, cuts))
    messages, pings, closed = library_reads(data)
    assert [tuple(event) for event in events if isinstance(event, Message)] == messages
    answers = b"".join(event.wire for event in events if isinstance(event, Answer))
    assert [bytes(pong.data) for pong in received_by_client(answers)] == pings
    ends = [(event.code, event.reason) for event in events if isinstance(event, Closed)]
    assert ends == ([closed] if closed[0] else [])
    assert not any(event.failed for event in events if isinstance(event, Closed))


@settings(deadline=None, max_examples=200)
@given(any_streams, cut_positions, st.sampled_from((10, 130, MIB)))
@example(frame(Opcode.BINARY, bytes(65_536)), [100], 1000)
def test_any_split_gives_the_same_events(data: bytes, cuts: list[int], max_size: int) -> None:
    assert read(pieces_of(data, cuts), max_size) == read([data], max_size)


@settings(deadline=None, max_examples=50)
@given(st.lists(messages() | controls | broken_frames, max_size=3).map(b"".join))
def test_byte_by_byte_gives_the_same_events(data: bytes) -> None:
    data = data[:2000]
    assert read(bytes_of(data)) == read([data])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.binary(max_size=300), max_size=8), st.sampled_from((1, 100, 1000)))
@example([b"\x81\xff" + b"\xff" * 8], 1000)
@example([b"\xff" * 64], 100)
def test_random_bytes_end_in_events_or_wait(pieces: list[bytes], max_size: int) -> None:
    reader = FrameReader(max_size)
    events = read_with(reader, pieces)
    assert all(isinstance(event, Message | Answer | Pong | Closed) for event in events)
    assert not any(isinstance(event, Closed) for event in events[:-1])
    # It waits for one frame within the limits, not for anything larger.
    assert reader.buffered_bytes < max(max_size, 125) + 14


@settings(deadline=None, max_examples=100)
@given(st.sampled_from((Opcode.TEXT, Opcode.BINARY)), st.sampled_from(SIZES), st.binary())
def test_decodes_one_whole_frame(opcode: Opcode, size: int, more: bytes) -> None:
    payload = text_of_size(size)
    data = frame(opcode, payload)
    assert decode_whole(data) == (payload if size < 65_536 else None)
    if more:
        assert decode_whole(data + more) is None
    assert decode_whole(data[:-1]) is None


@pytest.mark.parametrize(
    "data",
    [
        ping(b"x"),
        frame(Opcode.PONG),
        close(1000),
        frame(Opcode.TEXT, b"part", fin=False),
        frame(Opcode.CONT, b"part"),
        frame(Opcode.TEXT, b"x", rsv=4),
        frame(Opcode.TEXT, b"masked", masked=False),
        frame(Opcode.TEXT, b"x" * 300, masked=False),
        frame(3, b"x"),
        text("a") + text("b"),
        b"\x81",
        b"\x81\xfe\x00\x7e\x00\x00\x00",
    ],
)
def test_leaves_everything_else_to_the_reader(data: bytes) -> None:
    assert decode_whole(data) is None


@settings(deadline=None, max_examples=100)
@given(st.binary(min_size=1, max_size=200))
def test_decoding_random_bytes_does_not_raise(data: bytes) -> None:
    payload = decode_whole(data)
    assert payload is None or the_only(read([frame(Opcode.BINARY, payload)]))[1] == payload


@pytest.mark.parametrize("first_byte", [TEXT, BINARY])
@pytest.mark.parametrize("size", SIZES)
def test_encodes_what_a_client_reads(first_byte: int, size: int) -> None:
    payload = text_of_size(size)
    (received,) = received_by_client(encode(first_byte, payload))
    assert received == Frame(Opcode(first_byte & 0x0F), payload)


@pytest.mark.parametrize("size", SIZES)
def test_encodes_the_shortest_header(size: int) -> None:
    overhead = 2 if size < 126 else 4 if size < 65_536 else 10
    assert len(encode(BINARY, bytes(size))) == overhead + size


def test_ping_is_a_ping() -> None:
    assert received_by_client(PING_FRAME) == [Frame(Opcode.PING, b"")]


# Messages.


def test_receives_text_and_binary() -> None:
    data = [text("grün"), frame(Opcode.BINARY, b"\xff\x00")]
    assert read(data) == [Message(TEXT, "grün".encode()), Message(BINARY, b"\xff\x00")]


def test_receives_fragmented_text_cut_inside_a_character() -> None:
    euro = "€".encode()
    data = fragments(Opcode.TEXT, b"1 " + euro[:1], euro[1:2], euro[2:] + b"!")
    assert read(data) == [Message(TEXT, "1 €!".encode())]


def test_receives_fragmented_binary_that_is_no_text() -> None:
    assert read(fragments(Opcode.BINARY, b"\xff", b"", b"\xfe")) == [Message(BINARY, b"\xff\xfe")]


def test_receives_empty_fragments() -> None:
    assert read(fragments(Opcode.TEXT, b"", b"", b"")) == [Message(TEXT, b"")]


def test_control_frames_between_fragments_come_first() -> None:
    first, last = fragments(Opcode.TEXT, b"Hel", b"lo")
    events = read([first, ping(b"1"), frame(Opcode.PONG), last])
    assert events == [Answer(b"\x8a\x011"), Pong(), Message(TEXT, b"Hello")]


def test_answers_a_ping_with_its_payload() -> None:
    event = the_only(read([ping(b"are you there?")]))
    assert isinstance(event, Answer)
    assert received_by_client(event.wire) == [Frame(Opcode.PONG, b"are you there?")]


def test_one_event_at_a_time() -> None:
    reader = FrameReader(MIB)
    reader.feed(text("1") + text("2"))
    assert reader.next_event() == Message(TEXT, b"1")
    assert reader.buffered_bytes == len(text("2"))
    reader.feed(text("3"))
    assert reader.next_event() == Message(TEXT, b"2")
    assert reader.next_event() == Message(TEXT, b"3")
    assert reader.next_event() is None


@pytest.mark.parametrize(
    "whole",
    [
        [text("a")],
        [ping(b"a")],
        [frame(Opcode.PONG)],
        [frame(Opcode.BINARY, bytes(70_000))],
        fragments(Opcode.TEXT, b"a", b"b", b"c"),
        [text("a"), *fragments(Opcode.BINARY, b"a", b"b"), ping()],
    ],
)
def test_is_at_a_boundary_after_what_is_whole(whole: list[bytes]) -> None:
    reader = FrameReader(MIB)
    assert reader.at_boundary
    read_with(reader, whole)
    assert reader.at_boundary
    assert reader.buffered_bytes == 0


@pytest.mark.parametrize(
    "part",
    [
        [text("abc")[:1]],
        [text("abc")[:-1]],
        [frame(Opcode.TEXT, b"a", fin=False)],
        [frame(Opcode.TEXT, b"a", fin=False), ping()],
        [ping() + text("a")[:3]],
    ],
)
def test_is_not_at_a_boundary_within(part: list[bytes]) -> None:
    reader = FrameReader(MIB)
    read_with(reader, part)
    assert not reader.at_boundary


# Limits.


@pytest.mark.parametrize("size", [1, 125, 126, 65_535, 65_536])
def test_message_of_the_largest_size_is_received(size: int) -> None:
    payload = b"x" * size
    assert read([frame(Opcode.TEXT, payload)], max_size=size) == [Message(TEXT, payload)]
    in_two = fragments(Opcode.TEXT, payload[: size // 2], payload[size // 2 :])
    assert read(in_two, max_size=size) == [Message(TEXT, payload)]


@pytest.mark.parametrize("size", [1, 125, 126, 65_535, 65_536])
def test_message_beyond_the_largest_size_is_refused(size: int) -> None:
    payload = b"x" * (size + 1)
    assert_fails(1009, frame(Opcode.TEXT, payload), max_size=size)
    in_two = fragments(Opcode.TEXT, payload[: size // 2], payload[size // 2 :])
    assert_fails(1009, *in_two, max_size=size)


@pytest.mark.parametrize("size", [1001, 1 << 31, (1 << 63) - 1])
def test_is_refused_by_the_header_before_the_payload_came(size: int) -> None:
    assert_fails(1009, b"\x82\xff" + size.to_bytes(8, "big"), max_size=1000)


def test_fragment_beyond_what_is_left_is_refused() -> None:
    data = fragments(Opcode.BINARY, bytes(600), bytes(400), bytes(1))
    assert_fails(1009, *data, max_size=1000)


def test_many_fragments_are_received() -> None:
    data = b"".join(fragments(Opcode.BINARY, b"<", *[b""] * (MAX_FRAGMENTS - 2), b">"))
    assert read([data]) == [Message(BINARY, b"<>")]


def test_too_many_fragments_are_refused() -> None:
    data = b"".join(fragments(Opcode.BINARY, *[b""] * (MAX_FRAGMENTS + 1)))
    assert_fails(1009, data)


def test_fragments_are_counted_for_each_message() -> None:
    data = b"".join(fragments(Opcode.BINARY, *[b""] * (MAX_FRAGMENTS // 2 + 1)))
    assert read([data, data]) == [Message(BINARY, b"")] * 2


def test_ping_does_not_count_as_a_part_of_the_message() -> None:
    first, last = fragments(Opcode.BINARY, bytes(100), b"")
    events = read([first, ping(b"still there?"), last], max_size=100)
    assert [type(event) for event in events] == [Answer, Message]


def test_ping_may_be_longer_than_the_largest_message() -> None:
    assert isinstance(read([ping(b"x" * 125)], max_size=10)[0], Answer)


# UTF-8.


@pytest.mark.parametrize(
    "payload", [b"\xff", b"ok \xc3", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf5\x80"]
)
def test_text_that_is_no_utf8_is_refused(payload: bytes) -> None:
    assert not is_utf8(payload)
    assert_fails(1007, frame(Opcode.TEXT, payload))
    assert_fails(1007, frame(Opcode.TEXT, payload + b"x" * 200))
    assert_fails(1007, *fragments(Opcode.TEXT, payload[:1], payload[1:]))
    assert_fails(1007, *fragments(Opcode.TEXT, b"", payload))


def test_invalid_fragment_is_refused_before_the_message_ends() -> None:
    assert_fails(1007, frame(Opcode.TEXT, b"\xff", fin=False))


def test_character_that_is_never_finished_is_refused() -> None:
    assert_fails(1007, *fragments(Opcode.TEXT, "€".encode()[:2], b""))


# Broken frames.


@pytest.mark.parametrize(
    "data",
    [
        frame(Opcode.TEXT, b"x", rsv=4),
        frame(Opcode.PING, b"x", rsv=1),
        frame(Opcode.TEXT, b"x", masked=False),
        frame(Opcode.PING, masked=False),
        frame(Opcode.PING, b"x" * 126),
        frame(Opcode.PING, b"x", fin=False),
        frame(Opcode.CLOSE, b"\x03\xe8", fin=False),
        frame(Opcode.CONT, b"x"),
        frame(Opcode.CONT, b"x", fin=False),
        frame(3, b"x"),
        frame(7, b"x", fin=False),
        frame(11),
        frame(15, b"x"),
        frame(Opcode.TEXT, b"x", fin=False) + frame(Opcode.TEXT, b"y"),
        frame(Opcode.TEXT, b"x", fin=False) + frame(Opcode.BINARY, b"y", fin=False),
        frame(Opcode.CLOSE, b"\x03"),
        *(close(code) for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000)),
    ],
)
def test_broken_frame_is_a_protocol_error(data: bytes) -> None:
    assert_fails(1002, data)
    assert_fails(1002, *bytes_of(data))
    assert_fails(1002, data + text("more"))


def test_close_reason_that_is_no_utf8_is_refused() -> None:
    assert_fails(1007, frame(Opcode.CLOSE, b"\x03\xe8\xff"))


@pytest.mark.parametrize(
    "head",
    [
        *(b"\xf1\x80", b"\x81\x00", b"\x89\xfe", b"\x09\x80", b"\x88\xff", b"\x0a\x81"),
        *(b"\x83\xff", b"\x07\xfe", b"\x8b\xfd", b"\x8f\xfd"),
    ],
)
def test_two_bytes_are_enough_to_refuse(head: bytes) -> None:
    assert_fails(1002, head)


def test_messages_before_the_error_are_received() -> None:
    events = read([text("good") + frame(3)])
    assert events[0] == Message(TEXT, b"good")
    assert isinstance(events[1], Closed)
    assert len(events) == 2


# The end.


@pytest.mark.parametrize(("code", "reason"), [(1000, ""), (1001, "bye"), (4999, "grün")])
def test_close_of_the_client_is_returned_to_it(code: int, reason: str) -> None:
    event = the_only(read([close(code, reason)]))
    assert isinstance(event, Closed)
    assert (event.code, event.reason, event.failed) == (code, reason, False)
    assert server_close(event.wire) == (code, reason)


def test_close_without_a_code() -> None:
    event = the_only(read([frame(Opcode.CLOSE)]))
    assert event == Closed(1005, "", b"\x88\x00", False)


def test_close_inside_a_fragmented_message_is_clean() -> None:
    events = read([frame(Opcode.TEXT, b"never to be fin", fin=False), close(1000, "changed mind")])
    assert events == [Closed(1000, "changed mind", b"\x88\x0e\x03\xe8changed mind", False)]


def test_bytes_behind_the_close_are_dropped() -> None:
    reader = FrameReader(MIB)
    reader.feed(close(1000) + text("too late") + b"\xff\xff garbage")
    assert isinstance(reader.next_event(), Closed)
    assert reader.next_event() is None
    assert reader.buffered_bytes == 0


@pytest.mark.parametrize("end", [close(1000), frame(3), frame(Opcode.TEXT, b"\xff")])
def test_no_message_comes_and_nothing_is_written_after_the_end(end: bytes) -> None:
    reader = FrameReader(MIB)
    assert isinstance(read_with(reader, [end])[-1], Closed)
    for late in (text("late"), ping(b"late"), close(1001), b"\xff\xff"):
        events = read_with(reader, [late])
        assert all(isinstance(event, Closed) and not event.wire for event in events)
    assert reader.start_close(1001, "") == b""


def test_readers_that_share_an_end_do_not_touch_each_other() -> None:
    """Usual closes are answered by objects that all connections share."""
    expected = read([close(1001)])
    for late in ([], [text("late")], [b"\xff\xff"], [close(1001)]):
        reader = FrameReader(MIB)
        read_with(reader, [close(1001), *late])
        reader.start_close(1011, "gone")
        assert read([close(1001)]) == expected
        assert read([text("hi")]) == [Message(TEXT, b"hi")]


def test_our_close_is_answered() -> None:
    reader = FrameReader(MIB)
    assert server_close(reader.start_close(1001, "going away")) == (1001, "going away")
    assert not reader.at_boundary
    event = the_only(read_with(reader, [close(1001, "going away")]))
    assert event == Closed(1001, "going away", b"", False)


def test_we_close_once() -> None:
    reader = FrameReader(MIB)
    assert reader.start_close(1001, "")
    assert reader.start_close(1000, "") == b""


def test_closes_that_cross_are_not_answered() -> None:
    reader = FrameReader(MIB)
    reader.feed(text("before") + close(3000, "mine"))
    reader.start_close(1001, "ours")
    assert read_with(reader, [b""])[-1] == Closed(3000, "mine", b"", False)


def test_frames_under_way_when_we_close_are_read_past() -> None:
    first, last = fragments(Opcode.TEXT, b"under", b"way")
    reader = FrameReader(MIB)
    read_with(reader, [first])
    reader.start_close(1001, "")
    assert read_with(reader, [last, text("more"), close(1001)])[-1] == Closed(1001, "", b"", False)


def test_we_close_inside_a_fragmented_message() -> None:
    reader = FrameReader(MIB)
    read_with(reader, [frame(Opcode.TEXT, b"never", fin=False)])
    assert server_close(reader.start_close(1001, "")) == (1001, "")
    assert the_only(read_with(reader, [close(1001)])) == Closed(1001, "", b"", False)


@pytest.mark.parametrize(
    "broken", [frame(3), frame(Opcode.CLOSE, b"\x03"), b"\x81\x00", frame(Opcode.TEXT, b"x", rsv=4)]
)
def test_error_after_our_close_ends_without_a_second_frame(broken: bytes) -> None:
    reader = FrameReader(MIB)
    reader.start_close(1001, "")
    event = read_with(reader, [broken])[-1]
    assert isinstance(event, Closed)
    assert event.failed
    assert event.wire == b""


# Pings behind what has to wait.


def waiting(*pieces: bytes, max_size: int = MIB) -> FrameReader:
    reader = FrameReader(max_size)
    for piece in pieces:
        reader.feed(piece)
    return reader


def pong(payload: bytes = b"") -> bytes:
    return bytes((0x8A, len(payload))) + payload


def rest_of(reader: FrameReader) -> list[Event]:
    return read_with(reader, [b""])


def test_answers_pings_among_messages_that_wait() -> None:
    reader = waiting(ping(b"a"), text("one"), ping(b"b"), ping(), text("two" * 99), ping(b"c"))
    assert reader.answer_pings(9) == ([pong(b"a"), pong(b"b"), pong(), pong(b"c")], False)
    assert reader.answer_pings(9) == ([], False)
    assert rest_of(reader) == [Message(TEXT, b"one"), Message(TEXT, b"two" * 99)]
    assert reader.at_boundary


def test_looks_at_so_many_frames_at_once() -> None:
    reader = waiting(*[ping(bytes([number])) + text("x") for number in range(5)])
    assert reader.answer_pings(4) == ([pong(b"\x00"), pong(b"\x01")], True)
    assert reader.next_event() == Message(TEXT, b"x")
    assert reader.answer_pings(4) == ([pong(b"\x02"), pong(b"\x03")], True)
    assert reader.answer_pings(4) == ([pong(b"\x04")], False)
    assert rest_of(reader) == [Message(TEXT, b"x")] * 4


def read_with_looks(
    data: bytes, cuts: list[int], looks: list[int], max_size: int
) -> tuple[list[Event], list[bytes]]:
    """Return events and pongs, with pings answered ahead, and events taken now and then."""
    reader, events, pongs = FrameReader(max_size), list[Event](), list[bytes]()
    for number, piece in enumerate([*pieces_of(data, cuts), b""]):
        reader.feed(piece)
        pongs += reader.answer_pings(3)[0]
        count = looks[number] if number < len(looks) else 0
        while (count := count - 1) >= 0 and (event := reader.next_event()) is not None:
            events.append(event)
            if isinstance(event, Closed):
                break
        if events and isinstance(events[-1], Closed):
            break
    else:
        events += rest_of(reader)
    # A ping that is among the events was behind those that were answered ahead of it.
    pongs += [event.wire for event in events if isinstance(event, Answer)]
    return [event for event in events if not isinstance(event, Answer | Fragment)], pongs


@settings(deadline=None, max_examples=200)
@given(
    valid_streams,
    cut_positions,
    st.lists(st.integers(0, 5)),
)
def test_looking_for_pings_answers_each_once(
    data: bytes, cuts: list[int], looks: list[int]
) -> None:
    plain = read([data])
    events, pongs = read_with_looks(data, cuts, looks, MIB)
    assert events == [event for event in plain if not isinstance(event, Answer)]
    assert sorted(pongs) == sorted(event.wire for event in plain if isinstance(event, Answer))


@settings(deadline=None, max_examples=200)
@given(any_streams, cut_positions, st.lists(st.integers(0, 5)), st.sampled_from((10, 130, MIB)))
def test_looking_for_pings_changes_nothing_else(
    data: bytes, cuts: list[int], looks: list[int], max_size: int
) -> None:
    events, _ = read_with_looks(data, cuts, looks, max_size)
    plain = read([data], max_size)
    assert events == [event for event in plain if not isinstance(event, Answer)]


@pytest.mark.parametrize(
    "obstacle",
    [
        close(1000),
        text("larger than it may be"),
        frame(Opcode.TEXT, b"bare", masked=False),
        frame(Opcode.TEXT, b"x", rsv=4),
        frame(Opcode.PING, b"x", fin=False),
        frame(3, b"x"),
    ],
)
def test_pings_behind_what_cannot_be_passed_wait(obstacle: bytes) -> None:
    reader = waiting(text("ok"), ping(b"a"), obstacle, ping(b"b"), max_size=10)
    assert reader.answer_pings(9) == ([pong(b"a")], False)
    assert reader.answer_pings(9) == ([], False)


@pytest.mark.parametrize("size", SIZES)
def test_ping_behind_a_frame_that_is_not_whole_is_answered_when_it_is(size: int) -> None:
    data = frame(Opcode.BINARY, bytes(size)) + ping(b"a")
    reader = waiting(text("ok"))
    cuts = {1, 2, 3, 5, 9, 10, 13, len(data) - 1, len(data) - 8}
    *before, last = pieces_of(data, [cut for cut in cuts if cut < len(data)])
    for piece in before:
        reader.feed(piece)
        assert reader.answer_pings(9) == ([], False)
    reader.feed(last)
    assert reader.answer_pings(9) == ([pong(b"a")], False)
