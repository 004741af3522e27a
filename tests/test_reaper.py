"""Let workers die in a real Valkey, and see what reapers tell a real API."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import uvloop
from aiohttp import web
from harness.disconnect_store import BORN, LEASE_MS, Store
from harness.fault_proxy import FaultProxy
from harness.valkey import ValkeyProcess
from harness.waiting import DEADLINE_S, POLL_S
from redis import Redis, exceptions
from structlog.testing import capture_logs
from ws2api.gateway import counters as c
from ws2api.gateway.disconnects import GROUP, LEASES
from ws2api.gateway.settings import load
from ws2api.supervisor import reaper as reaper_module
from ws2api.supervisor.reaper import Reaper

CLIENTS: Final = 2000
FOREVER_S: Final = 3600.0

Delete = tuple[str, int, int, str]
"""Client id, generation, close code, reason."""


class Api:
    """Serve DELETEs, and note each; a test may close it and open it again."""

    def __init__(self) -> None:
        self.deletes: list[Delete] = []
        self.times: list[float] = []
        self.status: Callable[[str], int] = lambda client_id: 200
        self.hold: asyncio.Event | None = None
        self.port = 0
        self._runner: web.ServerRunner | None = None

    @property
    def counts(self) -> Counter[Delete]:
        return Counter(self.deletes)

    @property
    def clients(self) -> set[str]:
        return {delete[0] for delete in self.deletes}

    async def open(self) -> None:
        self._runner = web.ServerRunner(web.Server(self._serve), shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _serve(self, request: web.BaseRequest) -> web.Response:
        assert request.method == "DELETE"
        client_id = request.raw_path.removeprefix("/api/")
        delete = (
            client_id,
            int(request.headers["Ws2api-Generation"]),
            int(request.headers["Ws2api-Close-Code"]),
            await request.text(),
        )
        self.times.append(time.monotonic())
        if self.hold is not None:
            await self.hold.wait()
        status = self.status(client_id)
        if 200 <= status < 300:
            self.deletes.append(delete)
        return web.Response(status=status)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    with ValkeyProcess(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def store(server: ValkeyProcess) -> Iterator[Store]:
    with Redis.from_url(server.url) as redis:
        redis.flushall()
        yield Store(redis)


@pytest.fixture(autouse=True)
def watch_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaper_module, "_WATCH_EVERY_S", 0.02)
    monkeypatch.setattr(reaper_module, "_MEASURE_EVERY_S", 0.02)
    monkeypatch.setattr(reaper_module, "_LOOK_AT_POLICY_EVERY_S", 0.02)


@asynccontextmanager
async def an_api() -> AsyncIterator[Api]:
    api = Api()
    await api.open()
    try:
        yield api
    finally:
        await api.close()


class Reaping:
    """Hold a reaper that runs, and what it counts."""

    def __init__(self, reaper: Reaper, figures: Any) -> None:
        self.reaper = reaper
        self.figures = figures
        self.left: int | None = -1
        self.is_stopped = False

    async def stop(self) -> None:
        if not self.is_stopped:
            self.is_stopped = True
            self.left = await self.reaper.stop()


@asynccontextmanager
async def reaping(
    api: Api,
    url: str,
    instance: str = "one",
    living: Collection[str] = (),
    trust_s: float = 0.0,
    options: tuple[str, ...] = (),
) -> AsyncIterator[Reaping]:
    settings = load(
        ["--api", f"http://127.0.0.1:{api.port}/api/", "--reap-rate", "100000", *options]
    )
    figures = c.Counters(1).reaper
    reaper = Reaper(settings, url, instance, lambda: living, figures, trust_s=trust_s)
    running = Reaping(reaper, figures)
    reaper.start()
    try:
        yield running
    finally:
        await running.stop()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a scenario on the loop of the real process, without asyncio's costly debugging."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop, debug=False) as runner:
        runner.run(scenario)


async def until(condition: Callable[[], object], what: object = "") -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what or condition
        await asyncio.sleep(POLL_S)


def lost(client_id: str, generation: int = BORN) -> Delete:
    return client_id, generation, 1006, "worker lost"


def fill(store: Store, worker: str, count: int) -> set[Delete]:
    """Open connections; return the DELETEs that their loss leads to."""
    ids = {f"{worker}-{number}": BORN + number for number in range(count)}
    store.redis.hset(store.key("w:", worker), mapping=ids)
    store.redis.mset({store.key("c:", name): f"{worker} {born}" for name, born in ids.items()})
    return {lost(name, born) for name, born in ids.items()}


def is_empty(store: Store) -> bool:
    return store.redis.xlen(store.stream) == 0


class TestLostWorkers:
    def test_of_its_own_gateway_at_once(self, store: Store, server: ValkeyProcess) -> None:
        for worker in ("one-0-0", "one-1-0", "two-0-0"):
            store.renew(worker)
            store.open(worker, f"of-{worker}")

        async def scenario() -> None:
            async with (
                an_api() as api,
                reaping(api, server.url, living={"one-1-0"}, trust_s=FOREVER_S) as one,
            ):
                await until(lambda: api.deletes and is_empty(store))
                assert api.deletes == [lost("of-one-0-0")]
                assert one.figures[c.REAPER_TAKEN_OVER] == 1
                assert one.figures[c.REAPER_DELIVERED] == 1
                leases = store.redis.zrange(store.key(LEASES), 0, -1)
                assert leases == [b"one-1-0", b"two-0-0"]
                assert store.redis.exists(store.key("c:of-one-1-0"), store.key("c:of-two-0-0")) == 2

        run(scenario())

    def test_looks_again_for_what_arrives_late(
        self, store: Store, server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A worker's last words can be on their way to Redis when it is known to be dead."""
        monkeypatch.setattr(reaper_module, "_LOOK_AGAIN_S", 0.2)
        store.renew("one-0-0")
        store.open("one-0-0", "ann")

        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url, trust_s=FOREVER_S) as one:
                await until(lambda: one.reaper._look_again_at)
                store.open("one-0-0", "bob")
                await until(lambda: api.clients == {"ann", "bob"})
                assert not one.reaper._look_again_at

        run(scenario())

    def test_one_that_cannot_be_read_stops_nobody_else(
        self, store: Store, server: ValkeyProcess
    ) -> None:
        store.redis.set(store.key("w:one-0-0"), "of the wrong type")
        for worker in ("one-0-0", "one-1-0"):
            store.renew(worker)
        store.open("one-1-0", "ann")

        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url, trust_s=FOREVER_S):
                await until(lambda: api.deletes)

        with capture_logs() as logs:
            run(scenario())
        first, last = (line for line in logs if line["log_level"] == "error")
        assert first["event"] == "the reaper failed"
        assert last["event"] == "the reaper could not end in good order"
        assert "WRONGTYPE" in first["error"]

    def test_is_not_misled_by_a_name_that_begins_alike(
        self, store: Store, server: ValkeyProcess
    ) -> None:
        store.renew("one2-0-0")
        store.open("one2-0-0", "ann")
        store.renew("one-0-0")
        store.open("one-0-0", "bob")

        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url, trust_s=FOREVER_S):
                await until(lambda: api.deletes)
                assert api.clients == {"bob"}
                assert store.redis.exists(store.key("c:ann"))

        run(scenario())

    def test_of_others_when_their_lease_has_run_out(
        self, store: Store, server: ValkeyProcess
    ) -> None:
        store.open("two-0-0", "ann")
        store.expire("two-0-0")
        store.open("two-1-0", "bob")
        store.renew("two-1-0")

        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url):
                await until(lambda: api.deletes and is_empty(store))
                assert api.deletes == [lost("ann")]
                assert store.redis.exists(store.key("c:bob"))

        run(scenario())

    def test_not_before_redis_was_there_for_a_while(
        self, store: Store, server: ValkeyProcess
    ) -> None:
        store.open("two-0-0", "ann")
        store.expire("two-0-0")
        began = time.monotonic()

        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url, trust_s=0.5):
                await until(lambda: api.deletes)
                assert time.monotonic() - began >= 0.5

        run(scenario())

    def test_of_its_own_that_live_never(self, store: Store, server: ValkeyProcess) -> None:
        """Redis' clock was put forward: all leases look as if they had run out."""
        for worker in ("one-0-0", "one-1-0", "two-0-0"):
            store.open(worker, f"of-{worker}")
            store.expire(worker)

        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url, living={"one-0-0", "one-1-0"}):
                await until(lambda: api.deletes and is_empty(store))
                assert api.deletes == [lost("of-two-0-0")]
                await watches(store)
            assert api.deletes == [lost("of-two-0-0")]

        run(scenario())
        leases = store.redis.zrange(store.key(LEASES), 0, -1)
        assert leases == [b"one-0-0", b"one-1-0"]

    def test_not_while_the_clock_of_redis_disagrees(
        self, store: Store, server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As if it were put forward by 30 s, so that a lease that was taken just now is over."""
        store.open("two-0-0", "ann")
        store.renew("two-0-0", 20_000)
        jump_s = 0

        async def scenario() -> None:
            nonlocal jump_s
            async with an_api() as api, reaping(api, server.url, trust_s=1.0) as one:
                redis = one.reaper._redis

                async def time_of_redis() -> tuple[int, int]:
                    seconds, micros = await redis.execute_command("TIME")
                    return seconds + jump_s, micros

                monkeypatch.setattr(redis, "time", time_of_redis)
                await until(lambda: one.reaper._trusts_redis)
                jump_s = 30
                await until(lambda: api.deletes)
                assert api.deletes == [lost("ann")], "it did not renew, so it is gone"
                assert api.times[0] - one.reaper._clock.agreed_since >= 1.0

        with capture_logs() as logs:
            run(scenario())
        assert len(jumps(logs)) == 1

    def test_one_that_renews_at_the_last_moment_lives(
        self, store: Store, server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever Redis' clock says by then: another end of the lease is a sign of life."""
        store.open("two-0-0", "ann")
        store.expire("two-0-0")
        read = Reaper._read_leases
        reads = 0

        async def read_then_renew(reaper: Reaper) -> Any:
            nonlocal reads
            reads += 1
            leases = await read(reaper)
            # Two may read side by side at the end: the lease is another one for each of them.
            store.redis.zincrby(store.key(LEASES), 1, "two-0-0")
            return leases

        monkeypatch.setattr(Reaper, "_read_leases", read_then_renew)

        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url):
                await until(lambda: reads > 3)
                assert not api.deletes

        run(scenario())
        assert store.redis.exists(store.key("c:ann"))

    def test_when_the_clock_of_redis_was_put_back(
        self, store: Store, server: ValkeyProcess
    ) -> None:
        """A lease from before ends in the far future; who lives has renewed it since."""
        store.open("two-0-0", "ann")
        store.renew("two-0-0", 3_600_000)

        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url):
                await until(lambda: api.deletes == [lost("ann")])

        run(scenario())

    def test_one_that_has_ended_cleanly_needs_no_patience(
        self, store: Store, server: ValkeyProcess
    ) -> None:
        store.end("two-0-0", ("ann", BORN, 1001, "going away"))
        store.redis.zadd(store.key(LEASES), {"two-0-0": 0})

        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url, trust_s=FOREVER_S):
                await until(lambda: api.deletes and is_empty(store))
                assert api.deletes == [("ann", BORN, 1001, "going away")]
                assert not store.redis.exists(store.key(LEASES))

        run(scenario())

    def test_clients_that_are_back_are_left_out(self, store: Store, server: ValkeyProcess) -> None:
        store.open("one-0-0", "ann", BORN)
        store.open("one-0-0", "bob", BORN)
        store.open("one-0-1", "ann", BORN + 1)
        store.renew("one-0-0")
        store.renew("one-0-1")

        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url, living={"one-0-1"}):
                await until(lambda: api.deletes and is_empty(store))
                assert api.deletes == [lost("bob")]
                assert store.redis.get(store.key("c:ann")) == f"one-0-1 {BORN + 1}".encode()

        run(scenario())

    def test_logs_one_line_for_each(self, store: Store, server: ValkeyProcess) -> None:
        fill(store, "one-0-0", 700)
        store.renew("one-0-0")
        store.renew("one-1-0")  # had no client

        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url):
                await until(lambda: len(api.deletes) == 700)
                await until(lambda: not store.redis.exists(store.key(LEASES)))

        with capture_logs() as logs:
            run(scenario())
        assert [line for line in logs if line["log_level"] != "debug"] == [
            {
                "event": "took over from a worker that is gone",
                "log_level": "warning",
                "incarnation": "one-0-0",
                "disconnects": 700,
                "reconnected": 0,
            }
        ]


