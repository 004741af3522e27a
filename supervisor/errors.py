"""Name how the supervisor ends, and why a request to the admin port is refused."""

from __future__ import annotations

from typing import Final

EXIT_OK: Final = 0
EXIT_UNCLEAN: Final = 1
"""A worker had to be killed, or ended badly, when everything was told to end."""
EXIT_USAGE: Final = 2
EXIT_GAVE_UP: Final = 3


class StartError(Exception):
    """Say in one line why the supervisor cannot start: an address, a file, Redis."""


class GaveUpError(Exception):
    """Say in one line why restarting workers was given up."""


class RequestError(Exception):
    """Answer a request to the admin port with an error.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
