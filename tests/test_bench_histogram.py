"""Latencies are counted in buckets that are never off by more than 3 %."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from bench_.histogram import BUCKETS, LONGEST_NS, bucket, middle_ns, percentile_ms


def counted(*values_ns: int) -> list[int]:
    counts = [0] * BUCKETS
    for value in values_ns:
        counts[bucket(value)] += 1
    return counts


@given(st.integers(0, LONGEST_NS))
def test_the_middle_of_a_bucket_is_near_each_value_in_it(value_ns: int) -> None:
    assert abs(middle_ns(bucket(value_ns)) - value_ns) <= max(0.5, value_ns * 0.03)


@given(st.integers(0, LONGEST_NS - 1))
def test_a_larger_value_is_never_in_an_earlier_bucket(value_ns: int) -> None:
    assert 0 <= bucket(value_ns + 1) - bucket(value_ns) <= 1


def test_the_longest_value_has_the_last_bucket() -> None:
    assert bucket(LONGEST_NS) == BUCKETS - 1


def test_percentiles() -> None:
    counts = counted(*(value * 1_000_000 for value in range(1, 101)))
    for share, ms in ((0.5, 50), (0.99, 99), (1.0, 100)):
        assert math.isclose(percentile_ms(counts, share), ms, rel_tol=0.03)


def test_a_rare_long_one_shows_only_far_up() -> None:
    counts = counted(*[1_000_000] * 999, 10**9)
    assert math.isclose(percentile_ms(counts, 0.999), 1, rel_tol=0.03)
    assert math.isclose(percentile_ms(counts, 1.0), 1_000, rel_tol=0.03)


def test_nothing_has_no_percentile() -> None:
    assert math.isnan(percentile_ms(counted(), 0.5))
