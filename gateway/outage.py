"""Say in the log when the API goes away and when it is back: one line each."""

from __future__ import annotations

from typing import Final

import structlog

# Pause between two lines about single failures to connect.
_NOTE_EVERY_S: Final = 10.0

_log = structlog.get_logger()


class Outage:
    """Tell of one API.

    Args:
        api: its URL.
    """

    def __init__(self, api: str) -> None:
        self._api = api
        self._began_at = float("-inf")
        self._is_told = False

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
        if self._is_told:
            self._is_told = False
            away_s = round(now - self._began_at, 1)
            _log.info("API available again", api=self._api, away_s=away_s)
