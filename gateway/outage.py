"""Say when the API goes away and when it is back: in the log, one line each, and to the admin
process."""

from __future__ import annotations

import time
from typing import Final

import structlog

from . import causes
from . import counters as c
from .recent import ErrorRecord, Ring

# Pause between two lines about single failures to connect.
_NOTE_EVERY_S: Final = 10.0

_log = structlog.get_logger()


class Outage:
    """Tell of one API.

    Args:
        api: its URL.
        slot: the worker's counters.
        ring: where the cause stands for the admin process; None if it need not know.
    """

    def __init__(self, api: str, slot: memoryview, ring: Ring | None) -> None:
        self._api = api
        self._slot = slot
        self._ring = ring
        self._began_at = float("-inf")
        self._is_told = False
        self.cause = ""
        """Why the API is away, or was the last time."""
        self.heard_at = float("-inf")
        """Time of the last failure."""
        self.is_shown = False
        """Whether the admin process is to say that the API is away."""
        self._since_s = 0.0

    def begins(self, cause: str, now: float) -> None:
        """Say that requests wait, unless a line has said so."""
        if not self._is_told:
            self._is_told = True
            self._began_at = now
            _log.warning("API unavailable", api=self._api, error=cause)

    def may_begin(self, cause: str, now: float) -> None:
        """Say why no connection could be opened, but not each time: it may be a matter of once."""
        if now - self._began_at >= _NOTE_EVERY_S:
            self.begins(cause, now)

    def ends(self, now: float) -> None:
        """Say that all is well again, if a line has said that it was not."""
        self.hide()
        if self._is_told:
            self._is_told = False
            away_s = round(now - self._began_at, 1)
            _log.info("API available again", api=self._api, away_s=away_s)

    def show(self, cause: str, now: float) -> None:
        """Let the admin process see that the API is away, since when, and why."""
        self.heard_at = now
        if self.is_shown and cause == self.cause:
            return
        self.cause = cause
        if not self.is_shown:
            self._since_s = time.time()
        if self._ring is not None:
            text = " ".join(cause.split())
            record = ErrorRecord(self._since_s, causes.UNREACHABLE, "", text)
            self._ring.append(record.encode())
        self.is_shown = True
        self._slot[c.API_AWAY] = 1

    def hide(self) -> None:
        """Let it see no more of that."""
        if self.is_shown:
            self.is_shown = False
            self._slot[c.API_AWAY] = 0
