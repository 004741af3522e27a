"""Hold the lease of a worker in a real Valkey server, with a clock that the test moves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, cast

import pytest
import structlog
from harness.looping import Clock, holds, in_loop
from harness.redis_server import RedisServer, redis_server
from ws2api.gateway import disconnects
from ws2api.gateway.disconnects import LEASE_S, RENEW_EVERY_S
from ws2api.gateway.errors import RedisUnavailable
from ws2api.gateway.fence import Fence
from ws2api.gateway.lease import Lease
from ws2api.gateway.redis_link import RedisLink
from ws2api.gateway.redis_time import RedisTime
from ws2api.gateway.sweeper import Sweeper

PREFIX = "test:"
# More than two batches.
MANY = 1_200


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("valkey"), PREFIX) as server:
        yield server


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    """Use the shared server, empty."""
    shared_server.redis.flushall()
    return shared_server


class Client:
    """Be a connection, and note whether it was given up."""

    def __init__(self, generation: int, on_given_up: Callable[[], None] = lambda: None) -> None:
        self.generation = generation
        self.given_up = 0
        self._on_given_up = on_given_up

    def give_up(self) -> None:
        self.given_up += 1
        self._on_given_up()


class Worker:
    """Hold the lease of one worker, and its clients."""

    def __init__(self, url: str, name: str) -> None:
        loop = asyncio.get_running_loop()
        self.name = name
        self.ups = 0
        self.clients: dict[bytes, Client] = {}
        self.connecting: dict[bytes, Client] = {}
        self.clock = Clock()
        sweeper = Sweeper(cast(Any, self.clock))
        sweeper.start()
        self.link = RedisLink(
            url, name, loop, sweeper, self._on_up, lambda: None, scripts=disconnects.SCRIPTS
        )
        holders = (self.clients, self.connecting)
        self.fence = Fence(name)
        self.redis_time = RedisTime()
        self.times_forgotten = 0
        self.lease = Lease(
            self.link,
            PREFIX,
            self.fence,
            self.redis_time,
            holders,
            loop,
            sweeper,
            self._on_forgotten,
        )

    def _on_up(self) -> None:
        self.ups += 1

    def _on_forgotten(self) -> None:
        self.times_forgotten += 1

    async def renews(self) -> None:
        self.lease.renew()
        await self.link.ask("PING")

    async def is_cut_off(self) -> None:
        """Lose the connection, and get another."""
        ups = self.ups
        self.link.reset()
        await holds(lambda: self.link.is_up and self.ups > ups)

    def opens(self, client_id: str, generation: int, **kwargs: Callable[[], None]) -> Client:
        client = self.clients[client_id.encode()] = Client(generation, **kwargs)
        return client

    def decides_on(self, client_id: str, generation: int) -> Client:
        client = self.connecting[client_id.encode()] = Client(generation)
        return client


@contextlib.asynccontextmanager
async def worker_of(server: RedisServer, name: str = "a") -> AsyncIterator[Worker]:
    worker = Worker(server.url, name)
    worker.link.start()
    try:
        await holds(lambda: worker.link.is_up)
        yield worker
    finally:
        await worker.link.stop()


def give_up(server: RedisServer, worker: str, *entries: str) -> None:
    """Do as a reaper does that takes a worker for dead."""
    server.redis.sadd(f"{PREFIX}x:{worker}", *entries)


def given_up(server: RedisServer, worker: str) -> set[str]:
    """Return the connections that a worker has to close, as `<id> <generation>`."""
    return cast(set[str], server.redis.smembers(f"{PREFIX}x:{worker}"))


# The lease.


@in_loop
async def test_lease_is_taken(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        before_ms = server.now_ms
        await worker.renews()
        ((name, until_ms),) = server.leases.items()
        assert name == "a"
        assert before_ms - 1 <= until_ms - LEASE_S * 1000 <= server.now_ms


@in_loop
async def test_lease_is_renewed_again_and_again(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        await worker.renews()
        for _ in range(3):
            server.redis.zadd(f"{PREFIX}leases", {"a": 7.0})
            worker.clock.advance(RENEW_EVERY_S - 0.5)
            await worker.link.ask("PING")
            assert server.leases == {"a": 7.0}
            worker.clock.advance(0.7)
            await worker.link.ask("PING")
            assert server.leases["a"] > 7.0


def test_lease_outlives_some_renewals_that_are_lost() -> None:
    assert LEASE_S >= 4 * RENEW_EVERY_S


@in_loop
async def test_lease_is_not_renewed_while_redis_is_away(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        worker.link.reset()
        await holds(lambda: not worker.link.is_up)
        worker.clock.advance(2 * RENEW_EVERY_S + 1)
        await holds(lambda: worker.link.is_up)
        assert server.leases == {}
        worker.clock.advance(0.1)
        await worker.link.ask("PING")
        assert server.leases.keys() == {"a"}, "at the first tick"


@in_loop
async def test_lease_that_redis_forgot_is_taken_anew(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        await worker.renews()
        server.redis.flushdb()
        worker.clock.advance(RENEW_EVERY_S + 0.2)
        await worker.link.ask("PING")
        assert server.leases.keys() == {"a"}


@in_loop
async def test_redis_that_has_lost_its_data_is_found_out(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        for count in range(1, 3):
            await worker.renews()
            await worker.renews()
            assert worker.times_forgotten == count - 1
            server.redis.flushall()
            await worker.renews()
            assert worker.times_forgotten == count


@in_loop
async def test_loss_that_a_new_connection_finds_is_no_news(server: RedisServer) -> None:
    """What comes after a connection is made enters everything anyway."""
    async with worker_of(server) as worker:
        await worker.renews()
        server.redis.flushall()
        worker.lease.enter()
        await worker.renews()
        assert worker.times_forgotten == 0


@in_loop
async def test_loss_is_nothing_to_a_worker_that_ends(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        await worker.renews()
        server.redis.flushall()
        worker.lease.renew()
        worker.lease.stop()
        await worker.link.ask("PING")
        assert worker.times_forgotten == 0


@in_loop
async def test_lease_that_is_stopped_is_not_renewed(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        await worker.renews()
        server.redis.zadd(f"{PREFIX}leases", {"a": 7.0})
        worker.lease.stop()
        for _ in range(3):
            worker.clock.advance(RENEW_EVERY_S + 0.2)
            await worker.link.ask("PING")
        assert server.leases == {"a": 7.0}


@in_loop
async def test_lease_that_is_stopped_is_not_taken_anew(server: RedisServer) -> None:
    """Redis may come back while the worker ends; nobody would end a lease that is taken then."""
    async with worker_of(server) as worker:
        worker.lease.stop()
        await worker.is_cut_off()
        worker.lease.enter()
        assert worker.fence.epoch == b"0", "what the last connection has to say is said in its name"
        await worker.renews()
        worker.clock.advance(RENEW_EVERY_S + 0.2)
        await worker.link.ask("PING")
        assert server.leases == {}


@in_loop
async def test_lease_tells_what_time_it_is_at_redis(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        assert worker.redis_time.deadline_ms(0.0) == 0
        before_ms = int(server.now_ms)
        await worker.renews()
        assert before_ms <= worker.redis_time.deadline_ms(0.0) <= server.now_ms + 1


@in_loop
async def test_each_connection_makes_the_one_before_it_void(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        for epoch in ("1", "2", "3"):
            worker.lease.enter()
            await worker.link.ask("PING")
            assert server.redis.get(f"{PREFIX}i:a") == epoch
        assert server.leases.keys() == {"a"}


@in_loop
async def test_worker_that_was_given_up_goes_on_with_a_new_connection(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        worker.lease.enter()
        await worker.link.ask("PING")
        server.redis.set(f"{PREFIX}i:a", "-1")
        server.redis.delete(f"{PREFIX}leases")
        with structlog.testing.capture_logs():
            worker.lease.renew()
            await holds(lambda: worker.ups == 2)
        assert server.leases == {}
        worker.lease.enter()
        await worker.link.ask("PING")
        assert server.redis.get(f"{PREFIX}i:a") == "2"
        assert server.leases.keys() == {"a"}


# Given up for lost.


@in_loop
async def test_clients_that_were_given_up_are_closed(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        lost, other, younger = (
            worker.opens("lost", 17),
            worker.opens("other", 17),
            worker.opens("back", 18),
        )
        asking, asking_again = worker.decides_on("asking", 19), worker.decides_on("back", 20)
        give_up(server, "a", "lost 17", "back 17", "asking 19", "gone 5")
        give_up(server, "b", "other 17")
        with structlog.testing.capture_logs() as logs:
            await worker.renews()
            await holds(lambda: logs)
        assert [lost.given_up, asking.given_up] == [1, 1]
        assert [other.given_up, younger.given_up, asking_again.given_up] == [0, 0, 0]
        assert [entry["count"] for entry in logs] == [2]
        assert given_up(server, "a") == set()
        assert given_up(server, "b") == {"other 17"}


@pytest.mark.parametrize("lost", [(17,), (18,), (17, 18)])
@in_loop
async def test_client_that_connects_again_is_given_up_with_either_connection(
    server: RedisServer, lost: tuple[int, ...]
) -> None:
    async with worker_of(server) as worker:
        is_open, asking = worker.opens("me", 17), worker.decides_on("me", 18)
        give_up(server, "a", *(f"me {generation}" for generation in lost))
        await worker.lease.check()
        assert [is_open.given_up, asking.given_up] == [17 in lost, 18 in lost]
        assert given_up(server, "a") == set()


@in_loop
async def test_many_that_were_given_up_are_closed(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        clients = [worker.opens(f"c{number}", number) for number in range(MANY)]
        give_up(server, "a", *(f"c{number} {number}" for number in range(0, MANY, 2)))
        await worker.lease.check()
        assert [client.given_up > 0 for client in clients] == [True, False] * (MANY // 2)
        assert given_up(server, "a") == set()


@in_loop
async def test_who_is_given_up_during_a_check_is_closed_by_the_next(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        late = worker.opens("late", 18)
        worker.opens("me", 17, on_given_up=lambda: give_up(server, "a", "late 18"))
        give_up(server, "a", "me 17")
        await worker.lease.check()
        assert late.given_up == 0
        assert given_up(server, "a") == {"late 18"}
        await worker.lease.check()
        assert late.given_up == 1
        assert given_up(server, "a") == set()


@in_loop
async def test_client_may_leave_the_holders_when_it_is_given_up(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        for number in range(10):
            worker.opens(f"c{number}", 1, on_given_up=worker.clients.popitem)
        give_up(server, "a", *(f"c{number} 1" for number in range(10)))
        await worker.lease.check()
        assert len(worker.clients) < 10
        assert given_up(server, "a") == set()


@in_loop
async def test_nobody_is_closed_when_nobody_was_given_up(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        client = worker.opens("me", 17)
        server.redis.config_resetstat()
        with structlog.testing.capture_logs() as logs:
            await worker.renews()
            await worker.lease.check()
        assert client.given_up == 0
        assert not logs
        assert server.calls("sscan") == 1, "only the check that was asked for looks"


@in_loop
async def test_worker_that_is_back_is_not_missed_any_more(server: RedisServer) -> None:
    """From then on it is known where its clients are not."""
    async with worker_of(server) as worker:
        worker.opens("me", 17)
        give_up(server, "a", "me 17", "left 18", "moved 19")
        values = {"me": "a 17", "left": "a 18", "moved": "b 20"}
        server.redis.mset({f"{PREFIX}g:{name}": value for name, value in values.items()})
        await worker.lease.check()
        assert server.redis.keys(f"{PREFIX}g:*") == [f"{PREFIX}g:moved"]


@in_loop
async def test_one_check_at_a_time(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        give_up(server, "a", "me 17")
        server.redis.config_resetstat()
        for _ in range(5):
            worker.lease.renew()
        await holds(lambda: not given_up(server, "a"))
        await worker.link.ask("PING")
        assert server.calls("sscan") == 1


@in_loop
async def test_check_that_was_cut_off_is_made_up_for(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        first = worker.opens("me", 17, on_given_up=worker.link.reset)
        give_up(server, "a", "me 17")
        worker.lease.renew()
        await holds(lambda: worker.ups == 2)
        assert first.given_up == 1
        assert given_up(server, "a") == {"me 17"}, "the connection was lost before it could go"
        second = worker.opens("me", 17)
        await worker.renews()
        await holds(lambda: not given_up(server, "a"))
        assert second.given_up == 1


@in_loop
async def test_check_says_when_redis_is_lost(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        client = worker.opens("me", 17)
        give_up(server, "a", "me 17")
        worker.link.reset()
        with pytest.raises(RedisUnavailable):
            await worker.lease.check()
        assert client.given_up == 0


@in_loop
async def test_check_ends_with_the_lease(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        client = worker.opens("me", 17)
        give_up(server, "a", "me 17")
        await worker.renews()  # it has begun
        worker.lease.stop()
        for _ in range(3):
            await worker.link.ask("PING")
        assert client.given_up == 0
        assert given_up(server, "a") == {"me 17"}, "a worker that ends has nothing to amend"
