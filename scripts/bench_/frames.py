"""Make the bytes that clients send and expect: the handshake, and frames of known content."""

from __future__ import annotations

from typing import Final

KEY: Final = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT: Final = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
"""RFC 6455 section 1.3 gives this answer to the key above."""
MASK: Final = b"\x37\xfa\x21\x3d"

TEXT: Final = 0x81
CLOSE: Final = 0x88
PING: Final = 0x89
PONG: Final = 0x8A

_QUESTION: Final = b"thirty bytes from one client, "
_ANSWER: Final = b"thirty bytes back from the API "
UNIT: Final = 1024
"""The API's nginx builds a large answer from units of this size."""


def question(size: int) -> bytes:
    """Return a message of a client."""
    return (_QUESTION * (size // len(_QUESTION) + 1))[:size]


def answer_unit() -> bytes:
    """Return what every answer is a repetition of."""
    return (_ANSWER * (UNIT // len(_ANSWER) + 1))[:UNIT]


def answer(size: int) -> bytes:
    """Return what the API says to a message of the same size."""
    return (answer_unit() * (size // UNIT + 1))[:size]


def upgrade(path: str) -> bytes:
    """Return a client's handshake."""
    return (
        f"GET {path} HTTP/1.1\r\nHost: gateway\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {KEY}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


def server_frame(payload: bytes, first: int = TEXT) -> bytes:
    """Return an unmasked frame."""
    return bytes([first]) + _length(len(payload), 0) + payload


def client_frame(payload: bytes, first: int = TEXT) -> bytes:
    """Return a masked frame."""
    return bytes([first]) + _length(len(payload), 0x80) + MASK + _masked(payload)


def split_frame(data: bytes) -> tuple[int, int] | None:
    """Return where the payload of the first frame begins and ends; None if its head is not there.

    The end may lie behind the data.
    """
    if len(data) < 2:
        return None
    length, begin = data[1] & 0x7F, 2
    if length >= 126:
        begin = 4 if length == 126 else 10
        if len(data) < begin:
            return None
        length = int.from_bytes(data[2:begin], "big")
    return begin, begin + length


def _length(size: int, masked: int) -> bytes:
    if size < 126:
        return bytes([masked | size])
    if size < 1 << 16:
        return bytes([masked | 126]) + size.to_bytes(2, "big")
    return bytes([masked | 127]) + size.to_bytes(8, "big")


def _masked(payload: bytes) -> bytes:
    key = (MASK * (len(payload) // 4 + 1))[: len(payload)]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(
        len(payload), "big"
    )
