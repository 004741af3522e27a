"""Let so many connections of an address in, and never one more, whoever counts them."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable
from types import FrameType
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ws2api.gateway import address_limit
from ws2api.gateway.address_limit import AddressLimit, AddressTable, _key

# Another test's server may run in a thread: no child here touches what a thread could hold.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

ADDRESS = "192.0.2.7"


class Visitor:
    """Be a connection of one address."""

    def __init__(self, limit: AddressLimit, address: str = ADDRESS) -> None:
        self._limit = limit
        self.is_refused = limit.enter(cast(Any, self), address)

    @property
    def is_flood(self) -> bool:
        return self._limit.is_flood(cast(Any, self))

    def leaves(self) -> None:
        self._limit.leave(cast(Any, self))


def limits(most: int, *, workers: int = 1, banks: int = 1) -> list[AddressLimit]:
    """Return what each of so many processes has."""
    table = AddressTable(workers)
    return [AddressLimit(most, table, w, bank) for w in range(workers) for bank in range(banks)]


def let_in(visitors: Iterable[Visitor]) -> int:
    return sum(not visitor.is_refused for visitor in visitors)


# One process.


def test_so_many_are_let_in_and_the_others_refused() -> None:
    (limit,) = limits(3)
    visitors = [Visitor(limit) for _ in range(5)]
    assert [visitor.is_refused for visitor in visitors] == [False] * 3 + [True] * 2


def test_other_addresses_are_not_affected() -> None:
    (limit,) = limits(1)
    assert let_in(Visitor(limit) for _ in range(5)) == 1
    assert let_in(Visitor(limit, f"192.0.2.{number}") for number in range(100, 200)) == 100


def test_place_is_free_again_when_somebody_leaves() -> None:
    (limit,) = limits(2)
    first, _ = Visitor(limit), Visitor(limit)
    refused = Visitor(limit)
    assert refused.is_refused
    refused.leaves()
    first.leaves()
    assert not Visitor(limit).is_refused
    assert Visitor(limit).is_refused


def test_leaving_twice_or_without_having_come_changes_nothing() -> None:
    (limit,) = limits(1)
    visitor = Visitor(limit)
    visitor.leaves()
    visitor.leaves()
    limit.leave(cast(Any, object()))
    assert let_in(Visitor(limit) for _ in range(3)) == 1


def test_who_comes_with_twice_the_limit_gets_no_answer() -> None:
    (limit,) = limits(2)
    visitors = [Visitor(limit) for _ in range(5)]
    assert [visitor.is_flood for visitor in visitors[3:]] == [True, True]
    visitors.pop().leaves()
    assert not visitors[3].is_flood


# What is one address.


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff:ffff:ffff:ffff"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("::ffff:c000:207", "192.0.2.7"),
        ("fe80::1%eth0", "fe80::2"),
        ("2001:DB8::1", "2001:db8::1"),
    ],
)
def test_counted_together(one: str, other: str) -> None:
    assert _key(one) == _key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:3::1"),
        ("192.0.2.7", "192.0.2.8"),
        ("::ffff:192.0.2.7", "::ffff:192.0.2.8"),
        ("::1", "127.0.0.1"),
        ("::192.0.2.7", "192.0.2.7"),
    ],
)
def test_counted_apart(one: str, other: str) -> None:
    assert _key(one) != _key(other)


# Several processes, in any order of events.

ADDRESSES = ["192.0.2.1", "192.0.2.2", "2001:db8::1"]
events = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.integers(0, 3), st.sampled_from(ADDRESSES)),
        st.tuples(st.just("leave"), st.integers(0, 50), st.none()),
        st.tuples(st.just("die"), st.integers(0, 3), st.none()),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(events, st.integers(1, 4))
def test_never_more_than_the_limit_are_in(
    events: list[tuple[str, int, str | None]], most: int
) -> None:
    table = _small_table(2)
    slots = [(worker, bank) for worker in range(2) for bank in range(2)]
    processes = [AddressLimit(most, table, *slot) for slot in slots]
    present: list[tuple[int, str, Visitor]] = []
    for event, number, address in events:
        if event == "enter":
            assert address is not None
            visitor = Visitor(processes[number], address)
            present.append((number, address, visitor))
            mine = [v for _, a, v in present if a == address]
            # The addresses share no cell, so the count is exact.
            assert visitor.is_refused == (len(mine) > most)
            assert let_in(mine) <= most
        elif event == "leave" and present:
            present.pop(number % len(present))[2].leaves()
        elif event == "die":
            table.settle(*slots[number])
            processes[number] = AddressLimit(most, table, *slots[number])
            present = [each for each in present if each[0] != number]
    for _, _, visitor in present:
        visitor.leaves()
    assert not any(table.count(table.cells(_key(address))) for address in ADDRESSES)
    assert not any(table._words[: table._end])


def _small_table(workers: int) -> AddressTable:
    """Return a table that is quickly looked through, in which the addresses have cells apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(address_limit, "_MOST_CELLS", 1 << 10)
        while True:
            table = AddressTable(workers)
            cells = [cell for address in ADDRESSES for cell in table.cells(_key(address))]
            if len(set(cells)) == len(cells):
                return table
            # The hash of strings differs from run to run; a smaller table spreads them otherwise.
            patch.setattr(address_limit, "_MOST_CELLS", table._cells - 1)