class TestManyReapers:
    def test_tell_the_api_of_each_exactly_once(self, store: Store, server: ValkeyProcess) -> None:
        expected = fill(store, "three-0-0", CLIENTS) | fill(store, "three-1-0", CLIENTS)
        store.expire("three-0-0")
        store.expire("three-1-0")

        async def scenario() -> None:
            async with (
                an_api() as api,
                reaping(api, server.url, "one") as one,
                reaping(api, server.url, "two") as two,
            ):
                await until(lambda: len(api.deletes) >= 2 * CLIENTS and is_empty(store))
                assert set(api.deletes) == expected
                assert set(api.counts.values()) == {1}
                both = [
                    one.figures[index] + two.figures[index]
                    for index in (c.REAPER_TAKEN_OVER, c.REAPER_DELIVERED)
                ]
                assert both == [2 * CLIENTS] * 2
                assert one.figures[c.REAPER_DELIVERED]
                assert two.figures[c.REAPER_DELIVERED]

        run(scenario())

    def test_none_gets_lost_when_one_dies_in_the_middle(
        self, store: Store, server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = fill(store, "three-0-0", CLIENTS)
        store.expire("three-0-0")
        monkeypatch.setattr(reaper_module, "_ABANDONED_MARGIN_S", 0.1)
        timeout = ("--api-timeout", "1s")

        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url, "one", options=timeout):
                other = Reaper(
                    load(["--api", f"http://127.0.0.1:{api.port}/api/"]),
                    server.url,
                    "two",
                    lambda: (),
                    c.Counters(1).reaper,
                    trust_s=FOREVER_S,
                )
                other.start()
                await until(lambda: len(api.deletes) > CLIENTS / 4)
                await kill(other)
                await until(lambda: api.clients == {name for name, _, _, _ in expected})
                await until(lambda: is_empty(store))
                assert set(api.deletes) == expected
                # At least once: those on which the dead one had an answer under way came twice.
                assert len(api.deletes) <= CLIENTS + 100

        monkeypatch.setattr("ws2api.supervisor.delivery._ADOPT_EVERY_S", 0.1)
        run(scenario())

    def test_the_successor_goes_on_at_once(self, store: Store, server: ValkeyProcess) -> None:
        expected = fill(store, "one-0-0", CLIENTS)
        store.renew("one-0-0")

        async def scenario() -> None:
            async with an_api() as api:
                first = Reaper(
                    load(["--api", f"http://127.0.0.1:{api.port}/api/", "--reap-rate", "1000"]),
                    server.url,
                    "one",
                    lambda: (),
                    c.Counters(1).reaper,
                )
                first.start()
                await until(lambda: len(api.deletes) > 100)
                await kill(first)
                async with reaping(api, server.url, "one"):
                    await until(lambda: is_empty(store))
                    assert set(api.deletes) == expected
                    assert len(api.deletes) <= CLIENTS + 100

        run(scenario())


