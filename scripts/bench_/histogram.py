"""Count latencies in buckets that widen with them: 32 to an octave, so never wrong by over 3 %."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

BUCKETS: Final = 1216
"""Enough for 2^42 ns, more than an hour."""
LONGEST_NS: Final = (1 << 42) - 1


def bucket(value_ns: int) -> int:
    """Return the bucket of a value that is not negative and not above LONGEST_NS."""
    shift = value_ns.bit_length() - 6
    return (shift << 5) + (value_ns >> shift) if shift > 0 else value_ns


def middle_ns(index: int) -> float:
    """Return the middle of a bucket."""
    if index < 64:
        return float(index)
    shift = (index >> 5) - 1
    return ((index - (shift << 5)) + 0.5) * (1 << shift)


def percentile_ms(counts: Sequence[int], share: float) -> float:
    """Return the latency that this share of the values does not exceed; NaN without any.

    Args:
        counts: values per bucket.
        share: 0.5 for the median, 1 for the largest.
    """
    rank = share * sum(counts)
    seen = 0
    for index, count in enumerate(counts):
        seen += count
        if count and seen >= rank:
            return middle_ns(index) / 1e6
    return float("nan")
