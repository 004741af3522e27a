"""Limit the connections of one IP address over all workers, without a lock and without a call.

The workers share a count-min sketch (Cormode and Muthukrishnan, 2005): an address has one cell in
each of a few rows, and each process rows of its own, which it alone writes. An address has as many
connections as the smallest of its cells says in all processes together, or fewer: others may share
the cell, but hardly every one. So nobody gets more than the limit. With a million addresses
connected at once and 16 workers one is refused one or two early on average; with fewer of either
hardly any, with 64 workers six. What a dead process has counted is wiped.
"""

from __future__ import annotations

import ipaddress
import mmap
from typing import TYPE_CHECKING, Final

from .counters import BANKS

if TYPE_CHECKING:
    from .admission import Admission

_ROWS: Final = 2
_MOST_CELLS: Final = 1 << 19
_MOST_WORDS: Final = 1 << 24
_WORD_BYTES: Final = 4
_HASH_BITS: Final = 20
_POLITE: Final = 2
"""An address with so many times its limit is not even answered."""


class AddressTable:
    """Hold the sketch in a mapping that children inherit by fork.

    Args:
        workers: number of slots.
    """

    def __init__(self, workers: int) -> None:
        processes = workers * BANKS
        self._cells = min(_MOST_CELLS, max(1, _MOST_WORDS // processes))
        # Words of one process, which lie together so that they are wiped without touching others.
        self._share = _ROWS * self._cells
        self._end = processes * self._share
        # Pages that nobody touches take no memory; the last word tells whether anybody did.
        self._mapping = mmap.mmap(-1, (self._end + 1) * _WORD_BYTES)
        self._words = memoryview(self._mapping).cast("I")

    def cells(self, key: str) -> tuple[int, ...]:
        """Return where the cells of a key are in the share of each process."""
        # Of a string that is keyed by the process, and inherited by fork: all workers agree, and
        # nobody outside can look for addresses that collide.
        number = hash(key)
        return tuple(
            row * self._cells + (number >> row * _HASH_BITS) % self._cells for row in range(_ROWS)
        )

    def add(self, cells: tuple[int, ...], process: int, by: int) -> None:
        """Count a connection more or less of one process.

        Args:
            process: see `process_number`.
        """
        words = self._words
        words[self._end] = 1
        start = process * self._share
        for cell in cells:
            words[start + cell] += by

    def count(self, cells: tuple[int, ...]) -> int:
        """Return the connections of all processes."""
        return min(sum(self._words[cell : self._end : self._share]) for cell in cells)

    def settle(self, worker: int, bank: int) -> None:
        """Forget what a process that has ended had counted."""
        if not self._words[self._end]:
            return
        start = process_number(worker, bank) * self._share * _WORD_BYTES
        size = self._share * _WORD_BYTES
        self._mapping[start : start + size] = bytes(size)


def process_number(worker: int, bank: int) -> int:
    """Number the processes that may live at once."""
    return worker * BANKS + bank


class AddressLimit:
    """Let only so many connections of one address in.

    Args:
        limit: connections of one address, over all workers; of one /64 of IPv6, which is what a
            single customer gets.
        table: shared with the other workers.
        worker: number of the slot.
        bank: of the process.
    """

    def __init__(self, limit: int, table: AddressTable, worker: int, bank: int) -> None:
        self._limit = limit
        self._table = table
        self._process = process_number(worker, bank)
        self._entered: dict[Admission, tuple[int, ...]] = {}

    def enter(self, client: Admission, address: str) -> bool:
        """Count a connection; tell whether its address has one too many now."""
        cells = self._table.cells(_key(address))
        self._entered[client] = cells
        # Counted before it is judged: two that come at once may both be refused, never both let in.
        self._table.add(cells, self._process, 1)
        return self._table.count(cells) > self._limit

    def is_flood(self, client: Admission) -> bool:
        """Tell whether the address has so many connections that no answer is owed.

        Those that were refused count until they are closed.
        """
        return self._table.count(self._entered[client]) > self._limit * _POLITE

    def leave(self, client: Admission) -> None:
        """Count a connection no longer, if it was counted."""
        cells = self._entered.pop(client, None)
        if cells is not None:
            self._table.add(cells, self._process, -1)


def _key(address: str) -> str:
    """Return what is counted together with an address."""
    if ":" not in address:
        return address
    number = ipaddress.IPv6Address(address.partition("%")[0])
    if number.ipv4_mapped is not None:
        return str(number.ipv4_mapped)
    return str(int(number) >> 64)
