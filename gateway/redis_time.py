"""Know what time it is at Redis without asking it, and make up generations while it is away."""

from __future__ import annotations

import time


class RedisTime:
    """Follow Redis' clock from what its answers say.

    Between two answers it goes with this host's monotonic clock, so nothing that is done to either
    host's time of day makes it jump. It is late by what the last answer took on its way, and early
    by no more than the request took.
    """

    def __init__(self) -> None:
        # Redis' time minus the monotonic one, in ms; None until Redis has said what time it is.
        self._offset_ms: float | None = None
        self._last_generation = 0

    def learn(self, redis_ms: int, asked_at_s: float) -> None:
        """Take what Redis said.

        Args:
            redis_ms: its time, in ms since the epoch.
            asked_at_s: monotonic time at which it was asked, or later.
        """
        lowest = redis_ms - time.monotonic() * 1000
        highest = redis_ms + 1 - asked_at_s * 1000
        offset = self._offset_ms
        # What lies between agrees with this answer, and an answer before may have been faster.
        self._offset_ms = lowest if offset is None else min(max(offset, lowest), highest)

    def deadline_ms(self, timeout_s: float) -> int:
        """Return Redis' time so many seconds from now, in ms; 0 while nobody knows."""
        if self._offset_ms is None:
            return 0
        return int((time.monotonic() + timeout_s) * 1000 + self._offset_ms)

    def next_generation(self) -> int:
        """Return a birth time in µs, younger than all that this worker knows of."""
        if self._offset_ms is None:
            now_us = time.time_ns() // 1000
        else:
            now_us = int(time.monotonic() * 1e6 + self._offset_ms * 1000)
        self._last_generation = max(self._last_generation + 1, now_us)
        return self._last_generation

    def pass_by(self, generation: int) -> None:
        """Note a generation that there is, or may be: the next one is younger."""
        if generation > self._last_generation:
            self._last_generation = generation
