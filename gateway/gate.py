"""Bound how many connects the API is asked about at once; make the others wait, or turn them away.

After a restart of whatever stands in front, thousands of clients come back in the same second. The
API decides on so many at once as it is given to do, the next wait in order, and one that would wait
for longer than a handshake may take is told so at once. Pure: it knows no socket.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final, Protocol

from . import counters as c

# Weight of the last connect in the average time that the API takes.
_WEIGHT: Final = 1 / 16


class Entrant(Protocol):
    """Be a client whose request is read."""

    def on_admitted(self) -> None:
        """Go on: the API may be asked."""


class Clock(Protocol):
    """Tell the time in seconds."""

    now: float


class Gate:
    """Let a bounded number of clients through at a time, in the order in which they came.

    Args:
        limit: how many may be under way to the API.
        patience_s: the longest that one may wait.
        slot: the worker's counters.
    """

    def __init__(self, limit: int, patience_s: float, slot: memoryview, clock: Clock) -> None:
        self._limit = limit
        self._patience_s = patience_s
        self._slot = slot
        self._clock = clock
        # Client → when it was admitted, oldest first.
        self._under_way: OrderedDict[Entrant, float] = OrderedDict()
        self._waiting: OrderedDict[Entrant, None] = OrderedDict()
        self._average_s = 0.0

    def enter(self, entrant: Entrant) -> float:
        """Ask to be let through.

        Returns:
            0.0 when the client is through or will be told by `on_admitted`; else it is turned away,
            and the number of seconds after which it may come again.
        """
        if len(self._under_way) < self._limit and not self._waiting:
            self._admit(entrant)
            return 0.0
        wait_s = self._expected_wait_s()
        if wait_s > self._patience_s:
            self._slot[c.CONNECTS_OVERFLOWED] += 1
            return wait_s
        self._waiting[entrant] = None
        self._slot[c.CONNECTS_WAITING] = len(self._waiting)
        return 0.0

    def leave(self, entrant: Entrant) -> None:
        """Make room: the API has decided, or the client has gone. Does nothing for a stranger."""
        admitted_at = self._under_way.pop(entrant, None)
        if admitted_at is None:
            if self._waiting.pop(entrant, self) is None:
                self._slot[c.CONNECTS_WAITING] = len(self._waiting)
            return
        took_s = self._clock.now - admitted_at
        self._average_s += (took_s - self._average_s) * _WEIGHT
        while self._waiting and len(self._under_way) < self._limit:
            following, _ = self._waiting.popitem(last=False)
            self._slot[c.CONNECTS_WAITING] = len(self._waiting)
            self._admit(following)

    def _admit(self, entrant: Entrant) -> None:
        self._under_way[entrant] = self._clock.now
        entrant.on_admitted()

    def _expected_wait_s(self) -> float:
        """Estimate how long one would wait that came now; an API that hangs makes it grow."""
        # One that hangs among others tells nothing; a time in which nobody was let through does.
        newest_at = next(reversed(self._under_way.values()), self._clock.now)
        stalled_s = self._clock.now - newest_at
        return stalled_s + (len(self._waiting) + 1) * self._average_s / self._limit


def retry_after(wait_s: float) -> bytes:
    """Return the header line that tells a client when to come again (RFC 9110, 10.2.3)."""
    return b"Retry-After: %d\r\n" % max(1, min(60, math.ceil(wait_s)))
