"""Count in several banks, and in several processes."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from ws2api.gateway import counters as c
from ws2api.gateway.counters import (
    BANKS,
    METRICS,
    REAPER_LENGTH,
    REAPER_METRICS,
    SLOT_LENGTH,
    Counters,
)


def indices(kind: str) -> list[int]:
    return [index for index, metric in enumerate(METRICS) if metric.kind == kind]


def in_a_child(action: Callable[[], None]) -> int:
    """Fork, do it, and return the exit status; 0 when it did not raise."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def each_bank(counters: Counters) -> list[memoryview]:
    return [counters.bank(w, which) for w in range(counters.workers) for which in range(BANKS)]


def test_starts_at_zero() -> None:
    counters = Counters(3)
    assert all(list(bank) == [0] * SLOT_LENGTH for bank in each_bank(counters))
    assert list(counters.reaper) == [0] * REAPER_LENGTH


def test_banks_do_not_touch_each_other() -> None:
    counters = Counters(3)
    rows = [*each_bank(counters), counters.reaper]
    for number, row in enumerate(rows):
        for index in range(len(row)):
            row[index] = number * 1000 + index
    for number, row in enumerate(rows):
        assert list(row) == [number * 1000 + index for index in range(len(row))]


def test_bank_is_a_view_of_the_same_integers() -> None:
    counters = Counters(2)
    counters.bank(1, 1)[c.MESSAGES_SENT] += 1
    counters.bank(1, 1)[c.MESSAGES_SENT] += 1
    assert counters.bank(1, 1)[c.MESSAGES_SENT] == 2


def test_bank_ends_where_the_next_begins() -> None:
    with pytest.raises(IndexError):
        Counters(2).bank(0, 0)[SLOT_LENGTH] = 1


def test_integers_have_64_bits() -> None:
    bank = Counters(1).bank(0, 1)
    bank[c.BYTES_SENT] = (1 << 63) - 1
    assert bank[c.BYTES_SENT] == (1 << 63) - 1


def test_value_is_over_both_banks() -> None:
    counters = Counters(2)
    counters.bank(1, 0)[c.BYTES_SENT] = 5
    counters.bank(1, 1)[c.BYTES_SENT] = 7
    counters.bank(1, 0)[c.API_CONNECTIONS] = 1
    counters.bank(1, 1)[c.API_CONNECTIONS] = 2
    assert counters.value(1, c.BYTES_SENT) == 12
    assert counters.value(1, c.API_CONNECTIONS) == 3
    assert counters.value(0, c.BYTES_SENT) == 0


def test_total_is_over_all_workers() -> None:
    counters = Counters(3)
    for worker, count in enumerate((5, 0, 1 << 40)):
        counters.bank(worker, 0)[c.BYTES_RECEIVED] = count
        counters.bank(worker, 1)[c.BYTES_RECEIVED] = 10
        counters.bank(worker, 1)[c.BYTES_SENT] = 1
    assert counters.total(c.BYTES_RECEIVED) == 35 + (1 << 40)
    assert counters.total(c.BYTES_SENT) == 3


def test_open_connections_are_over_both_banks() -> None:
    counters = Counters(1)
    for which, (opened, closed) in enumerate([(10, 4), (3, 1)]):
        counters.bank(0, which)[c.CONNECTIONS_OPENED] = opened
        counters.bank(0, which)[c.CONNECTIONS_CLOSED] = closed
    assert counters.connections_open(0) == 8
    counters.settle(0, 0)
    assert counters.connections_open(0) == 2


# Which process of a slot is to serve.


def live(bank: memoryview, fork: int, state: int) -> None:
    bank[c.FORK], bank[c.STATE], bank[c.PID] = fork, state, 100 + fork
    bank[c.STARTED_S] = 1000 + fork
    bank[c.REDIS_UP] = fork


@pytest.mark.parametrize(
    ("states", "current"),
    [
        ((c.STATE_SERVING, c.STATE_DOWN), 0),
        ((c.STATE_SERVING, c.STATE_STARTING), 0),
        ((c.STATE_SERVING, c.STATE_SERVING), 1),
        ((c.STATE_DRAINING, c.STATE_SERVING), 1),
        ((c.STATE_DRAINING, c.STATE_STARTING), 1),
        ((c.STATE_DRAINING, c.STATE_DRAINING), 1),
    ],
)
@pytest.mark.parametrize("old", range(BANKS))
def test_current_is_who_serves_then_the_younger(
    old: int, states: tuple[int, int], current: int
) -> None:
    counters = Counters(2)
    live(counters.bank(1, old), 3, states[0])
    live(counters.bank(1, 1 - old), 4, states[1])
    assert counters.current(1)[c.FORK] == 3 + current
    assert counters.value(1, c.PID) == 103 + current
    assert counters.value(1, c.REDIS_UP) == 3 + current  # of one process, not of two


def test_current_is_who_drains_when_the_younger_died() -> None:
    counters = Counters(1)
    live(counters.bank(0, 0), 3, c.STATE_DRAINING)
    live(counters.bank(0, 1), 4, c.STATE_SERVING)
    counters.settle(0, 1)
    assert counters.current(0)[c.FORK] == 3


