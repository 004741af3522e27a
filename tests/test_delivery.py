"""Deliver from a real Valkey to an API that is a function, and count."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import uvloop
from harness.disconnect_store import BORN, Store
from harness.valkey import ValkeyProcess
from harness.waiting import DEADLINE_S, POLL_S
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import RedisError
from ws2api.gateway import counters as c
from ws2api.supervisor import delivery as delivery_module
from ws2api.supervisor import disconnect_queue
from ws2api.supervisor.api_client import Outcome, Verdict
from ws2api.supervisor.delivery import MAX_AT_ONCE, Delivery, end_tasks
from ws2api.supervisor.disconnect_queue import Disconnect, DisconnectQueue

NEVER_S: Final = 3600.0
RATE: Final = 100_000

TAKEN: Final = Outcome(Verdict.TAKEN, "status 200")
REFUSED: Final = Outcome(Verdict.REFUSED, "status 500")
BROKEN: Final = Outcome(Verdict.BROKEN, "status 503")
LATE: Final = Outcome(Verdict.LATE, "no answer in time")
UNREACHABLE: Final = Outcome(Verdict.UNREACHABLE, "refused")

Answer = Callable[[Disconnect], Outcome]


class StubApi:
    """Answer as told, and note every attempt.

    Args:
        answer: says what comes of an attempt; may be exchanged at any time.
    """

    def __init__(self, answer: Answer = lambda disconnect: TAKEN) -> None:
        self.answer = answer
        self.attempts: list[tuple[float, str]] = []
        self.under_way = 0
        self.most_at_once = 0
        self.open = asyncio.Event()
        self.open.set()

    async def report(self, disconnect: Disconnect) -> Outcome:
        self.attempts.append((time.monotonic(), disconnect.client_id.decode()))
        self.under_way += 1
        self.most_at_once = max(self.most_at_once, self.under_way)
        try:
            await asyncio.sleep(0)
            await self.open.wait()
            return self.answer(disconnect)
        finally:
            self.under_way -= 1

    @property
    def counts(self) -> Counter[str]:
        return Counter(client_id for _, client_id in self.attempts)


class Setting:
    """Hold a delivery that runs, and everything around it."""

    def __init__(self, store: Store, api: StubApi, delivery: Delivery, figures: Any) -> None:
        self.store = store
        self.api = api
        self.delivery = delivery
        self.figures = figures

    @property
    def is_empty(self) -> bool:
        return self.store.redis.xlen(self.store.stream) == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    with ValkeyProcess(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def store(server: ValkeyProcess) -> Iterator[Store]:
    with Redis.from_url(server.url) as redis:
        redis.flushall()
        yield Store(redis)


@asynccontextmanager
async def delivering(
    store: Store,
    url: str,
    answer: Answer = lambda disconnect: TAKEN,
    *,
    instance: str = "one",
    rate: float = RATE,
    **options: Any,
) -> AsyncIterator[Setting]:
    redis = AsyncRedis.from_url(url, protocol=2)
    queue = DisconnectQueue(redis, "ws2api:", instance, 1, NEVER_S)
    figures = c.Counters(1).reaper
    api = StubApi(answer)
    delivery = Delivery(queue, api, rate, figures, **options)

    async def repeat(step: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            await step()
            await asyncio.sleep(0.001)

    tasks = [asyncio.create_task(repeat(step)) for step in (delivery.read, delivery.send)]
    try:
        yield Setting(store, api, delivery, figures)
        assert not [task for task in tasks if task.done()]
    finally:
        await end_tasks(tasks)
        await delivery.close()
        await redis.aclose()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a scenario on the loop of the real process, without asyncio's costly debugging."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop, debug=False) as runner:
        runner.run(scenario)


async def until(condition: Callable[[], object], what: str = "") -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what or condition
        await asyncio.sleep(POLL_S)


def fill(store: Store, count: int, name: str = "client") -> None:
    for number in range(count):
        store.park("w-1", (f"{name}-{number}", BORN + number, 1000, "bye"))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_module, "_FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(delivery_module, "_MAX_RETRY_S", 0.1)


def test_each_is_delivered_once(store: Store, server: ValkeyProcess) -> None:
    fill(store, 1000)

    async def scenario() -> None:
        async with delivering(store, server.url) as one:
            await until(lambda: one.is_empty)
            assert set(one.api.counts.values()) == {1}
            assert len(one.api.counts) == 1000
            assert one.figures[c.REAPER_DELIVERED] == 1000
            assert one.figures[c.REAPER_FAILURES] == 0
            await until(lambda: one.figures[c.DISCONNECTS_HELD] == 0)
            assert one.api.most_at_once <= MAX_AT_ONCE

    run(scenario())


def test_two_share_the_work(store: Store, server: ValkeyProcess) -> None:
    fill(store, 3000)

    async def scenario() -> None:
        async with (
            delivering(store, server.url, instance="one") as one,
            delivering(store, server.url, instance="two") as two,
        ):
            await until(lambda: one.is_empty)
            assert len(one.api.counts + two.api.counts) == 3000
            assert set((one.api.counts + two.api.counts).values()) == {1}
            assert one.api.counts
            assert two.api.counts

    run(scenario())


def test_what_a_gateway_held_that_is_gone_is_inherited(
    store: Store, server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, 100)
    for module in (delivery_module, disconnect_queue):
        monkeypatch.setattr(module, "SILENT_S", 0.1)
    monkeypatch.setattr(delivery_module, "_ADOPT_EVERY_S", 0.1)

    async def scenario() -> None:
        gone = AsyncRedis.from_url(server.url, protocol=2)
        queue = DisconnectQueue(gone, "ws2api:", "gone", 1, NEVER_S)
        await queue.open()
        await queue.read(40, 0)
        await gone.aclose()
        async with delivering(store, server.url) as one:
            await until(lambda: one.is_empty)
            assert set(one.api.counts.values()) == {1}
            assert len(one.api.counts) == 100

    run(scenario())


def test_nobody_inherits_from_one_that_only_has_no_room(
    store: Store, server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives a sign of life, although it reads nothing and its workers have no lease."""
    fill(store, 30)
    for module in (delivery_module, disconnect_queue):
        monkeypatch.setattr(module, "SILENT_S", 0.5)
    monkeypatch.setattr(delivery_module, "_ADOPT_EVERY_S", 0.1)
    monkeypatch.setattr(delivery_module, "_IDLE_S", 0.02)
    monkeypatch.setattr(delivery_module, "_READ_WAIT_S", 0.05)

    async def scenario() -> None:
        async with delivering(store, server.url, max_held=3) as one:
            one.api.open.clear()
            await until(lambda: one.api.under_way == 3)
            async with delivering(store, server.url, instance="two") as two:
                await until(lambda: store.redis.xlen(store.stream) == 3)
                inherit = count_calls(monkeypatch, DisconnectQueue, "inherit")
                await until(lambda: inherit() >= 20)
                assert two.figures[c.REAPER_DELIVERED] == 27
            one.api.open.set()
            await until(lambda: one.is_empty)
            assert one.figures[c.REAPER_DELIVERED] == 3

    run(scenario())


