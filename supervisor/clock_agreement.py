"""Tell whether the time of Redis passes as this process' own does: pure.

A lease ends by Redis' clock. When that clock jumps, or this process stood still, every lease looks
as if it had run out, although the workers live and go on to renew theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

TOLERANCE_S: Final = 1.0
"""A difference up to this does no harm: a lease is renewed several times before it ends."""


@dataclass(frozen=True, slots=True)
class _Offset:
    """Bound Redis' time minus this process' own, at one moment."""

    low_s: float
    high_s: float
    at: float


class ClockAgreement:
    """Compare samples of Redis' time with this process' monotonic clock.

    Args:
        window_s: for how long a sample is what later ones are compared with, so that clocks that
            drift apart slowly agree.
        now: monotonic time in seconds.
    """

    def __init__(self, window_s: float, now: float) -> None:
        self._window_s = window_s
        self._anchor: _Offset | None = None  # before the first sample
        self.agreed_since = now
        """Monotonic time of the last sample that disagreed with those before."""

    def sample(self, redis_s: float, began: float, ended: float) -> float:
        """Take one sample.

        Args:
            redis_s: what Redis said.
            began: monotonic time before it was asked.
            ended: and when the answer was here.

        Returns:
            by how many seconds Redis' clock was put forward since (back: less than 0), 0 if the
            clocks agree.
        """
        anchor, offset = self._anchor, _Offset(redis_s - ended, redis_s - began, ended)
        jump_s = 0.0 if anchor is None else _difference_s(anchor, offset)
        if jump_s:
            self.agreed_since = ended
        if jump_s or anchor is None or ended - anchor.at >= self._window_s:
            self._anchor = offset
        return jump_s


def _difference_s(before: _Offset, after: _Offset) -> float:
    """Return by how much two offsets differ for certain, 0 for a little or nothing."""
    if after.low_s > before.high_s + TOLERANCE_S:
        return after.low_s - before.high_s
    if after.high_s < before.low_s - TOLERANCE_S:
        return after.high_s - before.low_s
    return 0.0
