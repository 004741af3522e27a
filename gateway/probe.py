"""Find out whether pushes reach this worker: send one to itself through Redis, again and again.

A worker whose loop turns and whose connections look fine may still be deaf: a subscription that
Redis has dropped, a proxy between that forwards nothing. Only what comes back proves the way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import structlog

from . import counters as c
from .envelope import PROBE, Envelope, pack
from .redis_link import RedisLink, ignore
from .sweeper import Sweeper

_INTERVAL_S: Final = 2.0
_DEAF_AFTER: Final = 4  # probes in a row

_log = structlog.get_logger()


class Probe:
    """Send a probe to this worker's own channel, and note when it comes back.

    Args:
        link: connection for commands.
        channel: the worker's own.
        on_deaf: called when nothing has come back for long although the connections are up.
    """

    def __init__(
        self,
        link: RedisLink,
        channel: bytes,
        slot: memoryview,
        sweeper: Sweeper,
        on_deaf: Callable[[], None],
    ) -> None:
        self._link = link
        self._channel = channel
        self._slot = slot
        self._on_deaf = on_deaf
        # While the bus is closed there is nothing to find out.
        self._is_open = False
        self._next_at = 0.0
        # Probes since one came back; counted, because a time would blame Redis for a stall of ours.
        self._missing = 0
        self._sweeper = sweeper
        sweeper.every_tick(self._on_tick)

    def open(self) -> None:
        """Begin to probe: both connections are up."""
        self._is_open = True
        self._missing = 0
        self._send(self._sweeper.now)

    def close(self) -> None:
        """Probe no more."""
        self._is_open = False

    def on_probe(self, envelope: Envelope) -> None:
        """Take a probe that came back."""
        now_us = _now_us()
        self._missing = 0
        self._slot[c.PROBED_US] = now_us
        self._slot[c.PROBE_LAG_US] = now_us - envelope.generation

    def _send(self, now: float) -> None:
        self._next_at = now + _INTERVAL_S
        self._missing += 1
        wire = pack(PROBE, 0, b"", b"", _now_us(), 0, b"")
        self._link.send(ignore, b"PUBLISH", self._channel, wire)

    def _on_tick(self, now: float) -> None:
        if not self._is_open or now < self._next_at:
            return
        if self._missing >= _DEAF_AFTER:
            _log.error("pushes do not reach this worker, subscribing again")
            self._missing = 0
            self._on_deaf()
        else:
            self._send(now)


def _now_us() -> int:
    return time.monotonic_ns() // 1000