class TestApi:
    def test_away_for_a_while(self, store: Store, server: ValkeyProcess) -> None:
        expected = fill(store, "one-0-0", 500)
        store.renew("one-0-0")

        async def scenario() -> None:
            async with an_api() as api:
                await api.close()
                async with reaping(api, server.url) as one:
                    await until(lambda: one.figures[c.REAPER_FAILURES] >= 7)
                    await until(lambda: one.figures[c.DISCONNECTS_PENDING] == 500)
                    assert one.figures[c.DISCONNECTS_HELD] == 500
                    await api.open()
                    await until(lambda: is_empty(store))
                    assert set(api.deletes) == expected
                    assert set(api.counts.values()) == {1}
                    await until(lambda: one.figures[c.DISCONNECTS_PENDING] == 0)

        with capture_logs() as logs:
            run(scenario())
        events = [line["event"] for line in logs]
        assert events.count("the API takes no disconnects") == 1
        assert events.count("the API takes disconnects again") == 1

    def test_gets_no_more_than_the_rate(self, store: Store, server: ValkeyProcess) -> None:
        fill(store, "one-0-0", 300)
        store.renew("one-0-0")

        async def scenario() -> None:
            async with (
                an_api() as api,
                reaping(api, server.url, options=("--reap-rate", "200")),
            ):
                await until(lambda: len(api.deletes) == 300)
                times = api.times
                assert times[299] - times[0] >= (300 - 20) / 200 * 0.95

        run(scenario())


