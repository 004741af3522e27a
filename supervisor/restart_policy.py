"""Decide when a dead child is forked again, and when to stop trying.

Nothing here looks at a clock: lifetimes come as arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

FIRST_DELAY_S: Final = 0.1
LONGEST_DELAY_S: Final = 10.0
STABLE_S: Final = 30.0
"""A child that lived this long starts over with the first delay."""

EARLY_S: Final = 1.0
"""A worker that ends sooner after its start counts as one that cannot start."""
EARLY_ENDS_LIMIT: Final = 10

EXIT_BOOT_FAILED: Final = 3
"""Exit status of a worker that could not boot, however long it tried."""


@dataclass(slots=True)
class Backoff:
    """Give the pauses before the restarts of one child: twice as long each time, up to a limit."""

    next_delay_s: float = FIRST_DELAY_S

    def after_end(self, lifetime_s: float) -> float:
        """Return the pause in seconds before the restart of a child that lived so long."""
        if lifetime_s >= STABLE_S:
            self.next_delay_s = FIRST_DELAY_S
        delay_s = self.next_delay_s
        self.next_delay_s = min(2 * delay_s, LONGEST_DELAY_S)
        return delay_s


class Verdict(Enum):
    """Say what to do about a worker that ended."""

    RESTART = auto()
    GIVE_UP = auto()


@dataclass(slots=True)
class CrashLoop:
    """Notice that workers cannot start at all, by counting early ends in a row over all slots."""

    early_ends: int = 0

    def judge(self, *, lifetime_s: float, exit_code: int, others_serve: bool) -> Verdict:
        """Judge the end of a worker.

        Args:
            lifetime_s: seconds between its start and its end.
            exit_code: exit status, or minus the number of the signal that killed it.
            others_serve: whether the service was ready once and other workers serve at this
                moment. It is then worth more than an end: the slot is retried at the longest
                delay, and readiness tells of it.
        """
        if lifetime_s >= EARLY_S and exit_code != EXIT_BOOT_FAILED:
            self.early_ends = 0
            return Verdict.RESTART
        self.early_ends += 1
        if self.early_ends < EARLY_ENDS_LIMIT or others_serve:
            return Verdict.RESTART
        return Verdict.GIVE_UP
