"""Let the time of one open client pass by, and look at its pings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from ws2api.gateway.client import Client
from ws2api.gateway.frames import PING_FRAME
from ws2api.gateway.session import OPEN


class Silent(Client):
    """Be an open client that is looked at when it asks to be, and may answer pings.

    Args:
        answers_after_s: time after which a ping is answered; None if never.
    """

    # Slots of its own, because there is no __dict__.
    __slots__ = ("answers_after_s", "closed_at", "now", "pings")

    def __init__(
        self, interval_s: float, timeout_s: float, answers_after_s: float | None = None
    ) -> None:
        hub = SimpleNamespace(
            sweeper=SimpleNamespace(now=0.0),
            serve_http=None,
            ping_interval_s=interval_s,
            ping_timeout_s=timeout_s,
        )
        super().__init__(cast(Any, hub))
        self.state = OPEN
        self._transport = cast(Any, object())
        self.answers_after_s = answers_after_s
        self.now = 0.0
        self.pings: list[float] = []
        self.closed_at: float | None = None

    def _write(self, wire: bytes) -> None:
        assert wire == PING_FRAME
        self.pings.append(self.now)

    def close(self, code: int, reason: str, cause: str | None = None) -> None:
        assert (code, reason) == (1011, "ping timeout")
        self.closed_at = self.now

    def lives(self, seconds: float) -> None:
        """Pass the time as the sweeper does, in ticks."""
        look_at = self._hub.ping_interval_s
        while self.now < seconds and look_at and self.closed_at is None:
            self.now = round(self.now + 0.1, 1)
            if self.answers_after_s is not None and self.pings:
                answered_at = self.pings[-1] + self.answers_after_s
                if self._heard_at < answered_at <= self.now:
                    self._heard_at = self.now
            if self.now >= look_at:
                delay_s = self.on_tick(self.now)
                look_at = self.now + delay_s if delay_s else 0.0


@pytest.mark.parametrize(("interval_s", "timeout_s"), [(30.0, 20.0), (20.0, 20.0), (10.0, 35.0)])
def test_one_that_does_not_answer_is_closed_after_the_timeout(
    interval_s: float, timeout_s: float
) -> None:
    client = Silent(interval_s, timeout_s)
    client.lives(200)
    assert client.pings == [interval_s]
    assert client.closed_at == pytest.approx(interval_s + timeout_s, abs=0.2)


@pytest.mark.parametrize(("interval_s", "timeout_s"), [(30.0, 20.0), (20.0, 20.0), (10.0, 35.0)])
def test_one_that_answers_is_pinged_at_each_interval(interval_s: float, timeout_s: float) -> None:
    client = Silent(interval_s, timeout_s, answers_after_s=0.1)
    client.lives(300)
    assert client.closed_at is None
    pauses = [after - before for before, after in zip(client.pings, client.pings[1:], strict=False)]
    assert len(pauses) >= 8
    assert all(pause == pytest.approx(interval_s, abs=0.3) for pause in pauses)


def test_late_answer_is_an_answer() -> None:
    client = Silent(10.0, 35.0, answers_after_s=33.0)
    client.lives(300)
    assert client.closed_at is None
