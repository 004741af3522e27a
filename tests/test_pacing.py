"""Take tokens at chosen times."""

from __future__ import annotations

import pytest
from ws2api.supervisor.pacing import TokenBucket


def test_begins_with_one() -> None:
    assert TokenBucket(500, now=7.0).available(7.0) == 1


def test_fills_up_to_a_tenth_of_a_second() -> None:
    bucket = TokenBucket(500, now=0.0)
    assert bucket.available(0.01) == 6
    assert bucket.available(100.0) == 50


def test_what_is_taken_is_gone() -> None:
    bucket = TokenBucket(100, now=0.0)
    bucket.take(bucket.available(1.0))
    assert bucket.available(1.0) == 0
    assert bucket.wait_s() == pytest.approx(0.01)
    assert bucket.available(1.05) == 5
    assert bucket.wait_s() == 0.0


def test_a_slow_rate_still_gives_one() -> None:
    bucket = TokenBucket(1, now=0.0)
    bucket.take(bucket.available(0.0))
    assert bucket.available(0.5) == 0
    assert bucket.wait_s() == pytest.approx(0.5)
    assert bucket.available(1.0) == 1
    assert bucket.available(60.0) == 1


@pytest.mark.parametrize("rate", [1, 3, 500, 100_000])
def test_never_gives_more_than_its_rate(rate: int) -> None:
    bucket = TokenBucket(rate, now=0.0)
    taken = 0
    for step in range(1, 10_001):
        count = bucket.available(step * 0.0007)
        bucket.take(count)
        taken += count
    assert taken <= rate * 7.0 + 1
    assert taken >= rate * 7.0 * 0.99 - 1
