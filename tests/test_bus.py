"""Ask other workers over a real Valkey server, and take their answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, cast

import pytest
import structlog
from harness.looping import Clock, holds, in_loop
from harness.valkey import ValkeyProcess
from harness.waiting import until
from redis import Redis
from redis.exceptions import RedisError
from ws2api.gateway import bus as bus_module
from ws2api.gateway import counters as c
from ws2api.gateway import outcomes
from ws2api.gateway.ask import Ask
from ws2api.gateway.bus import Bus, RemoteAsk
from ws2api.gateway.counters import Counters
from ws2api.gateway.envelope import (
    CLOSE,
    CONFIRM,
    DESCRIBE,
    PUSH,
    REPLACED,
    Envelope,
    encode,
)
from ws2api.gateway.frames import BINARY, TEXT
from ws2api.gateway.redis_link import RedisLink
from ws2api.gateway.redis_time import RedisTime
from ws2api.gateway.sweeper import Sweeper

DEADLINE_S = 20.0
TIMEOUT_S = 5.0
DOUBT_S = 5.0
TICK_S = 0.1
BATCH = 500
PREFIX = "test:"
A_MINUTE_MS = 60_000

Outcome = tuple[int, bytes]
OK: Outcome = (outcomes.OK, b"")
NOT_FOUND: Outcome = (outcomes.NOT_FOUND, b"")
UNAVAILABLE: Outcome = (outcomes.UNAVAILABLE, b"")
TIMEOUT: Outcome = (outcomes.TIMEOUT, b"")


class Server:
    """Be a Valkey server, and enter clients there."""

    def __init__(self, process: ValkeyProcess) -> None:
        self.process = process
        self.redis = Redis.from_url(process.url)
        until(self._answers, what="Valkey answers")
        self.pid: int = self.redis.info("server")["process_id"]

    def _answers(self) -> bool:
        with contextlib.suppress(RedisError):
            return bool(self.redis.ping())
        return False

    def has_open(self, client_id: str, worker: str, generation: int = 17) -> None:
        self.redis.set(f"{PREFIX}c:{client_id}", f"{worker} {generation}")

    def has_connecting(self, client_id: str, worker: str, generation: int = 18) -> None:
        self.redis.set(f"{PREFIX}p:{client_id}", f"{worker} {generation}")

    def now_ms(self) -> int:
        seconds, microseconds = cast("tuple[int, int]", self.redis.time())
        return seconds * 1000 + microseconds // 1000

    def freeze(self) -> None:
        """Stop the process: its sockets stay open, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def publish(self, worker: str, message: bytes) -> None:
        assert self.redis.publish(f"{PREFIX}w:{worker}", message) == 1

    def published(self) -> int:
        """Count the messages that were published so far."""
        return int(self.redis.info("commandstats").get("cmdstat_publish", {}).get("calls", 0))


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with ValkeyProcess(tmp_path_factory.mktemp("valkey")) as process:
        server = Server(process)
        yield server
        server.redis.close()


@pytest.fixture
def server(shared_server: Server) -> Server:
    """Use the shared server, empty."""
    shared_server.redis.flushall()
    return shared_server


@pytest.fixture
def frozen(server: Server) -> Iterator[Server]:
    """Use a server that the test may freeze."""
    yield server
    server.thaw()


class PushAsk(Ask):
    """Be an ask of this worker's push port, and note its outcome."""

    def __init__(self, client_id: str = "me", payload: bytes = b"hi", **fields: Any) -> None:
        super().__init__(client_id=client_id.encode(), payload=payload, **fields)
        self.outcomes: list[Outcome] = []

    def finish(self, outcome: int, body: bytes) -> None:
        self.outcomes.append((outcome, body))

    async def ends(self) -> Outcome:
        await holds(lambda: self.outcomes)
        (outcome,) = self.outcomes
        return outcome


