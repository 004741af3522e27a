"""Share a stream in a real Valkey among consumers that read, die, and come back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, cast

import pytest
from harness.disconnect_store import BORN, Store
from harness.valkey import ValkeyProcess
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from ws2api.gateway.disconnects import DROPPED, GROUP, LEASES
from ws2api.supervisor import disconnect_queue
from ws2api.supervisor.disconnect_queue import Claim, Disconnect, DisconnectQueue

Body = Callable[..., Awaitable[None]]

NEVER_S: Final = 3600.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    with ValkeyProcess(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def store(server: ValkeyProcess) -> Iterator[Store]:
    with Redis.from_url(server.url) as redis:
        redis.flushall()
        yield Store(redis)


class Consumers:
    """Make queues, each with a connection of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connections: list[AsyncRedis] = []

    def add(
        self, instance: str = "one", pid: int = 1, abandoned_s: float = NEVER_S
    ) -> DisconnectQueue:
        redis = AsyncRedis.from_url(self._url, protocol=2)
        self._connections.append(redis)
        return DisconnectQueue(redis, "ws2api:", instance, pid, abandoned_s)

    async def close(self) -> None:
        for redis in self._connections:
            await redis.aclose()


@pytest.fixture
def run(server: ValkeyProcess) -> Callable[[Body], None]:
    """Run a coroutine function with a maker of queues."""

    def run(body: Body) -> None:
        async def whole() -> None:
            consumers = Consumers(server.url)
            try:
                await body(consumers.add)
            finally:
                await consumers.close()

        asyncio.run(whole())

    return run


Run = Callable[[Body], None]


def fill(store: Store, count: int) -> None:
    for number in range(count):
        store.park("w-1", (f"client-{number}", BORN + number, 1000, "bye"))


def ids(found: list[Disconnect]) -> list[str]:
    return [disconnect.client_id.decode() for disconnect in found]


def pending(store: Store) -> dict[str, int]:
    """Tell how many entries each consumer has."""
    consumers: Any = store.redis.xinfo_consumers(store.stream, GROUP)
    return {consumer["name"].decode(): consumer["pending"] for consumer in consumers}


class TestRead:
    def test_from_the_first_entry_on(self, store: Store, run: Run) -> None:
        store.park("w-1", ("a%20b", BORN, 4001, "größer 🎉"))

        async def body(add: Any) -> None:
            queue = add()
            await queue.open()
            [found] = await queue.read(10, 0)
            assert (found.client_id, found.generation, found.code, found.reason.decode()) == (
                b"a%20b",
                BORN,
                4001,
                "größer 🎉",
            )
            assert found.failures == 0
            assert await queue.read(10, 0) == []

        run(body)

    def test_each_entry_once(self, store: Store, run: Run) -> None:
        fill(store, 100)

        async def body(add: Any) -> None:
            one, two = add("one"), add("two")
            await one.open()
            await two.open()
            found: list[str] = []
            for _ in range(10):
                found += ids(await one.read(7, 0)) + ids(await two.read(5, 0))
            assert sorted(found) == sorted(f"client-{number}" for number in range(100))

        run(body)

    def test_waits_for_one(self, store: Store, run: Run) -> None:
        async def body(add: Any) -> None:
            queue = add()
            await queue.open()
            reading = asyncio.create_task(queue.read(10, 4))
            while not is_blocked(store):
                await asyncio.sleep(0.01)
            fill(store, 1)
            assert ids(await reading) == ["client-0"]

        run(body)

    def test_without_group_is_an_error_until_it_is_opened(self, store: Store, run: Run) -> None:
        async def body(add: Any) -> None:
            queue = add()
            await queue.open()
            store.redis.flushall()
            with pytest.raises(ResponseError, match="NOGROUP"):
                await queue.read(10, 0)
            run_id = await queue.open()
            assert run_id
            assert run_id == await queue.open()
            assert await queue.read(10, 0) == []

        run(body)

    def test_strikes_off_what_is_no_disconnect(self, store: Store, run: Run) -> None:
        store.redis.xadd(store.stream, {"something": "else"})
        store.redis.xadd(store.stream, {"id": "a", "generation": "b", "code": "c", "reason": "d"})
        fill(store, 1)

        async def body(add: Any) -> None:
            queue = add()
            await queue.open()
            assert ids(await queue.read(10, 0)) == ["client-0"]
            assert store.redis.xlen(store.stream) == 1
            assert pending(store) == {"one-1": 1}

        run(body)


