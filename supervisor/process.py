"""Fork children that start with clean signals, end with their parent and always exit.

The supervisor has no thread and no event loop, which is what makes os.fork sound here.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Final, NoReturn

import structlog

EXIT_EXCEPTION: Final = 1

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

_HANDLED: Final = (signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR2)
_FROM_THE_TERMINAL: Final = (signal.SIGINT, signal.SIGHUP)
_STDERR: Final = 2

_log = structlog.get_logger()


def fork(body: Callable[[], int]) -> int:
    """Fork a child that runs `body` and exits with what it returns; return the child's pid.

    The child gets SIGTERM when this process dies, however it dies (Linux). It ignores SIGINT and
    SIGHUP, which a terminal sends to the whole group: the supervisor translates them. SIGQUIT makes
    it write the stacks of its threads to stderr, also when its code never returns to the loop.

    Raises:
        OSError: if there is no room for another process.
    """
    parent = os.getpid()
    # A signal to the young child must not run the parent's handlers, which would tell the parent.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _live(body, parent, mask)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def _live(body: Callable[[], int], parent: int, mask: Iterable[int]) -> NoReturn:
    """Be the child; never return, because the stack above belongs to the parent."""
    code = EXIT_EXCEPTION
    try:
        _reset_signals()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        die_with(parent)
        code = body()
    except BaseException:
        _log.critical("process ended by an exception", exc_info=True)
    finally:
        os._exit(code)


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in _HANDLED:
        signal.signal(number, signal.SIG_DFL)
    # Whoever boots yet must not die of being told to log more.
    for number in (*_FROM_THE_TERMINAL, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(signal.SIGQUIT, file=_STDERR, all_threads=True)


def die_with(parent: int) -> None:
    """Ask the kernel for SIGTERM when the parent dies; exit at once if it already has."""
    if _libc is not None and _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(EXIT_EXCEPTION)


def reap() -> list[tuple[int, int]]:
    """Collect every child that has ended, as pairs of pid and exit code (negative: a signal)."""
    ended = []
    with contextlib.suppress(ChildProcessError):  # there is no child at all
        while (found := os.waitpid(-1, os.WNOHANG))[0] != 0:
            ended.append((found[0], os.waitstatus_to_exitcode(found[1])))
    return ended


def describe_exit(code: int) -> str:
    """Say in words how a child ended.

    Args:
        code: exit status, or minus the number of the signal that killed it.
    """
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"killed by signal {-code}"


def raise_file_limit() -> int:
    """Let this process and its children open as many files as the system allows; return that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS reports no limit and accepts none.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft
