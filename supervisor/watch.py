"""Notice workers whose loop has stopped, by looking at their heartbeats now and then.

Silence is counted in looks that found the same heartbeat. A difference of clocks would be simpler,
but after a machine slept, or when the supervisor itself was stopped, every heartbeat is old: it is
the looks after that which tell the stuck from the healthy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ws2api.gateway import counters as c

STUCK_S: Final = 10.0
"""A worker whose loop has not beaten for so long is stuck; it beats ten times a second."""
BOOT_S: Final = 30.0
"""A worker that does not serve for so long after its fork is stuck too."""
LOOK_S: Final = 1.0


@dataclass(slots=True)
class _Sight:
    """Hold what the looks at one process found: its sign of life, and for how long unchanged."""

    sign: int
    silent_s: float = 0.0


def sign_of_life(bank: memoryview) -> int:
    """Read what changes for as long as the loop of a worker turns; 0 while it boots."""
    return bank[c.HEARTBEAT_US] if bank[c.STATE] >= c.STATE_SERVING else 0


class Watch:
    """Count the silence of each process.

    Args:
        stuck_s: seconds of silence that make a worker count as stuck.
        boot_s: likewise for one that does not serve yet.
        look_s: seconds between two looks.
    """

    def __init__(
        self, *, stuck_s: float = STUCK_S, boot_s: float = BOOT_S, look_s: float = LOOK_S
    ) -> None:
        self._stuck_s = stuck_s
        self._boot_s = boot_s
        self._look_s = look_s
        self._last_at = -math.inf
        self._sights: dict[int, _Sight] = {}

    @property
    def due_at(self) -> float:
        """Return the monotonic time of the next look."""
        return self._last_at + self._look_s

    def look(self, now: float, signs: Mapping[int, int]) -> dict[int, float]:
        """Take a look; return who is stuck.

        Args:
            now: monotonic time in seconds.
            signs: by pid, the sign of life of every process to watch.

        Returns:
            By pid, the seconds for which that process showed none.
        """
        # A look that comes late tells no more than one in time.
        passed_s = min(now - self._last_at, 2 * self._look_s)
        self._last_at = now
        self._sights = {pid: self._see(pid, sign, passed_s) for pid, sign in signs.items()}
        return {pid: s.silent_s for pid, s in self._sights.items() if self._is_stuck(s)}

    def _see(self, pid: int, sign: int, passed_s: float) -> _Sight:
        sight = self._sights.get(pid)
        if sight is None or sight.sign != sign:
            return _Sight(sign)
        sight.silent_s += passed_s
        return sight

    def _is_stuck(self, sight: _Sight) -> bool:
        return sight.silent_s >= (self._stuck_s if sight.sign else self._boot_s)
