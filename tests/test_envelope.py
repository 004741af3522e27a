"""Send envelopes from hand to hand, whole and in shreds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ws2api.gateway.envelope import (
    CLOSE,
    CONFIRM,
    DESCRIBE,
    PROBE,
    PUSH,
    REPLACED,
    Envelope,
    decode,
    encode,
)

HEAD_BYTES = 23

envelopes = st.builds(
    Envelope,
    kind=st.sampled_from((PUSH, DESCRIBE, CLOSE, CONFIRM, PROBE)),
    ask=st.integers(0, (1 << 32) - 1),
    source=st.binary(max_size=255),
    client_id=st.binary(max_size=255),
    generation=st.integers(0, (1 << 64) - 1),
    code=st.integers(0, (1 << 16) - 1),
    payload=st.binary(max_size=500),
    hops=st.integers(0, 255),
    waited=st.booleans(),
)
runs = st.lists(envelopes, max_size=5)


def push(client_id: bytes = b"me", payload: bytes = b"hi") -> Envelope:
    return Envelope(PUSH, 7, b"host-0-1", client_id, 17, 0x81, payload)


def notice(generation: bytes) -> bytes:
    """Return what the claiming script publishes: the head, completed with a generation."""
    return encode(Envelope(REPLACED, 0, b"", b"me", 0, 0, b"")) + generation


def written(run: list[Envelope]) -> bytes:
    return b"".join(map(encode, run))


def read_until_error(data: bytes) -> tuple[list[Envelope], bool]:
    """Return what comes before the end or the error, and whether there was one."""
    read = []
    try:
        for envelope in decode(data):
            read.append(envelope)
    except ValueError:
        return read, True
    return read, False


@settings(deadline=None, max_examples=200)
@given(runs)
def test_run_is_read_as_it_was_written(run: list[Envelope]) -> None:
    assert list(decode(written(run))) == run


def test_nothing_is_an_empty_run() -> None:
    assert list(decode(b"")) == []


def test_wire_is_the_documented_one() -> None:
    envelope = Envelope(CLOSE, 0x01020304, b"src", b"id", 5, 1000, b"bye", hops=2, waited=True)
    assert encode(envelope) == b"".join(
        (
            b"\x03\x02\x01\x03\x02",
            b"\x01\x02\x03\x04",
            b"\0\0\0\0\0\0\0\x05",
            b"\x03\xe8",
            b"\0\0\0\x03",
            b"src",
            b"id",
            b"bye",
        )
    )


def test_is_fresh_unless_said_otherwise() -> None:
    (envelope,) = decode(encode(push()))
    assert (envelope.hops, envelope.waited) == (0, False)


def test_large_payload() -> None:
    envelope = push(payload=bytes(1 << 20))
    assert list(decode(encode(envelope))) == [envelope]


def test_payload_may_look_like_an_envelope() -> None:
    run = [push(payload=encode(push())), push(payload=b"")]
    assert list(decode(written(run))) == run


@settings(deadline=None, max_examples=200)
@given(runs, st.integers(0, 5000))
def test_what_is_cut_off_is_an_error_after_what_is_whole(run: list[Envelope], cut: int) -> None:
    data = written(run)
    cut %= len(data) + 1
    read, failed = read_until_error(data[:cut])
    assert read == run[: len(read)]
    assert failed == (len(written(read)) != cut)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_raise_a_value_error_at_most(data: bytes) -> None:
    read_until_error(data)


@settings(deadline=None, max_examples=200)
@given(
    runs.filter(bool), st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=3)
)
def test_damaged_bytes_raise_a_value_error_at_most(
    run: list[Envelope], damages: list[tuple[int, int]]
) -> None:
    data = bytearray(written(run))
    for position, value in damages:
        data[position % len(data)] = value
    read, failed = read_until_error(bytes(data))
    assert failed or read


@pytest.mark.parametrize("kind", [0, 7, 255])
def test_unknown_kind_is_an_error(kind: int) -> None:
    with pytest.raises(ValueError, match=f"unknown kind of envelope: {kind}"):
        list(decode(encode(push()._replace(kind=kind))))


@pytest.mark.parametrize("missing", [1, 3, HEAD_BYTES, len(encode(push())) - 1])
def test_cut_off_envelope_is_an_error(missing: int) -> None:
    with pytest.raises(ValueError, match="envelope is cut off"):
        list(decode(encode(push())[:-missing]))


@pytest.mark.parametrize("generation", [b"1700000000000000", b"5", b""])
def test_notice_of_a_replacement_takes_the_rest(generation: bytes) -> None:
    (envelope,) = decode(notice(generation))
    assert (envelope.kind, envelope.client_id) == (REPLACED, b"me")
    assert envelope.payload == generation


def test_probe_is_an_envelope_of_nothing_but_a_time() -> None:
    probe = Envelope(PROBE, 0, b"", b"", 1_700_000_000_000_000, 0, b"")
    assert len(encode(probe)) == HEAD_BYTES
    assert list(decode(encode(push()) + encode(probe) + encode(push()))) == [push(), probe, push()]


def test_notice_may_follow_others() -> None:
    first, last = decode(encode(push()) + notice(b"17"))
    assert first == push()
    assert last.payload == b"17"
