"""Declare metrics, and count durations."""

from __future__ import annotations

import pytest
from harness.work import Rig
from hypothesis import given, settings
from hypothesis import strategies as st
from ws2api.gateway import counters as c
from ws2api.gateway.counters import METRICS, Counters
from ws2api.gateway.metric import MICRO, Declarations, Histogram

BOUNDS_S = (0.001, 0.01, 0.1)


def declared() -> tuple[Declarations, Histogram, Histogram]:
    """Declare two histograms among other things."""
    declarations = Declarations()
    declarations.counter("before", "Before.")
    first = declarations.histogram("duration_seconds", "Time.", BOUNDS_S, event="a")
    declarations.gauge("between", "Between.")
    second = declarations.histogram("duration_seconds", "Time.", BOUNDS_S, event="b")
    declarations.counter("after", "After.")
    return declarations, first, second


def slot_for(declarations: Declarations) -> memoryview:
    return memoryview(bytearray(8 * len(declarations))).cast("q")


def test_each_declaration_has_the_index_that_it_returned() -> None:
    declarations = Declarations()
    indices = {
        "counter": declarations.counter("one", "One.", code="1000"),
        "gauge": declarations.gauge("two", "Two."),
        "internal": declarations.internal("four", "Four."),
    }
    of_one = declarations.gauge_of_one("three", "Three.", MICRO)
    assert {kind: declarations[index].kind for kind, index in indices.items()} == {
        kind: kind for kind in indices
    }
    assert declarations[indices["counter"]].labels == {"code": "1000"}
    assert (declarations[of_one].is_summed, declarations[of_one].scale) == (False, MICRO)
    assert declarations[indices["gauge"]].is_summed
    assert not declarations[indices["internal"]].is_summed


def test_histogram_takes_a_word_for_each_bucket_one_for_the_rest_and_one_for_the_sum() -> None:
    declarations, first, second = declared()
    assert declarations.histograms == [first, second]
    kinds = [metric.kind for metric in declarations]
    assert kinds == ["counter", *["bucket"] * 5, "gauge", *["bucket"] * 5, "counter"]
    assert (first.first, first.sum_index) == (1, 5)
    assert (second.first, second.sum_index) == (7, 11)
    assert first.bounds_us == (1_000, 10_000, 100_000)


@pytest.mark.parametrize(
    ("duration_us", "bucket"),
    [
        *((0, 0), (999, 0), (1_000, 0), (1_001, 1)),
        *((10_000, 1), (10_001, 2), (100_000, 2), (100_001, 3), (10**15, 3)),
    ],
)
def test_bound_is_the_largest_of_its_bucket(duration_us: int, bucket: int) -> None:
    declarations, _, second = declared()
    slot = slot_for(declarations)
    second.observe(slot, duration_us)
    seen = [index for index, word in enumerate(slot) if word and index != second.sum_index]
    assert seen == [second.first + bucket]
    assert slot[second.sum_index] == duration_us


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**9), max_size=50))
def test_buckets_and_sum_hold_everything_that_was_observed(durations_us: list[int]) -> None:
    declarations, first, second = declared()
    slot = slot_for(declarations)
    for duration_us in durations_us:
        first.observe(slot, duration_us)
    buckets = slot[first.first : first.sum_index].tolist()
    assert sum(buckets) == len(durations_us)
    for index, bound_us in enumerate(first.bounds_us):
        assert sum(buckets[: index + 1]) == sum(each <= bound_us for each in durations_us)
    assert slot[first.sum_index] == sum(durations_us)
    assert not any(slot[second.first : second.sum_index + 1])
    assert not slot[0] and not slot[6] and not slot[12]


def test_bounds_rise() -> None:
    for histogram in METRICS.histograms:
        assert list(histogram.bounds_us) == sorted(set(histogram.bounds_us))
        assert histogram.bounds_us[0] > 0


def test_words_of_a_histogram_are_nobody_elses() -> None:
    words = [
        index
        for histogram in METRICS.histograms
        for index in range(histogram.first, histogram.sum_index + 1)
    ]
    assert len(set(words)) == len(words)
    assert sorted(words) == [i for i, metric in enumerate(METRICS) if metric.kind == "bucket"]


def test_buckets_of_all_workers_and_banks_are_added() -> None:
    counters = Counters(2)
    for worker in range(2):
        for bank in range(2):
            c.LOOP_LAG.observe(counters.bank(worker, bank), 400)
    c.LOOP_LAG.observe(counters.bank(1, 1), 10**9)
    buckets = counters.buckets(c.LOOP_LAG)
    assert len(buckets) == len(c.LOOP_LAG.bounds_us) + 1
    assert (buckets[0], sum(buckets), buckets[-1]) == (4, 5, 1)
    assert counters.total(c.LOOP_LAG.sum_index) == 4 * 400 + 10**9


def test_what_a_dead_worker_has_observed_stays() -> None:
    counters = Counters(1)
    bank = counters.bank(0, 0)
    c.MESSAGE_LATENCY.observe(bank, 2_000)
    counters.settle(0, 0)
    assert sum(counters.buckets(c.MESSAGE_LATENCY)) == 1
    assert bank[c.MESSAGE_LATENCY.sum_index] == 2_000


# The loop of a worker.


def lags(rig: Rig) -> list[int]:
    slot = rig._worker._slot
    return list(slot[c.LOOP_LAG.first : c.LOOP_LAG.sum_index])


def test_ticks_in_time_have_no_lag() -> None:
    with Rig() as rig:
        before = lags(rig)
        for _ in range(10):
            rig.loop.passes(rig._worker._sweeper._next_at - rig.loop.now)
        seen = [now - was for now, was in zip(lags(rig), before, strict=True)]
        assert seen == [10] + [0] * (len(seen) - 1)
        assert rig._worker._slot[c.WORST_LAG_US] < 1_000


def test_standstill_is_seen_as_one_lag_and_shown_for_seconds() -> None:
    with Rig() as rig:
        slot = rig._worker._slot
        rig.loop.passes(0.1)
        count, total_us = sum(lags(rig)), slot[c.LOOP_LAG.sum_index]
        rig.loop.passes(3.1)
        assert sum(lags(rig)) == count + 1
        assert 2_900_000 <= slot[c.LOOP_LAG.sum_index] - total_us <= 3_100_000
        assert lags(rig)[-2] == 1  # from 2.5 to 5 s
        for _ in range(49):
            assert slot[c.WORST_LAG_US] > 2_900_000
            rig.loop.passes(0.1)
        for _ in range(3):
            rig.loop.passes(0.1)
        assert slot[c.WORST_LAG_US] < 100_000
