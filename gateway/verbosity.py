"""Log debug lines for a while, in a process that has an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from . import logs


def _ignore() -> None:
    """Need not know."""


class Verbosity:
    """Raise the level when told to, and restore it later, also when it was raised before the fork.

    Args:
        on_change: called when another level is in force.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, on_change: Callable[[], None] = _ignore
    ) -> None:
        self._loop = loop
        self._on_change = on_change
        self._restoring: asyncio.TimerHandle | None = None
        left_s = logs.raised_left_s()
        if left_s is not None:
            self._restoring = loop.call_later(left_s, self._fall)

    def rise(self) -> None:
        """Log everything, for as long again if that is so already."""
        if self._restoring is not None:
            self._restoring.cancel()
        logs.raise_level()
        self._restoring = self._loop.call_later(logs.RAISED_S, self._fall)
        self._on_change()

    def _fall(self) -> None:
        logs.restore_level()
        self._on_change()
