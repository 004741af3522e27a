"""Wake an epoll loop at even intervals, finer than the milliseconds that epoll itself can wait."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_NONBLOCK: Final = os.O_NONBLOCK
SHORTEST_NS: Final = 50_000
"""More wake-ups than this would give would only burn what the system under test could use."""


class _Itimerspec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns")]


class Timer:
    """Be a timerfd, which os has from Python 3.13 on."""

    def __init__(self) -> None:
        self.fd: int = _libc.timerfd_create(time.CLOCK_MONOTONIC, _NONBLOCK)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._interval_ns = 0

    def set(self, interval_ns: int) -> None:
        """Expire at this interval from now on; 0 for never."""
        interval_ns = interval_ns and max(interval_ns, SHORTEST_NS)
        if interval_ns == self._interval_ns:
            return
        self._interval_ns = interval_ns
        spec = _Itimerspec(*divmod(interval_ns, 10**9), *divmod(interval_ns, 10**9))
        if _libc.timerfd_settime(self.fd, 0, ctypes.byref(spec), None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def rearm(self) -> None:
        """Take note of an expiry; there is no next one before."""
        with contextlib.suppress(BlockingIOError):  # it was set anew meanwhile
            os.read(self.fd, 8)
