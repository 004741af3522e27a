"""Claim and release ids in a real Valkey server, as several workers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import cast

import pytest
from harness.looping import holds, in_loop
from harness.valkey import ValkeyProcess
from harness.waiting import until
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import Redis
from redis.exceptions import RedisError
from ws2api.gateway import registry as registry_module
from ws2api.gateway.envelope import REPLACED, decode
from ws2api.gateway.errors import RedisUnavailable
from ws2api.gateway.fence import Fence
from ws2api.gateway.redis_link import RedisLink
from ws2api.gateway.redis_time import RedisTime
from ws2api.gateway.registry import Registry
from ws2api.gateway.sweeper import Sweeper

DEADLINE_S = 20.0
PENDING_S = 60.0
MARGIN_S = 30.0
PREFIX = "test:"
A_MINUTE_MS = 60_000
# More than one batch, and more than one round of clearing.
MANY = 2_100

Event = str | tuple[str, bool]


class Server:
    """Be a Valkey server, and read what workers have entered there."""

    def __init__(self, process: ValkeyProcess) -> None:
        self.process = process
        self.redis = Redis.from_url(process.url, decode_responses=True)
        until(self._answers, what="Valkey answers")
        self._pid: int = self.redis.info("server")["process_id"]

    def _answers(self) -> bool:
        with contextlib.suppress(RedisError):
            return bool(self.redis.ping())
        return False

    def freeze(self) -> None:
        """Stop the process: its sockets stay open, nothing is answered."""
        os.kill(self._pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._pid, signal.SIGCONT)

    def _all(self, kind: str) -> dict[str, str]:
        keys = self.redis.keys(f"{PREFIX}{kind}:*")
        return {key.removeprefix(f"{PREFIX}{kind}:"): self.redis.get(key) for key in keys}

    @property
    def owners(self) -> dict[str, str]:
        """Who holds each id: worker and generation."""
        return self._all("c")

    @property
    def marks(self) -> dict[str, str]:
        """Where the connect of an id is being decided."""
        return self._all("p")

    @property
    def members(self) -> dict[str, dict[str, str]]:
        """The ids of each worker with their generations."""
        keys = self.redis.keys(f"{PREFIX}w:*")
        return {key.removeprefix(f"{PREFIX}w:"): self.redis.hgetall(key) for key in keys}

    @property
    def asking(self) -> dict[str, set[str]]:
        """What each worker asks the API about, as `<id> <generation>`."""
        keys = self.redis.keys(f"{PREFIX}a:*")
        return {key.removeprefix(f"{PREFIX}a:"): self.redis.smembers(key) for key in keys}

    @property
    def owed(self) -> dict[str, dict[str, str]]:
        """The ends that each worker owes the API: `<id> <generation>` → code and reason."""
        keys = self.redis.keys(f"{PREFIX}e:*")
        return {key.removeprefix(f"{PREFIX}e:"): self.redis.hgetall(key) for key in keys}

    def assert_both_indexes_agree(self) -> None:
        from_members = {
            client_id: f"{worker} {generation}"
            for worker, ids in self.members.items()
            for client_id, generation in ids.items()
        }
        assert from_members == self.owners
        assert sum(map(len, self.members.values())) == len(self.owners)


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


def now_ms(server: Server) -> int:
    seconds, microseconds = cast("tuple[int, int]", server.redis.time())
    return seconds * 1000 + microseconds // 1000


class Client:
    """Be a connection, and note what it is told."""

    def __init__(self, client_id: str, generation: int) -> None:
        self.client_id = client_id.encode()
        self.generation = generation
        self.close_code = 1000
        self.close_reason: str | None = "so long, and thanks"
        self.events: list[Event] = []

    def on_announced(self, generation: int | None = None) -> None:
        self.events.append("announced")
        if generation is not None:
            self.generation = generation

    def on_claimed(self, owned: bool = True) -> None:
        self.events.append("claimed" if owned else "lost")

    def on_released(self, owned: bool) -> None:
        self.events.append(("released", owned))

    def replace(self) -> None:
        self.events.append("replaced")


class Worker:
    """Hold the registry of one worker, and what it is told over its channel."""

    def __init__(self, url: str, name: str) -> None:
        loop = asyncio.get_running_loop()
        sweeper = Sweeper(loop)
        self.name = name
        self.notices: list[tuple[str, int]] = []
        self._is_subscribed = False
        self.link = RedisLink(
            url, name, loop, sweeper, _nothing, _nothing, scripts=registry_module.SCRIPTS
        )
        self._subscription = RedisLink(
            url, name, loop, sweeper, self._subscribe, _nothing, self._on_message
        )
        self.fence = Fence(name)
        self.redis_time = RedisTime()
        self.registry = Registry(self.link, PREFIX, self.fence, self.redis_time, PENDING_S)

    def _subscribe(self) -> None:
        self._subscription.send(self._on_subscribed, "SUBSCRIBE", f"{PREFIX}w:{self.name}")

    def _on_subscribed(self, reply: object) -> None:
        self._is_subscribed = True

    def _on_message(self, message: bytes) -> None:
        for envelope in decode(message):
            assert envelope.kind == REPLACED
            self.notices.append((envelope.client_id.decode(), int(envelope.payload)))

    async def start(self) -> None:
        self.link.start()
        self._subscription.start()
        await holds(lambda: self.link.is_up and self._is_subscribed)

    async def stop(self) -> None:
        await self.link.stop()
        await self._subscription.stop()

    async def loses_its_link(self) -> None:
        """Let what was sent be written, and lose the connection for commands."""
        for _ in range(3):
            await asyncio.sleep(0)
        self.link.reset()
        await holds(lambda: not self.link.is_up)

    async def settles(self) -> None:
        """Wait until all that was sent is answered, and all notices of it have come."""
        if self.link.is_up:
            await self.link.ask("PING")
            done: list[object] = []
            self._subscription.send(done.append, "PING")
            await holds(lambda: done)

    # What clients do here.

    async def announces(self, client_id: str) -> Client:
        client = Client(client_id, 0)
        self.registry.announce(client.client_id, client)
        await self.settles()
        return client

    async def withdraws(self, client_id: str, generation: int) -> None:
        self.registry.withdraw(client_id.encode(), generation)
        await self.settles()

    async def claims(self, client_id: str, generation: int) -> Client:
        client = Client(client_id, generation)
        self.registry.claim(client.client_id, generation, client)
        await self.settles()
        return client

    async def releases(self, client_id: str, generation: int) -> bool:
        """Release an id; tell whether no newer connection has it."""
        client = Client(client_id, generation)
        self.registry.release(client)
        await self.settles()
        ((event, owned),) = client.events
        assert event == "released"
        return bool(owned)

    async def claims_again(self, *clients: Client) -> None:
        self.registry.claim_again(clients)
        await self.settles()

    async def restores(self, *clients: Client, deciding: Sequence[Client] = ()) -> None:
        """Restore with clients that are open, and those that are being decided, oldest first."""
        await self.registry.restore(
            {client.client_id: client for client in clients},
            {client.client_id: client for client in deciding},
            lambda: [client for client in deciding if client.generation],
        )
        await self.settles()


def _nothing() -> None:
    """Be told nothing of note."""


@contextlib.asynccontextmanager
async def workers(server: Server, *names: str) -> AsyncIterator[list[Worker]]:
    all_workers = [Worker(server.process.url, name) for name in names]
    try:
        for worker in all_workers:
            await worker.start()
        yield all_workers
    finally:
        for worker in all_workers:
            await worker.stop()


# Connects that are being decided.


@in_loop
async def test_connect_is_marked_for_as_long_as_it_may_take(server: Server) -> None:
    async with workers(server, "host-0-1") as (worker,):
        before_us = time.time_ns() // 1000
        client = await worker.announces("me")
        assert client.events == ["announced"]
        assert before_us <= client.generation <= time.time_ns() // 1000
        assert server.marks == {"me": f"host-0-1 {client.generation}"}
        left_ms = cast(int, server.redis.pttl(f"{PREFIX}p:me"))
        assert PENDING_S < left_ms / 1000 <= PENDING_S + MARGIN_S
        assert server.owners == server.members == {}


@in_loop
async def test_every_connect_of_a_client_has_a_birth_of_its_own(server: Server) -> None:
    async with workers(server, "a", "b") as (a, b):
        clients = [Client(f"{number % 7}", 0) for number in range(1000)]
        for number, client in enumerate(clients):
            (a, b)[number % 2].registry.announce(client.client_id, client)
        await a.settles()
        await b.settles()
        # Of one client only: those of others may coincide, and Redis' clock may be put back.
        for first in range(7):
            births = [client.generation for client in clients[first::7]]
            assert len(set(births)) == len(births)
            for worker in (0, 1):
                assert births[worker::2] == sorted(births[worker::2])


@pytest.mark.parametrize("kind", ["open", "being decided"])
@in_loop
async def test_announced_generation_is_younger_than_what_is_there(
    server: Server, kind: str
) -> None:
    async with workers(server, "a", "b") as (a, b):
        # Made with a clock that was ahead, or before Redis' own was put back.
        future = time.time_ns() // 1000 + 3600 * 1_000_000
        if kind == "open":
            await a.claims("me", future)
        else:
            server.redis.set(f"{PREFIX}p:me", f"a {future}")
        client = await b.announces("me")
        assert client.generation > future
        assert (await b.claims("me", client.generation)).events == ["claimed"]


@in_loop
async def test_mark_is_withdrawn(server: Server) -> None:
    async with workers(server, "a") as (a,):
        client = await a.announces("me")
        await a.withdraws("me", client.generation)
        assert server.marks == {}


@in_loop
async def test_connect_is_known_for_as_long_as_it_is_decided(server: Server) -> None:
    async with workers(server, "a", "b") as (a, b):
        first, second = await a.announces("me"), await a.announces("me")
        other = await b.announces("you")
        ours = {f"me {first.generation}", f"me {second.generation}"}
        assert server.asking == {"a": ours, "b": {f"you {other.generation}"}}
        await a.withdraws("me", first.generation)
        assert server.asking["a"] == {f"me {second.generation}"}
        assert server.marks["me"] == f"a {second.generation}"
        await a.claims("me", second.generation)
        await b.withdraws("you", other.generation)
        assert server.asking == {}


@in_loop
async def test_connect_that_lost_its_claim_is_decided(server: Server) -> None:
    async with workers(server, "a", "b") as (a, b):
        older, newer = await a.announces("me"), await b.announces("me")
        await b.claims("me", newer.generation)
        late = await a.claims("me", older.generation)
        assert late.events == ["lost"]
        assert server.asking == server.marks == {}


@in_loop
async def test_claims_of_many_end_their_connects(server: Server) -> None:
    async with workers(server, "a") as (a,):
        clients = [Client(f"c{number}", 0) for number in range(MANY)]
        for client in clients:
            a.registry.announce(client.client_id, client)
        await a.settles()
        assert len(server.asking["a"]) == MANY
        await a.claims_again(*clients)
        assert server.asking == server.marks == {}


@in_loop
async def test_mark_of_a_newer_connect_stays(server: Server) -> None:
    async with workers(server, "a", "b") as (a, b):
        older = await a.announces("me")
        newer = await b.announces("me")
        assert older.generation < newer.generation
        await a.withdraws("me", older.generation)
        await b.withdraws("me", older.generation)
        assert server.marks == {"me": f"b {newer.generation}"}


# Claims.


@in_loop
async def test_claim_enters_the_client(server: Server) -> None:
    async with workers(server, "a") as (a,):
        client = await a.claims("me", 17)
        assert client.events == ["claimed"]
        assert server.owners == {"me": "a 17"}
        assert server.members == {"a": {"me": "17"}}


@in_loop
async def test_claim_takes_its_own_mark_away(server: Server) -> None:
    async with workers(server, "a", "b") as (a, b):
        me = await a.announces("me")
        you = await b.announces("you")
        await a.claims("me", me.generation)
        await a.claims("you", 16)
        assert server.marks == {"you": f"b {you.generation}"}


@in_loop
async def test_claim_ends_the_doubt_where_the_client_is(server: Server) -> None:
    """A connection before it was given up with its worker, which may come back."""
    server.redis.set(f"{PREFIX}g:me", "b 16")
    async with workers(server, "a") as (a,):
        client = await a.announces("me")
        assert server.redis.exists(f"{PREFIX}g:me")
        await a.claims("me", client.generation)
        assert not server.redis.exists(f"{PREFIX}g:me")


@in_loop
async def test_newest_claim_wins_and_the_old_worker_is_told(server: Server) -> None:
    async with workers(server, "a", "b") as (a, b):
        await a.claims("me", 17)
        await a.claims("you", 17)
        await b.claims("me", 18)
        await a.settles()
        assert server.owners == {"me": "b 18", "you": "a 17"}
        assert a.notices == [("me", 17)]
        assert b.notices == []
        server.assert_both_indexes_agree()


@in_loop
async def test_younger_generation_keeps_the_id_from_a_later_claim(server: Server) -> None:
    async with workers(server, "a", "b") as (a, b):
        await a.claims("me", 18)
        late = await b.claims("me", 17)
        await a.settles()
        assert late.events == ["lost"]
        assert server.owners == {"me": "a 18"}
        assert a.notices == []


@in_loop
async def test_worker_is_not_told_of_what_it_does_itself(server: Server) -> None:
    async with workers(server, "a") as (a,):
        await a.claims("me", 17)
        await a.claims("me", 18)
        assert a.notices == []
        assert server.owners == {"me": "a 18"}
        server.assert_both_indexes_agree()


@in_loop
async def test_same_claim_twice_is_one(server: Server) -> None:
    async with workers(server, "a") as (a,):
        await a.claims("me", 17)
        await a.claims("me", 17)
        assert a.notices == []
        server.assert_both_indexes_agree()


@pytest.mark.parametrize("client_id", ["%25", "a.b_c~d-e", "-", "x" * 255, "p:", "17"])
@in_loop
async def test_any_id_can_be_claimed(server: Server, client_id: str) -> None:
    async with workers(server, "a", "b") as (a, b):
        # Two generations that floating-point numbers would take for one, were they larger.
        await a.claims(client_id, (1 << 53) - 2)
        await b.claims(client_id, (1 << 53) - 1)
        await a.settles()
        assert a.notices == [(client_id, (1 << 53) - 2)]
        assert server.owners == {client_id: f"b {(1 << 53) - 1}"}
        assert await b.releases(client_id, (1 << 53) - 1)
        assert server.owners == server.members == {}


# Releases.


@in_loop
async def test_release_takes_the_client_out(server: Server) -> None:
    async with workers(server, "a") as (a,):
        await a.claims("me", 17)
        assert await a.releases("me", 17)
        assert server.owners == server.members == {}


@in_loop
async def test_release_of_an_older_generation_leaves_the_newer(server: Server) -> None:
    async with workers(server, "a") as (a,):
        await a.claims("me", 17)
        await a.claims("me", 18)
        assert not await a.releases("me", 17)
        assert server.owners == {"me": "a 18"}
        server.assert_both_indexes_agree()


@in_loop
async def test_release_leaves_the_newer_connection_elsewhere(server: Server) -> None:
    async with workers(server, "a", "b") as (a, b):
        await a.claims("me", 17)
        await b.claims("me", 18)
        assert not await a.releases("me", 17)
        assert server.owners == {"me": "b 18"}
        server.assert_both_indexes_agree()


@in_loop
async def test_release_leaves_the_same_generation_elsewhere(server: Server) -> None:
    async with workers(server, "a", "b") as (a, b):
        await b.claims("me", 17)
        assert not await a.releases("me", 17)
        assert server.owners == {"me": "b 17"}


@in_loop
async def test_release_of_what_redis_has_forgotten_is_owned(server: Server) -> None:
    async with workers(server, "a") as (a,):
        await a.claims("me", 17)
        server.redis.flushall()
        assert await a.releases("me", 17), "the API must hear of the end"


REASONS = ["", "bye", "so long, and thanks", "4008 7", "two\nlines\r\n", "nul\0nul", "grün"]


@pytest.mark.parametrize("reason", REASONS)
@in_loop
async def test_released_end_is_owed_to_the_api(server: Server, reason: str) -> None:
    async with workers(server, "a") as (a,):
        client = await a.claims("me", 17)
        client.close_code, client.close_reason = 4001, reason
        a.registry.release(client)
        await a.settles()
        assert server.owed == {"a": {"me 17": f"4001 {reason}"}}
        assert server.owners == server.members == {}


@in_loop
async def test_end_without_a_reason_is_owed(server: Server) -> None:
    async with workers(server, "a") as (a,):
        client = await a.claims("me", 17)
        client.close_code, client.close_reason = 1006, None
        a.registry.release(client)
        await a.settles()
        assert server.owed == {"a": {"me 17": "1006 "}}


@in_loop
async def test_each_generation_is_owed_an_end(server: Server) -> None:
    async with workers(server, "a") as (a,):
        for generation in (17, 18):
            await a.claims("me", generation)
            assert await a.releases("me", generation)
        assert server.owed["a"].keys() == {"me 17", "me 18"}


@in_loop
async def test_end_is_owed_once(server: Server) -> None:
    async with workers(server, "a") as (a,):
        await a.claims("me", 17)
        assert await a.releases("me", 17)
        assert await a.releases("me", 17)
        assert len(server.owed["a"]) == 1


@pytest.mark.parametrize("name", ["a", "b"])
@in_loop
async def test_nothing_is_owed_of_who_is_connected(server: Server, name: str) -> None:
    async with workers(server, "a", "b") as both:
        await both[0].claims("me", 17)
        await both["ab".index(name)].claims("me", 18)
        assert not await both[0].releases("me", 17)
        assert server.owed == {}


@in_loop
async def test_end_is_owed_that_redis_has_forgotten(server: Server) -> None:
    async with workers(server, "a") as (a,):
        assert await a.releases("me", 17)
        assert server.owed["a"].keys() == {"me 17"}


# What is too late.


LATE: dict[str, Callable[[Worker], None]] = {
    "announce": lambda a: a.registry.announce(b"me", Client("me", 0)),
    "claim": lambda a: a.registry.claim(b"me", 17, Client("me", 17)),
    "claim again": lambda a: a.registry.claim_again([Client("me", 17)]),
    "release": lambda a: a.registry.release(Client("me", 17)),
    "mark again": lambda a: a.registry._mark_again([Client("me", 17)], {}),
}


@pytest.mark.parametrize("what", LATE)
@pytest.mark.parametrize("held", ["dead", "-1", "2"])
@in_loop
async def test_worker_that_was_given_up_enters_nothing(
    server: Server, what: str, held: str
) -> None:
    async with workers(server, "a") as (a,):
        a.fence.advance()
        server.redis.set(f"{PREFIX}i:a", held)
        LATE[what](a)
        await holds(lambda: not a.link.is_up)
        assert server.redis.keys() == [f"{PREFIX}i:a"]


@pytest.mark.parametrize("what", LATE)
@in_loop
async def test_worker_that_was_not_enters_it(server: Server, what: str) -> None:
    async with workers(server, "a") as (a,):
        a.fence.advance()
        server.redis.set(f"{PREFIX}i:a", "1")
        LATE[what](a)
        await a.settles()
        assert len(server.redis.keys()) > 1


@in_loop
async def test_what_can_never_be_right_again_goes_in_any_case(server: Server) -> None:
    async with workers(server, "a") as (a,):
        me = await a.announces("me")
        server.redis.set(f"{PREFIX}i:a", "dead")
        await a.withdraws("me", me.generation)
        assert server.redis.keys() == [f"{PREFIX}i:a"]


@in_loop
async def test_connect_is_not_marked_after_its_time(frozen: Server) -> None:
    async with workers(frozen, "a") as (a,):
        a.redis_time.learn(now_ms(frozen) - A_MINUTE_MS, time.monotonic())
        frozen.freeze()
        client = Client("me", 0)
        a.registry.announce(b"me", client)
        await a.loses_its_link()
        assert client.events == ["announced"]
        frozen.thaw()
        await holds(lambda: a.link.is_up)
        assert frozen.redis.keys() == []


@in_loop
async def test_connect_that_was_too_late_by_a_wrong_clock_is_marked_once(server: Server) -> None:
    async with workers(server, "a") as (a,):
        a.redis_time.learn(now_ms(server) - A_MINUTE_MS, time.monotonic())
        client = Client("me", 0)
        a.registry.announce(b"me", client)
        await holds(lambda: client.events)
        assert client.events == ["announced"]
        assert server.asking == {"a": {f"me {client.generation}"}}


@in_loop
async def test_connect_is_marked_in_the_end_by_a_redis_that_is_always_late(server: Server) -> None:
    async with workers(server, "a") as (a,):
        a.redis_time.learn = lambda *_: None  # type: ignore[method-assign]
        RedisTime.learn(a.redis_time, now_ms(server) - A_MINUTE_MS, time.monotonic())
        client = Client("me", 0)
        a.registry.announce(b"me", client)
        await holds(lambda: client.events)
        assert client.events == ["announced"]
        assert server.asking == {"a": {f"me {client.generation}"}}


@pytest.mark.parametrize("ahead_s", [0, 3600])
@in_loop
async def test_made_up_generation_is_younger_than_one_that_redis_gave_out_unheard(
    frozen: Server, ahead_s: int
) -> None:
    """The API must not hear of the end of a connection that is younger than the living one."""
    async with workers(frozen, "a") as (a,):
        a.redis_time.learn(now_ms(frozen) + ahead_s * 1000, time.monotonic())
        await a.link.ask("PING")
        frozen.freeze()
        a.registry.announce(b"me", Client("me", 0))
        await a.loses_its_link()
        made_up = a.redis_time.next_generation()
        frozen.thaw()
        await holds(lambda: a.link.is_up)
        await holds(lambda: frozen.asking)
        (mark,) = frozen.asking["a"]
        assert int(mark.split()[1]) < made_up


@in_loop
async def test_made_up_generation_is_younger_than_those_before(server: Server) -> None:
    async with workers(server, "a") as (a,):
        a.redis_time.learn(now_ms(server) - A_MINUTE_MS, time.monotonic())
        before = await a.announces("me")
        a.redis_time.learn(now_ms(server) - A_MINUTE_MS, time.monotonic())
        assert a.redis_time.next_generation() > before.generation


# Redis is away.


@in_loop
async def test_nobody_waits_for_redis_while_it_is_away(server: Server) -> None:
    worker = Worker(server.process.url, "a")
    client = Client("me", 17)
    worker.registry.announce(b"me", client)
    worker.registry.claim(b"me", 17, client)
    worker.registry.withdraw(b"me", 17)
    worker.registry.release(client)
    worker.registry.claim_again([client])
    assert client.events == ["announced", "claimed", ("released", True)]
    with pytest.raises(RedisUnavailable):
        await worker.restores(client)


# Claims that are repeated when Redis is back.


@in_loop
async def test_clients_are_entered_again(server: Server) -> None:
    async with workers(server, "a") as (a,):
        clients = [Client("me", 17), Client("you", 18)]
        await a.claims_again(*clients)
        assert server.owners == {"me": "a 17", "you": "a 18"}
        assert all(client.events == [] for client in clients)
        server.assert_both_indexes_agree()


@pytest.mark.parametrize("first", ["old", "new"])
@in_loop
async def test_newest_of_an_id_wins_in_any_order(server: Server, first: str) -> None:
    async with workers(server, "a", "b") as (a, b):
        old, new = Client("me", 17), Client("me", 18)
        if first == "old":
            await a.claims_again(old)
            await b.claims_again(new)
            await a.settles()
            assert a.notices == [("me", 17)]
        else:
            await b.claims_again(new)
            await a.claims_again(old)
            assert old.events == ["replaced"]
        assert new.events == []
        assert server.owners == {"me": "b 18"}
        server.assert_both_indexes_agree()


@in_loop
async def test_mark_of_a_connect_stays_when_the_open_client_is_entered_again(
    server: Server,
) -> None:
    async with workers(server, "a") as (a,):
        connect = await a.announces("me")
        await a.claims_again(Client("me", 17))
        assert server.marks == {"me": f"a {connect.generation}"}


@in_loop
async def test_many_clients_are_entered_again(server: Server) -> None:
    async with workers(server, "a", "b") as (a, b):
        clients = [Client(f"c{number}", 100) for number in range(MANY)]
        for number in range(0, MANY, 100):
            b.registry.claim(b"c%d" % number, 200, Client(f"c{number}", 200))
        await b.settles()
        await a.claims_again(*clients)
        assert len(server.owners) == MANY
        for number, client in enumerate(clients):
            assert client.events == ([] if number % 100 else ["replaced"])
        server.assert_both_indexes_agree()


@in_loop
async def test_nobody_is_entered_again_when_there_is_nobody(server: Server) -> None:
    async with workers(server, "a") as (a,):
        await a.claims_again()
        assert server.owners == {}


# Redis has forgotten, or remembers too much.


@in_loop
async def test_restore_after_redis_has_forgotten_everything(server: Server) -> None:
    async with workers(server, "a") as (a,):
        me, you = await a.claims("me", 17), Client("you", 18)
        server.redis.flushall()
        await a.restores(me, deciding=(you,))
        assert server.owners == {"me": "a 17"}
        assert server.marks == {"you": "a 18"}
        assert server.asking == {"a": {"you 18"}}
        assert you.events == []
        server.assert_both_indexes_agree()


@in_loop
async def test_restore_takes_out_who_left_meanwhile(server: Server) -> None:
    async with workers(server, "a", "b") as (a, b):
        stays, reconnected = await a.claims("stays", 1), await a.claims("reconnected", 2)
        await a.claims("left", 3)
        await a.claims("moved", 4)
        await b.claims("moved", 5)
        reconnected = Client("reconnected", 6)
        await a.restores(stays, reconnected)
        assert server.owners == {"stays": "a 1", "reconnected": "a 6", "moved": "b 5"}
        assert stays.events == ["claimed"]
        assert reconnected.events == []
        server.assert_both_indexes_agree()


@in_loop
async def test_restore_gives_way_to_who_moved_meanwhile(server: Server) -> None:
    async with workers(server, "a", "b") as (a, b):
        moved = await a.claims("me", 17)
        server.redis.flushall()
        await b.claims("me", 18)
        await a.restores(moved)
        assert moved.events == ["claimed", "replaced"]
        assert server.owners == {"me": "b 18"}
        server.assert_both_indexes_agree()


@in_loop
async def test_restore_of_many(server: Server) -> None:
    async with workers(server, "a") as (a,):
        for number in range(MANY):
            a.registry.claim(b"gone%d" % number, 1, Client("", 1))
        await a.settles()
        clients = [Client(f"new{number}", 2) for number in range(MANY)]
        await a.restores(*clients)
        assert server.owners == {f"new{number}": "a 2" for number in range(MANY)}
        server.assert_both_indexes_agree()


@in_loop
async def test_restore_takes_back_connects_that_came_to_nothing(server: Server) -> None:
    async with workers(server, "a", "b") as (a, b):
        stays, again = await a.announces("stays"), await a.announces("again")
        await a.announces("left")
        moved = await a.announces("moved")
        others = await b.announces("moved")
        newer = Client("again", again.generation + 1)
        await a.restores(deciding=(stays, newer))
        assert server.asking == {
            "a": {f"stays {stays.generation}", f"again {newer.generation}"},
            "b": {f"moved {others.generation}"},
        }
        assert server.marks == {
            "stays": f"a {stays.generation}",
            "again": f"a {newer.generation}",
            "moved": f"b {others.generation}",
        }
        assert moved.generation < others.generation


@in_loop
async def test_restore_of_many_connects(server: Server) -> None:
    async with workers(server, "a") as (a,):
        clients = [Client(f"c{number}", 0) for number in range(MANY)]
        for client in clients:
            a.registry.announce(client.client_id, client)
        await a.settles()
        await a.restores(deciding=clients[::2])
        expected = {f"{each.client_id.decode()} {each.generation}" for each in clients[::2]}
        assert server.asking == {"a": expected}
        assert len(server.marks) == len(expected)


@in_loop
async def test_connect_that_redis_has_yet_to_mark_is_not_entered(server: Server) -> None:
    async with workers(server, "a") as (a,):
        await a.restores(deciding=(Client("me", 0),))
        assert server.asking == server.marks == {}


@in_loop
async def test_restored_connects_are_known_again(server: Server) -> None:
    async with workers(server, "a") as (a,):
        connect = await a.announces("me")
        server.redis.flushall()
        await a.restores(deciding=(connect,))
        assert server.asking == {"a": {f"me {connect.generation}"}}
        assert cast(int, server.redis.pttl(f"{PREFIX}p:me")) > PENDING_S * 1000
        await a.claims("me", connect.generation)
        assert server.asking == server.marks == {}


@pytest.mark.parametrize("forgets", [False, True])
@in_loop
async def test_restore_keeps_every_connect_of_an_id(server: Server, forgets: bool) -> None:
    async with workers(server, "a") as (a,):
        older, newer = await a.announces("me"), await a.announces("me")
        if forgets:
            server.redis.flushall()
        await a.restores(deciding=(older, newer))
        assert server.asking == {"a": entries([older, newer])}
        assert server.marks == {"me": f"a {newer.generation}"}, "pushes go to the newest"


class Lost(Exception):
    """The worker dies here."""


@in_loop
async def test_restore_takes_nothing_out_before_all_is_entered(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies(*_: object) -> AsyncIterator[list[bytes]]:
        raise Lost
        yield []

    async with workers(server, "a") as (a,):
        await a.claims("left", 1)
        asked = await a.announces("asked")
        opened = await a.announces("opened")
        # Both were decided while Redis was away: it knows nothing of one, the other has opened.
        new = Client("new", 17)
        monkeypatch.setattr(registry_module, "scan", dies)
        with pytest.raises(Lost):
            await a.restores(opened, deciding=(new,))
        await a.settles()
        assert server.members == {"a": {"left": "1", "opened": f"{opened.generation}"}}
        assert server.asking == {"a": entries([asked, new])}
        monkeypatch.undo()
        await a.restores(opened, deciding=(new,))
        assert server.members == {"a": {"opened": f"{opened.generation}"}}
        assert server.asking == {"a": entries([new])}


@in_loop
async def test_connects_that_begin_while_redis_is_restored_stay(server: Server) -> None:
    async with workers(server, "a") as (a,):
        for number in range(MANY):
            a.registry.announce(b"gone%d" % number, Client("", 0))
        await a.settles()
        clients = [Client(f"c{number}", 0) for number in range(MANY)]

        async def go_on() -> None:
            for number, client in enumerate(clients):
                a.registry.announce(client.client_id, client)
                if number % 20 == 0:
                    await asyncio.sleep(0)

        await asyncio.gather(
            go_on(),
            a.registry.restore({}, {}, lambda: [each for each in clients if each.generation]),
        )
        await a.settles()
        assert server.asking == {"a": entries(clients)}
        assert len(server.marks) == MANY


@in_loop
async def test_connect_that_is_claimed_while_redis_is_restored_is_decided(server: Server) -> None:
    async with workers(server, "a") as (a,):
        client = await a.announces("me")
        client.events.clear()
        is_open: dict[bytes, Client] = {}
        connecting = {client.client_id: client}

        def deciding() -> list[Client]:
            if client.events == ["claimed"] and connecting:
                is_open.update(connecting)
                connecting.clear()
            return list(connecting.values())

        a.registry.claim(b"me", client.generation, client)  # on its way
        await a.registry.restore(is_open, connecting, deciding)
        await a.settles()
        assert not connecting
        assert server.asking == server.marks == {}


@in_loop
async def test_restore_owes_nothing_of_its_own(server: Server) -> None:
    async with workers(server, "a") as (a,):
        await a.claims("left", 17)
        await a.announces("refused")
        await a.restores()
        assert server.owed == {}, "whoever has ended says so itself"
        assert not server.redis.keys("*")


@in_loop
async def test_restore_says_when_redis_is_lost_again(server: Server) -> None:
    async with workers(server, "a") as (a,):
        await a.claims("left", 17)
        a.link.reset()
        with pytest.raises(RedisUnavailable):
            await a.registry.restore({}, {}, list)
        assert server.members == {"a": {"left": "17"}}


# Every connection of which the API may know has a trace in Redis until it is owed no more.

lives = st.lists(
    st.tuples(
        st.sampled_from(("connect", "accept", "refuse", "end", "hear", "restore")),
        st.integers(0, 1),
        st.sampled_from(("me", "you")),
        st.integers(0, 5),
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=25)
@given(lives)
def test_no_connection_is_lost_sight_of(
    shared_server: Server, lives: list[tuple[str, int, str, int]]
) -> None:
    shared_server.redis.flushall()
    _live(shared_server, lives)


class Book:
    """Know the connections of one worker, as the API does."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.asking: list[Client] = []
        self.open: list[Client] = []
        self.ended: list[Client] = []

    async def connects(self, client_id: str) -> None:
        self.asking.append(await self.worker.announces(client_id))

    async def is_accepted(self, client: Client, all_books: list[Book]) -> None:
        self.asking.remove(client)
        client.events.clear()
        self.worker.registry.claim(client.client_id, client.generation, client)
        await self.worker.settles()
        if client.events == ["claimed"]:
            for book in all_books:  # they are told, and give way
                book.open = [each for each in book.open if each.client_id != client.client_id]
            self.open.append(client)

    async def is_refused(self, client: Client) -> None:
        self.asking.remove(client)
        await self.worker.withdraws(client.client_id.decode(), client.generation)

    async def ends(self, client: Client) -> None:
        self.open.remove(client)
        client.events.clear()
        self.worker.registry.release(client)
        await self.worker.settles()
        assert client.events == [("released", True)]
        self.ended.append(client)

    async def is_heard_of(self, client: Client, server: Server) -> None:
        self.ended.remove(client)
        server.redis.hdel(f"{PREFIX}e:{self.worker.name}", *entries([client]))

    def assert_kept_in(self, server: Server) -> None:
        name = self.worker.name
        members = server.members.get(name, {})
        assert server.asking.get(name, set()) == entries(self.asking)
        assert {f"{key} {value}" for key, value in members.items()} == entries(self.open)
        assert server.owed.get(name, {}).keys() == entries(self.ended)


