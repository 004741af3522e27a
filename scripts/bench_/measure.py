"""Take the figures of a stretch of time, and the medians of several rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from bench_ import BenchError, histogram
from bench_.board import Sample
from bench_.crowd import Crowd
from bench_.report import BASE, Row
from bench_.systems import System

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Moment:
    """Hold what a system had used, and a crowd had seen, at one time."""

    user_us: float
    system_us: float
    redis_us: float
    sample: Sample


def look(system: System, crowd: Crowd) -> Moment:
    """Read both."""
    return Moment(*system.cpu(), system.redis_us(), crowd.sample())


def cpu_figures(before: Moment, after: Moment, count: int) -> Figures:
    """Return the CPU time per thing done."""
    user_us = (after.user_us - before.user_us) / count
    system_us = (after.system_us - before.system_us) / count
    return {"cpu_us": user_us + system_us, "user_us": user_us, "system_us": system_us}


def redis_figures(before: Moment, after: Moment, count: int) -> Figures:
    """Return the part of the CPU time that is Redis', for work that needs it."""
    return {"redis_us": (after.redis_us - before.redis_us) / count}


def latency_figures(buckets: list[int]) -> Figures:
    """Return the percentiles."""
    shares = {"p50_ms": 0.5, "p99_ms": 0.99, "p999_ms": 0.999}
    return {key: histogram.percentile_ms(buckets, share) for key, share in shares.items()}


def measure_sending(
    system: System, crowd: Crowd, seconds: float, *, redis: bool = False
) -> Figures:
    """Watch a crowd that sends, for a time.

    Args:
        system: what it sends to.
        crowd: sends already.
        seconds: for how long.
        redis: whether to tell the part of Redis as well.

    Raises:
        BenchError: if it got no answer at all.
    """
    before = look(system, crowd)
    time.sleep(seconds)
    after = look(system, crowd)
    window = after.sample - before.sample
    if not window.done:
        raise BenchError(f"{system.name} answers nothing; {system.errors()}".rstrip("; "))
    return (
        cpu_figures(before, after, window.done)
        | (redis_figures(before, after, window.done) if redis else {})
        | {"per_second": window.done / window.time_s, "late": window.late}
        | latency_figures(window.message_ns)
    )


@dataclass(slots=True)
class Rounds:
    """Collect the figures of systems that took turns at one load."""

    figures: dict[str, list[Figures]] = field(default_factory=dict)
    """System -> what each round gave."""

    def add(self, system: str, figures: Figures) -> None:
        """Note one round."""
        self.figures.setdefault(system, []).append(figures)

    def rows(self, scenario: str, load: dict[str, int | float | str]) -> Iterator[Row]:
        """Give a row for each system: medians, spread, and the ratio of the CPU to the base."""
        for system, rounds in self.figures.items():
            values = {key: [one[key] for one in rounds] for key in rounds[0]}
            medians = {key: statistics.median(column) for key, column in values.items()}
            medians |= self._ratio(system)
            spread = {key: (min(column), max(column)) for key, column in values.items()}
            yield Row(scenario, system, load, medians, spread)

    def _ratio(self, system: str) -> Figures:
        """Compare rounds that followed each other: those met the same weather."""
        ours, base = self.figures[system], self.figures.get(BASE, [])
        pairs = list(zip(ours, base, strict=False))
        if system == BASE or not pairs or "cpu_us" not in ours[0]:
            return {}
        ratios = [a["cpu_us"] / b["cpu_us"] for a, b in pairs if b["cpu_us"]]
        return {"cpu_us_ratio": statistics.median(ratios)} if ratios else {}
