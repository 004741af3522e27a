"""Serve every deadline of a worker from one timer: a coarse clock and a timing wheel."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Final, Protocol

TICK_S: Final = 0.1
_SLOTS: Final = 1024


class Timed(Protocol):
    """Have deadlines that the wheel asks for."""

    def on_tick(self, now: float) -> float:
        """Act on what is due; return seconds until the next look, 0 for never again."""


class Sweeper:
    """Hold what has deadlines in a ring of buckets, one tick apart, eight bytes each.

    A deadline is late by up to a tick; one beyond the ring's length is looked at early and put
    back. There is no cancelling: what has ended answers 0 when its bucket comes round.

    Args:
        loop: the worker's loop, whose clock `now` follows.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.now = loop.time()
        """Time of the last tick: free to read, 0.1 s coarse."""
        self.lag_s = 0.0
        """How late the last tick was."""
        self._ring: list[list[Timed]] = [[] for _ in range(_SLOTS)]
        self._position = 0
        self._next_at = self.now + TICK_S
        self._each_tick: list[Callable[[float], None]] = []
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to tick."""
        self._handle = self._loop.call_at(self._next_at, self._tick)

    def stop(self) -> None:
        """Tick no more."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def every_tick(self, callback: Callable[[float], None]) -> None:
        """Call `callback(now)` at each tick."""
        self._each_tick.append(callback)

    def schedule(self, timed: Timed, delay_s: float) -> None:
        """Look at `timed` after `delay_s` seconds."""
        ticks = min(max(1, math.ceil(delay_s / TICK_S)), _SLOTS - 1)
        self._ring[(self._position + ticks) % _SLOTS].append(timed)

    def _tick(self) -> None:
        self.now = now = self._loop.time()
        self.lag_s = max(0.0, now - self._next_at)
        due: list[Timed] = []
        # A loop that was held up catches up, so that deadlines do not drift. Nothing is looked at
        # before the ring stands where the clock does: the delays that follow begin now.
        while self._next_at <= now:
            self._next_at += TICK_S
            self._position = position = (self._position + 1) % _SLOTS
            due += self._ring[position]
            self._ring[position] = []
        # Armed before the looks, so that a fault in one of them does not stop the clock.
        self._handle = self._loop.call_at(self._next_at, self._tick)
        for timed in due:
            delay_s = timed.on_tick(now)
            if delay_s > 0:
                self.schedule(timed, delay_s)
        for callback in self._each_tick:
            callback(now)
