"""Encode what one worker tells another through Redis: pure.

A published message is a run of envelopes, so that all that is due in one tick of the loop travels
in one PUBLISH. An envelope is a fixed head, then source, client id and payload:

    kind 1 | hops 1 | waited 1 | source length 1 | id length 1 | ask 4 | generation 8 | code 2
    | payload length 4 | source | id | payload

All integers are big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

_HEAD: Final = struct.Struct("!BBBBBIQHI")

PUSH: Final = 1  # deliver a message; code is the frame's first byte
DESCRIBE: Final = 2  # answer with JSON about the connection
CLOSE: Final = 3  # close the client; code is the close code, payload the reason
CONFIRM: Final = 4  # the outcome of an ask; code is the outcome, payload the body
# The id belongs to a newer connection now; the payload, the rest of the message, is the old one's
# generation in decimal, which only the script that publishes it knows.
REPLACED: Final = 5
# For the sender itself, to see that it comes back; the generation is the time in µs.
PROBE: Final = 6

_KINDS: Final = range(PUSH, PROBE + 1)


class Envelope(NamedTuple):
    """Carry one request or confirmation between two workers."""

    kind: int
    ask: int
    """Number that the asking worker knows the request by; 0 when it wants no confirmation."""
    source: bytes
    """Incarnation of the asking worker, whose channel takes the confirmation."""
    client_id: bytes
    generation: int
    """Generation that the client must have, 0 for any."""
    code: int
    payload: bytes
    hops: int = 0
    """How often the request was passed on because the client had moved."""
    waited: bool = False
    """True when it was held for a connect long enough, and is for the open connection now."""


def encode(envelope: Envelope) -> bytes:
    """Return the bytes of one envelope."""
    return pack(*envelope)


def pack(
    kind: int,
    ask: int,
    source: bytes,
    client_id: bytes,
    generation: int,
    code: int,
    payload: bytes,
    hops: int = 0,
    waited: bool = False,
) -> bytes:
    """Return the bytes of the envelope with these fields; there is one for each push and answer."""
    head = _HEAD.pack(
        kind, hops, waited, len(source), len(client_id), ask, generation, code, len(payload)
    )
    return head + source + client_id + payload


def decode(data: bytes) -> Iterator[Envelope]:
    """Yield the envelopes of one published message.

    Raises:
        ValueError: if the bytes are no run of envelopes; what came before is still yielded.
    """
    position, end = 0, len(data)
    while position < end:
        if end - position < _HEAD.size:
            raise ValueError("envelope is cut off")
        kind, hops, waited, source_length, id_length, ask, generation, code, length = (
            _HEAD.unpack_from(data, position)
        )
        if kind not in _KINDS:
            raise ValueError(f"unknown kind of envelope: {kind}")
        position += _HEAD.size
        id_start = position + source_length
        payload_start = id_start + id_length
        next_position = payload_start + length if kind != REPLACED else end
        if next_position > end:
            raise ValueError("envelope is cut off")
        yield Envelope(
            kind,
            ask,
            data[position:id_start],
            data[id_start:payload_start],
            generation,
            code,
            data[payload_start:next_position],
            hops,
            bool(waited),
        )
        position = next_position
