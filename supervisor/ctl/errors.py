"""Name the ways in which a command of ws2api-ctl fails, each with its exit status."""

from __future__ import annotations

from typing import ClassVar, Final

EXIT_DONE: Final = 0
EXIT_REFUSED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3


class CtlError(Exception):
    """Say in one line what went wrong and what to do.

    Attributes:
        exit_status: of the command.
        http_status: of the gateway's answer; None when there was none.
    """

    exit_status: ClassVar[int]

    def __init__(self, text: str, http_status: int | None = None) -> None:
        super().__init__(text)
        self.http_status = http_status


class RefusedError(CtlError):
    """Pass on that the gateway said no, or did not do it in time."""

    exit_status = EXIT_REFUSED


class UsageError(CtlError):
    """Say which argument, variable or file is wrong."""

    exit_status = EXIT_USAGE


class UnreachableError(CtlError):
    """Say that no gateway answered."""

    exit_status = EXIT_UNREACHABLE
