"""Say what an integer of a worker's bank means, for /metrics: pure."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Final, Literal

MICRO: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Metric:
    """Describe one integer: what /metrics calls it and what it counts.

    Attributes:
        kind: "bucket" is a word of a histogram, "internal" is for the gateway's own processes.
        is_summed: whether a slot's value is the sum of its banks; False for a gauge that is true
            of one process only, and is read from the one that is to serve.
        scale: what to multiply it with for the unit that its name says.
    """

    name: str
    help: str
    kind: Literal["counter", "gauge", "bucket", "internal"]
    labels: dict[str, str] = field(default_factory=dict)
    is_summed: bool = True
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Histogram:
    """Count durations by size.

    Attributes:
        bounds_us: upper bounds of all buckets but the last, which takes the rest.
        first: index of the first bucket; the others follow.
        sum_index: index of the sum of all durations, in µs.
    """

    name: str
    help: str
    labels: dict[str, str]
    bounds_us: tuple[int, ...]
    first: int
    sum_index: int

    def observe(self, slot: memoryview, duration_us: int) -> None:
        """Count a duration."""
        slot[self.first + bisect_left(self.bounds_us, duration_us)] += 1
        slot[self.sum_index] += duration_us


class Declarations(list[Metric]):
    """List what a bank holds, in its order; a method returns the index of what it declares."""

    def __init__(self) -> None:
        super().__init__()
        self.histograms: list[Histogram] = []

    def counter(self, name: str, help: str, **labels: str) -> int:
        """Declare what only grows."""
        return self._add(Metric(name, help, "counter", labels))

    def gauge(self, name: str, help: str, **labels: str) -> int:
        """Declare what goes up and down; both processes of a slot have a part in it."""
        return self._add(Metric(name, help, "gauge", labels))

    def gauge_of_one(self, name: str, help: str, scale: float = 1.0) -> int:
        """Declare what goes up and down, and is true of one process."""
        return self._add(Metric(name, help, "gauge", is_summed=False, scale=scale))

    def internal(self, name: str, help: str) -> int:
        """Declare what the gateway's processes tell each other."""
        return self._add(Metric(name, help, "internal", is_summed=False))

    def histogram(
        self, name: str, help: str, bounds_s: tuple[float, ...], **labels: str
    ) -> Histogram:
        """Declare how long something takes.

        Args:
            bounds_s: upper bounds of the buckets in seconds.
        """
        bounds_us = tuple(round(bound / MICRO) for bound in bounds_s)
        first = len(self)
        histogram = Histogram(name, help, labels, bounds_us, first, first + len(bounds_us) + 1)
        for _ in range(len(bounds_us) + 2):
            self._add(Metric(name, help, "bucket", labels))
        self.histograms.append(histogram)
        return histogram

    def _add(self, metric: Metric) -> int:
        self.append(metric)
        return len(self) - 1
