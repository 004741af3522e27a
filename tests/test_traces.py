"""Hand traces from one process to another through the shared mapping."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ws2api.gateway.traces import (
    CONNECT,
    EVERYBODY,
    MOST_VIEWERS,
    NOBODY,
    PUSH,
    RECORDS,
    REQUEST,
    Trace,
    Traces,
)


def trace(client_id: str = "ann", reason: str = "") -> Trace:
    return Trace(1.5, REQUEST, "POST", client_id, 200, 1200, 5, 7, reason)


@pytest.fixture
def traces() -> Traces:
    return Traces(2, 2)


@given(
    st.sampled_from((REQUEST, PUSH, CONNECT)),
    st.integers(-1, 2**62),
    st.text(st.characters(codec="ascii", categories=("L", "N")), max_size=255),
    st.text(max_size=40),
)
def test_comes_as_it_was_written(kind: str, took_us: int, client_id: str, reason: str) -> None:
    written = Trace(2.25, kind, "DELETE", client_id, 404, took_us, 3, 4, reason)
    assert Trace.decode(written.encode()) == written


def test_reads_what_came_after(traces: Traces) -> None:
    ring = traces.ring(0)
    ring.append(b"before")
    seen = ring.last
    for number in range(3):
        ring.append(b"%d" % number)
    assert ring.read(seen) == ([b"0", b"1", b"2"], seen + 3, 0)
    assert ring.read(seen + 3) == ([], seen + 3, 0)


def test_counts_what_was_written_over(traces: Traces) -> None:
    ring = traces.ring(1, 1)
    for number in range(RECORDS + 10):
        ring.append(b"%d" % number)
    payloads, last, lost = ring.read(0)
    assert (payloads[0], payloads[-1]) == (b"10", b"%d" % (RECORDS + 9))
    assert (len(payloads), last, lost) == (RECORDS, RECORDS + 10, 10)


def test_rings_do_not_touch_each_other(traces: Traces) -> None:
    rings = [traces.ring(worker, bank) for worker in range(2) for bank in range(2)]
    rings.append(traces.ring(None))
    for number, ring in enumerate(rings):
        for _ in range(RECORDS + 1):
            ring.append(b"%d" % number * 600)  # longer than there is room for
    for number, ring in enumerate(rings):
        payloads, _, _ = ring.read(0)
        assert {bytes(set(payload)) for payload in payloads} == {b"%d" % number}


def test_long_reason_loses_its_end(traces: Traces) -> None:
    ring = traces.ring(0)
    ring.append(trace("x" * 255, "é" * 1000).encode())
    (payload,), _, _ = ring.read(0)
    found = Trace.decode(payload)
    assert found.client_id == "x" * 255
    assert set(found.reason) == {"é"}


def test_nobody_watches_at_first(traces: Traces) -> None:
    assert traces.wanted(0) == NOBODY


def test_each_viewer_has_a_client_or_all(traces: Traces) -> None:
    traces.watch(0, b"ann", 100)
    traces.watch(MOST_VIEWERS - 1, EVERYBODY, 200)
    assert traces.wanted(99) == {b"ann", EVERYBODY}
    assert traces.wanted(100) == {EVERYBODY}


def test_viewer_that_leaves_or_dies_is_forgotten(traces: Traces) -> None:
    traces.watch(0, b"ann", 100)
    traces.watch(1, b"bob", 100)
    traces.leave(0)
    assert traces.wanted(50) == {b"bob"}
    assert traces.wanted(100) == NOBODY