class TestClaim:
    def test_holds_refreshes_and_suppresses(self, store: Store, run: Run) -> None:
        fill(store, 4)
        store.redis.set(store.key("c:client-1"), f"w-2 {BORN + 2}")  # younger: back
        store.redis.set(store.key("c:client-2"), f"w-2 {BORN + 1}")  # older: not back
        store.redis.set(store.key("c:client-3"), f"w-2 {BORN + 3}")  # this very one

        async def body(add: Any) -> None:
            queue = add()
            run_id = await queue.open()
            found = await queue.read(10, 0)
            claimed_in, claims = await queue.claim(found)
            assert claimed_in == run_id
            assert claims == [Claim.HELD, Claim.RECONNECTED, Claim.HELD, Claim.HELD]
            assert store.redis.xlen(store.stream) == 3
            assert pending(store) == {"one-1": 3}
            await queue.settle(disconnect.entry for disconnect in found)
            assert (await queue.claim(found))[1] == [Claim.GONE] * 4
            assert store.redis.xlen(store.stream) == 0
            assert pending(store) == {"one-1": 0}

        run(body)

    def test_not_what_another_has_taken(self, store: Store, run: Run) -> None:
        fill(store, 2)

        async def body(add: Any) -> None:
            one, two = add("one"), add("two", abandoned_s=0)
            await one.open()
            found = await one.read(10, 0)
            taken, _ = await two.adopt(1)
            assert (await one.claim(found))[1] == [Claim.GONE, Claim.HELD]
            assert (await two.claim(taken))[1] == [Claim.HELD]
            assert pending(store) == {"one-1": 1, "two-1": 1}

        run(body)

    def test_not_what_fell_off_the_stream(self, store: Store, run: Run) -> None:
        fill(store, 1)

        async def body(add: Any) -> None:
            queue = add()
            await queue.open()
            found = await queue.read(10, 0)
            store.park("w-1", ("next", BORN, 1000, ""), bound=1)
            assert (await queue.claim(found))[1] == [Claim.GONE]

        run(body)

    def test_of_a_redis_that_was_emptied(self, store: Store, run: Run) -> None:
        fill(store, 1)

        async def body(add: Any) -> None:
            queue = add()
            await queue.open()
            found = await queue.read(10, 0)
            store.redis.flushall()
            assert (await queue.claim(found))[1] == [Claim.GONE]

        run(body)


