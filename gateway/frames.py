"""Read and write WebSocket frames: pure, bytes in, events out (RFC 6455, 5 to 7).

Nearly every packet of a client is one whole, final, masked data frame; `decode_whole` takes that
in a few operations and keeps nothing. Whatever else arrives (a part of a frame, several frames,
control frames, fragments, errors) goes through a `FrameReader`, which exists only until the
stream is back at a message boundary. Rules that need care (control frames, close codes, which
error closes with which code) are left to websockets' Sans-I/O `ServerProtocol`.
"""

from __future__ import annotations

import codecs
import logging
import struct
from collections.abc import Callable
from typing import Final, NamedTuple

from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import OPEN
from websockets.server import ServerProtocol

try:
    from websockets.speedups import apply_mask
except ImportError:  # the pure Python twin, where no wheel is to be had
    from websockets.utils import apply_mask

TEXT: Final = 0x81
BINARY: Final = 0x82
_PING: Final = 0x89
_PONG: Final = 0x8A
_CLOSE: Final = 0x88
_PINGS: Final = (_PING, _PONG)
PING_FRAME: Final = b"\x89\x00"

# Two bytes of header and four of mask: what a frame with up to 125 bytes of payload adds to it.
_SMALL_OVERHEAD: Final = 6
_SMALL_LIMIT: Final = 125
_MEDIUM_OVERHEAD: Final = 8
_LARGE_OVERHEAD: Final = 14
# The headers of unmasked frames, by length of the payload.
_SMALL_TEXT_HEADS: Final = [bytes((TEXT, length)) for length in range(_SMALL_LIMIT + 1)]
_SMALL_BINARY_HEADS: Final = [bytes((BINARY, length)) for length in range(_SMALL_LIMIT + 1)]
# A message of many tiny or empty fragments costs work that its size does not show; 1 MiB in
# fragments of 64 bytes is still let through.
_MAX_FRAGMENTS: Final = 16_384

# One logger for all connections: the library would otherwise ask the logging module for each.
_silent: Final = logging.getLogger("ws2api.websockets")
_silent.addHandler(logging.NullHandler())
_silent.setLevel(logging.CRITICAL)
_silent.propagate = False


class Message(NamedTuple):
    """Carry one whole message of the client; text is valid UTF-8."""

    first_byte: int
    """TEXT or BINARY."""
    payload: bytes


class Answer(NamedTuple):
    """Carry bytes that must be written back (a pong)."""

    wire: bytes


class Pong(NamedTuple):
    """Tell that the client answered a ping (or sent a pong of its own accord)."""


class Fragment(NamedTuple):
    """Tell that a part of a message came and its end did not: whoever asks may pause here."""


class Closed(NamedTuple):
    """Tell that no further message will come: a close frame arrived, or the stream is broken."""

    code: int
    reason: str
    wire: bytes
    """The close frame to write back; empty when one was sent before."""
    failed: bool
    """True when the client broke the protocol or a limit."""


Event = Message | Answer | Pong | Fragment | Closed

_FRAGMENT: Final = Fragment()


def decode_whole(data: bytes) -> bytes | None:
    """Return the unmasked payload if `data` is exactly one final, masked data frame.

    None means that a FrameReader must look at it. The caller tells text from binary by the first
    byte, checks the size and the UTF-8. Payloads of 64 KiB and more never fit one read.
    """
    first = data[0]
    if first != TEXT and first != BINARY:
        return None
    length = len(data)
    if length < _SMALL_OVERHEAD:
        return None
    second = data[1]
    if second == 0xFE:
        if length < _MEDIUM_OVERHEAD or (data[2] << 8 | data[3]) != length - _MEDIUM_OVERHEAD:
            return None
        return apply_mask(data[8:], data[4:8])
    if second - 0x80 != length - _SMALL_OVERHEAD or second > 0xFD:
        return None
    return apply_mask(data[6:], data[2:6])


