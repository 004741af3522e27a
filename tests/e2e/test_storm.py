"""Everybody connects at the same moment."""

from __future__ import annotations

import resource
from collections import Counter
from contextlib import ExitStack

import pytest
from harness.gateway import GatewayProcess
from harness.storm import StormProcess
from harness.traffic import Traffic
from harness.waiting import DEADLINE_S, until

WORKERS = 4
CLIENTS = 20_000
PROCESSES = 3

_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[1]


@pytest.mark.skipif(_FILES < CLIENTS // 2, reason="a process may hold too few files")
def test_connect_storm() -> None:
    # Patience for a busy machine: nobody is to be turned back.
    patience = {"workers": WORKERS, "handshake_timeout": "60s"}
    with Traffic() as traffic, GatewayProcess(api=traffic.api.url, **patience) as gateway:
        with ExitStack() as stack:
            storms = [
                stack.enter_context(StormProcess(gateway.clients_address, count, number))
                for number, count in enumerate(split(CLIENTS, PROCESSES), 1)
            ]
            outcomes = sum((storm.outcomes() for storm in storms), Counter())
            assert outcomes == {"let in": CLIENTS}, outcomes
            assert len(traffic.api.lives) == CLIENTS == gateway.count("connections_opened")
            assert traffic.api.most_at_once["GET"] <= WORKERS * 256
            for storm in storms:
                storm.leave()
        until(
            lambda: sum(bool(life.deletes) for life in traffic.api.snapshot()) == CLIENTS,
            timeout_s=4 * DEADLINE_S,
            what="a DELETE for everybody",
        )
        assert not gateway.complaints, gateway.stderr


def split(count: int, parts: int) -> list[int]:
    return [count // parts + (number < count % parts) for number in range(parts)]


def test_more_than_the_api_can_decide_on() -> None:
    clients = 100
    with (
        Traffic() as traffic,
        GatewayProcess(
            api=traffic.api.url, workers=1, max_connecting=1, handshake_timeout="1s"
        ) as gateway,
        StormProcess(gateway.clients_address, clients, 1) as storm,
    ):
        gate = traffic.api.hold(lambda request: request.method == "GET")
        until(lambda: gate.waiting == 1)
        until(lambda: gateway.count("connects_waiting") > 0)
        until(lambda: gateway.count("connects_overflowed") > 0, what="some to be turned back")
        assert traffic.api.most_at_once["GET"] == 1
        gate.open()
        outcomes = storm.outcomes()
        assert outcomes.pop("turned back") >= 1
        assert outcomes == {"let in": clients}
        assert traffic.api.most_at_once["GET"] == 1
        assert not gateway.complaints, gateway.stderr
