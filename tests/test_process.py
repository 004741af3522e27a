"""Fork for real, and look at how children live and end."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable

import pytest
from harness.waiting import until
from ws2api.supervisor import process

# Another test's server may run in a thread: no child here touches what a thread could hold.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def exit_code_of(body: Callable[[], int]) -> int:
    _, status = os.waitpid(process.fork(body), 0)
    return os.waitstatus_to_exitcode(status)


def raise_system_exit() -> int:
    raise SystemExit(0)


def divide_by_zero() -> int:
    return 1 // 0


def test_child_exits_with_what_the_body_returns() -> None:
    assert exit_code_of(lambda: 7) == 7


@pytest.mark.parametrize("body", [divide_by_zero, raise_system_exit])
def test_child_never_returns_into_the_parents_code(body: Callable[[], int]) -> None:
    assert exit_code_of(body) == process.EXIT_EXCEPTION


def test_child_has_clean_signals() -> None:
    def check() -> int:
        mask: set[int] = set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        return (
            (signal.getsignal(signal.SIGTERM) != signal.SIG_DFL)
            + 2 * (signal.getsignal(signal.SIGINT) != signal.SIG_IGN)
            + 4 * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)
            + 8 * bool(mask)
            + 16 * (signal.set_wakeup_fd(-1) != -1)
            + 32 * (signal.getsignal(signal.SIGUSR1) != signal.SIG_IGN)
            + 64 * (signal.getsignal(signal.SIGUSR2) != signal.SIG_DFL)
        )

    former = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        assert exit_code_of(check) == 0
    finally:
        signal.signal(signal.SIGTERM, former)


def test_child_writes_its_stack_on_sigquit(capfd: pytest.CaptureFixture[str]) -> None:
    def wait_for_ever() -> int:
        while True:
            signal.pause()

    written: list[str] = []

    def is_written() -> bool:
        os.kill(child, signal.SIGQUIT)  # again, because the first may have come too early
        written.append(capfd.readouterr().err)
        return "in wait_for_ever\n" in "".join(written)

    child = process.fork(wait_for_ever)
    try:
        until(is_written)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_parents_mask_is_as_before() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    os.waitpid(process.fork(lambda: 0), 0)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_grandchild_ends_with_its_killed_parent() -> None:
    reader, writer = os.pipe()

    def wait_for_a_signal() -> int:
        signal.pause()
        return 0

    def parent() -> int:
        child = process.fork(wait_for_a_signal)
        os.write(writer, f"{child}\n".encode())
        return wait_for_a_signal()

    middle = process.fork(parent)
    os.close(writer)
    grandchild = int(os.read(reader, 100))
    os.kill(middle, signal.SIGKILL)
    os.waitpid(middle, 0)
    # The pipe reaches its end when the grandchild, too, holds it open no more.
    assert os.read(reader, 1) == b""
    os.close(reader)
    assert grandchild != middle


def test_reaps_all_that_ended_and_only_those() -> None:
    living = process.fork(lambda: signal.pause() or 0)
    dead = [process.fork(lambda: 3), process.fork(lambda: 4)]
    collected: dict[int, int] = {}

    def all_collected() -> bool:
        collected.update(process.reap())
        return len(collected) >= 2

    until(all_collected)
    assert collected == dict(zip(dead, (3, 4), strict=True))
    os.kill(living, signal.SIGKILL)
    until(lambda: process.reap() == [(living, -signal.SIGKILL)])
    assert process.reap() == []


def test_end_in_words() -> None:
    assert process.describe_exit(3) == "exit status 3"
    assert process.describe_exit(-9) == "killed by SIGKILL"
    assert process.describe_exit(-40) == "killed by signal 40"


def test_file_limit_is_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        assert process.raise_file_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