class Worker:
    """Hold the bus of one worker, with what arrives there."""

    def __init__(self, url: str, name: str) -> None:
        loop = asyncio.get_running_loop()
        self.name = name
        self.clock = Clock()
        self.slot = Counters(1).bank(0, 0)
        self.redis_time = RedisTime()
        self.asks: list[RemoteAsk] = []
        self.replaced: list[tuple[str, int]] = []
        self.on_ask: Callable[[RemoteAsk], None] = self.asks.append
        sweeper = Sweeper(cast(Any, self.clock))
        self.link = RedisLink(
            url, name, loop, sweeper, _nothing, _nothing, scripts=bus_module.SCRIPTS
        )
        self.bus = Bus(
            self.link,
            PREFIX,
            name,
            self.slot,
            sweeper,
            self.redis_time,
            loop.call_soon,
            TIMEOUT_S,
            lambda ask: self.on_ask(ask),
            lambda client_id, generation: self.replaced.append((client_id.decode(), generation)),
            lambda probe: None,
            self._on_forgotten,
        )
        self.times_forgotten = 0
        self.subscription = RedisLink(
            url, name, loop, sweeper, self._subscribe, _nothing, self.bus.on_message
        )
        sweeper.start()

    def _on_forgotten(self) -> None:
        self.times_forgotten += 1

    def _subscribe(self) -> None:
        self.subscription.send(self._on_subscribed, "SUBSCRIBE", self.bus.channel)

    def _on_subscribed(self, reply: object) -> None:
        self.bus.open(returned=False)

    async def start(self) -> None:
        self.link.start()
        self.subscription.start()
        await holds(lambda: self.link.is_up and self.bus.is_open)

    async def stop(self) -> None:
        await self.link.stop()
        await self.subscription.stop()

    def forwards(self, ask: PushAsk) -> PushAsk:
        self.bus.forward(ask)
        return ask

    async def is_asked(self, count: int = 1) -> list[RemoteAsk]:
        await holds(lambda: len(self.asks) >= count)
        return self.asks

    async def loses_its_link(self) -> None:
        """Let what was sent be written, and lose the connection for commands."""
        for _ in range(3):
            await asyncio.sleep(0)
        self.link.reset()
        await holds(lambda: not self.link.is_up)

    async def settles(self) -> None:
        """Wait until all that was sent is answered, and all that is meant for it has come."""
        await self.link.ask("PING")
        done: list[object] = []
        self.subscription.send(done.append, "PING")
        await holds(lambda: done)


def _nothing() -> None:
    """Be told nothing of note."""


@contextlib.asynccontextmanager
async def workers(server: Server, *names: str) -> AsyncIterator[list[Worker]]:
    all_workers = [Worker(server.process.url, name) for name in names]
    try:
        for worker in all_workers:
            server.redis.zadd(f"{PREFIX}leases", {worker.name: 1})
            await worker.start()
        yield all_workers
        for worker in all_workers:
            assert worker.bus.unconfirmed == 0
    finally:
        for worker in all_workers:
            await worker.stop()


# From worker to worker.


@in_loop
async def test_ask_reaches_the_owner_and_its_outcome_comes_back(server: Server) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        ask = a.forwards(PushAsk())
        assert a.bus.unconfirmed == 1
        (arrived,) = await b.is_asked()
        assert ask.outcomes == []
        arrived.finish(outcomes.TOO_SLOW, b"because")
        assert await ask.ends() == (outcomes.TOO_SLOW, b"because")
        assert (a.slot[c.PUSHES_FORWARDED], b.slot[c.PUSHES_FORWARDED]) == (1, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": PUSH, "code": TEXT, "payload": "grün".encode()},
        {"kind": PUSH, "code": BINARY, "payload": bytes(range(256)) * 4000, "generation": 1 << 52},
        {"kind": DESCRIBE, "payload": b""},
        {"kind": CLOSE, "code": 4999, "payload": b"bye", "hops": 2},
    ],
)
@in_loop
async def test_ask_arrives_as_it_was_sent(server: Server, fields: dict[str, Any]) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        ask = a.forwards(PushAsk(**fields))
        (arrived,) = await b.is_asked()
        for name in ("kind", "client_id", "generation", "code", "payload", "hops", "waited"):
            assert getattr(arrived, name) == getattr(ask, name)
        assert arrived.source == b"a"
        arrived.finish(*OK)
        assert await ask.ends() == OK


@in_loop
async def test_worker_may_ask_itself(server: Server) -> None:
    server.has_open("me", "a")
    async with workers(server, "a") as (a,):
        ask = a.forwards(PushAsk())
        (await a.is_asked())[0].finish(*OK)
        assert await ask.ends() == OK