def test_clients_that_are_back_are_left_out(store: Store, server: ValkeyProcess) -> None:
    fill(store, 4)
    store.redis.set(store.key("c:client-1"), f"w-2 {BORN + 2}")
    store.redis.set(store.key("c:client-3"), f"w-2 {BORN}")

    async def scenario() -> None:
        async with delivering(store, server.url) as one:
            await until(lambda: one.is_empty)
            assert one.api.counts == {"client-0": 1, "client-2": 1, "client-3": 1}
            await until(lambda: one.figures[c.REAPER_SUPPRESSED] == 1)
            assert one.figures[c.REAPER_DELIVERED] == 3

    run(scenario())


def test_one_that_comes_back_between_two_attempts_is_left_out(
    store: Store, server: ValkeyProcess
) -> None:
    fill(store, 1)

    async def scenario() -> None:
        async with delivering(store, server.url, lambda _: REFUSED) as one:
            await until(lambda: one.api.attempts)
            store.redis.set(store.key("c:client-0"), f"w-2 {BORN + 1}")
            await until(lambda: one.figures[c.REAPER_SUPPRESSED] == 1)
            assert one.is_empty

    run(scenario())


@pytest.mark.parametrize("outcome", [REFUSED, LATE, BROKEN, UNREACHABLE])
def test_what_fails_is_tried_again(store: Store, server: ValkeyProcess, outcome: Outcome) -> None:
    fill(store, 20)
    failures = iter(range(6))  # few, because each while the API is away lengthens the pause

    def fail(disconnect: Disconnect) -> Outcome:
        return TAKEN if next(failures, None) is None else outcome

    async def scenario() -> None:
        async with delivering(store, server.url, fail) as one:
            await until(lambda: one.is_empty)
            assert sum(one.api.counts.values()) == 26
            assert one.figures[c.REAPER_FAILURES] == 6
            assert one.figures[c.REAPER_DELIVERED] == 20

    run(scenario())


