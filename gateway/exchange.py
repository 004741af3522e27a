"""Name a request to the API, and who waits for its outcome."""

from __future__ import annotations

from typing import Final, Protocol

from .errors import ApiError
from .http_wire import ReplyReader

CONNECT: Final = 0
MESSAGE: Final = 1
DISCONNECT: Final = 2


class Owner(Protocol):
    """Wait for the outcome of an exchange; exactly one of the three is called, once."""

    client_id: bytes
    left: bool
    """Whether the client is gone, so that a connect need not be sent any more."""
    retry_safe: bool
    """Whether the API may get a message again that it may have acted on."""

    def on_reply(self, exchange: Exchange, reply: ReplyReader) -> None:
        """Take the API's answer; `reply` is valid during the call only."""

    def on_failure(self, exchange: Exchange, error: ApiError) -> None:
        """Learn that no usable answer will come."""

    def on_parked(self, exchange: Exchange) -> None:
        """Learn that a disconnect was left to Redis, from which others will send it."""


class Exchange:
    """Stand for one request to the API until its outcome is known."""

    __slots__ = ("attempts", "event", "owner", "started", "wire")

    def __init__(self, owner: Owner, event: int, wire: bytes) -> None:
        self.owner = owner
        self.event = event
        self.wire = wire
        self.started = 0.0
        """Clock at which it was submitted."""
        self.attempts = 0
        """How many times it was sent."""
