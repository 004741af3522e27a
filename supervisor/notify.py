"""Tell systemd how the service is, over the socket that NOTIFY_SOCKET names: see sd_notify(3)."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import MutableMapping
from typing import Final

import structlog

_SEND_TIMEOUT_S: Final = 1.0
_VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")

_log = structlog.get_logger()


class Notifier:
    """Send states and beats; without a NOTIFY_SOCKET all of it does nothing.

    Args:
        environment: where the variables are read, and removed, so that children do not report in
            the supervisor's name; None for a notifier that does nothing.
    """

    def __init__(self, environment: MutableMapping[str, str] | None = None) -> None:
        found = {} if environment is None else environment
        path, watchdog_us, watchdog_pid = (found.pop(name, "") for name in _VARIABLES)
        # An address that begins with @ is in the abstract namespace.
        self._address = "\0" + path[1:] if path.startswith("@") else path
        is_watched = bool(path) and watchdog_us.isdecimal() and int(watchdog_us) > 0
        if not is_watched or watchdog_pid not in ("", str(os.getpid())):
            watchdog_us = ""
        self._beat_s = int(watchdog_us) / 2e6 if watchdog_us else math.inf
        self.beat_at = 0.0 if watchdog_us else math.inf
        """Monotonic time at which the next beat is due; infinite if nobody waits for it."""

    def ready(self, status: str) -> None:
        """Say that the start, or the reload, is complete."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self, status: str) -> None:
        """Say that a reload begins."""
        now_us = time.monotonic_ns() // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now_us}", f"STATUS={status}")

    def stopping(self, status: str) -> None:
        """Say that the end begins."""
        self._send("STOPPING=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        """Say in a line how the service is."""
        self._send(f"STATUS={status}")

    def beat(self, now: float) -> None:
        """Feed the watchdog if that is due; call it from the loop that is to be watched."""
        if now >= self.beat_at:
            self.beat_at = now + self._beat_s
            self._send("WATCHDOG=1")

    def _send(self, *assignments: str) -> None:
        if not self._address:
            return
        # No line of a status may become an assignment of its own.
        text = "\n".join(" ".join(assignment.split()) for assignment in assignments)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(_SEND_TIMEOUT_S)
                sender.sendto(text.encode(), self._address)
        except OSError as error:  # the service does not depend on whoever watches it
            _log.debug("systemd was not told", reason=str(error), what=assignments[0])
