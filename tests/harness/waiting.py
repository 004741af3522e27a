"""Wait for something to become true, and only that long."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

DEADLINE_S: Final = 15.0
"""After this time something that must happen counts as not happening; no test waits it out."""

POLL_S: Final = 0.01

T = TypeVar("T")


def until(condition: Callable[[], T], *, timeout_s: float = DEADLINE_S, what: str = "") -> T:
    """Poll until the condition holds, and return its value.

    Raises:
        AssertionError: if it does not hold in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what or condition}"
        time.sleep(POLL_S)