def entries(clients: list[Client]) -> set[str]:
    return {f"{client.client_id.decode()} {client.generation}" for client in clients}


@in_loop
async def _live(server: Server, lives: list[tuple[str, int, str, int]]) -> None:
    async with workers(server, "a", "b") as all_workers:
        books = [Book(worker) for worker in all_workers]
        for action, number, client_id, choice in lives:
            book = books[number]
            if action == "connect":
                await book.connects(client_id)
            elif action == "restore":
                await book.worker.restores(*book.open, deciding=tuple(book.asking))
            elif action == "accept" and book.asking:
                await book.is_accepted(book.asking[choice % len(book.asking)], books)
            elif action == "refuse" and book.asking:
                await book.is_refused(book.asking[choice % len(book.asking)])
            elif action == "end" and book.open:
                await book.ends(book.open[choice % len(book.open)])
            elif action == "hear" and book.ended:
                await book.is_heard_of(book.ended[choice % len(book.ended)], server)
            for each in books:
                each.assert_kept_in(server)
            server.assert_both_indexes_agree()


# Any order of claims and releases.

Operation = tuple[str, int, str, int]
operations = st.lists(
    st.tuples(
        st.sampled_from(("claim", "claim", "release", "again")),
        st.integers(0, 2),
        st.sampled_from(("me", "you")),
        st.integers(0, 30),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=25)
@given(operations)
def test_redis_agrees_with_the_youngest_claim(
    shared_server: Server, operations: list[Operation]
) -> None:
    shared_server.redis.flushall()
    _play(shared_server, operations)


@in_loop
async def _play(server: Server, operations: list[Operation]) -> None:
    owners: dict[str, tuple[str, int]] = {}
    notices: dict[str, list[tuple[str, int]]] = {"a": [], "b": [], "c": []}
    async with workers(server, *notices) as all_workers:
        for action, number, client_id, generation in operations:
            worker = all_workers[number]
            owner = owners.get(client_id)
            mine = worker.name, generation
            if action == "release":
                assert await worker.releases(client_id, generation) == (owner in (None, mine))
                if owner == mine:
                    del owners[client_id]
            elif owner is not None and owner[1] > generation:
                if action == "again":
                    client = Client(client_id, generation)
                    await worker.claims_again(client)
                    assert client.events == ["replaced"]
                else:
                    client = await worker.claims(client_id, generation)
                    assert client.events == ["lost"]
            else:
                if action == "claim":
                    await worker.claims(client_id, generation)
                else:
                    await worker.claims_again(Client(client_id, generation))
                owners[client_id] = mine
                if owner is not None and owner[0] != worker.name:
                    notices[owner[0]].append((client_id, owner[1]))
        for worker in all_workers:
            await worker.settles()
            assert worker.notices == notices[worker.name]
        assert server.owners == {key: f"{name} {number}" for key, (name, number) in owners.items()}
        server.assert_both_indexes_agree()
