"""Hold the state of each child of the supervisor, and of the processes that are it in turn."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

from ws2api.gateway.counters import BANKS

from .restart_policy import Backoff


@dataclass(slots=True, eq=False)
class Incarnation:
    """Hold what is known of one process of a child.

    Attributes:
        child: whose work it does.
        number: how many processes of that child were forked before it.
        bank: which bank of its slot's counters it writes; of no meaning for a helper.
        generation: number of the reload whose settings it has, see `roll.py`.
        started_at: monotonic time of its fork.
        stop_s: seconds that it has to end when it is told to stop.
        drain_s: seconds over which it moves its clients when it is told to retire.
        pid: None once it has been reaped.
        kill_at: monotonic time at which it is to be killed; None while it has no deadline.
        is_condemned: whether it was found stuck.
        is_killed: whether it was sent SIGKILL.
        is_leaving: whether it was told to end so that a fresh one takes its place.
        owes_verbose: whether it has yet to be told to log more for a while.
    """

    child: Child
    number: int
    bank: int
    generation: int
    started_at: float
    stop_s: float
    drain_s: float
    pid: int | None = None
    kill_at: float | None = None
    is_condemned: bool = False
    is_killed: bool = False
    is_leaving: bool = False
    owes_verbose: bool = False

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it lives; a pid stays its own until it is reaped here."""
        if self.pid is not None:
            os.kill(self.pid, number)

    def kill_by(self, deadline: float) -> None:
        """Kill it at this monotonic time, or earlier if that was the plan."""
        if not self.is_killed:
            self.kill_at = deadline if self.kill_at is None else min(self.kill_at, deadline)

    def kill(self) -> None:
        """Kill it now."""
        self.send(signal.SIGKILL)
        self.is_killed = True
        self.kill_at = None


@dataclass(slots=True, eq=False)
class Child:
    """Hold what is known of one child, over all its processes.

    A worker may have two at once: `process` with a `successor` that boots, or with a `former` that
    drains. Helpers have one.

    Attributes:
        name: for the log.
        fork: forks a process of it and returns the pid.
        slot: a worker's slot; None for the helpers.
        forks: how often it has been forked.
        process: the one that is to do the work; None while there is none.
        successor: boots to become `process`.
        former: was `process`, and drains.
        due_at: monotonic time of the next fork; None while it runs, and when there is none.
    """

    name: str
    fork: Callable[[Incarnation], int]
    slot: int | None = None
    backoff: Backoff = field(default_factory=Backoff)
    forks: int = 0
    process: Incarnation | None = None
    successor: Incarnation | None = None
    former: Incarnation | None = None
    due_at: float | None = None

    @property
    def living(self) -> list[Incarnation]:
        """List its processes."""
        return [one for one in (self.process, self.successor, self.former) if one is not None]

    @property
    def free_bank(self) -> int:
        """Find the bank that no living process uses; the roll sees to it that there is one."""
        used = {one.bank for one in self.living}
        return next(bank for bank in range(BANKS) if bank not in used)