class TestRedis:
    def test_away_and_back(self, tmp_path: Path) -> None:
        server = ValkeyProcess(tmp_path)
        server.start()

        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url) as one:
                for round_ in range(3):
                    with Redis.from_url(server.url) as redis:
                        Store(redis).park("w-1", (f"ann-{round_}", BORN, 1000, "bye"))
                    await until(lambda: len(api.deletes) == round_ + 1)  # noqa: B023
                    server.stop()
                    await until(lambda: len(outages(logs)) == 2 * round_ + 1)  # noqa: B023
                    server.start()
                    await until(lambda: len(outages(logs)) == 2 * round_ + 2)  # noqa: B023
                assert not any(task.done() for task in one.reaper._tasks)

        with capture_logs() as logs:
            run(scenario())
        server.stop()
        assert outages(logs) == ["the reaper has no Redis", "the reaper has Redis back"] * 3
        assert not [line for line in logs if line["log_level"] == "error"]

    def test_away_from_the_start(self, tmp_path: Path) -> None:
        server = ValkeyProcess(tmp_path)

        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url):
                await until(lambda: outages(logs))
                server.start()
                with Redis.from_url(server.url) as redis:
                    Store(redis).park("w-1", ("ann", BORN, 1000, "bye"))
                await until(lambda: api.deletes)

        with capture_logs() as logs:
            run(scenario())
        server.stop()

    def test_emptied_while_it_runs(self, store: Store, server: ValkeyProcess) -> None:
        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url):
                store.park("w-1", ("ann", BORN, 1000, "bye"))
                await until(lambda: len(api.deletes) == 1)
                store.redis.flushall()
                store.redis.script_flush()
                store.park("w-1", ("bob", BORN, 1000, "bye"))
                await until(lambda: len(api.deletes) == 2)

        with capture_logs() as logs:
            run(scenario())
        assert not [line for line in logs if line["log_level"] == "error"]

    def test_a_lease_is_not_believed_when_redis_stood_still(
        self, store: Store, server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The workers could not renew either, and need their time when it goes on."""
        monkeypatch.setattr(reaper_module, "_SLOW_S", 0.2)
        store.open("two-0-0", "ann")
        store.renew("two-0-0", lease_ms=400)

        async def scenario() -> None:
            with FaultProxy(Path(server.url.removeprefix("unix://"))) as proxy:
                url = f"redis://127.0.0.1:{proxy.port}/0"
                async with an_api() as api, reaping(api, url, trust_s=0.3) as one:
                    await until(lambda: one.reaper._trusts_redis)
                    await asyncio.to_thread(proxy.freeze)
                    await until(lambda: has_run_out(store, "two-0-0"))
                    await asyncio.sleep(0.3)  # the freeze has to last longer than _SLOW_S
                    store_was = store.redis.exists(store.key("c:ann"))
                    await asyncio.to_thread(proxy.thaw)
                    await until(lambda: not one.reaper._trusts_redis)
                    store.renew("two-0-0", lease_ms=LEASE_MS)
                    await until(lambda: one.reaper._trusts_redis)
                    assert store_was
                    assert store.redis.exists(store.key("c:ann"))
                    assert not api.deletes

        run(scenario())

    def test_unexpected_errors_do_not_end_it(
        self, store: Store, server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measure = reaper_module.DisconnectQueue.measure
        failures = iter(range(2))

        async def fail_first(self: Any) -> Any:
            if next(failures, None) is not None:
                raise RuntimeError("nobody thought of it")
            return await measure(self)

        monkeypatch.setattr(reaper_module.DisconnectQueue, "measure", fail_first)

        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url) as one:
                api.status = lambda client_id: 500
                store.park("w-1", ("ann", BORN, 1000, "bye"))
                await until(lambda: one.figures[c.DISCONNECTS_PENDING] == 1)

        with capture_logs() as logs:
            run(scenario())
        [line] = [line for line in logs if line["log_level"] == "error"]
        assert line["error"] == "nobody thought of it"
        assert line["exc_info"]


class TestStop:
    def test_delivers_what_is_left_when_the_workers_have_ended(
        self, store: Store, server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also what a worker left that was killed in the last moment."""
        monkeypatch.setattr(reaper_module, "_WATCH_EVERY_S", FOREVER_S)
        store.renew("one-1-0")
        living = {"one-1-0"}

        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url, living=living) as one:
                store.park("one-0-0", ("parked", BORN, 1001, "going away"))
                await until(lambda: api.deletes)
                expected = fill(store, "one-1-0", 100)
                living.clear()
                await one.stop()
                assert one.left == 0
                assert set(api.deletes[1:]) == expected
                assert store.redis.xinfo_consumers(store.stream, GROUP) == []

        run(scenario())

    def test_leaves_the_rest_to_its_successor_while_workers_live(
        self, store: Store, server: ValkeyProcess
    ) -> None:
        async def scenario() -> None:
            async with (
                an_api() as api,
                reaping(api, server.url, living={"one-0-0"}, options=("--reap-rate", "50")) as one,
            ):
                for number in range(200):
                    store.park("w-1", (f"ann-{number}", BORN, 1000, "bye"))
                await until(lambda: api.deletes)
                await one.stop()
                assert one.left == store.redis.xlen(store.stream) == 200 - len(api.deletes)
                async with reaping(api, server.url, living={"one-0-0"}):
                    await until(lambda: is_empty(store))
                    assert set(api.counts.values()) == {1}
                    assert len(api.deletes) == 200

        run(scenario())

    def test_does_not_wait_for_an_api_that_is_away(
        self, store: Store, server: ValkeyProcess
    ) -> None:
        store.park("w-1", ("ann", BORN, 1000, "bye"))

        async def scenario() -> None:
            async with an_api() as api:
                await api.close()
                async with reaping(api, server.url) as one:
                    await until(lambda: one.figures[c.REAPER_FAILURES] >= 5)
                    began = time.monotonic()
                    await one.stop()
                    assert one.left == 1
                    assert time.monotonic() - began < reaper_module._STOP_S

        run(scenario())

    def test_does_not_wait_for_long_for_an_api_that_hangs(
        self, store: Store, server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(reaper_module, "_STOP_S", 0.3)
        store.park("w-1", ("ann", BORN, 1000, "bye"))

        async def scenario() -> None:
            async with an_api() as api:
                api.hold = asyncio.Event()
                async with reaping(api, server.url) as one:
                    await until(lambda: api.times)
                    await one.stop()
                    assert one.left == 1
                api.hold.set()

        run(scenario())

    def test_hurries_when_told_to(self, store: Store, server: ValkeyProcess) -> None:
        store.park("w-1", ("ann", BORN, 1000, "bye"))

        async def scenario() -> None:
            async with an_api() as api:
                api.hold = asyncio.Event()
                async with reaping(api, server.url) as one:
                    await until(lambda: api.times)
                    began = time.monotonic()
                    stopping = asyncio.create_task(one.stop())
                    await asyncio.sleep(0)
                    one.reaper.hurry()
                    await stopping
                    assert time.monotonic() - began < reaper_module._STOP_S
                api.hold.set()

        run(scenario())

    @pytest.mark.parametrize("delay_s", [0.0, 0.001, 0.005, 0.02])
    def test_at_any_moment_of_the_start(
        self, store: Store, server: ValkeyProcess, delay_s: float
    ) -> None:
        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url) as one:
                await asyncio.sleep(delay_s)
                async with asyncio.timeout(DEADLINE_S):
                    await one.stop()

        run(scenario())

    def test_without_redis(self, tmp_path: Path) -> None:
        url = f"unix://{tmp_path}/none.sock"

        async def scenario() -> None:
            async with an_api() as api, reaping(api, url) as one:
                await until(lambda: outages(logs))
                async with asyncio.timeout(DEADLINE_S):
                    await one.stop()
                assert one.left is None

        with capture_logs() as logs:
            run(scenario())


