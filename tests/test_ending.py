"""End processes that are none, at times that a test makes up."""

from __future__ import annotations

import signal

from ws2api.supervisor.children import Child, Incarnation
from ws2api.supervisor.ending import HURRY, HURRY_TIMEOUT_S, KILL, Ending

TERM, KILLED = signal.SIGTERM, signal.SIGKILL
STOP_S = 30.0


class FakeProcess(Incarnation):
    """Note the signals that it is sent."""

    def __init__(self, stop_s: float = STOP_S) -> None:
        super().__init__(Child("one", lambda _: 1), 0, 0, 0, 0.0, stop_s, 0.0, pid=1)
        self.sent: list[signal.Signals] = []

    def send(self, number: signal.Signals) -> None:
        self.sent.append(number)

    def end(self) -> None:
        self.pid = None


def test_tells_everybody_and_waits() -> None:
    processes = [FakeProcess(), FakeProcess()]
    ending = Ending(processes, 0.0)
    assert ending.step(1.0, 1) > 0
    assert [one.sent for one in processes] == [[TERM], [TERM]]
    assert not ending.is_over(2.0)
    for one in processes:
        one.end()
    assert ending.is_over(2.0)


def test_nobody_is_ended_at_once() -> None:
    assert Ending([], 0.0).is_over(0.0)


def test_each_has_a_deadline_of_its_own() -> None:
    short, long = processes = [FakeProcess(5.0), FakeProcess(STOP_S)]
    ending = Ending(processes, 0.0)
    ending.step(4.9, 1)
    assert short.sent == [TERM]
    ending.step(5.0, 1)
    assert (short.sent, long.sent) == ([TERM, KILLED], [TERM])
    short.end()
    ending.step(STOP_S, 1)
    assert (short.sent, long.sent) == ([TERM, KILLED], [TERM, KILLED])


def test_earlier_deadline_holds() -> None:
    draining = FakeProcess()
    draining.kill_by(3.0)
    ending = Ending([draining], 0.0)
    ending.step(3.0, 1)
    assert draining.sent == [TERM, KILLED]


def test_second_signal_hurries_and_is_repeated() -> None:
    process = FakeProcess()
    ending = Ending([process], 0.0)
    ending.step(10.0, 1)
    assert process.sent == [TERM]
    wait_s = ending.step(10.1, HURRY)
    assert process.sent == [TERM, TERM]
    ending.step(10.2, HURRY)
    assert process.sent == [TERM, TERM]
    ending.step(10.1 + wait_s, HURRY)
    assert process.sent == [TERM, TERM, TERM]
    ending.step(10.1 + HURRY_TIMEOUT_S, HURRY)
    assert process.sent[-1] == KILLED


def test_hurry_does_not_lengthen_the_time() -> None:
    process = FakeProcess(1.0)
    ending = Ending([process], 0.0)
    ending.step(0.5, HURRY)
    ending.step(1.0, HURRY)
    assert process.sent[-1] == KILLED


def test_third_signal_kills() -> None:
    process = FakeProcess()
    ending = Ending([process], 0.0)
    ending.step(1.0, KILL)
    assert process.sent[-1] == KILLED
    ending.step(1.1, KILL)
    assert process.sent.count(KILLED) == 1


def test_what_even_that_does_not_end_is_left() -> None:
    process = FakeProcess(1.0)
    ending = Ending([process], 0.0)
    wait_s = ending.step(1.0, 1)
    assert process.sent == [TERM, KILLED]
    assert wait_s > 0
    assert not ending.is_over(1.0)
    now = 1.0
    while not ending.is_over(now):
        now += ending.step(now, 1) + 0.001
        assert now < 60
    assert process.sent == [TERM, KILLED]
