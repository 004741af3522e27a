"""Hold the state of each child, and replace workers one after another."""

from __future__ import annotations

import math
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import structlog

from .restart_policy import Backoff

_log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class Child:
    """Hold what is known of one child, over all its incarnations.

    Attributes:
        name: for the log.
        fork: forks it and returns the pid.
        slot: a worker's slot; None for the other children.
        forks: how often it has been forked.
        pid: None while it does not run.
        started_at: monotonic time of the last fork.
        due_at: monotonic time of the next fork; None while it runs, and when there is none.
        retiring: whether it was told to end so that a fresh one takes its place.
    """

    name: str
    fork: Callable[[], int]
    slot: int | None = None
    backoff: Backoff = field(default_factory=Backoff)
    forks: int = 0
    pid: int | None = None
    started_at: float = 0.0
    due_at: float | None = None
    retiring: bool = False

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it runs; a pid stays its own until it is reaped here."""
        if self.pid is not None:
            os.kill(self.pid, number)


class Roll:
    """Replace workers one by one, so that all but one serve at any time.

    The kernel keeps the connections of the one being replaced waiting in its slot's queue.

    Args:
        shutdown_timeout_s: seconds that a worker has between SIGTERM and SIGKILL.
        serves: tells whether a worker serves.
    """

    def __init__(self, shutdown_timeout_s: float, serves: Callable[[Child], bool]) -> None:
        self._shutdown_timeout_s = shutdown_timeout_s
        self._serves = serves
        self._waiting: deque[Child] = deque()
        self._current: Child | None = None
        self._kill_at = 0.0

    @property
    def under_way(self) -> bool:
        """Tell whether a worker is being replaced or waits for that."""
        return self._current is not None or bool(self._waiting)

    def begin(self, workers: Iterable[Child]) -> None:
        """Queue all workers; those of a roll under way are queued anew."""
        self._waiting = deque(workers)

    def step(self, now: float) -> None:
        """Go on as far as possible; call it again when a worker ended or began to serve."""
        if self._current is not None:
            self._watch(self._current, now)
        while self._current is None and self._waiting:
            child = self._waiting.popleft()
            # One that does not run at this moment is about to be replaced anyway.
            if child.pid is not None:
                self._retire(child, now)

    def _retire(self, child: Child, now: float) -> None:
        self._current = child
        self._kill_at = now + self._shutdown_timeout_s
        child.retiring = True
        child.send(signal.SIGTERM)

    def _watch(self, child: Child, now: float) -> None:
        """Kill the old worker when its time is over; let the next one go when the new serves."""
        if child.retiring:
            if now >= self._kill_at:
                _log.warning("not ended in time, killed", child=child.name)
                child.send(signal.SIGKILL)
                self._kill_at = math.inf
        elif self._serves(child):
            _log.info("replaced", child=child.name, pid=child.pid)
            self._current = None