class TestFigures:
    def test_of_the_stream(self, store: Store, server: ValkeyProcess) -> None:
        for number in range(7):
            store.park("w-1", (f"ann-{number}", BORN, 1000, "bye"), bound=5)

        async def scenario() -> None:
            async with an_api() as api:
                api.status = lambda client_id: 500
                async with reaping(api, server.url) as one:
                    await until(lambda: one.figures[c.DISCONNECTS_PENDING] == 5)
                    assert one.figures[c.DISCONNECTS_DROPPED] == 2
                    await until(lambda: one.figures[c.DISCONNECTS_HELD] == 5)
                    await until(lambda: one.figures[c.DISCONNECTS_OLDEST_S] >= 1)
                assert one.figures[c.DISCONNECTS_HELD] == 0

        run(scenario())


class TestRedisThatForgets:
    def test_what_is_at_hand_is_told_all_the_same(
        self, store: Store, server: ValkeyProcess
    ) -> None:
        """The connection stays, and Redis is the same process: only its data is gone."""
        expected = fill(store, "one-0-0", 50)
        store.renew("one-0-0")

        async def scenario() -> None:
            async with an_api() as api:
                api.status = lambda client_id: 500
                async with reaping(api, server.url) as one:
                    await until(lambda: one.figures[c.DISCONNECTS_HELD] == 50)
                    await until(lambda: len(api.times) >= 50)
                    store.redis.flushall()
                    api.status = lambda client_id: 200
                    await until(lambda: len(api.deletes) >= 50 and is_empty(store))
                    assert set(api.deletes) == expected

        run(scenario())