def encode(first_byte: int, payload: bytes) -> bytes:
    """Return one final, unmasked frame; `first_byte` is TEXT or BINARY."""
    length = len(payload)
    if length <= _SMALL_LIMIT:
        heads = _SMALL_TEXT_HEADS if first_byte == TEXT else _SMALL_BINARY_HEADS
        return heads[length] + payload
    if length < 65536:
        return struct.pack("!BBH", first_byte, 126, length) + payload
    return struct.pack("!BBQ", first_byte, 127, length) + payload


class FrameReader:
    """Turn a stream of bytes into events, one at a time, so that the caller can stop in between.

    Args:
        max_size: largest message in bytes; a larger one ends with 1009.
    """

    __slots__ = (
        "_buffer",
        "_decode",
        "_first_byte",
        "_fragment_count",
        "_fragments",
        "_max_size",
        "_protocol",
        "_scanned",
    )

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._buffer = bytearray()
        # Where in the buffer the frames begin among which nobody has looked for pings yet.
        self._scanned = 0
        # None unless a fragmented message or a close is under way.
        self._protocol: ServerProtocol | None = None
        # The message under way, when it came in fragments; a bytearray, because a million empty
        # fragments must not cost memory.
        self._fragments: bytearray | None = None
        self._fragment_count = 0
        self._first_byte = 0
        # Incremental UTF-8 decoder of a fragmented text message, None for a binary one.
        self._decode: Callable[[bytes, bool], str] | None = None

    @property
    def at_boundary(self) -> bool:
        """Tell whether nothing is kept, so that the reader can be dropped."""
        return self._protocol is None and not self._buffer

    @property
    def buffered_bytes(self) -> int:
        """Count the bytes that wait to be read."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Append bytes from the socket."""
        self._buffer += data

    def start_close(self, code: int, reason: str) -> bytes:
        """Return the close frame to write; from now on only the client's close frame counts."""
        protocol = self._library()
        if protocol.state is not OPEN:
            return b""
        protocol.send_close(code, reason)
        return b"".join(protocol.data_to_send())

    def answer_pings(self, most: int) -> tuple[list[bytes], bool]:
        """Take pings out of the midst of what has to wait, and return a pong for each.

        5.5.2: "It SHOULD respond with Pong frame as soon as is practical." Frames that are not
        whole, those behind a close frame, and whatever is wrong are left for `next_event`.

        Args:
            most: frames to look at, of those that were not looked at before.

        Returns:
            the pongs, and whether there may be more.
        """
        buffer, at = self._buffer, self._scanned
        pongs: list[bytes] = []
        # What stands behind the first ping, without the others: moved in one piece.
        first, kept = 0, bytearray()
        while most and (end := self._end_of_waiting(at)):
            most -= 1
            if buffer[at] == _PING:
                first = first if pongs else at
                pongs.append(_pong(buffer[at:end]))
            elif pongs:
                kept += buffer[at:end]
            at = end
        if pongs:
            buffer[first:at] = kept
            at = first + len(kept)
        self._scanned = at
        return pongs, not most

    def _end_of_waiting(self, start: int) -> int:
        """Return where the frame that begins at `start` ends, 0 if there is none to be passed."""
        buffer = self._buffer
        have = len(buffer) - start
        if have < _SMALL_OVERHEAD or buffer[start] == _CLOSE or self._is_closing:
            return 0
        if _header_error(buffer[start], buffer[start + 1]) is not None:
            return 0
        length, overhead = buffer[start + 1] & 0x7F, _SMALL_OVERHEAD
        if length == 126:
            length, overhead = buffer[start + 2] << 8 | buffer[start + 3], _MEDIUM_OVERHEAD
        elif length == 127:
            if have < _LARGE_OVERHEAD:
                return 0
            length = int.from_bytes(buffer[start + 2 : start + 10], "big")
            overhead = _LARGE_OVERHEAD
        if length > self._max_size and not buffer[start] & 0x08:
            return 0
        return start + overhead + length if have >= overhead + length else 0

    @property
    def _is_closing(self) -> bool:
        return self._protocol is not None and self._protocol.state is not OPEN

    def next_event(self) -> Event | None:
        """Return the next event, or None when more bytes are needed."""
        buffer = self._buffer
        while len(buffer) >= 2:
            if (error := _header_error(buffer[0], buffer[1])) is not None:
                return self._fail(CloseCode.PROTOCOL_ERROR, error)
            end = self._frame_end()
            if end is None:
                return None
            frame = bytes(buffer[:end])
            del buffer[:end]
            if self._scanned:
                self._scanned -= end
            event = self._take(frame)
            if event is not None:
                return event
        return None

    def _frame_end(self) -> int | None:
        """Return the length of the frame at the front, None while it is not whole.

        One larger than the limit counts as whole at once: the library refuses it by its header.
        """
        buffer = self._buffer
        have = len(buffer)
        length = buffer[1] & 0x7F
        overhead = _SMALL_OVERHEAD
        if length == 126:
            if have < 4:
                return None
            length, overhead = buffer[2] << 8 | buffer[3], _MEDIUM_OVERHEAD
        elif length == 127:
            if have < 10:
                return None
            length, overhead = int.from_bytes(buffer[2:10], "big"), _LARGE_OVERHEAD
        if length > self._max_size and not buffer[0] & 0x08:
            return have
        return length + overhead if have >= length + overhead else None

    def _take(self, frame: bytes) -> Event | None:
        if self._protocol is None and (payload := self._whole(frame)) is not None:
            return self._message(frame[0], payload)
        if self._protocol is None and frame[0] in _PINGS:
            # The header is checked. A library's object for each would cost ten times as much,
            # and a client may send thousands.
            return Pong() if frame[0] == _PONG else Answer(_pong(frame))
        if self._protocol is None and frame[0] == _CLOSE:
            known = _PLAIN_CLOSES.get(apply_mask(frame[_SMALL_OVERHEAD:], frame[2:_SMALL_OVERHEAD]))
            if known is not None:
                self._protocol, closed = known
                self._buffer.clear()
                self._scanned = 0
                return closed
        protocol = self._library()
        closing_already = protocol.state is not OPEN
        if frame[0] & 0x0F == Opcode.CLOSE:
            # 5.4: "Control frames MAY be injected in the middle of a fragmented message." The
            # library takes a close there for an error; it is only the end of that message.
            protocol.current_size = None
        # A control frame is no part of the message that it comes in the middle of, and has a limit
        # of its own; the library counts it against the message's.
        protocol.max_message_size = None if frame[0] & 0x08 else self._max_size
        protocol.receive_data(frame)
        for received in protocol.events_received():
            assert isinstance(received, Frame)
            if received.opcode is not Opcode.CLOSE:
                return self._received(protocol, received)
        if protocol.parser_exc is not None or protocol.close_rcvd is not None:
            return self._closed(protocol, closing_already)
        return None

    def _whole(self, frame: bytes) -> bytes | None:
        """Return the payload of a whole data frame within the limit, None for anything else."""
        if frame[0] in (TEXT, BINARY) and frame[1] == 0xFF:
            length = int.from_bytes(frame[2:10], "big")
            if length > self._max_size or length != len(frame) - _LARGE_OVERHEAD:
                return None
            return apply_mask(frame[_LARGE_OVERHEAD:], frame[10:_LARGE_OVERHEAD])
        payload = decode_whole(frame)
        return payload if payload is not None and len(payload) <= self._max_size else None

    def _message(self, first_byte: int, payload: bytes) -> Event:
        if first_byte == TEXT and not is_utf8(payload):
            return self._fail(CloseCode.INVALID_DATA, "invalid UTF-8")
        return Message(first_byte, payload)

    def _received(self, protocol: ServerProtocol, frame: Frame) -> Event | None:
        """Turn one frame that the library found in order into an event."""
        if frame.opcode is Opcode.PING:
            answer = Answer(b"".join(protocol.data_to_send()))
            self._forget_library()
            return answer
        if frame.opcode is Opcode.PONG:
            self._forget_library()
            return Pong()
        if frame.opcode is not Opcode.CONT:
            self._first_byte = 0x80 | frame.opcode
            self._fragments = bytearray()
            self._fragment_count = 0
            is_text = frame.opcode is Opcode.TEXT
            self._decode = codecs.getincrementaldecoder("utf-8")().decode if is_text else None
        assert self._fragments is not None
        self._fragment_count += 1
        if self._fragment_count > _MAX_FRAGMENTS:
            return self._fail(CloseCode.MESSAGE_TOO_BIG, "too many fragments")
        data = bytes(frame.data)
        self._fragments += data
        if self._decode is not None:
            try:
                self._decode(data, frame.fin)
            except UnicodeDecodeError:
                return self._fail(CloseCode.INVALID_DATA, "invalid UTF-8")
        if not frame.fin:
            return _FRAGMENT
        payload = bytes(self._fragments)
        self._fragments = self._decode = None
        self._forget_library()
        return Message(self._first_byte, payload)

    def _library(self) -> ServerProtocol:
        if self._protocol is None:
            self._protocol = ServerProtocol(state=OPEN, max_size=self._max_size, logger=_silent)
        return self._protocol

    def _forget_library(self) -> None:
        """Drop the library's state when nothing is under way in it."""
        protocol = self._protocol
        if protocol is not None and protocol.state is OPEN and self._fragments is None:
            self._protocol = None

    def _fail(self, code: CloseCode, reason: str) -> Closed:
        protocol = self._library()
        closing_already = protocol.state is not OPEN
        if not closing_already:
            protocol.fail(code, reason)
        return self._closed(protocol, closing_already, failed=(code, reason))

    def _closed(
        self,
        protocol: ServerProtocol,
        closing_already: bool,
        failed: tuple[int, str] | None = None,
    ) -> Closed:
        self._buffer.clear()
        self._scanned = 0
        wire = b"".join(protocol.data_to_send())
        if failed is not None:
            return Closed(*failed, b"" if closing_already else wire, True)
        if protocol.parser_exc is not None:
            sent = protocol.close_sent
            code, reason = (sent.code, sent.reason) if sent else (CloseCode.PROTOCOL_ERROR, "")
            return Closed(int(code), reason, wire, True)
        received = protocol.close_rcvd
        assert received is not None
        return Closed(int(received.code), received.reason, wire, False)


