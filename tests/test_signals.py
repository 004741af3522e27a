"""Send signals to this very process, and find them in the queue."""

from __future__ import annotations

import os
import signal

from ws2api.supervisor.signals import SignalQueue

USR1, USR2 = signal.SIGUSR1, signal.SIGUSR2


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def test_signals_come_in_order_and_once() -> None:
    with SignalQueue((USR1, USR2)) as queue:
        send(USR1, USR2, USR1)
        assert queue.wait(0) == [USR1, USR2, USR1]
        assert queue.wait(0) == []


def test_waits_until_one_comes() -> None:
    with SignalQueue((signal.SIGALRM,)) as queue:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        assert queue.wait(None) == [signal.SIGALRM]


def test_returns_without_one_after_the_timeout() -> None:
    with SignalQueue((USR1,)) as queue:
        assert queue.wait(0.001) == []
        assert queue.wait(-1.0) == []


def test_none_is_lost_when_the_socket_is_full() -> None:
    with SignalQueue((USR1,)) as queue:
        for _ in range(5000):
            send(USR1)
        assert queue.wait(0) == [USR1] * 5000


def test_former_handlers_are_back_afterwards() -> None:
    before = signal.getsignal(USR1)
    with SignalQueue((USR1,)):
        assert signal.getsignal(USR1) != before
    assert signal.getsignal(USR1) == before
    assert signal.set_wakeup_fd(-1) == -1
