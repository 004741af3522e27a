"""Say that the API is away, as workers have found it; tests/test_admin.py has the rest."""

from __future__ import annotations

import time
from typing import Any, cast

from ws2api.gateway import causes
from ws2api.gateway import counters as c
from ws2api.gateway.recent import ErrorRecord, Recent
from ws2api.supervisor.health import Health

DAY_S = 86_400
NOW_S = time.time()
JUST_NOW_S = max(NOW_S - 60, NOW_S // DAY_S * DAY_S)
"""Not yesterday in any case."""


class Scene:
    """Hold the health of two workers."""

    def __init__(self) -> None:
        self.counters = c.Counters(2)
        self.recent = Recent(2, c.BANKS)
        self.health = Health(
            self.counters, self.recent, cast(Any, None), lambda: 0, "ws2api:", "instance"
        )

    def api_is_away(self, worker: int, since_s: float, cause: str, bank: int = 0) -> None:
        record = ErrorRecord(since_s, causes.UNREACHABLE, "", cause)
        self.recent.outage(worker, bank).append(record.encode())
        self.counters.bank(worker, bank)[c.API_AWAY] = 1


def test_says_nothing_of_an_api_that_answers() -> None:
    scene = Scene()
    assert scene.health.notes() == []
    scene.api_is_away(0, JUST_NOW_S, "Connection refused")
    scene.counters.bank(0, 0)[c.API_AWAY] = 0
    assert scene.health.notes() == []


def test_says_since_when_the_api_is_away_and_why() -> None:
    scene = Scene()
    scene.api_is_away(1, JUST_NOW_S, "Connection refused")
    clock = time.strftime("%H:%M", time.gmtime(JUST_NOW_S))
    assert scene.health.notes() == [f"API away: Connection refused, since {clock} UTC"]


def test_takes_the_word_of_the_worker_that_noticed_first() -> None:
    scene = Scene()
    scene.api_is_away(0, JUST_NOW_S, "status 503")
    scene.api_is_away(1, NOW_S - 3 * DAY_S, "No route to host", bank=1)
    moment = time.strftime("%Y-%m-%d %H:%M", time.gmtime(NOW_S - 3 * DAY_S))
    assert scene.health.notes() == [f"API away: No route to host, since {moment} UTC"]


def test_it_is_no_reason_to_send_nobody() -> None:
    scene = Scene()
    findings = scene.health.findings_beside([])
    scene.api_is_away(0, JUST_NOW_S, "Connection refused")
    assert scene.health.findings_beside([]) == findings


def test_forgets_what_a_worker_said_that_has_died() -> None:
    scene = Scene()
    scene.api_is_away(0, JUST_NOW_S, "Connection refused")
    scene.counters.settle(0, 0)
    assert scene.health.notes() == []
