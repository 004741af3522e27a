"""Bring a worker to its end, with clients, an API and a Redis that do as the test says.

The loop's time passes only while nothing happens: what is said of it here is exact.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import hiredis
import pytest
import structlog
from harness.looping import in_virtual_time
from ws2api.gateway.drain import Drain
from ws2api.gateway.errors import RedisUnavailable
from ws2api.gateway.session import (
    ASKING,
    CLAIMING,
    CLOSED,
    CLOSING,
    HANDSHAKE,
    OPEN,
    REPORTING,
    WAITING,
)

DRAIN_S = 10.0
TOTAL_S = 30.0
PATIENCE_S = 0.4 * TOTAL_S
# How long after something happened it may be noticed.
SOON_S = 0.2
# How often it is looked at whether there is still something to wait for.
POLL_S = 0.02
# What is done in the end, whatever happened before.
LAST_STEPS = ["close the upstream", "let go of Redis", "hand over"]

RESTART = (1012, "service restart")
AWAY = (1001, "going away")
Farewell = tuple[int, str]


class Client:
    """Be a connection, note what it is told, and tell the API of its end.

    Args:
        in_flight: whether a message is under way to the API, which does not answer it.
        api_hears: whether the API answers the DELETE at once.
    """

    def __init__(
        self,
        worker: Worker,
        name: str,
        state: int = OPEN,
        *,
        in_flight: bool = False,
        api_hears: bool = True,
    ) -> None:
        self._worker = worker
        self.name = name
        self.state = state
        self.in_flight = in_flight
        self.api_hears = api_hears
        self.is_leaving = False
        self.told: list[Farewell] = []
        self.told_at: list[float] = []
        self.closed_with: Farewell | None = None
        self.was_turned_back = False

    def drain(self, code: int, reason: str) -> None:
        if self.state != OPEN:
            return
        self.told.append((code, reason))
        self.told_at.append(self._worker.now)
        if self.in_flight:
            self.is_leaving = True
        else:
            self.close(code, reason)

    def close(self, code: int, reason: str) -> None:
        assert self.state == OPEN
        self.closed_with = code, reason
        self.leaves()

    def leaves(self) -> None:
        """End, from whichever side."""
        del self._worker.hub.clients[self.name.encode()]
        if self.in_flight:
            self.state = CLOSING
        else:
            self.state = REPORTING
            if self.api_hears:
                self.is_heard_of()

    def is_heard_of(self) -> None:
        """Let the API answer the DELETE."""
        assert self.state == REPORTING
        self.state = CLOSED

    def is_answered(self) -> None:
        """Let the API answer the message that is under way."""
        self.in_flight = False
        if self.is_leaving and self.state == OPEN:
            self.close(*self.told[-1])

    def comes_in(self) -> None:
        """Let the API decide on the connect."""
        assert self.state in (ASKING, CLAIMING)
        hub = self._worker.hub
        del hub.connecting[self.name.encode()]
        hub.clients[self.name.encode()] = self
        self.state = OPEN
        if hub.farewell is not None:
            self.close(*hub.farewell)

    def is_admitted(self) -> None:
        """Let the gate have room."""
        assert self.state == WAITING
        self._worker.hub.connecting[self.name.encode()] = self
        self.state = ASKING

    def turn_back(self, wait_s: float) -> None:
        assert self.state == WAITING
        assert wait_s > 0
        self.was_turned_back = True
        self.state = CLOSED


class Outbox:
    """Hand over as the test says."""

    def __init__(self, steps: list[str]) -> None:
        self._steps = steps
        self.left = 0
        self.unconfirmed = 0
        self.error: Exception | None = None
        self.hangs = False
        self.takes_s = 0.0

    async def hand_over(self) -> int:
        self._steps.append("hand over")
        if self.hangs:
            await asyncio.get_running_loop().create_future()
        await asyncio.sleep(self.takes_s)
        if self.error is not None:
            raise self.error
        return self.left


class Worker:
    """Hold what a worker has when it accepts no more."""

    def __init__(self, *, total_s: float = TOTAL_S, drain_s: float = DRAIN_S) -> None:
        self.loop = asyncio.get_running_loop()
        self.began_at = self.loop.time()
        self.steps: list[str] = []
        self.outbox = Outbox(self.steps)
        self.hub = SimpleNamespace(
            clients={}, connecting={}, live=set(), refusing=False, farewell=None
        )
        self.drain = Drain(
            cast(Any, self.hub),
            cast(Any, SimpleNamespace(close=self._close_upstream)),
            cast(Any, self.outbox),
            self.loop,
            total_s,
            drain_s,
            lambda: self.steps.append("let go of Redis"),
        )
        self.settles_on_close = True

    async def _close_upstream(self) -> None:
        """Give up what is under way, as the real one does: park it, or let it fail."""
        self.steps.append("close the upstream")
        for client in self.hub.live:
            if self.settles_on_close and client.state == REPORTING:
                client.state = CLOSED

    @property
    def now(self) -> float:
        """Seconds since the beginning, to the microsecond."""
        return round(self.loop.time() - self.began_at, 6)

    def has(self, name: str = "me", state: int = OPEN, **kwargs: bool) -> Client:
        client = Client(self, name, state, **kwargs)
        self.hub.live.add(client)
        if state == OPEN:
            self.hub.clients[name.encode()] = client
        elif state in (ASKING, CLAIMING):
            self.hub.connecting[name.encode()] = client
        return client

    def has_many(self, count: int) -> list[Client]:
        return [self.has(f"c{number}") for number in range(count)]

    def at(self, seconds: float, action: Callable[[], object]) -> None:
        """Let something happen at some time after the beginning."""
        self.loop.call_at(self.began_at + seconds, action)

    async def retires(self) -> float:
        """Return how long it took."""
        began_at = self.now
        await self.drain.retire()
        return round(self.now - began_at, 6)

    async def finishes(self, *, retiring: bool = False) -> tuple[int, float]:
        """Return how many ends are lost, and how long it took."""
        began_at = self.now
        lost = await self.drain.finish(retiring=retiring)
        return lost, round(self.now - began_at, 6)

    async def stops(self) -> tuple[int, float]:
        """Be told to stop, as by SIGTERM."""
        self.drain.stop()
        return await self.finishes()


# Retire.


@pytest.mark.parametrize("count", [1, 2, 7, 300])
@in_virtual_time
async def test_clients_are_told_one_after_the_other(count: int) -> None:
    worker = Worker()
    clients = worker.has_many(count)
    await worker.retires()
    assert [client.told for client in clients] == [[RESTART]] * count
    times = sorted(client.told_at[0] for client in clients)
    for number, time in enumerate(times):
        # An even share of them at each moment, but for the one whose turn it nearly is.
        assert number - 1 <= count * time / DRAIN_S
        assert count * (time - SOON_S) / DRAIN_S <= number + 1
    assert times[-1] <= DRAIN_S + SOON_S


@in_virtual_time
async def test_clients_are_told_in_no_order_that_they_could_share() -> None:
    worker = Worker()
    clients = worker.has_many(300)
    await worker.retires()
    times = [client.told_at[0] for client in clients]
    assert times != sorted(times)
    assert times != sorted(times, reverse=True)


@in_virtual_time
async def test_retiring_ends_at_once_when_nobody_is_there() -> None:
    worker = Worker()
    worker.has(state=CLOSED)
    worker.has(state=REPORTING)
    assert await worker.retires() <= SOON_S


@in_virtual_time
async def test_retiring_looks_for_who_was_accepted_a_moment_ago() -> None:
    worker = Worker()
    stays: list[Client] = []
    # The kernel has handed the socket over, but the loop has yet to tell.
    worker.at(0.01, lambda: stays.append(worker.has("late", HANDSHAKE)))
    worker.at(3.0, lambda: setattr(stays[0], "state", CLOSED))
    assert 3.0 <= await worker.retires() <= 3.0 + SOON_S


@in_virtual_time
async def test_retiring_ends_when_nobody_is_left() -> None:
    worker = Worker()
    clients = worker.has_many(50)
    worker.at(1.0, lambda: [client.leaves() for client in clients if client.state == OPEN])
    assert 1.0 <= await worker.retires() <= 1.0 + SOON_S


@in_virtual_time
async def test_client_that_left_by_itself_is_not_told() -> None:
    worker = Worker()
    clients = worker.has_many(50)
    worker.at(DRAIN_S / 2, lambda: [client.leaves() for client in clients if client.state == OPEN])
    await worker.retires()
    assert 0 < sum(client.told == [RESTART] for client in clients) < 50
    assert not worker.hub.clients


@pytest.mark.parametrize("state", [HANDSHAKE, WAITING, ASKING, CLAIMING])
@in_virtual_time
async def test_retiring_waits_for_who_may_come_in(state: int) -> None:
    worker = Worker()
    client = worker.has(state=state)
    worker.at(3.0, lambda: setattr(client, "state", CLOSED))
    took_s = await worker.retires()
    assert 3.0 <= took_s <= 3.0 + SOON_S
    assert not client.was_turned_back
    assert not worker.hub.refusing


@pytest.mark.parametrize("seconds", [0.01, 1.0, 5.0, DRAIN_S - 0.2])
@in_virtual_time
async def test_late_comer_is_told_too(seconds: float) -> None:
    worker = Worker()
    stays = worker.has("stays", in_flight=True)  # so that retiring takes its time
    late = worker.has("late", ASKING)
    worker.at(seconds, late.comes_in)
    await worker.retires()
    assert late.told == [RESTART]
    assert late.told_at[0] >= seconds
    assert stays.told == [RESTART]
    assert late.state == CLOSED


@in_virtual_time
async def test_late_comers_are_spread_over_what_is_left() -> None:
    worker = Worker()
    late = [worker.has(f"late{number}", ASKING) for number in range(100)]
    worker.at(DRAIN_S / 2, lambda: [client.comes_in() for client in late])
    await worker.retires()
    times = [client.told_at[0] for client in late]
    assert [client.told for client in late] == [[RESTART]] * 100
    assert sum(time > 0.75 * DRAIN_S for time in times) > 20
    assert max(times) <= DRAIN_S + SOON_S


@in_virtual_time
async def test_client_that_waits_for_the_api_is_told_once() -> None:
    worker = Worker()
    client = worker.has(in_flight=True)
    assert DRAIN_S <= await worker.retires() <= DRAIN_S + SOON_S
    assert client.told == [RESTART]
    assert client.state == OPEN
    client.is_answered()
    assert client.closed_with == RESTART


@in_virtual_time
async def test_retiring_is_over_when_the_last_is_answered() -> None:
    worker = Worker(drain_s=5.0)
    client = worker.has(in_flight=True)
    worker.at(4.0, client.is_answered)
    assert 4.0 <= await worker.retires() <= 4.0 + SOON_S
    assert client.closed_with == RESTART


@in_virtual_time
async def test_stop_ends_the_pacing() -> None:
    worker = Worker()
    clients = worker.has_many(100)
    worker.at(DRAIN_S / 4, worker.drain.stop)
    assert await worker.retires() <= DRAIN_S / 4 + SOON_S
    untold = [client for client in clients if not client.told]
    assert len(untold) > 50
    await worker.finishes(retiring=True)
    assert all(client.told == [AWAY] for client in untold), "there may be nobody to go to"


@in_virtual_time
async def test_retiring_is_not_begun_after_a_stop() -> None:
    worker = Worker()
    client = worker.has()
    worker.drain.stop()
    assert await worker.retires() <= SOON_S
    assert client.told == []


@in_virtual_time
async def test_very_short_time_suffices_to_tell_everybody() -> None:
    worker = Worker(drain_s=0.001)
    clients = worker.has_many(50)
    await worker.retires()
    assert [client.told for client in clients] == [[RESTART]] * 50


# Finish.


@pytest.mark.parametrize("retiring", [False, True])
@in_virtual_time
async def test_all_who_are_left_are_told_at_once(retiring: bool) -> None:
    worker = Worker()
    clients = worker.has_many(100)
    asking = worker.has("asking", ASKING)
    worker.at(0.5, asking.comes_in)
    if not retiring:
        worker.drain.stop()
    lost, took_s = await worker.finishes(retiring=retiring)
    farewell = RESTART if retiring else AWAY
    assert [client.closed_with for client in [*clients, asking]] == [farewell] * 101
    assert max(client.told_at[0] for client in clients) == 0
    assert lost == 0
    assert 0.5 <= took_s <= 0.5 + SOON_S
    assert worker.steps == LAST_STEPS


@in_virtual_time
async def test_nobody_comes_in_after_the_end() -> None:
    for retiring in (False, True):
        worker = Worker()
        await worker.finishes(retiring=retiring)
        assert worker.hub.refusing


@in_virtual_time
async def test_who_waits_at_the_gate_is_turned_back_on_a_stop() -> None:
    worker = Worker()
    waiting, asking, new = (
        worker.has("waiting", WAITING),
        worker.has("asking", ASKING),
        worker.has("new", HANDSHAKE),
    )
    stopping = worker.loop.create_task(worker.stops())
    await asyncio.sleep(SOON_S)
    assert worker.hub.refusing
    assert waiting.was_turned_back
    assert (asking.state, new.state) == (ASKING, HANDSHAKE)
    asking.comes_in()
    await stopping


@in_virtual_time
async def test_who_waits_at_the_gate_has_patience_when_the_worker_retires() -> None:
    worker = Worker()
    first, second, third = (worker.has(f"c{n}", WAITING) for n in range(3))
    first.is_admitted()
    # The API decides in turn, but not in time on the third.
    worker.at(1.0, lambda: (second.is_admitted(), first.comes_in()))
    worker.at(2.0, second.comes_in)
    busy = worker.has("busy", in_flight=True)
    finishing = worker.loop.create_task(worker.finishes(retiring=True))
    await asyncio.sleep(PATIENCE_S - SOON_S)
    assert not worker.hub.refusing
    assert [first.closed_with, second.closed_with] == [RESTART, RESTART]
    assert not third.was_turned_back
    await asyncio.sleep(2 * SOON_S)
    assert worker.hub.refusing
    assert third.was_turned_back
    busy.in_flight = False
    busy.state = CLOSED
    await finishing


@in_virtual_time
async def test_message_under_way_has_its_time() -> None:
    worker = Worker()
    client = worker.has(in_flight=True)
    worker.at(PATIENCE_S - 1, client.is_answered)
    lost, took_s = await worker.stops()
    assert client.told == [AWAY]
    assert client.closed_with == AWAY
    assert (lost, client.state) == (0, CLOSED)
    assert took_s <= PATIENCE_S - 1 + SOON_S


@in_virtual_time
async def test_client_is_closed_when_the_api_takes_too_long() -> None:
    worker = Worker()
    client = worker.has(in_flight=True)
    stopping = worker.loop.create_task(worker.stops())
    await asyncio.sleep(PATIENCE_S - SOON_S)
    assert client.closed_with is None
    await asyncio.sleep(2 * SOON_S)
    assert client.closed_with == AWAY
    assert not stopping.done(), "the API must hear of it yet"
    client.in_flight = False
    client.state = CLOSED
    await stopping


@in_virtual_time
async def test_api_has_time_to_hear_of_every_end() -> None:
    worker = Worker()
    clients = [worker.has(f"c{number}", api_hears=False) for number in range(10)]
    for number, client in enumerate(clients):
        worker.at(2.0 * (number + 1), client.is_heard_of)
    lost, took_s = await worker.stops()
    assert lost == 0
    assert 20.0 <= took_s <= 20.0 + SOON_S
    assert worker.steps == LAST_STEPS


@pytest.mark.parametrize("state", [ASKING, CLAIMING, CLOSING, REPORTING])
@in_virtual_time
async def test_what_the_api_does_not_hear_is_left_to_others(state: int) -> None:
    worker = Worker()
    worker.has(state=state)
    worker.outbox.left = 1
    with structlog.testing.capture_logs() as logs:
        lost, took_s = await worker.stops()
    assert lost == 0
    # Redis, the sockets and the connections to Redis have their time after it.
    deadline_s = TOTAL_S - 3 * worker.drain.closing_s
    assert deadline_s <= took_s <= deadline_s + POLL_S
    assert worker.steps == LAST_STEPS
    assert [(entry["log_level"], entry["count"]) for entry in logs] == [("warning", 1)]


@pytest.mark.parametrize("state", [HANDSHAKE, CLOSED])
@in_virtual_time
async def test_who_is_nothing_to_the_api_is_not_waited_for(state: int) -> None:
    worker = Worker()
    worker.has(state=state)
    lost, took_s = await worker.stops()
    assert (lost, took_s) == (0, 0)
    assert worker.steps == LAST_STEPS


ERRORS = [RedisUnavailable("away"), hiredis.ReplyError("OOM"), hiredis.ProtocolError("what?")]


@pytest.mark.parametrize("error", ERRORS)
@in_virtual_time
async def test_ends_that_nobody_will_tell_are_counted(error: Exception) -> None:
    worker = Worker()
    for number in range(3):
        worker.has(f"c{number}", api_hears=False)
    worker.outbox.error = error
    lost, _ = await worker.stops()
    assert lost == 3


@pytest.mark.parametrize("error", ERRORS)
@in_virtual_time
async def test_ends_that_outlast_the_upstream_are_counted(error: Exception) -> None:
    worker = Worker()
    worker.settles_on_close = False
    for number, state in enumerate((ASKING, CLAIMING, CLOSING, REPORTING, CLOSED, HANDSHAKE)):
        worker.has(f"c{number}", state)
    worker.outbox.error = error
    lost, _ = await worker.stops()
    assert lost == 4


@in_virtual_time
async def test_ends_that_redis_has_not_confirmed_are_counted() -> None:
    worker = Worker()
    worker.outbox.error = RedisUnavailable("away")
    worker.outbox.unconfirmed = 2  # parked, so that the clients have done with it
    lost, _ = await worker.stops()
    assert lost == 2


@in_virtual_time
async def test_no_end_is_lost_when_the_api_has_heard_and_redis_is_away() -> None:
    worker = Worker()
    worker.has_many(3)
    worker.outbox.error = RedisUnavailable("away")
    assert await worker.stops() == (0, 0)


@pytest.mark.parametrize("total_s", [1.0, 2.0, 4.0, 5.0, 10.0, TOTAL_S])
@in_virtual_time
async def test_redis_that_hangs_takes_no_more_than_the_time_there_is(total_s: float) -> None:
    worker = Worker(total_s=total_s)
    worker.has("quiet", api_hears=False)
    worker.has("busy", in_flight=True)
    worker.outbox.hangs = True
    _, took_s = await worker.stops()
    rest_s = total_s - took_s
    assert rest_s >= 2 * worker.drain.closing_s - POLL_S, "the sockets and links need it"
    assert rest_s > worker.drain.closing_s


@pytest.mark.parametrize("unconfirmed", [0, 2])
@in_virtual_time
async def test_slow_redis_loses_only_what_it_has_not_confirmed(unconfirmed: int) -> None:
    """What stands there is found when the lease is over."""
    worker = Worker()
    worker.settles_on_close = False
    worker.has(api_hears=False)
    worker.outbox.hangs = True
    worker.outbox.unconfirmed = unconfirmed
    lost, _ = await worker.stops()
    assert lost == unconfirmed


@in_virtual_time
async def test_handing_over_much_has_its_time() -> None:
    worker = Worker()
    worker.outbox.left = 50_000
    worker.outbox.takes_s = worker.drain.closing_s - SOON_S
    with structlog.testing.capture_logs() as logs:
        lost, _ = await worker.stops()
    assert lost == 0
    assert [entry["count"] for entry in logs] == [50_000], "it was not cut short"


# Hurry.


@in_virtual_time
async def test_one_stop_leaves_its_time_to_the_api() -> None:
    worker = Worker()
    client = worker.has(api_hears=False)
    worker.at(10.0, client.is_heard_of)
    _, took_s = await worker.stops()
    assert took_s >= 10.0


@pytest.mark.parametrize("phase", ["answers", "reports"])
@in_virtual_time
async def test_second_stop_ends_all_waiting(phase: str) -> None:
    worker = Worker()
    client = worker.has(in_flight=phase == "answers", api_hears=False)
    worker.at(1.0, worker.drain.stop)
    lost, took_s = await worker.stops()
    assert took_s <= 1.0 + SOON_S
    assert client.closed_with == AWAY
    assert lost == 0
    assert worker.steps == LAST_STEPS, "none of it is left out"


@in_virtual_time
async def test_two_stops_while_retiring_end_all_waiting() -> None:
    worker = Worker()
    told, untold = worker.has("told", in_flight=True), worker.has("untold", api_hears=False)
    worker.at(DRAIN_S - 1, worker.drain.stop)
    worker.at(DRAIN_S - 0.5, worker.drain.stop)
    await worker.retires()
    await worker.finishes(retiring=True)
    assert worker.now <= DRAIN_S - 0.5 + SOON_S
    assert told.closed_with == AWAY
    assert untold.closed_with in (AWAY, RESTART)


@in_virtual_time
async def test_stop_does_not_hang_on_redis_either() -> None:
    worker = Worker()
    worker.has(api_hears=False)
    worker.outbox.hangs = True
    worker.drain.stop()
    _, took_s = await worker.stops()
    assert took_s <= worker.drain.closing_s + SOON_S
