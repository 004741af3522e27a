"""Speak WebSocket with every byte under control, also those that no sane client sends."""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from .http_messages import Response, encode_head, read_response
from .stream import Stream

ACCEPT_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
KEY: Final = "dGhlIHNhbXBsZSBub25jZQ=="


class Op(IntEnum):
    """Name the opcodes of RFC 6455, 5.2."""

    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


@dataclass(frozen=True)
class Frame:
    """Hold one frame, payload unmasked."""

    opcode: int
    payload: bytes
    fin: bool = True
    rsv: int = 0

    def encode(self, *, mask: bool = True) -> bytes:
        """Return the bytes on the wire, masked as a client must or bare as a server must."""
        first = self.fin << 7 | self.rsv << 4 | self.opcode
        size = len(self.payload)
        if size < 126:
            head = bytes([first, mask << 7 | size])
        elif size < 1 << 16:
            head = bytes([first, mask << 7 | 126]) + size.to_bytes(2, "big")
        else:
            head = bytes([first, mask << 7 | 127]) + size.to_bytes(8, "big")
        if not mask:
            return head + self.payload
        key = os.urandom(4)
        return head + key + _apply_mask(self.payload, key)


def _apply_mask(payload: bytes, key: bytes) -> bytes:
    size = len(payload)
    repeated = (key * (size // 4 + 1))[:size]
    masked = int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")
    return masked.to_bytes(size, "big")


def close_payload(code: int, reason: str | bytes = b"") -> bytes:
    """Encode the body of a close frame."""
    return code.to_bytes(2, "big") + (reason.encode() if isinstance(reason, str) else reason)


def upgrade_request(
    target: str,
    headers: Mapping[str, str | None] | None = None,
    *,
    method: str = "GET",
    version: str = "HTTP/1.1",
) -> bytes:
    """Encode a handshake; `headers` adds to the usual ones, replaces, or with None removes."""
    merged: dict[str, str | None] = {
        "Host": "gateway.example",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": KEY,
        "Sec-WebSocket-Version": "13",
        **(headers or {}),
    }
    present = {name: value for name, value in merged.items() if value is not None}
    return encode_head(f"{method} {target} {version}", present)


def handshake(stream: Stream, request: bytes) -> Response:
    """Send an upgrade request and read the answer, whatever it is."""
    stream.write(request)
    return read_response(stream)


class WsClient:
    """Hold the client's end of a WebSocket.

    Args:
        stream: connected, nothing sent yet.
        target: of the request, normally a slash and the client id.
        headers: as in `upgrade_request`.
        early_data: sent in one piece with the upgrade request.

    Raises:
        AssertionError: unless the gateway accepts.
    """

    def __init__(
        self,
        stream: Stream,
        target: str,
        headers: Mapping[str, str | None] | None = None,
        *,
        early_data: bytes = b"",
    ) -> None:
        self.stream = stream
        self.response = handshake(stream, upgrade_request(target, headers) + early_data)
        assert self.response.status == 101, self.response
        assert self.response.headers["Upgrade"].lower() == "websocket"
        assert self.response.headers["Connection"].lower() == "upgrade"
        accept = base64.b64encode(hashlib.sha1(KEY.encode() + ACCEPT_GUID).digest()).decode()
        assert self.response.headers["Sec-WebSocket-Accept"] == accept

    @property
    def port(self) -> int:
        """The TCP port of this end."""
        port: int = self.stream.socket.getsockname()[1]
        return port

    def send(self, message: str | bytes, *, chop: int | None = None) -> None:
        """Send a whole text or binary message in one frame."""
        if isinstance(message, str):
            self.send_frame(Op.TEXT, message.encode(), chop=chop)
        else:
            self.send_frame(Op.BINARY, message, chop=chop)

    def send_frame(
        self,
        opcode: int,
        payload: bytes = b"",
        *,
        fin: bool = True,
        rsv: int = 0,
        mask: bool = True,
        chop: int | None = None,
    ) -> None:
        """Send one frame, in one piece or in pieces of `chop` bytes."""
        self.send_raw(Frame(opcode, payload, fin, rsv).encode(mask=mask), chop=chop)

    def send_frames(self, *frames: Frame) -> None:
        """Send several frames in one piece."""
        self.send_raw(b"".join(frame.encode() for frame in frames))

    def send_fragments(self, opcode: int, fragments: Sequence[bytes]) -> None:
        """Send a message in as many frames as there are fragments."""
        opcodes = itertools.chain([opcode], itertools.repeat(Op.CONTINUATION))
        fins = [False] * (len(fragments) - 1) + [True]
        self.send_frames(*map(Frame, opcodes, fragments, fins))

    def send_close(self, code: int | None = None, reason: str | bytes = b"") -> None:
        """Send a close frame, with an empty body if there is no code."""
        self.send_frame(Op.CLOSE, b"" if code is None else close_payload(code, reason))

    def send_raw(self, data: bytes, *, chop: int | None = None) -> None:
        """Send bytes as they are."""
        self.stream.write(data, chop=chop)

    def receive_frame(self) -> Frame:
        """Read one frame; a server's frames are bare and use no reserved bit."""
        first, second = self.stream.read_exactly(2)
        assert not second & 0x80, "a server must not mask"
        size = second & 0x7F
        if size >= 126:
            size = int.from_bytes(self.stream.read_exactly(2 if size == 126 else 8), "big")
        assert not first & 0x70, "reserved bits without an extension"
        return Frame(first & 0x0F, self.stream.read_exactly(size), fin=bool(first & 0x80))

    def receive(self) -> str | bytes:
        """Read one message; pings on the way are answered."""
        frame = self._receive_data_frame()
        assert frame.opcode in (Op.TEXT, Op.BINARY), frame
        payload, last = frame.payload, frame
        while not last.fin:
            last = self._receive_data_frame()
            assert last.opcode == Op.CONTINUATION, last
            payload += last.payload
        return payload.decode() if frame.opcode == Op.TEXT else payload

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Close in good order: close frames both ways, then the end of the connection."""
        self.send_close(code, reason)
        self.assert_closed(code, reason)

    def assert_closed(self, code: int | None, reason: str | None = None) -> None:
        """Read up to a close frame with this code, answer it, and see the connection end.

        Args:
            code: None means a close frame with an empty body.
            reason: None accepts any.
        """
        frame = self.receive_frame()
        while frame.opcode != Op.CLOSE:
            frame = self.receive_frame()
        received_code = int.from_bytes(frame.payload[:2], "big") if frame.payload else None
        received_reason = frame.payload[2:].decode()
        assert received_code == code, (received_code, received_reason)
        assert reason in (None, received_reason), (received_code, received_reason)
        self._answer_close(frame.payload)
        assert self.stream.read_to_end() == b"", "bytes after the close frame"
        self.stream.close()

    def abort(self) -> None:
        """End the connection with a RST and without a close frame."""
        self.stream.reset()

    def hang_up(self) -> None:
        """End the connection with a FIN and without a close frame."""
        self.stream.close()

    def _receive_data_frame(self) -> Frame:
        frame = self.receive_frame()
        while frame.opcode in (Op.PING, Op.PONG):
            if frame.opcode == Op.PING:
                self.send_frame(Op.PONG, frame.payload)
            frame = self.receive_frame()
        return frame

    def _answer_close(self, payload: bytes) -> None:
        try:
            self.send_frame(Op.CLOSE, payload)
        except OSError:  # the gateway does not wait for an answer to its answer
            return
