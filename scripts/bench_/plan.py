"""Say what the clients of a process are, and what a file descriptor of it can be."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Final

(
    FOREIGN,
    CONTROL,
    TIMER,
    DIALLING,
    SHAKING,
    OPEN,
    CLOSING,
    DEAD,
    API_LISTENER,
    API_CONNECTION,
    PUSHER,
    KINDS,
) = range(12)
"""Kinds of file descriptors; KINDS is how many there are."""
HEAD_BYTES: Final = 4096
"""What is read at once of an answer over HTTP."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Tell one process what its clients are.

    Attributes:
        target: host and port to connect to.
        paths: what each one asks for, `{}` being its number.
        numbers: of this process's clients.
        sources: addresses to connect from.
        message: bytes of what a client says.
        answer: bytes of what it hears.
        files: file descriptors are below this.
        rest_s: time to rest before each turn of the loop, so that there is more to do in it; it is
            a part of the latencies.
        api: a listening socket when this process is the API as well, and pushes.
    """

    target: tuple[str, int]
    paths: str
    numbers: range
    sources: list[str]
    message: bytes
    answer: bytes
    files: int
    rest_s: float = 0.0
    api: socket.socket | None = None