@in_loop
async def test_outcomes_find_their_asks_in_any_order(server: Server) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        asks = [a.forwards(PushAsk(payload=b"%d" % number)) for number in range(50)]
        arrived = await b.is_asked(50)
        assert [ask.payload for ask in arrived] == [ask.payload for ask in asks]
        for ask in reversed(arrived):
            ask.finish(outcomes.OK, b"re " + ask.payload)
        for ask in asks:
            assert await ask.ends() == (outcomes.OK, b"re " + ask.payload)


@in_loop
async def test_large_asks_travel_apart(server: Server) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        b.on_ask = lambda ask: ask.finish(outcomes.OK, ask.payload[:1])
        calls: list[int] = []
        call = a.link.call
        a.link.call = lambda *args: (calls.append(len(args) // 3), call(*args))[1]  # type: ignore[method-assign]
        asks = [a.forwards(PushAsk(payload=b"%d" % n * (3 << 20))) for n in range(4)]
        assert [await ask.ends() for ask in asks] == [(outcomes.OK, b"%d" % n) for n in range(4)]
        assert len(calls) == 4


@in_loop
async def test_payloads_under_way_are_bounded(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_module, "_MAX_ASKED_BYTES", 1000)
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        asks = [a.forwards(PushAsk(payload=b"x" * 600)) for _ in range(3)]
        assert await asks[2].ends() == UNAVAILABLE
        for arrived in await b.is_asked(2):
            arrived.finish(*OK)
        assert [await ask.ends() for ask in asks[:2]] == [OK, OK]
        again = a.forwards(PushAsk(payload=b"x" * 600))
        (await b.is_asked(3))[2].finish(*OK)
        assert await again.ends() == OK


# Nobody there.


@in_loop
async def test_client_that_nobody_has_is_not_found(server: Server) -> None:
    async with workers(server, "a") as (a,):
        assert await a.forwards(PushAsk()).ends() == NOT_FOUND


@in_loop
async def test_client_that_nobody_has_may_be_one_that_is_not_entered_again_yet(
    server: Server,
) -> None:
    async with workers(server, "a") as (a,):
        a.bus.close()
        a.bus.open(returned=True)
        a.clock.advance(DOUBT_S - 2 * TICK_S)
        assert await a.forwards(PushAsk()).ends() == UNAVAILABLE
        a.clock.advance(4 * TICK_S)
        assert await a.forwards(PushAsk()).ends() == NOT_FOUND


@in_loop
async def test_owner_that_does_not_listen_is_out_of_reach(server: Server) -> None:
    server.has_open("me", "dead")
    async with workers(server, "a") as (a,):
        assert await a.forwards(PushAsk()).ends() == UNAVAILABLE


@in_loop
async def test_owner_that_does_not_confirm_is_not_waited_for(server: Server) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        early = a.forwards(PushAsk())
        await b.is_asked()
        a.clock.advance(TIMEOUT_S - 1)
        late = a.forwards(PushAsk())
        await b.is_asked(2)
        a.clock.advance(1 + 2 * TICK_S)
        assert (early.outcomes, late.outcomes) == ([TIMEOUT], [])
        a.clock.advance(TIMEOUT_S)
        assert late.outcomes == [TIMEOUT]
        for arrived in b.asks:
            arrived.finish(*OK)
        await b.settles()
        await a.settles()
        assert early.outcomes == late.outcomes == [TIMEOUT]


@in_loop
async def test_confirmed_ask_has_no_deadline(server: Server) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        ask = a.forwards(PushAsk())
        (await b.is_asked())[0].finish(*OK)
        assert await ask.ends() == OK
        a.clock.advance(2 * TIMEOUT_S)
        assert ask.outcomes == [OK]


@in_loop
async def test_closed_bus_takes_nothing(server: Server) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        a.bus.close()
        assert a.forwards(PushAsk()).outcomes == [UNAVAILABLE]
        a.bus.open(returned=True)
        ask = a.forwards(PushAsk())
        (await b.is_asked())[0].finish(*OK)
        assert await ask.ends() == OK


@in_loop
async def test_closing_leaves_what_is_under_way_its_time(server: Server) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        ask = a.forwards(PushAsk())
        arrived = await b.is_asked()
        a.bus.close()
        assert ask.outcomes == []
        arrived[0].finish(*OK)
        assert await ask.ends() == OK


@in_loop
async def test_ask_that_redis_does_not_take_is_out_of_reach(tmp_path: Any) -> None:
    with ValkeyProcess(tmp_path) as process:
        server = Server(process)
        server.redis.close()
        async with workers(server, "a") as (a,):
            process.stop()
            await holds(lambda: not a.link.is_up)
            assert await a.forwards(PushAsk()).ends() == UNAVAILABLE


@in_loop
async def test_no_more_asks_are_under_way_than_allowed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_module, "_MAX_ASKS", 3)
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        asks = [a.forwards(PushAsk()) for _ in range(4)]
        assert [ask.outcomes for ask in asks] == [[], [], [], [UNAVAILABLE]]
        for arrived in await b.is_asked(3):
            arrived.finish(*OK)
        assert [await ask.ends() for ask in asks[:3]] == [OK] * 3
        ask = a.forwards(PushAsk())
        (await b.is_asked(4))[3].finish(*OK)
        assert await ask.ends() == OK


# Clients of whom it is not known that they are gone.


@in_loop
async def test_client_of_a_worker_that_may_come_back_is_out_of_reach(server: Server) -> None:
    server.redis.set(f"{PREFIX}g:me", "b 17")
    async with workers(server, "a") as (a,):
        me, other = a.forwards(PushAsk("me")), a.forwards(PushAsk("other"))
        assert await me.ends() == UNAVAILABLE
        assert await other.ends() == NOT_FOUND
        assert a.times_forgotten == 0


@in_loop
async def test_client_that_has_come_back_elsewhere_is_found(server: Server) -> None:
    server.redis.set(f"{PREFIX}g:me", "b 17")
    server.has_open("me", "a", 18)
    async with workers(server, "a", "c") as (a, c_):
        ask = c_.forwards(PushAsk("me"))
        (await a.is_asked())[0].finish(*OK)
        assert await ask.ends() == OK


@in_loop
async def test_nobody_is_known_to_a_redis_that_has_lost_its_data(server: Server) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        server.redis.flushall()
        asks = [a.forwards(PushAsk("me")), a.forwards(PushAsk("other"))]
        assert [await ask.ends() for ask in asks] == [UNAVAILABLE] * 2
        assert (a.times_forgotten, b.times_forgotten) == (1, 0)


# What nobody knows, and what is too late.


@in_loop
async def test_ask_that_was_lost_on_its_way_may_have_arrived(frozen: Server) -> None:
    frozen.has_open("me", "b")
    async with workers(frozen, "a", "b") as (a, b):
        frozen.freeze()
        ask = a.forwards(PushAsk())
        await a.loses_its_link()
        assert ask.outcomes == []
        a.clock.advance(TIMEOUT_S + 2 * TICK_S)
        assert ask.outcomes == [TIMEOUT]
        frozen.thaw()
        (arrived,) = await b.is_asked()
        arrived.finish(*OK)


@in_loop
async def test_ask_that_was_lost_on_its_way_may_be_confirmed(frozen: Server) -> None:
    frozen.has_open("me", "b")
    async with workers(frozen, "a", "b") as (a, b):
        frozen.freeze()
        ask = a.forwards(PushAsk())
        await a.loses_its_link()
        frozen.thaw()
        (await b.is_asked())[0].finish(*OK)
        assert await ask.ends() == OK


@in_loop
async def test_ask_that_was_never_written_does_not_arrive(server: Server) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        a.link.reset()
        ask = a.forwards(PushAsk())
        assert await ask.ends() == UNAVAILABLE
        await holds(lambda: a.link.is_up)
        await a.settles()
        assert b.asks == []


@in_loop
async def test_ask_that_redis_refuses_does_not_arrive(server: Server) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        server.redis.script_flush()
        ask = a.forwards(PushAsk())
        with structlog.testing.capture_logs():
            assert await ask.ends() == UNAVAILABLE
        assert b.asks == []


@in_loop
async def test_ask_that_redis_gets_after_its_time_does_not_arrive(frozen: Server) -> None:
    frozen.has_open("me", "b")
    async with workers(frozen, "a", "b") as (a, b):
        a.redis_time.learn(frozen.now_ms() - A_MINUTE_MS, time.monotonic())
        frozen.freeze()
        ask = a.forwards(PushAsk())
        await a.loses_its_link()
        a.clock.advance(TIMEOUT_S + 2 * TICK_S)
        assert ask.outcomes == [TIMEOUT]
        frozen.thaw()
        await holds(lambda: a.link.is_up)
        await a.settles()
        await b.settles()
        assert b.asks == []


@in_loop
async def test_ask_that_was_too_late_by_a_wrong_clock_is_sent_again(server: Server) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        a.redis_time.learn(server.now_ms() - A_MINUTE_MS, time.monotonic())
        ask = a.forwards(PushAsk())
        (await b.is_asked())[0].finish(*OK)
        assert await ask.ends() == OK
        assert len(b.asks) == 1


@in_loop
async def test_ask_of_another_worker_that_is_too_late_does_not_arrive(server: Server) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b", "c") as (a, b, c_):
        ask = a.forwards(PushAsk())
        (arrived,) = await b.is_asked()
        server.has_open("me", "c")
        b.redis_time.learn(server.now_ms() - A_MINUTE_MS, time.monotonic())
        b.bus.forward(arrived)
        assert await ask.ends() == UNAVAILABLE
        assert c_.asks == []


# Confirmations that nobody has heard.


@in_loop
async def test_outcome_is_confirmed_when_the_owner_has_redis_back(server: Server) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        ask = a.forwards(PushAsk())
        (arrived,) = await b.is_asked()
        b.link.reset()
        await holds(lambda: not b.link.is_up)
        arrived.finish(*OK)
        await asyncio.sleep(0)
        b.clock.advance(TICK_S)
        await holds(lambda: b.link.is_up)
        b.clock.advance(TICK_S)
        assert await ask.ends() == OK


@in_loop
async def test_outcome_is_confirmed_that_was_lost_on_its_way(frozen: Server) -> None:
    frozen.has_open("me", "b")
    async with workers(frozen, "a", "b") as (a, b):
        ask = a.forwards(PushAsk())
        (arrived,) = await b.is_asked()
        arrived.finish(*OK)
        b.link.reset()  # before it is written
        await holds(lambda: not b.link.is_up)
        await holds(lambda: b.link.is_up)
        b.clock.advance(TICK_S)
        assert await ask.ends() == OK


@in_loop
async def test_outcome_is_confirmed_when_the_asker_listens_again(server: Server) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        ask = a.forwards(PushAsk())
        (arrived,) = await b.is_asked()
        await a.subscription.ask("UNSUBSCRIBE", a.bus.channel)
        arrived.finish(*OK)
        await b.settles()
        assert ask.outcomes == []
        await a.subscription.ask("SUBSCRIBE", a.bus.channel)
        b.clock.advance(TICK_S)
        assert await ask.ends() == OK


@pytest.mark.parametrize("has_link", [True, False])
@in_loop
async def test_outcome_that_nobody_waits_for_is_not_confirmed(
    server: Server, has_link: bool
) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        ask = a.forwards(PushAsk())
        (arrived,) = await b.is_asked()
        await a.subscription.ask("UNSUBSCRIBE", a.bus.channel)
        arrived.finish(*OK)
        await b.settles()
        if not has_link:
            b.link.reset()
            await holds(lambda: not b.link.is_up)
        b.clock.stall(TIMEOUT_S + TICK_S)
        assert not b.bus._unheard
        a.clock.advance(TIMEOUT_S + 2 * TICK_S)
        assert ask.outcomes == [TIMEOUT]


@in_loop
async def test_what_is_kept_to_be_confirmed_is_bounded(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_module, "_MAX_UNHEARD_BYTES", 1000)
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        asks = [a.forwards(PushAsk()) for _ in range(2)]
        arrived = await b.is_asked(2)
        b.link.reset()
        await holds(lambda: not b.link.is_up)
        for ask in arrived:
            ask.finish(outcomes.OK, b"x" * 600)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await holds(lambda: b.link.is_up)
        b.clock.advance(TICK_S)
        assert (await asks[0].ends())[0] == outcomes.OK
        a.clock.advance(TIMEOUT_S + 2 * TICK_S)
        assert asks[1].outcomes == [TIMEOUT]


# Where it is looked for.


@in_loop
async def test_connect_that_is_being_decided_goes_before_the_open_connection(
    server: Server,
) -> None:
    server.has_open("me", "b")
    server.has_connecting("me", "c")
    async with workers(server, "a", "b", "c") as (a, b, c_):
        ask = a.forwards(PushAsk())
        (await c_.is_asked())[0].finish(*OK)
        assert await ask.ends() == OK
        assert b.asks == []


@in_loop
async def test_ask_that_has_waited_goes_to_the_open_connection(server: Server) -> None:
    server.has_open("me", "b")
    server.has_connecting("me", "c")
    async with workers(server, "a", "b", "c") as (a, b, c_):
        ask = a.forwards(PushAsk(waited=True))
        (arrived,) = await b.is_asked()
        assert arrived.waited
        arrived.finish(*OK)
        assert await ask.ends() == OK
        assert c_.asks == []


@in_loop
async def test_ask_that_has_waited_for_a_connect_alone_is_not_found(server: Server) -> None:
    server.has_connecting("me", "b")
    async with workers(server, "a", "b") as (a, _):
        assert await a.forwards(PushAsk(waited=True)).ends() == NOT_FOUND


@pytest.mark.parametrize(
    ("owner", "outcome"), [("b", OK), ("dead", UNAVAILABLE), (None, NOT_FOUND)]
)
@in_loop
async def test_mark_of_a_worker_that_is_gone_is_passed_over(
    server: Server, owner: str | None, outcome: Outcome
) -> None:
    server.has_connecting("me", "dead")
    if owner is not None:
        server.has_open("me", owner)
    async with workers(server, "a", "b") as (a, b):
        b.on_ask = lambda ask: ask.finish(*OK)
        asks = [a.forwards(PushAsk()) for _ in range(3)]
        assert [await ask.ends() for ask in asks] == [outcome] * 3
        assert not server.redis.exists(f"{PREFIX}p:me")


@pytest.mark.parametrize(("owner", "outcome"), [("b", OK), (None, UNAVAILABLE)])
@in_loop
async def test_mark_of_a_worker_that_lives_but_does_not_listen_stays(
    server: Server, owner: str | None, outcome: Outcome
) -> None:
    """As one whose connection for commands is away."""
    server.has_connecting("me", "c")
    if owner is not None:
        server.has_open("me", owner)
    async with workers(server, "a", "b", "c") as (a, b, c_):
        b.on_ask = lambda ask: ask.finish(*OK)
        await c_.subscription.ask("UNSUBSCRIBE", c_.bus.channel)
        assert await a.forwards(PushAsk()).ends() == outcome
        await c_.subscription.ask("SUBSCRIBE", c_.bus.channel)
        ask = a.forwards(PushAsk())
        (await c_.is_asked())[0].finish(*OK)
        assert await ask.ends() == OK


# Passed on because the client has moved.


@in_loop
async def test_ask_is_passed_on_and_confirmed_to_who_asked_first(server: Server) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b", "c") as (a, b, c_):
        ask = a.forwards(PushAsk())
        (arrived,) = await b.is_asked()
        server.has_open("me", "c")
        arrived.hops += 1
        b.bus.forward(arrived)
        assert b.bus.unconfirmed == 0
        (moved,) = await c_.is_asked()
        assert (moved.source, moved.hops) == (b"a", 1)
        moved.finish(*OK)
        assert await ask.ends() == OK
        assert b.slot[c.PUSHES_FORWARDED] == 0


@pytest.mark.parametrize(("owner", "outcome"), [(None, NOT_FOUND), ("dead", UNAVAILABLE)])
@in_loop
async def test_ask_that_is_passed_on_to_nobody(
    server: Server, owner: str | None, outcome: Outcome
) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        ask = a.forwards(PushAsk())
        (arrived,) = await b.is_asked()
        if owner is None:
            server.redis.delete(f"{PREFIX}c:me")
        else:
            server.has_open("me", owner)
        b.bus.forward(arrived)
        assert await ask.ends() == outcome


@in_loop
async def test_ask_that_a_closed_bus_would_pass_on_is_confirmed(server: Server) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        ask = a.forwards(PushAsk())
        (arrived,) = await b.is_asked()
        b.bus.close()
        b.bus.forward(arrived)
        assert await ask.ends() == UNAVAILABLE


# Batches.


@in_loop
async def test_all_of_one_tick_travels_together(server: Server) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        before = server.published()
        asks = [a.forwards(PushAsk()) for _ in range(BATCH)]
        for arrived in await b.is_asked(BATCH):
            arrived.finish(*OK)
        assert [await ask.ends() for ask in asks] == [OK] * BATCH
        assert server.published() - before == 2, "one there, one back"


@in_loop
async def test_more_than_a_batch_in_one_tick(server: Server) -> None:
    count = 2 * BATCH + 1
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        before = server.published()
        asks = [a.forwards(PushAsk(payload=b"%d" % number)) for number in range(count)]
        arrived = await b.is_asked(count)
        assert [ask.payload for ask in arrived] == [b"%d" % number for number in range(count)]
        assert server.published() - before == 3
        for ask in arrived:
            ask.finish(outcomes.OK, ask.payload)
        assert [await ask.ends() for ask in asks] == [(outcomes.OK, ask.payload) for ask in asks]


@in_loop
async def test_batch_for_many_owners(server: Server) -> None:
    server.has_open("here", "b")
    server.has_open("there", "c")
    server.has_open("nowhere", "dead")
    async with workers(server, "a", "b", "c") as (a, b, c_):
        for worker in (b, c_):
            worker.on_ask = lambda ask, name=worker.name: ask.finish(outcomes.OK, name.encode())
        expected = {
            "here": (outcomes.OK, b"b"),
            "there": (outcomes.OK, b"c"),
            "nowhere": UNAVAILABLE,
            "unknown": NOT_FOUND,
        }
        asks = [a.forwards(PushAsk(client_id)) for client_id in [*expected] * 20]
        for ask in asks:
            assert await ask.ends() == expected[ask.client_id.decode()]


@in_loop
async def test_asks_and_confirmations_cross(server: Server) -> None:
    server.has_open("at a", "a")
    server.has_open("at b", "b")
    async with workers(server, "a", "b") as (a, b):
        for worker in (a, b):
            worker.on_ask = lambda ask: ask.finish(outcomes.OK, ask.payload)
        asks = [
            worker.forwards(PushAsk(client_id, b"%d" % number))
            for number in range(200)
            for worker, client_id in ((a, "at b"), (b, "at a"))
        ]
        for ask in asks:
            assert await ask.ends() == (outcomes.OK, ask.payload)


@in_loop
async def test_numbers_of_asks_begin_again(server: Server) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        b.on_ask = lambda ask: ask.finish(outcomes.OK, b"%d" % ask.number)
        a.bus._number = (1 << 32) - 2
        asks = [a.forwards(PushAsk()) for _ in range(2)]
        assert [(await ask.ends())[1] for ask in asks] == [b"4294967295", b"1"]


# Other messages.


@in_loop
async def test_notice_of_a_replacement(server: Server) -> None:
    async with workers(server, "a") as (a,):
        head = encode(Envelope(REPLACED, 0, b"", b"me", 0, 0, b""))
        server.publish("a", head + b"1700000000000000")
        await holds(lambda: a.replaced)
        assert a.replaced == [("me", 1_700_000_000_000_000)]


@in_loop
async def test_confirmation_of_an_unknown_ask_is_ignored(server: Server) -> None:
    async with workers(server, "a") as (a,):
        with structlog.testing.capture_logs() as logs:
            server.publish("a", encode(Envelope(CONFIRM, 99, b"", b"", 0, outcomes.OK, b"")))
            await a.settles()
        assert logs == []


@in_loop
async def test_outcome_that_this_version_does_not_know(server: Server) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        ask = a.forwards(PushAsk())
        (await b.is_asked())[0].finish(999, b"")
        assert await ask.ends() == TIMEOUT, "it may have arrived"


@pytest.mark.parametrize(
    "malformed",
    [
        b"x",
        b"\xff" * 100,
        encode(Envelope(PUSH, 1, b"b", b"me", 0, TEXT, b"cut off"))[:-1],
        encode(Envelope(REPLACED, 0, b"", b"me", 0, 0, b"")) + b"no number",
        encode(Envelope(REPLACED, 0, b"", b"me", 0, 0, b"")),
    ],
)
@in_loop
async def test_malformed_message_is_only_logged(server: Server, malformed: bytes) -> None:
    server.has_open("me", "b")
    async with workers(server, "a", "b") as (a, b):
        with structlog.testing.capture_logs() as logs:
            good = encode(Envelope(PUSH, 7, b"nobody", b"me", 0, TEXT, b"before"))
            server.publish("b", good + malformed)
            server.publish("b", malformed)
            await b.settles()
        assert [log["event"] for log in logs] == ["malformed message on the bus"] * 2
        assert [ask.payload for ask in b.asks] == [b"before"]
        ask = a.forwards(PushAsk())
        (await b.is_asked(2))[1].finish(*OK)
        assert await ask.ends() == OK