def test_current_is_the_last_one_when_none_lives() -> None:
    counters = Counters(1)
    live(counters.bank(0, 1), 4, c.STATE_SERVING)
    live(counters.bank(0, 0), 3, c.STATE_DRAINING)
    counters.settle(0, 0)
    counters.settle(0, 1)
    assert counters.current(0)[c.STARTED_S] == 1004
    assert counters.value(0, c.STATE) == c.STATE_DOWN


# The declarations.


def test_every_metric_has_a_name_of_its_own() -> None:
    alone = [metric for metric in METRICS if metric.kind != "bucket"]
    names = [(metric.name, *metric.labels.items()) for metric in (*alone, *METRICS.histograms)]
    assert len(set(names)) == len(names)
    assert len(METRICS) == SLOT_LENGTH
    assert all(metric.help.endswith(".") for metric in METRICS)


def test_reapers_metrics_have_names_of_their_own() -> None:
    names = [metric.name for metric in (*METRICS, *REAPER_METRICS)]
    for metric in REAPER_METRICS:
        assert names.count(metric.name) == 1
        assert metric.kind != "internal"
        assert metric.help.endswith(".")
        assert not metric.labels


def test_every_counter_is_summed() -> None:
    assert all(metric.is_summed for metric in METRICS if metric.kind == "counter")


def test_metrics_of_one_name_are_of_one_kind() -> None:
    for metric in METRICS:
        twins = [other for other in METRICS if other.name == metric.name]
        assert {twin.kind for twin in twins} == {metric.kind}
        assert {twin.help for twin in twins} == {metric.help}
        assert {tuple(twin.labels) for twin in twins} == {tuple(metric.labels)}


# A worker that died.


def bank_of_a_busy_worker(counters: Counters) -> memoryview:
    bank = counters.bank(1, 1)
    for index in range(SLOT_LENGTH):
        bank[index] = 1000 + index
    bank[c.CONNECTIONS_OPENED], bank[c.CONNECTIONS_CLOSED] = 10, 4
    bank[c.REQUESTS_STARTED], bank[c.REQUESTS_SUCCEEDED], bank[c.REQUESTS_FAILED] = 100, 90, 3
    return bank


def test_connections_and_requests_of_a_dead_worker_are_settled() -> None:
    counters = Counters(2)
    bank = bank_of_a_busy_worker(counters)
    counters.settle(1, 1)
    assert (bank[c.CONNECTIONS_OPENED], bank[c.CONNECTIONS_CLOSED]) == (10, 10)
    assert bank[c.REQUESTS_STARTED] == 100
    assert (bank[c.REQUESTS_SUCCEEDED], bank[c.REQUESTS_FAILED]) == (90, 10)


def test_dead_worker_has_no_gauges_and_no_process() -> None:
    counters = Counters(2)
    bank = bank_of_a_busy_worker(counters)
    counters.settle(1, 1)
    assert [bank[index] for index in indices("gauge")] == [0] * len(indices("gauge"))
    assert bank[c.STATE] == c.STATE_DOWN
    left = [index for index in indices("internal") if bank[index]]
    assert left == [c.STARTED_S]


def test_counters_of_a_dead_worker_never_fall() -> None:
    counters = Counters(2)
    bank = bank_of_a_busy_worker(counters)
    before = list(bank)
    counters.settle(1, 1)
    assert all(bank[index] >= before[index] for index in indices("counter"))
    settled = list(bank)
    counters.settle(1, 1)
    assert list(bank) == settled


def test_settling_one_process_leaves_the_others() -> None:
    counters = Counters(3)
    counters.bank(0, 0)[c.CONNECTIONS_OPENED] = 1
    counters.bank(1, 0)[c.CONNECTIONS_OPENED] = 1
    counters.bank(2, 0)[c.REDIS_UP] = 1
    counters.reaper[c.DISCONNECTS_PENDING] = 5
    bank_of_a_busy_worker(counters)
    counters.settle(1, 1)
    assert counters.bank(0, 0)[c.CONNECTIONS_CLOSED] == 0
    assert counters.bank(1, 0)[c.CONNECTIONS_CLOSED] == 0
    assert counters.bank(2, 0)[c.REDIS_UP] == 1
    assert counters.reaper[c.DISCONNECTS_PENDING] == 5


# Across processes.


def test_parent_reads_what_a_child_counts() -> None:
    counters = Counters(2)

    def count() -> None:
        counters.bank(1, 0)[c.MESSAGES_RECEIVED] += 41
        counters.reaper[c.REAPER_DELIVERED] += 1

    assert in_a_child(count) == 0
    assert in_a_child(count) == 0
    assert counters.bank(1, 0)[c.MESSAGES_RECEIVED] == 82
    assert counters.total(c.MESSAGES_RECEIVED) == 82
    assert counters.reaper[c.REAPER_DELIVERED] == 2


def test_child_reads_what_its_parent_and_its_sibling_count() -> None:
    counters = Counters(2)
    counters.bank(0, 0)[c.RESTARTS] = 3

    def write() -> None:
        counters.bank(1, 0)[c.RESTARTS] = 4

    def check() -> None:
        assert counters.total(c.RESTARTS) == 7

    assert in_a_child(write) == 0
    assert in_a_child(check) == 0
