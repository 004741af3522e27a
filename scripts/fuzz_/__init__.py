"""Fuzz what reads the bytes of others: one module per target, whose `check` takes bytes.

`check` asserts what holds for any bytes, and lets through nothing but what it expects; whatever it
raises is a finding. `DICTIONARY` holds tokens that random changes would hardly hit upon.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Final, Protocol, cast

CORPUS: Final = Path(__file__).parents[2] / "tests" / "corpus"

TARGETS: Final = {
    "handshake": "RequestHead and HandshakePolicy: bytes on the client port before the 101",
    "frames": "decode_whole and FrameReader: bytes on an open WebSocket",
    "push": "PushConnection: bytes on the push port",
    "reply": "ReplyReader: bytes that the API answers",
    "envelope": "envelope.decode: bytes that come from Redis",
    "session": "Session: any order of events; each byte is one",
}


class Target(Protocol):
    """Be the module of a target."""

    DICTIONARY: tuple[bytes, ...]

    def check(self, data: bytes) -> None:
        """Assert what holds for any bytes."""


def load(name: str) -> Target:
    """Import the module of a target, and with it the code that it examines."""
    return cast(Target, importlib.import_module(f"{__name__}.{name}"))


def seeds(name: str) -> list[Path]:
    """Return the files that fuzzing a target begins with."""
    return sorted((CORPUS / name).iterdir())