def test_one_that_is_refused_for_ever_delays_nobody(store: Store, server: ValkeyProcess) -> None:
    fill(store, 5, "bad")
    fill(store, 500)

    def refuse_some(disconnect: Disconnect) -> Outcome:
        return REFUSED if disconnect.client_id.startswith(b"bad") else TAKEN

    async def scenario() -> None:
        async with delivering(store, server.url, refuse_some) as one:
            await until(lambda: store.redis.xlen(store.stream) == 5)
            assert one.figures[c.REAPER_DELIVERED] == 500

    run(scenario())


def test_those_that_are_refused_for_ever_leave_room_for_others(
    store: Store, server: ValkeyProcess
) -> None:
    fill(store, 50, "bad")
    fill(store, 30)

    def refuse_some(disconnect: Disconnect) -> Outcome:
        return REFUSED if disconnect.client_id.startswith(b"bad") else TAKEN

    async def scenario() -> None:
        async with delivering(store, server.url, refuse_some, max_held=8) as one:
            await until(lambda: one.figures[c.REAPER_DELIVERED] == 30)
            await until(lambda: store.redis.xlen(store.stream) == 50)
            assert one.figures[c.DISCONNECTS_HELD] <= 8
            assert {end[0].partition("-")[0] for end in store.owed} == {"bad"}

    run(scenario())


def test_holds_no_more_than_it_may(store: Store, server: ValkeyProcess) -> None:
    fill(store, 200)

    async def scenario() -> None:
        async with delivering(store, server.url, lambda _: UNREACHABLE, max_held=50) as one:
            await until(lambda: one.figures[c.DISCONNECTS_HELD] == 50)
            [consumer] = store.redis.xinfo_consumers(store.stream, "reapers")
            assert consumer["pending"] == 50
            one.api.answer = lambda _: TAKEN
            await until(lambda: one.is_empty)
            assert one.figures[c.REAPER_DELIVERED] == 200

    run(scenario())


def test_an_api_that_is_away_is_probed_by_one_at_a_time(
    store: Store, server: ValkeyProcess
) -> None:
    fill(store, 300)

    async def scenario() -> None:
        async with delivering(store, server.url, lambda _: UNREACHABLE) as one:
            await until(lambda: "open" in repr(one.delivery))
            one.api.most_at_once = 0
            before = len(one.api.attempts)
            await until(lambda: len(one.api.attempts) >= before + 4)
            assert one.api.most_at_once == 1
            one.api.answer = lambda _: TAKEN
            one.api.most_at_once = 0
            await until(lambda: one.is_empty)
            assert set(one.api.counts.values()) - {1}  # some were the probes
            assert one.figures[c.REAPER_DELIVERED] == 300

    run(scenario())


def test_keeps_to_its_rate(store: Store, server: ValkeyProcess) -> None:
    fill(store, 60)

    async def scenario() -> None:
        async with delivering(store, server.url, rate=100) as one:
            await until(lambda: one.is_empty)
            times = [at for at, _ in one.api.attempts]
            # Of 100 a second 10 may come at once: never more than that in any part of the time.
            for count in (20, 40, 60):
                assert times[count - 1] - times[0] >= (count - 11) / 100 * 0.99

    run(scenario())


def test_what_another_reaper_took_is_dropped(store: Store, server: ValkeyProcess) -> None:
    fill(store, 1)

    async def scenario() -> None:
        async with delivering(store, server.url, lambda _: REFUSED) as one:
            await until(lambda: one.api.attempts)
            claimed: Any = store.redis.xclaim(
                store.stream, "reapers", "another", 0, [entry_of(store)]
            )
            assert claimed
            await until(lambda: one.figures[c.DISCONNECTS_HELD] == 0)
            [holder] = [
                consumer["name"]
                for consumer in store.redis.xinfo_consumers(store.stream, "reapers")
                if consumer["pending"]
            ]
            assert holder == b"another"

    run(scenario())