class TestEviction:
    def test_is_warned_of_once_when_it_is_set(self, store: Store, server: ValkeyProcess) -> None:
        def warnings() -> list[Any]:
            return [line["reason"] for line in logs if "may drop" in line["event"]]

        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url) as one:
                await until(lambda: one.reaper._policy == "noeviction")
                for count, policy in enumerate(("allkeys-lru", "allkeys-random"), 1):
                    store.redis.config_set("maxmemory-policy", policy)
                    await until(lambda count=count: len(warnings()) == count)
                    assert policy in warnings()[-1]
                store.redis.config_set("maxmemory-policy", "volatile-lru")
                await until(lambda: one.reaper._policy == "volatile-lru")

        try:
            with capture_logs() as logs:
                run(scenario())
        finally:
            store.redis.config_set("maxmemory-policy", "noeviction")
        assert len(warnings()) == 2

    def test_where_redis_does_not_say(
        self, store: Store, server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = 0

        async def refuse(redis: object, section: str) -> None:
            nonlocal asked
            asked += 1
            raise exceptions.NoPermissionError("no")

        monkeypatch.setattr(reaper_module.Redis, "info", refuse)

        async def scenario() -> None:
            async with an_api() as api, reaping(api, server.url):
                await until(lambda: asked > 2)

        with capture_logs() as logs:
            run(scenario())
        assert not logs


async def kill(reaper: Reaper) -> None:
    """End a reaper as SIGKILL would: nothing is told to Redis any more."""
    for task in reaper._tasks:
        task.cancel()
    await reaper_module.end_tasks(reaper._tasks)
    assert reaper._delivery is not None
    assert reaper._api is not None
    await reaper._delivery.close()
    await reaper._api.close()
    await reaper._redis.aclose()


async def watches(store: Store, count: int = 3) -> None:
    """Wait until the leases were looked at so many times."""
    store.redis.config_resetstat()
    await until(lambda: calls(store, "zrange") >= count)


def calls(store: Store, command: str) -> int:
    statistics: Any = store.redis.info("commandstats")
    return int(statistics.get(f"cmdstat_{command}", {"calls": 0})["calls"])


def jumps(logs: list[Any]) -> list[Any]:
    return [line for line in logs if "has jumped" in line["event"]]


def outages(logs: list[Any]) -> list[str]:
    return [line["event"] for line in logs if line["event"].startswith("the reaper has")]


def has_run_out(store: Store, worker: str) -> bool:
    now: Any = store.redis.time()
    until_ms: Any = store.redis.zscore(store.key(LEASES), worker)
    return bool(until_ms < now[0] * 1000 + now[1] / 1000)
