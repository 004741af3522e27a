"""Write the latest ends and errors, and read them beside the writer."""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ws2api.gateway import causes
from ws2api.gateway.recent import (
    CLOSES,
    ERRORS,
    RECORD_BYTES,
    CloseRecord,
    ErrorRecord,
    Recent,
    Ring,
)

# Another test's server may run in a thread: no child here touches what a thread could hold.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

PAYLOAD_BYTES = RECORD_BYTES - 10


def a_close(client_id: str = "tom", time_s: float = 1.0, reason: str = "bye") -> CloseRecord:
    return CloseRecord(time_s, 17, 1000, 2.5, 3, 4, causes.CLIENT, client_id, reason)


def an_error(client_id: str = "tom", time_s: float = 1.0, text: str = "too late") -> ErrorRecord:
    return ErrorRecord(time_s, causes.TIMEOUT, client_id, text)


def ring(records: int) -> Ring:
    return Ring(memoryview(bytearray(records * RECORD_BYTES)))


# Records.

client_ids = st.text("abcXYZ019._~-%", min_size=1, max_size=255)
reasons = st.text(st.characters(exclude_categories=["Cs"]), max_size=123).filter(
    lambda text: len(text.encode()) <= 123
)
counts = st.integers(0, 2**63)


@settings(deadline=None)
@given(
    st.builds(
        CloseRecord,
        time_s=st.floats(0, 1e12),
        generation=counts,
        code=st.integers(0, 65535),
        duration_s=st.integers(0, 10**12).map(lambda ms: ms / 1000),
        messages_received=counts,
        messages_sent=counts,
        cause=st.sampled_from(list(causes.CODES)),
        client_id=client_ids,
        reason=reasons,
    )
)
def test_every_close_comes_back_as_it_was(record: CloseRecord) -> None:
    one = ring(2)
    one.append(record.encode())
    (payload,) = one.read()
    found = CloseRecord.decode(payload)
    assert found._replace(duration_s=0) == record._replace(duration_s=0)
    assert found.duration_s == pytest.approx(record.duration_s, abs=0.001)


@settings(deadline=None)
@given(client_ids, st.text(st.characters(exclude_categories=["Cs"]), max_size=1000))
def test_error_comes_back_as_far_as_it_fits(client_id: str, text: str) -> None:
    one = ring(2)
    one.append(ErrorRecord(1.5, causes.STATUS, client_id, text).encode())
    (payload,) = one.read()
    assert len(payload) <= PAYLOAD_BYTES
    record = ErrorRecord.decode(payload)
    assert (record.time_s, record.cause, record.client_id) == (1.5, causes.STATUS, client_id)
    assert text.startswith(record.text)
    # No more is missing than what did not fit, and the rest of one character.
    room = PAYLOAD_BYTES - 10 - len(causes.STATUS) - len(client_id)
    assert len(record.text.encode()) >= min(len(text.encode()), room - 3)


@pytest.mark.parametrize("cut", range(4))
def test_text_that_is_cut_in_the_middle_of_a_character_loses_it(cut: int) -> None:
    text = "x" * cut + "\U0001f600" * 200
    payload = an_error(text=text).encode()[:PAYLOAD_BYTES]
    assert text.startswith(ErrorRecord.decode(payload).text)


# A ring.


def numbers(one: Ring) -> list[int]:
    return sorted(int(payload) for payload in one.read())


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 100, 1001])
def test_ring_keeps_the_latest(count: int) -> None:
    one = ring(4)
    for number in range(count):
        one.append(b"%d" % number)
    assert numbers(one) == list(range(count))[-4:]


@settings(deadline=None)
@given(st.lists(st.binary(max_size=600), max_size=20), st.integers(1, 6))
def test_ring_returns_what_was_written(payloads: list[bytes], records: int) -> None:
    one = ring(records)
    for payload in payloads:
        one.append(payload)
    assert sorted(one.read()) == sorted(p[:PAYLOAD_BYTES] for p in payloads[-records:])


@pytest.mark.parametrize("before", [1, 3, 4, 5, 11])
def test_next_process_goes_on_where_the_last_one_ended(before: int) -> None:
    data = memoryview(bytearray(4 * RECORD_BYTES))
    first, total = Ring(data), before + 2
    for number in range(before):
        first.append(b"%d" % number)
    second = Ring(data)
    for number in range(before, total):
        second.append(b"%d" % number)
    assert numbers(second) == list(range(total))[-4:]


@pytest.mark.parametrize("before", range(1, 10))
def test_record_at_which_a_process_died_is_passed_over_and_used_again(before: int) -> None:
    data = memoryview(bytearray(4 * RECORD_BYTES))
    first = Ring(data)
    for number in range(before):
        first.append(b"%d" % number)
    # It dies while it writes the next one: no number, half of a payload.
    struct.pack_into("<QH", data, (before + 1) % 4 * RECORD_BYTES, 0, 400)
    assert numbers(first) == list(range(before))[-3:]
    second = Ring(data)
    second.append(b"%d" % before)
    assert numbers(second) == list(range(before + 1))[-4:]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_reader_that_is_overtaken_sees_no_mixture(times: int) -> None:
    """Let the writer come in front of any line of the reader."""
    lines_seen = 0
    for line in range(100):
        data = memoryview(bytearray(2 * RECORD_BYTES))
        one, writer = Ring(data), Ring(data)
        for ring in (one, writer):
            ring.append(b"old" * 100)

        def write(writer: Ring = writer) -> None:
            for _ in range(times):
                writer.append(b"new and longer" * 30)

        with before_line(Ring.read, line, write) as seen:
            payloads = list(one.read())
        assert set(payloads) <= {b"old" * 100, b"new and longer" * 30}
        lines_seen = max(lines_seen, seen())
        if seen() <= line:
            break
    assert lines_seen > 8


