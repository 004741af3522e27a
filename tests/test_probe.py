"""Send probes: through nothing, with a clock that the test moves, and through a real Valkey."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from typing import Any, cast

import pytest
import structlog
from harness.looping import Clock, holds, in_loop
from harness.redis_server import RedisServer, redis_server
from ws2api.gateway import counters as c
from ws2api.gateway import probe as probe_module
from ws2api.gateway.bus import Bus
from ws2api.gateway.counters import Counters
from ws2api.gateway.envelope import PROBE, Envelope, decode
from ws2api.gateway.probe import Probe
from ws2api.gateway.redis_link import RedisLink
from ws2api.gateway.redis_time import RedisTime
from ws2api.gateway.sweeper import Sweeper

PREFIX = "test:"
CHANNEL = b"test:w:a"
INTERVAL_S = 2.0
DEAF_AFTER = 4
# The time that so many probes take.
DEAF_AFTER_S = DEAF_AFTER * INTERVAL_S


class Link:
    """Take commands, and do nothing with them."""

    def __init__(self) -> None:
        self.published: list[Envelope] = []

    def send(self, callback: object, *command: bytes) -> None:
        name, channel, wire = command
        assert (name, channel) == (b"PUBLISH", CHANNEL)
        self.published += decode(wire)


class Worker:
    """Hold the probe of one worker, whose channel leads nowhere unless the test says so."""

    def __init__(self) -> None:
        self.clock = Clock()
        sweeper = Sweeper(cast(Any, self.clock))
        sweeper.start()
        self.slot = Counters(1).bank(0, 0)
        self.link = Link()
        self.times_deaf = 0
        self.probe = Probe(cast(Any, self.link), CHANNEL, self.slot, sweeper, self._on_deaf)

    def _on_deaf(self) -> None:
        self.times_deaf += 1

    @property
    def sent(self) -> int:
        return len(self.link.published)

    def sends(self, count: int) -> None:
        """Let time go by until so many more probes were sent."""
        until = self.sent + count
        while self.sent < until:
            self.clock.advance(0.1)

    def comes_back(self) -> None:
        """Let the last probe arrive."""
        self.probe.on_probe(self.link.published[-1])


# Without Redis.


def test_nothing_is_probed_before_the_bus_is_open() -> None:
    worker = Worker()
    worker.clock.advance(2 * DEAF_AFTER_S)
    assert worker.sent == worker.times_deaf == 0


def test_probe_is_sent_at_once_and_every_few_seconds() -> None:
    worker = Worker()
    worker.probe.open()
    sent_at = [worker.clock.now]
    while len(sent_at) < 10:
        worker.comes_back()
        worker.clock.advance(0.1)
        if worker.sent > len(sent_at):
            sent_at.append(worker.clock.now)
        assert worker.sent == len(sent_at)
    intervals = [after - before for before, after in pairwise(sent_at)]
    assert intervals == [pytest.approx(INTERVAL_S, abs=0.15)] * 9
    assert {envelope.kind for envelope in worker.link.published} == {PROBE}
    assert worker.times_deaf == 0


def test_lag_is_the_time_between_sending_and_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker()
    monkeypatch.setattr(probe_module, "_now_us", lambda: 5_000_000)
    worker.probe.open()
    monkeypatch.setattr(probe_module, "_now_us", lambda: 5_000_321)
    worker.comes_back()
    assert worker.slot[c.PROBE_LAG_US] == 321
    assert worker.slot[c.PROBED_US] == 5_000_321


def test_worker_that_hears_nothing_for_long_is_deaf() -> None:
    worker = Worker()
    worker.probe.open()
    worker.comes_back()
    worker.sends(DEAF_AFTER)
    worker.clock.advance(INTERVAL_S - 0.2)
    assert worker.times_deaf == 0, "the last one has its time, too"
    with structlog.testing.capture_logs() as logs:
        worker.clock.advance(0.4)
    assert worker.times_deaf == 1
    assert [entry["log_level"] for entry in logs] == ["error"]


def test_deaf_worker_tries_again_and_again() -> None:
    worker = Worker()
    worker.probe.open()
    worker.clock.advance(3.5 * DEAF_AFTER_S)
    assert worker.times_deaf == 3
    assert worker.sent > 9, "meanwhile it goes on to probe"


def test_worker_that_hears_again_is_not_deaf() -> None:
    worker = Worker()
    worker.probe.open()
    worker.clock.advance(DEAF_AFTER_S - 0.5)
    worker.comes_back()
    worker.clock.advance(DEAF_AFTER_S - 0.5)
    assert worker.times_deaf == 0


@pytest.mark.parametrize("stall_s", [DEAF_AFTER_S, 3600.0])
def test_process_that_stood_still_is_not_deaf(stall_s: float) -> None:
    """The probe lies in the socket, and is read only after the tick."""
    worker = Worker()
    worker.probe.open()
    for _ in range(3):
        worker.clock.stall(stall_s)
        assert worker.times_deaf == 0
        worker.comes_back()
    worker.sends(DEAF_AFTER)
    assert worker.times_deaf == 0, "it has all its time again"


def test_worker_that_is_deaf_is_found_out_after_a_stall() -> None:
    worker = Worker()
    worker.probe.open()
    worker.clock.stall(3600.0)
    assert worker.sent == 2
    worker.clock.advance(DEAF_AFTER_S)
    assert worker.times_deaf == 1


def test_nothing_is_probed_while_the_bus_is_closed() -> None:
    worker = Worker()
    worker.probe.open()
    worker.probe.close()
    worker.clock.advance(3 * DEAF_AFTER_S)
    assert worker.sent == 1
    assert worker.times_deaf == 0


def test_worker_has_its_time_again_when_the_bus_is_opened_again() -> None:
    worker = Worker()
    worker.probe.open()
    worker.clock.advance(DEAF_AFTER_S - 1)
    worker.probe.close()
    worker.clock.advance(DEAF_AFTER_S)
    worker.probe.open()
    worker.clock.advance(DEAF_AFTER_S - 1)
    assert worker.times_deaf == 0


def test_figures_stay_those_of_the_last_probe_that_came_back() -> None:
    worker = Worker()
    worker.probe.open()
    worker.comes_back()
    probed_us, lag_us = worker.slot[c.PROBED_US], worker.slot[c.PROBE_LAG_US]
    assert probed_us > 0
    assert lag_us >= 0
    worker.clock.advance(3 * DEAF_AFTER_S)
    assert (worker.slot[c.PROBED_US], worker.slot[c.PROBE_LAG_US]) == (probed_us, lag_us)


# With Redis.


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("valkey"), PREFIX) as server:
        yield server


class ConnectedWorker:
    """Hold probe, bus and links of one worker, joined as they are in a real one.

    Args:
        is_deaf: whether the first subscription is to nothing.
    """

    def __init__(self, url: str, *, is_deaf: bool = False) -> None:
        loop = asyncio.get_running_loop()
        self.clock = Clock()
        self.slot = Counters(1).bank(0, 0)
        self.subscriptions = 0
        self._is_deaf = is_deaf
        sweeper = Sweeper(cast(Any, self.clock))
        sweeper.start()
        self.commands = RedisLink(url, "a", loop, sweeper, lambda: None, lambda: None)
        self.bus = Bus(
            self.commands,
            PREFIX,
            "a",
            self.slot,
            sweeper,
            RedisTime(),
            loop.call_soon,
            5.0,
            cast(Any, None),
            cast(Any, None),
            lambda envelope: self.probe.on_probe(envelope),
            lambda: None,
        )
        self.subscription = RedisLink(
            url, "a", loop, sweeper, self._on_up, self._on_down, self.bus.on_message
        )
        self.probe = Probe(
            self.commands, self.bus.channel, self.slot, sweeper, self.subscription.reset
        )

    def _on_up(self) -> None:
        self.subscriptions += 1
        is_deaf = self._is_deaf and self.subscriptions == 1
        channel = b"nowhere" if is_deaf else self.bus.channel
        self.subscription.send(self._on_subscribed, "SUBSCRIBE", channel)

    def _on_subscribed(self, reply: object) -> None:
        if not isinstance(reply, Exception):
            self.probe.open()

    def _on_down(self) -> None:
        self.probe.close()

    @property
    def has_heard(self) -> bool:
        return self.slot[c.PROBED_US] > 0


@contextlib.asynccontextmanager
async def connected(
    server: RedisServer, *, is_deaf: bool = False
) -> AsyncIterator[ConnectedWorker]:
    worker = ConnectedWorker(server.url, is_deaf=is_deaf)
    worker.commands.start()
    try:
        await holds(lambda: worker.commands.is_up)
        worker.subscription.start()
        yield worker
    finally:
        await worker.subscription.stop()
        await worker.commands.stop()


@in_loop
async def test_probe_comes_back_through_redis(server: RedisServer) -> None:
    async with connected(server) as worker:
        await holds(lambda: worker.has_heard)
        assert 0 <= worker.slot[c.PROBE_LAG_US] < worker.slot[c.PROBED_US]
        worker.slot[c.PROBED_US] = 0
        worker.clock.advance(INTERVAL_S + 0.2)
        await holds(lambda: worker.has_heard)


@in_loop
async def test_deaf_worker_subscribes_again(server: RedisServer) -> None:
    async with connected(server, is_deaf=True) as worker:
        await holds(lambda: worker.subscriptions == 1)
        while worker.subscriptions == 1:
            assert not worker.has_heard
            worker.clock.advance(0.5)
            for link in (worker.commands, worker.subscription):
                if link.is_up:
                    await link.ask("PING")  # the connections themselves are well
        await holds(lambda: worker.has_heard)
