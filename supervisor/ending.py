"""End processes: SIGTERM, a deadline, SIGKILL; a second signal hurries them, a third kills them."""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from typing import Final

from .children import Incarnation

HURRY: Final = 2
"""With so many signals to the supervisor the time gets short."""
KILL: Final = 3
HURRY_TIMEOUT_S: Final = 3.0

_AGAIN_S: Final = 0.5
"""Two signals that come at once are one to who gets them, so a hurried process is told again."""
_REAP_TIMEOUT_S: Final = 5.0


class Ending:
    """Hold the state of one end, which begins with this object.

    Args:
        processes: those to end.
        now: monotonic time in seconds.
    """

    def __init__(self, processes: Sequence[Incarnation], now: float) -> None:
        self._processes = processes
        self._hurry_at = -math.inf
        self._abandon_at = math.inf
        for one in processes:
            one.kill_by(now + one.stop_s)
            one.send(signal.SIGTERM)

    def is_over(self, now: float) -> bool:
        """Tell whether all have been reaped; what even SIGKILL does not end is waited for a bit."""
        return not self._living or now >= self._abandon_at

    def step(self, now: float, signals: int) -> float:
        """Do what is due; return the seconds until the next step, if nothing happens before.

        Args:
            now: monotonic time in seconds.
            signals: how many times the supervisor was told to end.
        """
        if signals >= HURRY and now >= self._hurry_at:
            self._hurry(now)
        for one in self._living:
            if signals >= KILL:
                one.kill_by(now)
            if one.kill_at is not None and one.kill_at <= now:
                one.kill()
        living = self._living
        if self._abandon_at == math.inf and all(one.is_killed for one in living):
            self._abandon_at = now + _REAP_TIMEOUT_S
        dues = [one.kill_at for one in living if one.kill_at is not None]
        return max(0.0, min(*dues, self._abandon_at, now + _AGAIN_S) - now)

    @property
    def _living(self) -> list[Incarnation]:
        return [one for one in self._processes if one.pid is not None]

    def _hurry(self, now: float) -> None:
        self._hurry_at = now + _AGAIN_S
        for one in self._living:
            one.kill_by(now + HURRY_TIMEOUT_S)  # the first of these calls holds
            one.send(signal.SIGTERM)