def _header_error(first: int, second: int) -> str | None:
    """Name what is wrong with a frame's first two bytes, before its payload is waited for."""
    if first & 0x70:
        return "reserved bits must be 0"
    if first & 0x07 > 2:
        # 5.2: "If an unknown opcode is received, the receiving endpoint MUST _Fail the WebSocket
        # Connection_." 3 to 7 and 11 to 15 are reserved.
        return "reserved opcode"
    if not second & 0x80:
        # 5.1: "The server MUST close the connection upon receiving a frame that is not masked."
        return "frame is not masked"
    if first & 0x08 and (second & 0x7F > _SMALL_LIMIT or not first & 0x80):
        # 5.5: "All control frames MUST have a payload length of 125 bytes or less and MUST NOT be
        # fragmented."
        return "control frame is fragmented or too long"
    return None


def _pong(ping: bytes | bytearray) -> bytes:
    """Return the answer to a whole ping (5.5.3): its payload, unmasked."""
    payload = apply_mask(bytes(ping[_SMALL_OVERHEAD:]), bytes(ping[2:_SMALL_OVERHEAD]))
    return bytes((_PONG, len(payload))) + payload


def is_utf8(payload: bytes) -> bool:
    """Tell whether a text message is well-formed (RFC 6455, 8.1)."""
    try:
        payload.decode()
    except UnicodeDecodeError:
        return False
    return True


def _plain_close(payload: bytes) -> tuple[ServerProtocol, Closed]:
    """Return the library's state after a close frame that it has answered, and what that was."""
    protocol = ServerProtocol(state=OPEN, logger=_silent)
    protocol.receive_data(bytes((_CLOSE, 0x80 | len(payload), 0, 0, 0, 0)) + payload)
    protocol.events_received()
    wire = b"".join(protocol.data_to_send())
    received = protocol.close_rcvd
    assert received is not None
    return protocol, Closed(int(received.code), received.reason, wire, False)


# Nearly every connection that a client closes ends with one of these payloads: 1000 or 1001 without
# a reason. The library's objects, which do nothing any more but to drop what comes, are shared.
_PLAIN_CLOSES: Final = {payload: _plain_close(payload) for payload in (b"\x03\xe8", b"\x03\xe9")}
