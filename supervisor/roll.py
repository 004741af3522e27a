"""Replace every child by a fresh process, one after another, so that none is missed.

The replacement of a worker boots beside it, on the same sockets. When that serves, the old one
retires: it moves its clients at a pace, while the next worker is already replaced. So all old ones
drain at the same time, and no client is moved twice.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Final

import structlog

from .children import Child, Incarnation
from .restart_policy import Backoff

RETIRE: Final = signal.SIGUSR2
"""Tells a worker to accept no more, to move its clients within its time and to end with 0."""

TRIES: Final = 5
"""Replacements of one worker that may end before they serve; then the old workers stay."""

_log = structlog.get_logger()


class Stage(Enum):
    """Say how far a roll is."""

    IDLE = auto()
    REPLACING = auto()
    DRAINING = auto()
    """All are replaced, or it was given up; old workers have yet to end."""


class Roll:
    """Hold the state of one roll after another.

    Args:
        spawn: forks a process of a child; None if there was no room for one.
        serves: tells whether a process does its work.

    Attributes:
        generation: number of the current or last roll; a process of this generation is fresh.
        failure: why the current or last roll was given up; empty if it was not.
    """

    def __init__(
        self,
        spawn: Callable[[Child], Incarnation | None],
        serves: Callable[[Incarnation], bool],
    ) -> None:
        self._spawn = spawn
        self._serves = serves
        self._children: tuple[Child, ...] = ()
        self._waiting: deque[Child] = deque()
        self._tries = 0
        self._try_at = 0.0
        self._backoff = Backoff()
        self.generation = 0
        self.failure = ""

    @property
    def stage(self) -> Stage:
        """Tell how far the roll is."""
        if self._waiting:
            return Stage.REPLACING
        if any(child.former is not None for child in self._children):
            return Stage.DRAINING
        return Stage.IDLE

    def begin(self, children: Sequence[Child], now: float) -> None:
        """Replace these children in this order; the last roll must have come to its end."""
        self.generation += 1
        self.failure = ""
        self._children = tuple(children)
        self._waiting = deque(children)
        self._begin_turn()
        for child in children:
            if child.due_at is not None:  # what it waited for may be the new settings
                child.due_at = now

    def step(self, now: float) -> None:
        """Go on as far as possible; call it again when a process ended or began to serve."""
        while self._waiting and self._replace(self._waiting[0], now):
            self._waiting.popleft()
            self._begin_turn()

    def lost(self, gone: Incarnation, how: str, now: float) -> None:
        """Take note of a process that ended before it served."""
        if self._waiting and gone.child is self._waiting[0] and self._is_fresh(gone):
            self._fail(gone.child, f"the last one ended: {how}", now)

    def _fail(self, child: Child, why: str, now: float) -> None:
        """Count a try that failed, and give the roll up after some."""
        self._tries += 1
        self._try_at = now + self._backoff.after_end(0.0)
        if self._tries >= TRIES:
            self.failure = f"{child.name} could not be replaced, {why}"
            self._waiting.clear()

    def _begin_turn(self) -> None:
        self._tries = 0
        self._try_at = 0.0
        self._backoff = Backoff()

    def _is_fresh(self, process: Incarnation) -> bool:
        return process.generation == self.generation

    def _replace(self, child: Child, now: float) -> bool:
        """Go on with one child; tell whether a fresh process does its work."""
        old = child.process
        if old is None:  # it has died, and is forked again as every dead child is
            return False
        if self._is_fresh(old):
            return self._serves(old)
        if child.slot is None:
            self._let_end(old, now)
        elif child.successor is None:
            if now >= self._try_at:
                self._try(child, now)
        elif self._serves(child.successor):
            self._hand_over(child, old, child.successor, now)
            return True
        return False

    def _try(self, child: Child, now: float) -> None:
        child.successor = self._spawn(child)
        if child.successor is None:
            self._fail(child, "there is no room for a process", now)

    def _hand_over(self, child: Child, old: Incarnation, new: Incarnation, now: float) -> None:
        _log.info("replaced", child=child.name, pid=new.pid, old_pid=old.pid)
        child.process, child.successor, child.former = new, None, old
        old.kill_by(now + old.drain_s + old.stop_s)
        old.send(RETIRE)

    def _let_end(self, helper: Incarnation, now: float) -> None:
        """End a helper; callers wait in its socket's queue until the fresh one accepts."""
        if not helper.is_leaving:
            helper.is_leaving = True
            helper.kill_by(now + helper.stop_s)
            helper.send(signal.SIGTERM)