def test_writer_that_is_looked_at_shows_no_half_record() -> None:
    """Let the reader come in front of any line of the writer."""
    for line in range(100):
        one = ring(2)
        one.append(b"old" * 100)
        one.append(b"next" * 100)
        found: list[bytes] = []
        with before_line(Ring.append, line, lambda o=one, f=found: f.extend(o.read())) as seen:
            one.append(b"new and longer" * 30)
        if seen() <= line:
            break
        assert set(found) in ({b"old" * 100, b"next" * 100}, {b"next" * 100})
    assert line > 5


@contextlib.contextmanager
def before_line(
    function: Callable[..., object], line: int, action: Callable[[], object]
) -> Iterator[Callable[[], int]]:
    """Do something in front of the nth line that a function executes; tell how many it did."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if frame.f_code is not function.__code__:  # type: ignore[attr-defined]
            return None
        if event == "line":
            count += 1
            if count == line + 1:
                action()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lambda: count
    finally:
        sys.settrace(before)


# The rings of all workers.


def test_each_process_has_rings_of_its_own() -> None:
    recent = Recent(3, 2)
    for worker in range(3):
        for bank in range(2):
            name = f"{worker}{bank}"
            closes, errors = recent.closes(worker, bank), recent.errors(worker, bank)
            for _ in range(CLOSES):
                closes.append(a_close(name).encode())
            for _ in range(ERRORS):
                errors.append(an_error(name).encode())
    for worker in range(3):
        for bank in range(2):
            ids = {CloseRecord.decode(p).client_id for p in recent.closes(worker, bank).read()}
            assert ids == {f"{worker}{bank}"}
            ids = {ErrorRecord.decode(p).client_id for p in recent.errors(worker, bank).read()}
            assert ids == {f"{worker}{bank}"}


def test_last_close_is_the_latest_of_all_workers() -> None:
    recent = Recent(2, 2)
    for time_s, worker, bank in [(3.0, 1, 0), (7.0, 0, 1), (5.0, 1, 1)]:
        recent.closes(worker, bank).append(a_close("tom", time_s).encode())
        recent.closes(worker, bank).append(a_close("tommy", time_s + 10).encode())
    found = recent.last_close("tom")
    assert found == (0, a_close("tom", 7.0))
    assert recent.last_close("tim") is None


def test_name_in_a_reason_is_nobodys_name() -> None:
    recent = Recent(1, 1)
    recent.closes(0, 0).append(a_close("anna", reason="tom").encode())
    assert recent.last_close("tom") is None


def test_latest_errors_come_newest_first_and_as_many_of_each_worker() -> None:
    recent = Recent(2, 2)
    for number in range(8):
        recent.errors(number % 2, number // 4).append(an_error(f"c{number}", number).encode())
    found = recent.latest_errors(3)
    assert [(worker, record.client_id) for worker, record in found] == [
        (1, "c7"),
        (0, "c6"),
        (1, "c5"),
        (0, "c4"),
        (1, "c3"),
        (0, "c2"),
    ]


# Beside a writer in another process.


def test_reader_beside_a_writer_sees_whole_records_only() -> None:
    recent = Recent(1, 1)
    pid = os.fork()
    if pid == 0:
        one = recent.closes(0, 0)
        number = 0
        try:
            while True:  # until it is killed
                number += 1
                size = number % 120
                reason = chr(97 + number % 26) * size
                one.append(a_close(f"c{number}", float(number), reason).encode())
        finally:
            os._exit(1)
    try:
        seen, last, deadline = 0, 0, time.monotonic() + 15
        while last < 5 * CLOSES or seen < 10 * CLOSES:
            assert time.monotonic() < deadline
            for payload in recent.closes(0, 0).read():
                record = CloseRecord.decode(payload)
                number = int(record.time_s)
                assert record.client_id == f"c{number}"
                assert record.reason == chr(97 + number % 26) * (number % 120)
                seen, last = seen + 1, max(last, number)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    # What it has written is still there, and the next process goes on.
    one = recent.closes(0, 0)
    found = {int(CloseRecord.decode(payload).time_s) for payload in one.read()}
    assert CLOSES - 1 <= len(found) <= CLOSES
    assert found == set(range(max(found) - len(found) + 1, max(found) + 1))
    one.append(a_close("heir", 1e9).encode())
    assert recent.last_close("heir") == (0, a_close("heir", 1e9))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), client_ids), max_size=30))
def test_finds_whoever_was_written(ends: list[tuple[int, int, str]]) -> None:
    recent = Recent(2, 2)
    for number, (worker, bank, client_id) in enumerate(ends):
        recent.closes(worker, bank).append(a_close(client_id, float(number)).encode())
    for client_id in {client_id for _, _, client_id in ends}:
        last = max(n for n, (_, _, name) in enumerate(ends) if name == client_id)
        assert recent.last_close(client_id) == (ends[last][0], a_close(client_id, float(last)))
