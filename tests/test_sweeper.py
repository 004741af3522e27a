"""Turn the wheel by hand, with a clock that goes only when it is told to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ws2api.gateway.sweeper import TICK_S, Sweeper

RING_S = 1023 * TICK_S
"""The longest delay that the ring holds at once."""


class FakeHandle:
    """Be a timer that can be cancelled."""

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback = callback
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeLoop:
    """Be a loop with one timer.

    Args:
        lag_s: how late the loop calls its timers.
    """

    def __init__(self, lag_s: float = 0.0) -> None:
        self.now = 5000.0
        self._lag_s = lag_s
        self._handle: FakeHandle | None = None

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> FakeHandle:
        assert not self.is_armed, "two timers for one sweeper"
        self._handle = FakeHandle(when, callback)
        return self._handle

    @property
    def is_armed(self) -> bool:
        return self._handle is not None and not self._handle.is_cancelled

    def run(self, seconds: float) -> None:
        """Let time go by, and call what is due at its time."""
        end = self.now + seconds
        while self._handle is not None and self._handle.when + self._lag_s <= end:
            handle, self._handle = self._handle, None
            self.now = max(self.now, handle.when + self._lag_s)
            if not handle.is_cancelled:
                handle.callback()
        self.now = max(self.now, end)

    def stall(self, seconds: float) -> None:
        """Let time go by without calling anything."""
        self.now += seconds


class Timed:
    """Note when it is looked at.

    Args:
        answers: seconds until the next look; 0 when there are no more.
    """

    def __init__(self, loop: FakeLoop, *answers: float) -> None:
        self._loop = loop
        self._start = loop.now
        self._answers = list(answers)
        self.looks: list[float] = []

    def on_tick(self, now: float) -> float:
        assert now == self._loop.now
        self.looks.append(now - self._start)
        return self._answers.pop(0) if self._answers else 0.0


class Deadline(Timed):
    """Keep a deadline of its own, as what is longer than the ring has to."""

    def __init__(self, loop: FakeLoop, delay_s: float) -> None:
        super().__init__(loop)
        self._due = loop.now + delay_s
        self.met_after: float | None = None

    def on_tick(self, now: float) -> float:
        super().on_tick(now)
        if now < self._due:
            return self._due - now
        self.met_after = now - self._start
        return 0.0


def started(lag_s: float = 0.0) -> tuple[FakeLoop, Sweeper]:
    loop = FakeLoop(lag_s)
    sweeper = Sweeper(cast(Any, loop))
    sweeper.start()
    return loop, sweeper


def test_is_looked_at_once_after_its_delay() -> None:
    loop, sweeper = started()
    timed = Timed(loop)
    sweeper.schedule(timed, 0.5)
    loop.run(0.45)
    assert timed.looks == []
    loop.run(10)
    assert timed.looks == [pytest.approx(0.5)]


@pytest.mark.parametrize("delay_s", [-1.0, 0.0, 0.001, TICK_S])
def test_shortest_delay_is_a_tick(delay_s: float) -> None:
    loop, sweeper = started()
    timed = Timed(loop)
    sweeper.schedule(timed, delay_s)
    assert timed.looks == []
    loop.run(1)
    assert timed.looks == [pytest.approx(TICK_S)]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.floats(0, 3), st.floats(0.001, 20)), min_size=1, max_size=10),
    st.floats(0, 0.02),
)
@example([(0.0, 0.3), (0.05, 0.7), (0.099, 0.1)], 0.0)
def test_looks_follow_the_order_of_the_deadlines(
    schedule: list[tuple[float, float]], lag_s: float
) -> None:
    loop, sweeper = started(lag_s)
    all_timed = []
    for wait_s, delay_s in schedule:
        loop.run(wait_s)
        timed = Timed(loop)
        sweeper.schedule(timed, delay_s)
        all_timed.append((timed, loop.now + delay_s))
    loop.run(30)
    for timed, due in all_timed:
        (look,) = timed.looks
        late_s = timed._start + look - due
        assert -TICK_S - lag_s - 1e-6 <= late_s <= TICK_S + lag_s + 1e-6


def test_delays_are_counted_from_the_last_tick() -> None:
    loop, sweeper = started()
    loop.run(0.17)
    assert sweeper.now == pytest.approx(5000.1)
    timed = Timed(loop)
    sweeper.schedule(timed, 0.5)
    loop.run(1)
    assert timed.looks == [pytest.approx(0.43)]


def test_is_put_back_as_often_as_it_says() -> None:
    loop, sweeper = started()
    timed = Timed(loop, 0.2, 0.5, 0.1, 0.0)
    sweeper.schedule(timed, 1.0)
    loop.run(10)
    assert timed.looks == [pytest.approx(look) for look in (1.0, 1.2, 1.7, 1.8)]


@pytest.mark.parametrize("answer", [0.0, -1.0])
def test_nothing_to_wait_for_ends_it(answer: float) -> None:
    loop, sweeper = started()
    timed = Timed(loop, answer, 0.1)
    sweeper.schedule(timed, 0.1)
    loop.run(200)
    assert len(timed.looks) == 1


def test_one_look_may_bring_others() -> None:
    loop, sweeper = started()
    later = Timed(loop)

    class Parent(Timed):
        def on_tick(self, now: float) -> float:
            sweeper.schedule(later, 0.3)
            return super().on_tick(now)

    sweeper.schedule(Parent(loop), 0.1)
    loop.run(5)
    assert later.looks == [pytest.approx(0.4)]


@pytest.mark.parametrize("delay_s", [RING_S - 0.1, RING_S, RING_S + 0.1, 250.0, 1000.0])
def test_delay_may_be_longer_than_the_ring(delay_s: float) -> None:
    loop, sweeper = started()
    deadline = Deadline(loop, delay_s)
    sweeper.schedule(deadline, delay_s)
    loop.run(delay_s - 0.05)
    assert deadline.met_after is None
    assert len(deadline.looks) == int((delay_s - 0.05) / RING_S + 1e-9)
    loop.run(0.2)
    assert deadline.met_after == pytest.approx(delay_s, abs=TICK_S + 1e-6)


def test_endless_delay_is_looked_at_when_the_ring_has_turned() -> None:
    loop, sweeper = started()
    timed = Timed(loop)
    sweeper.schedule(timed, 1e9)
    loop.run(RING_S + 0.05)
    assert timed.looks == [pytest.approx(RING_S)]


# A loop that is held up.


def test_all_that_fell_due_in_a_stall_is_looked_at_after_it() -> None:
    loop, sweeper = started()
    order: list[float] = []

    class Noting(Timed):
        def __init__(self, delay_s: float) -> None:
            super().__init__(loop)
            self.delay_s = delay_s
            sweeper.schedule(self, delay_s)

        def on_tick(self, now: float) -> float:
            order.append(self.delay_s)
            return super().on_tick(now)

    all_timed = [Noting(delay_s) for delay_s in (3.0, 0.5, 20.0, 1.0)]
    loop.stall(5.0)
    loop.run(0.0)
    assert order == [0.5, 1.0, 3.0]
    assert all(timed.looks == [5.0] for timed in all_timed if timed.delay_s < 5)
    loop.run(20)
    assert order == [0.5, 1.0, 3.0, 20.0]
    assert all_timed[2].looks == [pytest.approx(20.0, abs=TICK_S)]


def test_deadlines_do_not_drift_with_a_slow_loop() -> None:
    loop, sweeper = started(lag_s=0.04)
    timed = Timed(loop)
    sweeper.schedule(timed, 60.0)
    loop.run(70)
    assert timed.looks == [pytest.approx(60.04)]


@pytest.mark.parametrize("stall_s", [1.0, 10.0, 99.0, 150.0, 1000.0])
def test_what_is_put_back_after_a_stall_has_its_whole_delay(stall_s: float) -> None:
    loop, sweeper = started()
    timed = Timed(loop, 0.5, 0.5, 0.5)
    sweeper.schedule(timed, 0.1)
    loop.stall(stall_s)
    loop.run(3.0)
    first, *rest = timed.looks
    assert first == pytest.approx(stall_s, abs=TICK_S)
    assert rest == [pytest.approx(first + n * 0.5, abs=n * TICK_S + 1e-6) for n in (1, 2, 3)]


def test_what_is_scheduled_after_a_stall_has_its_whole_delay() -> None:
    loop, sweeper = started()
    late = Timed(loop)

    class Parent(Timed):
        def on_tick(self, now: float) -> float:
            sweeper.schedule(late, 1.0)
            return 0.0

    sweeper.schedule(Parent(loop), 0.1)
    loop.stall(20.0)
    loop.run(5.0)
    assert late.looks == [pytest.approx(21.0, abs=TICK_S + 1e-6)]


def test_stall_longer_than_the_ring_looks_at_each_once() -> None:
    loop, sweeper = started()
    all_timed = [Timed(loop) for _ in range(50)]
    for number, timed in enumerate(all_timed):
        sweeper.schedule(timed, number * 2.0)
    loop.stall(3 * RING_S)
    loop.run(1.0)
    assert [len(timed.looks) for timed in all_timed] == [1] * 50


# Each tick.


def test_calls_back_at_each_tick_and_keeps_the_time() -> None:
    loop, sweeper = started()
    ticks: list[float] = []
    sweeper.every_tick(ticks.append)
    sweeper.every_tick(lambda now: ticks.append(-now))
    loop.run(0.35)
    assert ticks == [
        pytest.approx(sign * now) for now in (5000.1, 5000.2, 5000.3) for sign in (1, -1)
    ]
    assert sweeper.now == pytest.approx(5000.3)


def test_calls_back_once_after_a_stall() -> None:
    loop, sweeper = started()
    ticks: list[float] = []
    sweeper.every_tick(ticks.append)
    loop.stall(7.0)
    loop.run(0.0)
    assert ticks == [pytest.approx(5007.0)]


def test_time_is_known_to_whoever_is_looked_at() -> None:
    loop, sweeper = started()

    class Asking(Timed):
        def on_tick(self, now: float) -> float:
            assert sweeper.now == now
            return super().on_tick(now)

    asking = Asking(loop)
    sweeper.schedule(asking, 0.1)
    loop.run(1)
    assert asking.looks


def test_fault_in_a_look_does_not_stop_the_clock() -> None:
    loop, sweeper = started()

    class Faulty(Timed):
        def on_tick(self, now: float) -> float:
            raise LookupError

    later = Timed(loop)
    sweeper.schedule(Faulty(loop), 0.1)
    sweeper.schedule(later, 0.3)
    with pytest.raises(LookupError):
        loop.run(1)
    loop.run(1)
    assert later.looks == [pytest.approx(0.3)]


# Start and stop.


def test_does_not_tick_before_it_is_started() -> None:
    loop = FakeLoop()
    sweeper = Sweeper(cast(Any, loop))
    timed = Timed(loop)
    sweeper.schedule(timed, 0.1)
    assert not loop.is_armed
    loop.run(1)
    sweeper.start()
    loop.run(0.2)
    assert len(timed.looks) == 1


def test_does_not_tick_after_it_is_stopped() -> None:
    loop, sweeper = started()
    timed = Timed(loop)
    sweeper.schedule(timed, 0.5)
    loop.run(0.2)
    sweeper.stop()
    sweeper.stop()
    loop.run(5)
    assert timed.looks == []
    assert not loop.is_armed
