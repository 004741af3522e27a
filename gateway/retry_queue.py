"""Keep exchanges that wait for their next attempt."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from .exchange import Exchange


class RetryQueue:
    """Give exchanges back in the order in which they are due."""

    def __init__(self) -> None:
        # (due, number, exchange); the number breaks ties.
        self._heap: list[tuple[float, int, Exchange]] = []
        self._number = 0

    def __len__(self) -> int:
        return len(self._heap)

    def put(self, exchange: Exchange, due: float) -> None:
        """Keep an exchange until a time."""
        self._number += 1
        heapq.heappush(self._heap, (due, self._number, exchange))

    def due(self, now: float) -> Iterator[Exchange]:
        """Take out what is due, one after the other."""
        while self._heap and self._heap[0][0] <= now:
            yield self.pop()

    def pop(self) -> Exchange:
        """Take out the one that is due first."""
        return heapq.heappop(self._heap)[2]

    def take_all(self) -> list[Exchange]:
        """Take out all, in the order in which they are due."""
        taken = [exchange for _, _, exchange in sorted(self._heap)]
        self._heap.clear()
        return taken
