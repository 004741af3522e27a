"""Hold what a connection needs until it is open, and no longer: pure."""

from __future__ import annotations

import time
from typing import Final

from . import outcomes
from .ask import Ask
from .handshake import Handshake, RequestHead

_MAX_HELD_ASKS: Final = 64


class Opening:
    """Keep the request, early frames and early pushes of a client that is not connected yet.

    Args:
        keep_raw: whether the bytes may turn out to be for the push side (--single-port).
    """

    __slots__ = ("began_us", "early", "handshake", "head", "held", "raw", "response")

    def __init__(self, keep_raw: bool) -> None:
        self.began_us = time.monotonic_ns() // 1000
        """When the connection was accepted."""
        self.head: RequestHead | None = RequestHead()
        """None when the request is complete."""
        self.handshake: Handshake | None = None
        self.raw = bytearray() if keep_raw else None
        """All bytes so far; None when they are of no use any more."""
        self.early = bytearray()
        """Frames that the client sent before it had the 101."""
        self.held: list[Ask] = []
        """Asks that wait for the end of the upgrade, oldest first."""
        self.response = b""
        """The 101, when the API has accepted."""

    def hold(self, ask: Ask) -> bool:
        """Keep an ask, or finish it if there are too many; tell whether it is kept."""
        if len(self.held) >= _MAX_HELD_ASKS:
            ask.finish(outcomes.TOO_SLOW, b"")
            return False
        self.held.append(ask)
        return True

    def take_held(self) -> list[Ask]:
        """Return the asks that were held, and hold them no longer."""
        held, self.held = self.held, []
        return held
