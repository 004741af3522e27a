"""Keep the latest ends of connections, the latest errors, and why the API is away, where the admin
process sees them.

Each worker has rings of fixed-size records in a mapping that all processes share; it alone writes
to them, and readers find out whether a record changed under their eyes. A ring outlives its
process, so that what happened before a crash can still be looked up. Nothing here is the truth
about anything: the API's DELETE is.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

RECORD_BYTES: Final = 512
CLOSES: Final = 1024
"""Ends that are kept, of each process."""
ERRORS: Final = 128
_OUTAGES: Final = 1
_RECORDS: Final = CLOSES + ERRORS + _OUTAGES

# Number of the record, from 1, and length of what follows; 0 while it is being written.
_HEAD: Final = struct.Struct("<QH")
_PAYLOAD_BYTES: Final = RECORD_BYTES - _HEAD.size
# Time, generation, code, duration in ms, messages received, messages sent, length of the cause, and
# of the id.
_CLOSE: Final = struct.Struct("<dQHQQQBB")
_ERROR: Final = struct.Struct("<dBB")


class CloseRecord(NamedTuple):
    """Tell how a connection ended.

    Attributes:
        time_s: Unix time of the end.
        cause: one of the causes module.
    """

    time_s: float
    generation: int
    code: int
    duration_s: float
    messages_received: int
    messages_sent: int
    cause: str
    client_id: str
    reason: str

    def encode(self) -> bytes:
        """Return the bytes of a record."""
        cause, client_id = self.cause.encode(), self.client_id.encode()
        head = _CLOSE.pack(
            self.time_s,
            self.generation,
            self.code,
            int(self.duration_s * 1000),
            self.messages_received,
            self.messages_sent,
            len(cause),
            len(client_id),
        )
        return head + cause + client_id + self.reason.encode()

    @classmethod
    def decode(cls, data: bytes) -> CloseRecord:
        """Read the bytes of a record."""
        time_s, generation, code, ms, received, sent, causes, ids = _CLOSE.unpack_from(data)
        cause, client_id, reason = _split(data[_CLOSE.size :], causes, ids)
        return cls(time_s, generation, code, ms / 1000, received, sent, cause, client_id, reason)


class ErrorRecord(NamedTuple):
    """Tell what went wrong for one client.

    Attributes:
        time_s: Unix time.
        cause: one of the causes module.
    """

    time_s: float
    cause: str
    client_id: str
    text: str

    def encode(self) -> bytes:
        """Return the bytes of a record."""
        cause, client_id = self.cause.encode(), self.client_id.encode()
        head = _ERROR.pack(self.time_s, len(cause), len(client_id))
        return head + cause + client_id + self.text.encode()

    @classmethod
    def decode(cls, data: bytes) -> ErrorRecord:
        """Read the bytes of a record."""
        time_s, causes, ids = _ERROR.unpack_from(data)
        return cls(time_s, *_split(data[_ERROR.size :], causes, ids))


class Ring:
    """Write records over the oldest ones, and read them from another process.

    Args:
        data: the ring's part of the mapping, a multiple of RECORD_BYTES.
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._records = len(data) // RECORD_BYTES
        # The process before may have left some.
        self._last = max(_HEAD.unpack_from(data, i * RECORD_BYTES)[0] for i in self._positions)

    @property
    def _positions(self) -> range:
        return range(self._records)

    def append(self, payload: bytes) -> None:
        """Write a record; what is too long loses its end."""
        payload = payload[:_PAYLOAD_BYTES]
        self._last = number = self._last + 1
        start = (number % self._records) * RECORD_BYTES
        data = self._data
        _HEAD.pack_into(data, start, 0, len(payload))
        data[start + _HEAD.size : start + _HEAD.size + len(payload)] = payload
        _HEAD.pack_into(data, start, number, len(payload))

    def read(self) -> Iterator[bytes]:
        """Yield the payloads of all records that are whole, in no order."""
        for position in self._positions:
            start = position * RECORD_BYTES
            number, length = _HEAD.unpack_from(self._data, start)
            payload = bytes(self._data[start + _HEAD.size : start + _HEAD.size + length])
            if number and _HEAD.unpack_from(self._data, start)[0] == number:
                yield payload


class Recent:
    """Hold the rings of all workers in a mapping that children inherit by fork.

    Args:
        workers: number of slots.
        banks: processes that may live at once in each.
    """

    def __init__(self, workers: int, banks: int) -> None:
        self.workers = workers
        self._banks = banks
        self._mapping = mmap.mmap(-1, workers * banks * _RECORDS * RECORD_BYTES)
        self._data = memoryview(self._mapping)

    def closes(self, worker: int, bank: int) -> Ring:
        """Return the ring of one process's ended connections."""
        return Ring(self._part(worker, bank, 0, CLOSES))

    def errors(self, worker: int, bank: int) -> Ring:
        """Return the ring of one process's errors."""
        return Ring(self._part(worker, bank, CLOSES, ERRORS))

    def outage(self, worker: int, bank: int) -> Ring:
        """Return the place for one record, of why one process finds the API away."""
        return Ring(self._part(worker, bank, CLOSES + ERRORS, _OUTAGES))

    def _part(self, worker: int, bank: int, first: int, records: int) -> memoryview:
        start = ((worker * self._banks + bank) * _RECORDS + first) * RECORD_BYTES
        return self._data[start : start + records * RECORD_BYTES]

    def last_close(self, client_id: str) -> tuple[int, CloseRecord] | None:
        """Find the latest end of a client, and the slot of its worker; None if none is known."""
        wanted = client_id.encode()
        found: tuple[int, CloseRecord] | None = None
        for worker in range(self.workers):
            for bank in range(self._banks):
                data = self._part(worker, bank, 0, CLOSES)
                if wanted not in bytes(data):  # found out a lot sooner than record by record
                    continue
                for payload in Ring(data).read():
                    if wanted not in payload:
                        continue
                    record = CloseRecord.decode(payload)
                    is_later = found is None or record.time_s > found[1].time_s
                    if record.client_id == client_id and is_later:
                        found = worker, record
        return found

    def latest_errors(self, limit: int) -> list[tuple[int, ErrorRecord]]:
        """List the latest errors with the slots of their workers, newest first.

        Args:
            limit: of each worker.
        """
        found: list[tuple[int, ErrorRecord]] = []
        for worker in range(self.workers):
            banks = range(self._banks)
            payloads = [p for bank in banks for p in self.errors(worker, bank).read()]
            records = sorted(map(ErrorRecord.decode, payloads), key=lambda each: -each.time_s)
            found += [(worker, record) for record in records[:limit]]
        return sorted(found, key=lambda each: -each[1].time_s)


def _split(data: bytes, causes: int, ids: int) -> tuple[str, str, str]:
    cause, client_id = data[:causes], data[causes : causes + ids]
    # The end may have been cut off in the middle of a character.
    return cause.decode(), client_id.decode(), data[causes + ids :].decode(errors="ignore")
