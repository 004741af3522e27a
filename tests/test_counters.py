"""Count in several slots, and in several processes."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from ws2api.gateway import counters as c
from ws2api.gateway.counters import METRICS, SLOT_LENGTH, Counters


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


def test_starts_at_zero() -> None:
    counters = Counters(3)
    assert all(list(counters.slot(worker)) == [0] * SLOT_LENGTH for worker in range(3))


def test_slots_do_not_touch_each_other() -> None:
    counters = Counters(3)
    for worker in range(3):
        slot = counters.slot(worker)
        for index in range(SLOT_LENGTH):
            slot[index] = worker * 1000 + index
    for worker in range(3):
        assert list(counters.slot(worker)) == [worker * 1000 + i for i in range(SLOT_LENGTH)]


def test_slot_is_a_view_of_the_same_integers() -> None:
    counters = Counters(2)
    counters.slot(1)[c.MESSAGES_SENT] += 1
    counters.slot(1)[c.MESSAGES_SENT] += 1
    assert counters.slot(1)[c.MESSAGES_SENT] == 2


def test_slot_ends_where_the_next_begins() -> None:
    with pytest.raises(IndexError):
        Counters(2).slot(0)[SLOT_LENGTH] = 1


def test_integers_have_64_bits() -> None:
    slot = Counters(1).slot(0)
    slot[c.BYTES_SENT] = (1 << 63) - 1
    assert slot[c.BYTES_SENT] == (1 << 63) - 1


def test_total_is_over_all_workers() -> None:
    counters = Counters(3)
    for worker, count in enumerate((5, 0, 1 << 40)):
        counters.slot(worker)[c.BYTES_RECEIVED] = count
        counters.slot(worker)[c.BYTES_SENT] = 1
    assert counters.total(c.BYTES_RECEIVED) == 5 + (1 << 40)
    assert counters.total(c.BYTES_SENT) == 3


def test_every_metric_has_a_name_of_its_own() -> None:
    names = [(metric.name, *metric.labels.items()) for metric in METRICS]
    assert len(set(names)) == len(names) == SLOT_LENGTH
    assert all(metric.help.endswith(".") for metric in METRICS)


def test_metrics_of_one_name_are_of_one_kind() -> None:
    for metric in METRICS:
        twins = [other for other in METRICS if other.name == metric.name]
        assert {twin.kind for twin in twins} == {metric.kind}
        assert {twin.help for twin in twins} == {metric.help}
        assert {tuple(twin.labels) for twin in twins} == {tuple(metric.labels)}


# A worker that died.


def slot_of_a_busy_worker(counters: Counters) -> memoryview:
    slot = counters.slot(1)
    for index in range(SLOT_LENGTH):
        slot[index] = 1000 + index
    slot[c.CONNECTIONS_OPENED], slot[c.CONNECTIONS_CLOSED] = 10, 4
    slot[c.REQUESTS_STARTED], slot[c.REQUESTS_SUCCEEDED], slot[c.REQUESTS_FAILED] = 100, 90, 3
    return slot


def test_connections_and_requests_of_a_dead_worker_are_settled() -> None:
    counters = Counters(2)
    slot = slot_of_a_busy_worker(counters)
    counters.settle(1)
    assert (slot[c.CONNECTIONS_OPENED], slot[c.CONNECTIONS_CLOSED]) == (10, 10)
    assert slot[c.REQUESTS_STARTED] == 100
    assert (slot[c.REQUESTS_SUCCEEDED], slot[c.REQUESTS_FAILED]) == (90, 10)


def test_dead_worker_has_no_gauges_and_no_process() -> None:
    counters = Counters(2)
    slot = slot_of_a_busy_worker(counters)
    counters.settle(1)
    assert [slot[index] for index in indices("gauge")] == [0] * len(indices("gauge"))
    assert slot[c.STATE] == c.STATE_DOWN
    assert slot[c.HEARTBEAT_US] == slot[c.PID] == 0


def test_counters_of_a_dead_worker_never_fall() -> None:
    counters = Counters(2)
    slot = slot_of_a_busy_worker(counters)
    before = list(slot)
    counters.settle(1)
    assert all(slot[index] >= before[index] for index in indices("counter"))
    settled = list(slot)
    counters.settle(1)
    assert list(slot) == settled


def test_settling_one_worker_leaves_the_others() -> None:
    counters = Counters(3)
    counters.slot(0)[c.CONNECTIONS_OPENED] = 1
    counters.slot(2)[c.REDIS_UP] = 1
    slot_of_a_busy_worker(counters)
    counters.settle(1)
    assert counters.slot(0)[c.CONNECTIONS_CLOSED] == 0
    assert counters.slot(2)[c.REDIS_UP] == 1


# Across processes.


def test_parent_reads_what_a_child_counts() -> None:
    counters = Counters(2)

    def count() -> None:
        counters.slot(1)[c.MESSAGES_RECEIVED] += 41

    assert in_a_child(count) == 0
    assert in_a_child(count) == 0
    assert counters.slot(1)[c.MESSAGES_RECEIVED] == 82
    assert counters.total(c.MESSAGES_RECEIVED) == 82


def test_child_reads_what_its_parent_and_its_sibling_count() -> None:
    counters = Counters(2)
    counters.slot(0)[c.RESTARTS] = 3

    def write() -> None:
        counters.slot(1)[c.RESTARTS] = 4

    def check() -> None:
        assert counters.total(c.RESTARTS) == 7

    assert in_a_child(write) == 0
    assert in_a_child(check) == 0