class TestDeadReapers:
    def test_leave_their_entries_after_a_time(self, store: Store, run: Run) -> None:
        fill(store, 5)

        async def body(add: Any) -> None:
            dead, patient, other = add("dead"), add("patient"), add("other", abandoned_s=0)
            await dead.open()
            await dead.read(5, 0)
            assert await patient.adopt(10) == ([], True)
            first, is_last = await other.adopt(3)
            assert len(first) == 3
            assert not is_last
            rest, is_last = await other.adopt(10)
            assert sorted(ids(first + rest)) == [f"client-{number}" for number in range(5)]
            assert is_last
            assert pending(store) == {"dead-1": 0, "other-1": 5, "patient-1": 0}

        run(body)

    def test_are_forgotten_when_they_have_nothing(
        self, store: Store, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fill(store, 1)

        async def body(add: Any) -> None:
            dead, idle, living = add("dead"), add("idle"), add("living")
            await dead.open()
            await dead.read(1, 0)
            await idle.read(1, 0)
            await living.adopt(10)
            assert pending(store) == {"dead-1": 1, "idle-1": 0, "living-1": 0}
            monkeypatch.setattr(disconnect_queue, "_FORGET_AFTER_S", -1)
            await living.adopt(10)
            assert pending(store) == {"dead-1": 1}

        run(body)

    def test_leave_them_to_their_successor_at_once(self, store: Store, run: Run) -> None:
        fill(store, 700)

        async def body(add: Any) -> None:
            dead, stranger, successor = add("one", 1), add("other", 1), add("one", 2)
            await dead.open()
            await dead.read(600, 0)
            await stranger.read(50, 0)
            held: set[bytes] = set()
            while found := await successor.recover(256, held):
                assert not held & {disconnect.entry for disconnect in found}
                held |= {disconnect.entry for disconnect in found}
            assert len(held) == 600
            assert pending(store) == {"one-1": 0, "one-2": 600, "other-1": 50}

        run(body)

    def test_leave_them_to_others_when_their_gateway_is_gone(
        self, store: Store, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fill(store, 300)

        async def body(add: Any) -> None:
            gone, expired, living, heir = add("gone"), add("expired"), add("living"), add("heir")
            leases = {"expired-0-0": 1.0, "living-0-0": 1e15, "gone-0-0": 0}
            store.redis.zadd(store.key(LEASES), leases)
            await gone.open()
            for queue in (gone, expired, living):
                await queue.read(100, 0)
            assert await heir.inherit(1000) == []  # their reapers were heard of a moment ago
            monkeypatch.setattr(disconnect_queue, "SILENT_S", 0)
            first = await heir.inherit(150)
            rest = await heir.inherit(1000)
            assert (len(first), len(rest)) == (150, 50)
            assert len({disconnect.entry for disconnect in first + rest}) == 200
            assert pending(store) == {"gone-1": 0, "expired-1": 0, "living-1": 100, "heir-1": 200}

        run(body)

    def test_a_sign_of_life_is_seen(self, store: Store, run: Run) -> None:
        fill(store, 1)

        async def body(add: Any) -> None:
            queue = add()
            await queue.open()
            await queue.read(1, 0)
            while silent_ms(store) < 50:
                await asyncio.sleep(0.01)
            await queue.touch()
            assert silent_ms(store) < 50
            assert pending(store) == {"one-1": 1}

        run(body)

    def test_recovers_what_got_lost_on_the_way(self, store: Store, run: Run) -> None:
        fill(store, 3)

        async def body(add: Any) -> None:
            queue = add()
            await queue.open()
            await queue.read(1, 0)  # and the answer was lost
            kept = {disconnect.entry for disconnect in await queue.read(1, 0)}
            assert ids(await queue.recover(10, kept)) == ["client-0"]

        run(body)

    def test_what_fell_off_meanwhile_is_passed_over(self, store: Store, run: Run) -> None:
        fill(store, 3)

        async def body(add: Any) -> None:
            dead, successor, other = add("one", 1), add("one", 2), add("two", 1, 0)
            await dead.open()
            await dead.read(3, 0)
            store.park("w-1", ("next", BORN, 1000, ""), bound=2)
            assert ids(await successor.recover(10, ())) == ["client-2"]
            assert ids((await other.adopt(10))[0]) == ["client-2"]

        run(body)


class TestPutBack:
    def test_goes_to_the_end_and_keeps_its_failures(self, store: Store, run: Run) -> None:
        fill(store, 2)

        async def body(add: Any) -> None:
            queue = add()
            await queue.open()
            [first] = await queue.read(1, 0)
            first.failures = 7
            await queue.put_back(first)
            assert [end[0] for end in store.owed] == ["client-1", "client-0"]
            assert pending(store) == {"one-1": 0}
            _, again = await queue.read(10, 0)
            assert (again.client_id, again.failures) == (b"client-0", 7)
            assert (again.generation, again.code, again.reason) == (BORN, 1000, b"bye")

        run(body)

    def test_not_what_another_has(self, store: Store, run: Run) -> None:
        fill(store, 1)

        async def body(add: Any) -> None:
            one, two = add("one"), add("two", abandoned_s=0)
            await one.open()
            [mine] = await one.read(1, 0)
            await two.adopt(1)
            await one.put_back(mine)
            assert pending(store) == {"one-1": 0, "two-1": 1}
            assert len(store.owed) == 1

        run(body)

    def test_what_redis_has_lost(self, store: Store, run: Run) -> None:
        fill(store, 1)

        async def body(add: Any) -> None:
            queue = add()
            await queue.open()
            [mine] = await queue.read(1, 0)
            store.redis.flushall()
            await queue.put_back(mine)
            assert not store.owed
            await queue.put_back(mine, even_if_lost=True)
            assert store.owed == [("client-0", BORN, 1000, "bye")]

        run(body)


class TestLeave:
    def test_forgets_a_consumer_of_nothing(self, store: Store, run: Run) -> None:
        async def body(add: Any) -> None:
            one, two = add("one"), add("two")
            await one.open()
            await one.read(1, 0)
            await two.read(1, 0)
            await one.leave()
            assert pending(store) == {"two-1": 0}

        run(body)

    def test_keeps_one_that_has_entries(self, store: Store, run: Run) -> None:
        fill(store, 1)

        async def body(add: Any) -> None:
            queue = add()
            await queue.open()
            await queue.read(1, 0)
            await queue.leave()
            assert pending(store) == {"one-1": 1}

        run(body)

    def test_of_a_stream_that_is_gone(self, store: Store, run: Run) -> None:
        async def body(add: Any) -> None:
            await add().leave()

        run(body)


class TestMeasure:
    def test_nothing(self, store: Store, run: Run) -> None:
        async def body(add: Any) -> None:
            measure = await add().measure()
            assert (measure.length, measure.oldest_s, measure.dropped) == (0, 0, 0)

        run(body)

    def test_length_age_and_drops(self, store: Store, run: Run) -> None:
        now_s: Any = store.redis.time()
        fields: Any = {"id": "ann", "generation": 1, "code": 1000, "reason": ""}
        store.redis.xadd(store.stream, fields, id=f"{(now_s[0] - 90) * 1000}-0")
        fill(store, 2)
        store.redis.set(store.key(DROPPED), 17)

        async def body(add: Any) -> None:
            measure = await add().measure()
            assert (measure.length, measure.dropped) == (3, 17)
            assert 90 <= measure.oldest_s <= 95

        run(body)


def test_says_that_redis_is_away(tmp_path_factory: pytest.TempPathFactory) -> None:
    async def body() -> None:
        consumers = Consumers(f"unix://{tmp_path_factory.mktemp('none')}/none.sock")
        with pytest.raises(RedisConnectionError):
            await consumers.add().open()
        await consumers.close()

    asyncio.run(body())


def silent_ms(store: Store) -> int:
    """Tell for how long the only consumer has asked for nothing."""
    [consumer] = cast("list[dict[str, int]]", store.redis.xinfo_consumers(store.stream, GROUP))
    return consumer["idle"]


def is_blocked(store: Store) -> bool:
    clients: Any = store.redis.client_list()
    return any("b" in client["flags"] for client in clients)