def test_what_the_api_has_is_not_sent_again_when_striking_off_fails(
    store: Store, server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, 10)
    failures = iter(range(3))
    settle = DisconnectQueue.settle

    async def settle_in_the_end(self: DisconnectQueue, entries: Any) -> None:
        if next(failures, None) is not None:
            raise OSError("Redis is away")
        await settle(self, entries)

    monkeypatch.setattr(DisconnectQueue, "settle", settle_in_the_end)

    async def scenario() -> None:
        redis = AsyncRedis.from_url(server.url, protocol=2)
        api = StubApi()
        queue = DisconnectQueue(redis, "ws2api:", "one", 1, NEVER_S)
        delivery = Delivery(queue, api, RATE, c.Counters(1).reaper)
        await delivery.read()
        while store.redis.xlen(store.stream):
            try:
                await delivery.read()
                await delivery.send()
            except OSError:
                delivery.on_redis_lost()
        assert next(failures, None) is None
        assert set(api.counts.values()) == {1}
        await delivery.close()
        await redis.aclose()

    run(scenario())


def test_what_it_holds_survives_a_redis_that_forgets(tmp_path_factory: Any) -> None:
    with ValkeyProcess(tmp_path_factory.mktemp("own")) as server:
        redis = Redis.from_url(server.url)
        store = Store(redis)
        fill(store, 10)

        async def scenario() -> None:
            connection = AsyncRedis.from_url(server.url, protocol=2)
            queue = DisconnectQueue(connection, "ws2api:", "one", 1, NEVER_S)
            api = StubApi(lambda _: REFUSED)
            figures = c.Counters(1).reaper
            delivery = Delivery(queue, api, RATE, figures)
            while figures[c.DISCONNECTS_HELD] < 10:
                await delivery.read()
            await delivery.send()
            server.stop()
            server.start()
            api.answer = lambda _: TAKEN
            delivery.on_redis_lost()
            deadline = time.monotonic() + DEADLINE_S
            while len(api.counts) < 10 or store.redis.xlen(store.stream):
                assert time.monotonic() < deadline, delivery
                for step in (delivery.read, delivery.send):
                    try:
                        await step()
                    except RedisError:
                        delivery.on_redis_lost()
                await asyncio.sleep(0.001)
            await delivery.close()
            await connection.aclose()

        run(scenario())
        redis.close()


class TestEnd:
    def test_finishes_what_can_be_finished(self, store: Store, server: ValkeyProcess) -> None:
        fill(store, 500)

        async def scenario() -> None:
            async with delivering(store, server.url) as one:
                one.delivery.finish()
                await until(lambda: one.delivery.is_finished)
                assert one.is_empty

        run(scenario())

    def test_does_not_wait_for_an_api_that_is_away(
        self, store: Store, server: ValkeyProcess
    ) -> None:
        fill(store, 500)

        async def scenario() -> None:
            async with delivering(store, server.url, lambda _: UNREACHABLE) as one:
                one.delivery.finish()
                await until(lambda: one.delivery.is_finished)
                assert store.redis.xlen(store.stream) == 500

        run(scenario())

    def test_rest_waits_for_what_is_under_way_only(
        self, store: Store, server: ValkeyProcess
    ) -> None:
        fill(store, 500)

        async def scenario() -> None:
            async with delivering(store, server.url) as one:
                one.api.open.clear()
                await until(lambda: one.api.under_way)
                one.delivery.rest()
                sent = len(one.api.attempts)
                assert not one.delivery.is_finished
                one.api.open.set()
                await until(lambda: one.delivery.is_finished)
                assert len(one.api.attempts) <= sent + 1  # a claim may have been on its way
                await until(lambda: store.redis.xlen(store.stream) == 500 - sent)

        run(scenario())


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> Callable[[], int]:
    """Return a function that tells how often a method was called from now on."""
    method = getattr(owner, name)
    calls: list[None] = []

    def counting(*arguments: Any) -> Any:
        calls.append(None)
        return method(*arguments)

    monkeypatch.setattr(owner, name, counting)
    return lambda: len(calls)


def entry_of(store: Store) -> bytes:
    [(entry, _)] = store.redis.xrange(store.stream)
    return bytes(entry)
