"""Turn signals into a queue that one loop waits on."""

from __future__ import annotations

import contextlib
import math
import select
import signal
import socket
from collections import deque
from collections.abc import Iterable
from types import FrameType, TracebackType


class SignalQueue:
    """Queue signals while in its context; a handler does nothing else than to enqueue.

    Args:
        numbers: the signals to queue; their former handlers are back after the context.
    """

    def __init__(self, numbers: Iterable[signal.Signals]) -> None:
        self._numbers = tuple(numbers)
        self._queue: deque[signal.Signals] = deque()
        self._former: dict[signal.Signals, signal._HANDLER] = {}
        self._reader, self._writer = socket.socketpair()
        self._poll = select.poll()

    def __enter__(self) -> SignalQueue:
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._poll.register(self._reader, select.POLLIN)
        # A full pipe only means that the loop is awake already: the deque has the signal.
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in self._numbers:
            self._former[number] = signal.signal(number, self._enqueue)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self.close()

    def _enqueue(self, number: int, _frame: FrameType | None) -> None:
        self._queue.append(signal.Signals(number))

    def wait(self, timeout_s: float | None) -> list[signal.Signals]:
        """Return the signals that came, at once if there are any, else when one comes.

        Args:
            timeout_s: seconds after which to return without any; None waits for ever.
        """
        if not self._queue:
            # Rounded up: a deadline that is not quite reached would be polled in a busy loop.
            self._poll.poll(None if timeout_s is None else math.ceil(max(0.0, timeout_s) * 1000))
        with contextlib.suppress(BlockingIOError):
            while self._reader.recv(4096):
                pass
        came = list(self._queue)
        for _ in came:
            self._queue.popleft()
        return came

    def close(self) -> None:
        """Close the sockets; a forked child does only this, its signals are reset already."""
        self._reader.close()
        self._writer.close()
