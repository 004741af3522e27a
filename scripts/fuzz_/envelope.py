"""Any bytes are a run of envelopes or raise ValueError; what was encoded comes back the same."""

from __future__ import annotations

from typing import Final

from ws2api.gateway.envelope import PROBE, PUSH, REPLACED, Envelope, decode, encode

DICTIONARY = (
    *(bytes((kind,)) for kind in range(PUSH, PROBE + 2)),
    b"\1\0\0\0\0" + bytes(18),
    b"\5\0\0\1\2" + bytes(18) + b"w" + b"me17",
)

_HEAD_BYTES: Final = len(encode(Envelope(PUSH, 0, b"", b"", 0, 0, b"")))


def check(data: bytes) -> None:
    """Decode the bytes, and make envelopes of them."""
    read: list[Envelope] = []
    try:
        for envelope in decode(data):
            read.append(envelope)
            assert PUSH <= envelope.kind <= PROBE
            assert len(envelope.source) + len(envelope.client_id) <= len(data)
    except ValueError:
        pass
    else:
        assert len(b"".join(map(encode, read))) == len(data)
    # A notice takes the rest of the message, so nothing can follow it.
    assert all(envelope.kind != REPLACED for envelope in read[:-1])
    assert list(decode(b"".join(map(encode, read)))) == read
    _encode_and_decode(data)


def _encode_and_decode(data: bytes) -> None:
    """Take fields from the bytes, as long as there are enough of them."""
    run: list[Envelope] = []
    while len(data) >= _HEAD_BYTES and (not run or run[-1].kind != REPLACED):
        head, data = data[:_HEAD_BYTES], data[_HEAD_BYTES:]
        source_length, id_length, payload_length = head[3], head[4], int.from_bytes(head[5:7])
        source, data = data[:source_length], data[source_length:]
        client_id, data = data[:id_length], data[id_length:]
        payload, data = data[:payload_length], data[payload_length:]
        run.append(
            Envelope(
                PUSH + head[0] % PROBE,
                int.from_bytes(head[7:11]),
                source,
                client_id,
                int.from_bytes(head[11:19]),
                int.from_bytes(head[19:21]),
                payload,
                head[1],
                bool(head[2] & 1),
            )
        )
    assert list(decode(b"".join(map(encode, run)))) == run
