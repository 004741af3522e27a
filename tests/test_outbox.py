"""Owe the API ends of connections, in a real Valkey server that is there, away, or slow."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from harness.looping import holds, in_loop
from harness.redis_server import RedisServer, redis_server
from harness.waiting import until
from ws2api.gateway import counters as c
from ws2api.gateway import disconnects
from ws2api.gateway import outbox as outbox_module
from ws2api.gateway import registry as registry_module
from ws2api.gateway import worker as worker_module
from ws2api.gateway.disconnects import TAKE_OVER, WORKER_LOST
from ws2api.gateway.errors import RedisUnavailable
from ws2api.gateway.fence import Fence
from ws2api.gateway.outbox import Outbox
from ws2api.gateway.redis_link import RedisLink
from ws2api.gateway.redis_time import RedisTime
from ws2api.gateway.registry import Registry
from ws2api.gateway.sweeper import Sweeper

PREFIX = "test:"
# More than two batches, of whatever.
MANY = 1_200
# For how long the API may decide on a connect: longer than any test takes.
PENDING_S = 60.0
REASONS = [
    "",
    "bye",
    "so long, and thanks",
    "4008 7",
    "two\nlines\r\n",
    "nul\0nul",
    "grün",
    "x" * 99,
]


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("valkey"), PREFIX) as server:
        yield server


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    """Use the shared server, empty."""
    shared_server.redis.flushall()
    return shared_server


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    """Use a server that the test may freeze."""
    with redis_server(tmp_path, PREFIX) as server:
        yield server


class Departed:
    """Be a connection that has ended."""

    def __init__(self, client_id: str, generation: int, code: int = 1000, reason: str = "bye"):
        self.client_id = client_id.encode()
        self.generation = generation
        self.close_code = code
        self.close_reason: str | None = reason
        self.was_released = False

    @property
    def entry(self) -> str:
        return f"{self.client_id.decode()} {self.generation}"

    @property
    def end(self) -> str:
        return f"{self.close_code} {self.close_reason}"

    @property
    def fields(self) -> dict[str, str]:
        """What the reapers find in the stream."""
        return {
            "id": self.client_id.decode(),
            "generation": str(self.generation),
            "code": str(self.close_code),
            "reason": self.close_reason or "",
        }

    # What the registry tells it.

    def on_announced(self, generation: int | None) -> None:
        """Be asked about already."""

    def on_claimed(self, owned: bool = True) -> None:
        """Be open already."""

    def on_released(self, owned: bool) -> None:
        self.was_released = True

    def replace(self) -> None:
        """Be gone already."""


class Worker:
    """Hold the outbox of one worker."""

    def __init__(self, url: str, name: str, bound: int) -> None:
        loop = asyncio.get_running_loop()
        self.name = name
        self.ups = 0
        self.link = RedisLink(
            url,
            name,
            loop,
            Sweeper(loop),
            self._on_up,
            lambda: None,
            scripts=(*registry_module.SCRIPTS, *disconnects.SCRIPTS),
        )
        fence = Fence(name)
        self.outbox = Outbox(self.link, PREFIX, fence, bound, PENDING_S, loop.call_soon)
        self.registry = Registry(self.link, PREFIX, fence, RedisTime(), PENDING_S)

    def _on_up(self) -> None:
        self.ups += 1

    async def settled(self) -> None:
        """Wait until all that is due in this tick was sent, and answered."""
        await asyncio.sleep(0)
        await self.link.ask("PING")

    async def owes(self, *ends: Departed) -> None:
        """Let connections end, of which the API is to be told."""
        for end in ends:
            self.registry.claim(end.client_id, end.generation, end)
            self.registry.release(end)
        await self.settled()

    async def is_cut_off(self) -> None:
        """Lose the connection, and get another."""
        ups = self.ups
        self.link.reset()
        await holds(lambda: self.link.is_up and self.ups > ups)

    async def restores(self, *owed: Departed) -> None:
        await self.outbox.restore(lambda: owed)
        await self.settled()


@contextlib.asynccontextmanager
async def worker_of(
    server: RedisServer, name: str = "a", bound: int = 100_000
) -> AsyncIterator[Worker]:
    worker = Worker(server.url, name, bound)
    worker.link.start()
    try:
        await holds(lambda: worker.link.is_up)
        yield worker
    finally:
        await worker.link.stop()


def some(count: int, name: str = "c") -> list[Departed]:
    return [Departed(f"{name}{number}", number + 1) for number in range(count)]


# The API has heard.


@in_loop
async def test_end_that_the_api_has_heard_of_is_struck_off(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        end, other, older = Departed("me", 17), Departed("you", 17), Departed("me", 16)
        await worker.owes(older, end, other)
        assert server.owed("a") == {each.entry: "1000 bye" for each in (end, other, older)}
        worker.outbox.settle(end)
        await worker.settled()
        assert server.owed("a") == {each.entry: "1000 bye" for each in (other, older)}


@in_loop
async def test_ends_of_one_tick_are_struck_off_together(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        ends = some(MANY)
        await worker.owes(*ends)
        server.redis.config_resetstat()
        for end in ends:
            worker.outbox.settle(end)
        await worker.settled()
        assert server.owed("a") == {}
        assert server.calls("hdel") == 3

        await worker.owes(Departed("me", 1))
        worker.outbox.settle(Departed("me", 1))
        await worker.settled()
        assert server.owed("a") == {}, "those of the next tick, too"


@in_loop
async def test_settling_while_redis_is_away_is_made_up_for(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        heard, owed = Departed("heard", 1), Departed("owed", 2)
        await worker.owes(heard, owed)
        worker.link.reset()
        worker.outbox.settle(heard)
        await holds(lambda: worker.ups == 2)
        assert len(server.owed("a")) == 2
        await worker.restores(owed)
        assert server.owed("a") == {owed.entry: owed.end}


# Left to the reapers.


@pytest.mark.parametrize("reason", REASONS)
@in_loop
async def test_parked_end_is_in_the_stream_and_owed_no_more(
    server: RedisServer, reason: str
) -> None:
    async with worker_of(server) as worker:
        parked, other = Departed("me", 17, 4001, reason), Departed("you", 18)
        await worker.owes(parked, other)
        assert worker.outbox.park(parked)
        assert worker.outbox.unconfirmed == 1
        await worker.settled()
        assert worker.outbox.unconfirmed == 0
        assert server.stream == [parked.fields]
        assert server.owed("a") == {other.entry: other.end}


@in_loop
async def test_end_without_a_reason_is_parked(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        end = Departed("me", 17)
        end.close_reason = None
        assert worker.outbox.park(end)
        await worker.settled()
        assert server.stream == [end.fields]


@in_loop
async def test_ends_are_parked_in_their_order(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        ends = some(MANY)
        assert all(worker.outbox.park(end) for end in ends)
        await worker.settled()
        assert server.stream == [end.fields for end in ends]


@in_loop
async def test_oldest_fall_off_when_too_many_are_parked(server: RedisServer) -> None:
    async with worker_of(server, bound=3) as worker:
        ends = some(5)
        for end in ends:
            assert worker.outbox.park(end)
        await worker.settled()
        assert server.stream == [end.fields for end in ends[2:]]
        assert server.redis.get(f"{PREFIX}dropped") == "2"


@in_loop
async def test_nothing_is_parked_while_redis_is_away(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        worker.link.reset()
        await holds(lambda: not worker.link.is_up)
        assert not worker.outbox.park(Departed("me", 17))
        assert worker.outbox.unconfirmed == 0
        await holds(lambda: worker.link.is_up)
        await worker.restores()
        assert server.stream == []


@in_loop
async def test_parking_that_did_not_reach_redis_is_repeated(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        end = Departed("me", 17)
        await worker.owes(end)
        assert worker.outbox.park(end)
        await worker.is_cut_off()  # before it was written
        assert server.stream == []
        assert worker.outbox.unconfirmed == 1
        server.redis.config_resetstat()
        await worker.restores()  # the session has done with it
        assert worker.outbox.unconfirmed == 0
        assert server.calls("hdel") == 1, "owed until it is in the stream"
        assert server.stream == [end.fields]
        assert server.owed("a") == {}


@in_loop
async def test_parking_is_repeated_until_redis_confirms_it(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        end = Departed("me", 17)
        assert worker.outbox.park(end)
        await worker.is_cut_off()
        worker.link.reset()
        with pytest.raises(RedisUnavailable):
            await worker.outbox.restore(lambda: ())
        await holds(lambda: worker.ups == 3)
        assert worker.outbox.unconfirmed == 1
        assert server.stream == []
        await worker.restores()
        assert worker.outbox.unconfirmed == 0
        assert server.stream == [end.fields]


@in_loop
async def test_parking_that_redis_could_not_confirm_is_repeated(own_server: RedisServer) -> None:
    async with worker_of(own_server) as worker:
        end = Departed("me", 17)
        await worker.owes(end)
        own_server.freeze()
        assert worker.outbox.park(end)
        for _ in range(10):  # it is written, and nobody reads it yet
            await asyncio.sleep(0)
        worker.link.reset()
        own_server.thaw()
        await holds(lambda: worker.ups == 2)
        until(lambda: own_server.stream == [end.fields], what="Redis has taken it all the same")
        assert worker.outbox.unconfirmed == 1
        await worker.restores()
        assert worker.outbox.unconfirmed == 0
        assert own_server.stream == [end.fields] * 2, "twice, rather than not at all"


@in_loop
async def test_what_redis_refuses_is_parked_when_it_takes_it(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        end = Departed("me", 17)
        server.redis.script_flush()
        assert worker.outbox.park(end)
        await holds(lambda: worker.ups == 2)  # with its scripts
        assert worker.outbox.unconfirmed == 1
        await worker.restores()
        assert server.stream == [end.fields]


# Redis is back.


@in_loop
async def test_restore_makes_redis_agree(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        heard, owed, new = Departed("heard", 1), Departed("owed", 2), Departed("new", 3, 4000, "")
        await worker.owes(heard, owed)
        server.redis.hset(f"{PREFIX}e:other", "stranger 1", "1000 ")
        for _ in range(2):
            await worker.restores(owed, new)
            assert server.owed("a") == {owed.entry: owed.end, new.entry: new.end}
        assert server.owed("other") == {"stranger 1": "1000 "}
        assert server.stream == []


@pytest.mark.parametrize("reason", REASONS)
@in_loop
async def test_restored_end_is_written_as_a_release_writes_it(
    server: RedisServer, reason: str
) -> None:
    async with worker_of(server) as worker:
        end = Departed("me", 17, 4001, reason)
        await worker.owes(end)
        released = server.owed("a")
        server.redis.flushall()
        await worker.restores(end)
        assert server.owed("a") == released == {end.entry: end.end}


@in_loop
async def test_restore_after_redis_has_forgotten_everything(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        owed, parking = some(MANY), some(MANY, "p")
        await worker.owes(*owed)
        for end in parking:
            assert worker.outbox.park(end)
        await worker.is_cut_off()
        server.redis.flushall()
        server.redis.script_flush("SYNC")
        await worker.is_cut_off()  # it loads the scripts again
        await worker.restores(*owed)
        assert server.owed("a") == {end.entry: end.end for end in owed}
        assert server.stream == [end.fields for end in parking]
        assert worker.outbox.unconfirmed == 0


class Lost(Exception):
    """The worker dies here."""


@in_loop
async def test_restore_strikes_nothing_off_before_all_is_entered(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies(*_: object) -> AsyncIterator[list[bytes]]:
        raise Lost
        yield []

    async with worker_of(server) as worker:
        heard, owed, parked = Departed("heard", 1), Departed("owed", 2), Departed("parked", 3)
        await worker.owes(heard)
        assert worker.outbox.park(parked)
        await worker.is_cut_off()  # before it was written
        monkeypatch.setattr(outbox_module, "scan", dies)
        with pytest.raises(Lost):
            await worker.restores(owed)
        await worker.settled()
        assert server.owed("a") == {heard.entry: heard.end, owed.entry: owed.end}
        assert server.stream == [parked.fields]


@in_loop
async def test_worker_enters_ends_before_it_takes_open_connections_out() -> None:
    """An end while Redis was away may be known there only as a connection that is open."""
    steps: list[str] = []

    def room(name: str) -> object:
        async def note(*_: object) -> None:
            steps.append(name)

        return SimpleNamespace(check=note, restore=note)

    worker = cast(Any, object.__new__(worker_module.Worker))
    worker._lease, worker._outbox, worker._registry = map(room, ("lease", "outbox", "registry"))
    worker._hub = SimpleNamespace(clients={}, connecting={})
    worker._slot = {c.RESTORING: 1}
    await worker._restore()
    assert steps == ["lease", "outbox", "registry"]
    assert worker._slot == {c.RESTORING: 0}


@in_loop
async def test_restore_of_many_that_the_api_has_heard_of(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        ends = some(MANY)
        await worker.owes(*ends)
        await worker.restores(*ends[::3])
        assert server.owed("a") == {end.entry: end.end for end in ends[::3]}


@in_loop
async def test_what_ends_while_redis_is_restored_stays_owed(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        heard, owed = some(MANY, "h"), some(MANY, "o")
        await worker.owes(*heard, *owed[:10])
        ending = iter(owed[10:])
        known = owed[:10]
        server.redis.config_resetstat()

        async def go_on() -> None:
            for end in ending:
                worker.registry.claim(end.client_id, end.generation, end)
                worker.registry.release(end)
                known.append(end)  # as far as the session knows
                if end.generation % 20 == 0:
                    await asyncio.sleep(0)

        await asyncio.gather(
            go_on(),
            worker.outbox.restore(lambda: [end for end in known if end.was_released]),
        )
        await worker.settled()
        assert server.owed("a") == {end.entry: end.end for end in owed}
        # Each release takes the client out of another hash; beside that:
        assert server.calls("hdel") - (MANY - 10) == len(heard), "none was struck off meanwhile"


@in_loop
async def test_what_the_api_hears_while_redis_is_restored_is_owed_no_more(
    server: RedisServer,
) -> None:
    async with worker_of(server) as worker:
        owed = some(MANY)
        await worker.owes(*owed)

        async def go_on() -> None:
            while owed:
                worker.outbox.settle(owed.pop())
                if len(owed) % 20 == 0:
                    await asyncio.sleep(0)

        await asyncio.gather(go_on(), worker.outbox.restore(lambda: owed))
        await worker.settled()
        assert server.owed("a") == {}


@in_loop
async def test_restore_says_when_redis_is_lost_again(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        await worker.owes(*some(MANY))
        worker.link.reset()
        with pytest.raises(RedisUnavailable):
            await worker.outbox.restore(lambda: ())
        await holds(lambda: worker.ups == 2)
        await worker.restores()
        assert server.owed("a") == {}


# The worker ends.


def leave_behind(server: RedisServer, worker: str, count: int) -> None:
    """Enter connections in every state."""
    server.redis.zadd(f"{PREFIX}leases", {worker: server.now_ms + 60_000})
    for number in range(count):
        server.redis.hset(f"{PREFIX}w:{worker}", f"open{number}", "1")
        server.redis.set(f"{PREFIX}c:open{number}", f"{worker} 1")
        server.redis.sadd(f"{PREFIX}a:{worker}", f"asking{number} 2")
        server.redis.set(f"{PREFIX}p:asking{number}", f"{worker} 2")
        server.redis.hset(f"{PREFIX}e:{worker}", f"ended{number} 3", "4001 bye")


@in_loop
async def test_all_that_is_left_is_handed_over(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        leave_behind(server, "a", 1)
        leave_behind(server, "other", 1)
        assert await worker.outbox.hand_over() == 3
        lost = {"code": "1006", "reason": WORKER_LOST}
        assert server.stream == [
            {"id": "open0", "generation": "1", **lost},
            {"id": "asking0", "generation": "2", **lost},
            {"id": "ended0", "generation": "3", "code": "4001", "reason": "bye"},
        ]
        assert server.leases.keys() == {"other"}
        assert server.keys == {
            *("disconnects", "leases", "w:other", "a:other", "e:other", "i:a"),
            *("c:open0", "p:asking0"),  # the other's, which came last
        }


@in_loop
async def test_many_are_handed_over(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        leave_behind(server, "a", MANY)
        assert await worker.outbox.hand_over() == 3 * MANY
        assert len({fields["id"] for fields in server.stream}) == 3 * MANY
        assert server.keys == {"disconnects", "i:a"}


@in_loop
async def test_client_that_is_back_is_not_handed_over(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        gone, back = Departed("gone", 1), Departed("back", 1)
        await worker.owes(gone, back)
        server.redis.set(f"{PREFIX}c:back", "other 2")
        assert await worker.outbox.hand_over() == 1
        assert server.stream == [gone.fields]
        assert server.owed("a") == {}


@in_loop
async def test_what_was_just_parked_is_handed_over_once(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        ends = some(MANY)
        await worker.owes(*ends)
        for end in ends:
            assert worker.outbox.park(end)
        assert await worker.outbox.hand_over() == 0
        assert server.stream == [end.fields for end in ends]
        assert worker.outbox.unconfirmed == 0


@in_loop
async def test_what_is_parked_after_all_was_handed_over_is_there_once(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        ends = some(MANY)
        await worker.owes(*ends)
        handing_over = asyncio.ensure_future(worker.outbox.hand_over())
        await asyncio.sleep(0)
        assert all(worker.outbox.park(end) for end in ends)
        assert await handing_over == MANY
        assert worker.outbox.park(ends[0])
        await worker.settled()
        assert len(server.stream) == MANY
        assert {fields["id"] for fields in server.stream} == {each.fields["id"] for each in ends}
        assert worker.outbox.unconfirmed == 0


@in_loop
async def test_end_that_redis_may_know_nothing_of_is_handed_over_once(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        known, unknown = Departed("known", 1), Departed("unknown", 2)
        await worker.owes(known)
        worker.outbox.enter([known, unknown])
        assert await worker.outbox.hand_over() == 2
        assert worker.outbox.park(unknown)
        await worker.settled()
        assert {fields["id"] for fields in server.stream} == {"known", "unknown"}
        assert len(server.stream) == 2


@in_loop
async def test_what_the_api_has_just_heard_is_not_handed_over(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        heard, owed = some(MANY), Departed("owed", 1)
        await worker.owes(*heard, owed)
        for end in heard:
            worker.outbox.settle(end)
        assert await worker.outbox.hand_over() == 1
        assert server.stream == [owed.fields]
        await worker.settled()  # when they would have been struck off
        assert server.keys == {"disconnects", "i:a"}


def asks(server: RedisServer, worker: str, count: int) -> set[str]:
    """Enter connects on which the API may be at work for as long again."""
    born = int((server.now_ms - PENDING_S * 1000 / 2) * 1000)
    marks = {f"young{number} {born}" for number in range(count)}
    server.redis.sadd(f"{PREFIX}a:{worker}", *marks)
    return marks


@pytest.mark.parametrize("count", [1, MANY])
@in_loop
async def test_connects_that_the_api_may_be_deciding_on_are_left_for_later(
    server: RedisServer, count: int
) -> None:
    async with worker_of(server) as worker:
        leave_behind(server, "a", 10)
        young = asks(server, "a", count)
        moved = await worker.outbox.hand_over()
        if count == 1:  # else those that are old are hard to find, and left for later, too
            assert moved == 30
            assert server.asking("a") == young
        assert young <= server.asking("a")
        assert not server.open("a")
        assert not server.owed("a")
        assert server.leases == {"a": 0}, "so that the reapers come back"

        takes_over = server.redis.register_script(TAKE_OVER.source)
        more = 1
        while more:
            _, _, more = takes_over(keys=[PREFIX], args=["a", 100_000, 0, 0])
        assert len(server.stream) == 30 + count
        assert server.keys == {"disconnects", "i:a"}


@in_loop
async def test_connect_that_is_left_for_later_may_come_to_nothing(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        (mark,) = asks(server, "a", 1)
        assert await worker.outbox.hand_over() == 0
        client_id, _, generation = mark.partition(" ")
        worker.registry.withdraw(client_id.encode(), int(generation))
        assert await worker.outbox.hand_over() == 0
        assert server.keys == {"i:a"}


@in_loop
async def test_nothing_is_handed_over_when_nothing_is_left(server: RedisServer) -> None:
    async with worker_of(server) as worker:
        server.redis.zadd(f"{PREFIX}leases", {"a": server.now_ms + 60_000})
        assert await worker.outbox.hand_over() == 0
        assert server.keys == {"i:a"}


@in_loop
async def test_handing_over_keeps_to_the_bound(server: RedisServer) -> None:
    async with worker_of(server, bound=100) as worker:
        leave_behind(server, "a", 200)
        assert await worker.outbox.hand_over() == 600
        assert len(server.stream) == 100
        assert server.redis.get(f"{PREFIX}dropped") == "500"


@pytest.mark.parametrize("moment", ["before", "meanwhile"])
@in_loop
async def test_what_could_not_be_handed_over_stays(server: RedisServer, moment: str) -> None:
    async with worker_of(server) as worker:
        leave_behind(server, "a", 1)
        handing_over = worker.outbox.hand_over()
        worker.link.reset()
        if moment == "before":
            await holds(lambda: not worker.link.is_up)
        with pytest.raises(RedisUnavailable):
            await handing_over
        assert server.stream == []
        assert server.open("a") == {"open0": "1"}
        assert server.leases.keys() == {"a"}, "whose end tells the reapers"
