"""Hand what is traced from the workers to the admin process, for whoever watches.

One mapping that all processes share. In front are the places of the viewers: each has a client id,
or none for all clients, and a lease that the admin process renews while the viewer is there, so
that nothing is traced any longer because somebody died. Behind them each process has a ring of
fixed-size records that it alone writes. A viewer that falls behind loses records, and learns how
many; a writer never waits.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from .client_id import MAX_CLIENT_ID_BYTES

MOST_VIEWERS: Final = 8
RECORDS: Final = 2048
"""Records that are kept, of each process."""
RECORD_BYTES: Final = 512
NOBODY: Final[frozenset[bytes]] = frozenset()
EVERYBODY: Final = b""
"""Stands for all ids."""

REQUEST: Final = "request"
"""A request to the API."""
PUSH: Final = "push"
"""A request on the push port."""
CONNECT: Final = "connect"
"""A connect that the gateway refused by itself."""
_KINDS: Final = (REQUEST, PUSH, CONNECT)

# Monotonic time in µs until which the viewer is there, length of its id, id.
_VIEWER: Final = struct.Struct(f"<qH{MAX_CLIENT_ID_BYTES}s")
# Monotonic time in µs until which any viewer is there.
_UNTIL: Final = struct.Struct("<q")
_VIEWERS_START: Final = RECORD_BYTES
_RINGS_START: Final = _VIEWERS_START + MOST_VIEWERS * RECORD_BYTES
# Number of the record, from 1, and length of what follows; 0 while it is being written.
_HEAD: Final = struct.Struct("<QH")
_PAYLOAD_BYTES: Final = RECORD_BYTES - _HEAD.size
# Number of the last record, in a record's place in front of the ring.
_LAST: Final = struct.Struct("<Q")
_RING_BYTES: Final = (1 + RECORDS) * RECORD_BYTES
# Time, duration in µs, sizes; then kind, status, lengths of the method and of the id.
_TRACE: Final = struct.Struct("<dqqqBHBB")


class Trace(NamedTuple):
    """Tell what became of one request.

    Attributes:
        time_s: Unix time of its end.
        kind: REQUEST, PUSH or CONNECT.
        client_id: empty when the request did not get so far as to name one.
        status: of the answer; 0 when there was none.
        took_us: from its sending, or its arrival, to the answer; -1 when it was not sent.
        request_bytes: size of the request's body.
        reply_bytes: size of the answer's body.
        reason: why it was refused, or failed; empty when all is well.
    """

    time_s: float
    kind: str
    method: str
    client_id: str
    status: int
    took_us: int
    request_bytes: int
    reply_bytes: int
    reason: str

    def encode(self) -> bytes:
        """Return the bytes of a record."""
        method, client_id = self.method.encode(), self.client_id.encode()
        head = _TRACE.pack(
            self.time_s,
            self.took_us,
            self.request_bytes,
            self.reply_bytes,
            _KINDS.index(self.kind),
            self.status,
            len(method),
            len(client_id),
        )
        return head + method + client_id + self.reason.encode()

    @classmethod
    def decode(cls, data: bytes) -> Trace:
        """Read the bytes of a record."""
        time_s, took_us, sent, received, kind, status, methods, ids = _TRACE.unpack_from(data)
        method_end = _TRACE.size + methods
        id_end = method_end + ids
        return cls(
            time_s,
            _KINDS[kind],
            data[_TRACE.size : method_end].decode(),
            data[method_end:id_end].decode(),
            status,
            took_us,
            sent,
            received,
            data[id_end:].decode(errors="ignore"),  # may be cut off in the middle of a character
        )


class TraceRing:
    """Write records over the oldest ones, and read them from another process.

    Args:
        data: the ring's part of the mapping.
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data

    @property
    def last(self) -> int:
        """Number of the last record, from 1; 0 before there is one."""
        number: int = _LAST.unpack_from(self._data)[0]
        return number

    def append(self, payload: bytes) -> None:
        """Write a record; what is too long loses its end."""
        payload = payload[:_PAYLOAD_BYTES]
        number = self.last + 1
        start = _start_of(number)
        data = self._data
        _HEAD.pack_into(data, start, 0, len(payload))
        data[start + _HEAD.size : start + _HEAD.size + len(payload)] = payload
        _HEAD.pack_into(data, start, number, len(payload))
        _LAST.pack_into(data, 0, number)

    def read(self, after: int) -> tuple[list[bytes], int, int]:
        """Return the payloads of the records behind one, the number of the last, and how many of
        them are lost because others were written over them."""
        last = self.last
        first = max(after + 1, last - RECORDS + 1)
        payloads = list(self._whole(range(first, last + 1)))
        return payloads, last, last - after - len(payloads)

    def _whole(self, numbers: range) -> Iterator[bytes]:
        for number in numbers:
            start = _start_of(number)
            found, length = _HEAD.unpack_from(self._data, start)
            payload = bytes(self._data[start + _HEAD.size : start + _HEAD.size + length])
            if found == number == _HEAD.unpack_from(self._data, start)[0]:
                yield payload


def _start_of(number: int) -> int:
    return (1 + number % RECORDS) * RECORD_BYTES


class Traces:
    """Hold the viewers' places and all rings in a mapping that children inherit by fork.

    Args:
        workers: number of slots.
        banks: processes that may live at once in each.
    """

    def __init__(self, workers: int, banks: int) -> None:
        self.workers = workers
        self.banks = banks
        # The admin process has one, too; memory is taken when it is written to.
        self._mapping = mmap.mmap(-1, _RINGS_START + (workers * banks + 1) * _RING_BYTES)
        self._data = memoryview(self._mapping)

    def ring(self, worker: int | None, bank: int = 0) -> TraceRing:
        """Return the ring of one process; worker None: that of the admin process."""
        index = self.workers * self.banks if worker is None else worker * self.banks + bank
        start = _RINGS_START + index * _RING_BYTES
        return TraceRing(self._data[start : start + _RING_BYTES])

    # Of the admin process.

    def watch(self, viewer: int, client_id: bytes, until_us: int) -> None:
        """Take a viewer's place, or keep it.

        Args:
            viewer: number of the place, below MOST_VIEWERS.
            client_id: whose requests are wanted; EVERYBODY for all.
            until_us: monotonic time up to which they are.
        """
        start = _VIEWERS_START + viewer * RECORD_BYTES
        _VIEWER.pack_into(self._data, start, until_us, len(client_id), client_id)
        if until_us > _UNTIL.unpack_from(self._data)[0]:
            _UNTIL.pack_into(self._data, 0, until_us)

    def leave(self, viewer: int) -> None:
        """Leave a viewer's place."""
        _VIEWER.pack_into(self._data, _VIEWERS_START + viewer * RECORD_BYTES, 0, 0, b"")

    # Of whoever traces.

    def wanted(self, now_us: int) -> frozenset[bytes]:
        """Return the ids whose requests somebody watches; EVERYBODY among them: all."""
        if _UNTIL.unpack_from(self._data)[0] <= now_us:
            return NOBODY
        viewers = (
            _VIEWER.unpack_from(self._data, _VIEWERS_START + viewer * RECORD_BYTES)
            for viewer in range(MOST_VIEWERS)
        )
        return frozenset(
            client_id[:length] for until_us, length, client_id in viewers if until_us > now_us
        )
