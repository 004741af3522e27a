"""Pace what is sent to the API: at most so many a second. Pure."""

from __future__ import annotations

from typing import Final

_BURST_S: Final = 0.1


class TokenBucket:
    """Allow so much a second; what is not used is lost after a tenth of a second.

    Args:
        rate: per second.
        now: the clock in seconds.
    """

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self._capacity = max(1.0, rate * _BURST_S)
        self._tokens = 1.0
        self._filled_at = now

    def available(self, now: float) -> int:
        """Return how many may be taken now."""
        gained = (now - self._filled_at) * self._rate
        self._tokens = min(self._capacity, self._tokens + gained)
        self._filled_at = now
        return int(self._tokens)

    def take(self, count: int) -> None:
        """Use some of what is available."""
        self._tokens -= count

    def wait_s(self) -> float:
        """Return in how many seconds the next one is there, counted from the last look."""
        return max(0.0, (1.0 - self._tokens) / self._rate)