def test_process_between_any_two_steps_of_another_lets_nobody_slip_in() -> None:
    lines = 0
    for line in range(60):
        one, other = limits(1, banks=2)
        visitors: list[Visitor] = []
        count = 0

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal count
            if frame.f_code.co_filename != address_limit.__file__:
                return None
            if event == "line":
                count += 1
                if count == line + 1:  # noqa: B023  (called within this turn)
                    sys.settrace(None)
                    visitors.append(Visitor(other))  # noqa: B023
                    sys.settrace(trace)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            visitors.append(Visitor(one))
        finally:
            sys.settrace(before)
        if len(visitors) < 2:
            break
        lines += 1
        assert let_in(visitors) <= 1
        assert Visitor(one).is_refused
    assert lines > 8


# Real processes.


def test_processes_that_count_at_the_same_time_let_no_more_in() -> None:
    fork = multiprocessing.get_context("fork")
    count, most, rounds = 3, 2, 200
    table = AddressTable(count)
    barrier = fork.Barrier(count)
    inside = fork.Array("i", count * rounds, lock=False)

    def be(process: int) -> None:
        limit = AddressLimit(most, table, process, 0)
        for number in range(rounds):
            barrier.wait(15)
            visitor = Visitor(limit)
            inside[number * count + process] = not visitor.is_refused
            barrier.wait(15)
            visitor.leaves()

    processes = [fork.Process(target=be, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    seen = Counter(sum(inside[n * count : (n + 1) * count]) for n in range(rounds))
    assert set(seen) <= set(range(most + 1))
    assert table.count(table.cells(ADDRESS)) == 0


def test_process_that_was_killed_is_forgotten() -> None:
    table = AddressTable(2)
    mine, after = AddressLimit(7, table, 0, 0), AddressLimit(7, table, 1, 0)
    assert let_in(Visitor(mine) for _ in range(2)) == 2
    pid = os.fork()
    if pid == 0:
        limit = AddressLimit(7, table, 1, 0)
        kept = [Visitor(limit) for _ in range(5)]
        while kept:
            time.sleep(1)
    try:
        deadline = time.monotonic() + 15
        while table.count(table.cells(ADDRESS)) < 7:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert Visitor(after).is_refused
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    table.settle(1, 0)
    assert table.count(table.cells(ADDRESS)) == 2
    assert [Visitor(mine).is_refused for _ in range(6)] == [False] * 5 + [True]


def test_forgetting_one_process_leaves_the_others() -> None:
    table = AddressTable(3)
    slots = [(worker, bank) for worker in range(3) for bank in range(2)]
    for slot in slots:
        Visitor(AddressLimit(100, table, *slot))
    cells = table.cells(ADDRESS)
    for left, slot in enumerate(slots):
        assert table.count(cells) == len(slots) - left
        table.settle(*slot)
    assert table.count(cells) == 0


def test_forgetting_takes_no_memory_where_nobody_has_counted() -> None:
    table = AddressTable(64)
    before = _resident_bytes()
    table.settle(3, 1)
    Visitor(AddressLimit(1, table, 0, 0))
    table.settle(3, 1)
    # The share of one process, and not a page of each other one.
    assert _resident_bytes() - before < 4 << 20 < len(table._mapping) // 8


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("workers", [1, 2, 16, 64, 1024])
def test_table_has_its_bounds(workers: int) -> None:
    table = AddressTable(workers)
    assert len(table._mapping) <= (128 << 20) + 4
    table.add(table.cells(ADDRESS), workers * 2 - 1, 1)
    assert table.count(table.cells(ADDRESS)) == 1
    table.settle(workers - 1, 1)
    assert table.count(table.cells(ADDRESS)) == 0


# Addresses that share their cells with others.


@pytest.mark.parametrize(
    ("load", "most_on_average", "most"),
    # A million addresses: with 16 workers there are two for each cell, with 64 there are eight.
    [(0.2, 0.1, 4), (2.0, 1.7, 9), (8.0, 7.0, 24)],
)
def test_refuses_hardly_anybody_early(
    monkeypatch: pytest.MonkeyPatch, load: float, most_on_average: float, most: int
) -> None:
    """Measure what the others add to one's count, at a sixty-fourth of the size."""
    monkeypatch.setattr(address_limit, "_MOST_CELLS", 1 << 13)
    table = AddressTable(2)
    chance = random.Random(5)
    for number in range(int(load * table._cells)):
        table.add(table.cells(str(chance.getrandbits(64))), number % 4, 1)
    extra = [table.count(table.cells(f"stranger {number}")) for number in range(2000)]
    assert sum(extra) / len(extra) <= most_on_average
    assert max(extra) <= most


def test_count_is_never_less_than_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address_limit, "_MOST_CELLS", 50)
    table = AddressTable(2)
    truth: Counter[str] = Counter()
    chance = random.Random(7)
    for _ in range(2000):
        key = f"address {chance.randrange(200)}"
        if truth[key] and chance.random() < 0.4:
            # By the process that has counted it, as a connection is.
            table.add(table.cells(key), hash(key) % 4, -1)
            truth[key] -= 1
        else:
            table.add(table.cells(key), hash(key) % 4, 1)
            truth[key] += 1
    assert all(table.count(table.cells(key)) >= count for key, count in truth.items())
