"""Ask the admin port about workers and Redis in every state."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import structlog
from aiohttp.test_utils import TestClient, TestServer
from harness.valkey import ValkeyProcess
from harness.waiting import DEADLINE_S
from redis import Redis
from ws2api.gateway import counters as c
from ws2api.gateway import disconnects, logs
from ws2api.gateway.address_limit import AddressTable
from ws2api.gateway.recent import Recent
from ws2api.gateway.settings import Address, load
from ws2api.gateway.traces import Traces
from ws2api.gateway.verbosity import Verbosity
from ws2api.supervisor import admin, admin_port, process
from ws2api.supervisor.admin_port import AdminPort
from ws2api.supervisor.health import HEARTBEAT_LIMIT_S, PROBE_LIMIT_S
from ws2api.supervisor.shared_state import SharedState

# Another test's server may run in a thread: no child here touches what a thread could hold.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

NOW_US = 1_000_000_000
NOBODY = Address("127.0.0.1", 1)
"""Where no push port listens."""


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    with ValkeyProcess(tmp_path_factory.mktemp("valkey")) as valkey:
        yield valkey


@pytest.fixture
def counters() -> c.Counters:
    """Return the slots of two workers that serve."""
    counters = c.Counters(2)
    for worker in range(2):
        slot = counters.bank(worker, 0)
        slot[c.STATE] = c.STATE_SERVING
        slot[c.HEARTBEAT_US] = NOW_US
        slot[c.REDIS_UP] = 1
        slot[c.PROBED_US] = NOW_US
        slot[c.PROBE_LAG_US] = 1500
        slot[c.PID] = 100 + worker
        slot[c.STARTED_S] = int(time.time())
        slot[c.STARTED_US] = NOW_US
    return counters


def share(counters: c.Counters) -> SharedState:
    workers = counters.workers
    return SharedState(
        counters, Recent(workers, c.BANKS), AddressTable(workers), Traces(workers, c.BANKS), Path()
    )


def port(counters: c.Counters, redis_url: str, *options: str) -> AdminPort:
    settings = load(options)
    return AdminPort(
        share(counters), settings, redis_url, NOBODY, 1000.0, "one", monotonic_us=lambda: NOW_US
    )


def get(counters: c.Counters, redis_url: str, *paths: str) -> list[tuple[int, str, str]]:
    """Ask for each path in turn; return status, body and content type of each."""

    async def ask() -> list[tuple[int, str, str]]:
        application = port(counters, redis_url).application()
        answers = []
        async with TestClient(TestServer(application)) as client:
            for path in paths:
                async with client.get(path) as reply:
                    answers.append(
                        (reply.status, await reply.text(), reply.headers["Content-Type"])
                    )
        return answers

    return asyncio.run(ask())


def readiness(counters: c.Counters, redis_url: str) -> tuple[int, str]:
    ((status, text, _),) = get(counters, redis_url, "/readyz")
    return status, text


def test_is_healthy(counters: c.Counters, valkey: ValkeyProcess) -> None:
    ((status, text, _),) = get(counters, valkey.url, "/healthz")
    assert (status, text) == (200, "ok\n")


def test_is_ready_when_all_serve(counters: c.Counters, valkey: ValkeyProcess) -> None:
    assert readiness(counters, valkey.url) == (200, "ready\n")


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (c.STATE_DOWN, "down"),
        (c.STATE_STARTING, "starting"),
        (c.STATE_DRAINING, "draining"),
        (99, "unknown"),
    ],
)
def test_names_the_worker_that_does_not_serve(
    counters: c.Counters, valkey: ValkeyProcess, state: int, word: str
) -> None:
    counters.bank(1, 0)[c.STATE] = state
    assert readiness(counters, valkey.url) == (503, f"worker 1 is {word}\n")


def test_names_the_worker_whose_loop_is_stuck(counters: c.Counters, valkey: ValkeyProcess) -> None:
    limit_us = int(HEARTBEAT_LIMIT_S * 1e6)
    counters.bank(0, 0)[c.HEARTBEAT_US] = NOW_US - limit_us + 1
    assert readiness(counters, valkey.url)[0] == 200
    counters.bank(0, 0)[c.HEARTBEAT_US] = NOW_US - limit_us
    assert readiness(counters, valkey.url) == (503, "worker 0 has not beaten for 5 s\n")


def test_waits_for_the_first_beat(counters: c.Counters, valkey: ValkeyProcess) -> None:
    counters.bank(0, 0)[c.HEARTBEAT_US] = 0
    assert readiness(counters, valkey.url) == (503, "worker 0 has not beaten yet\n")


def test_names_the_worker_that_pushes_do_not_reach(
    counters: c.Counters, valkey: ValkeyProcess
) -> None:
    counters.bank(1, 0)[c.PROBED_US] = NOW_US - int(PROBE_LIMIT_S * 1e6) + 1
    assert readiness(counters, valkey.url)[0] == 200
    counters.bank(1, 0)[c.PROBED_US] = NOW_US - 12_000_000
    assert readiness(counters, valkey.url) == (
        503,
        "worker 1: pushes do not reach it (last seen 12 s ago)\n",
    )


def test_gives_a_young_worker_time_to_be_reached(
    counters: c.Counters, valkey: ValkeyProcess
) -> None:
    counters.bank(0, 0)[c.PROBED_US] = 0
    assert readiness(counters, valkey.url)[0] == 200
    counters.bank(0, 0)[c.STARTED_S] = 0  # the host's clock was put forward since
    assert readiness(counters, valkey.url)[0] == 200
    counters.bank(0, 0)[c.STARTED_US] = NOW_US - int(PROBE_LIMIT_S * 1e6)
    assert readiness(counters, valkey.url) == (
        503,
        "worker 0: pushes do not reach it (never seen)\n",
    )


def test_names_the_worker_that_is_entering_its_clients(
    counters: c.Counters, valkey: ValkeyProcess
) -> None:
    counters.bank(1, 0)[c.RESTORING] = 1
    assert readiness(counters, valkey.url) == (
        503,
        "worker 1 has yet to enter its clients into redis\n",
    )


def test_names_the_worker_that_redis_has_forgotten(
    counters: c.Counters, valkey: ValkeyProcess
) -> None:
    """Before the worker itself has noticed."""
    for worker in range(2):
        counters.bank(worker, 0)[c.FORK] = 8
    with Redis.from_url(valkey.url) as redis:
        redis.zadd("ws2api:leases", {"one-0-7": 1, "one-1-7": 1})
        assert readiness(counters, valkey.url)[0] == 200
        redis.zrem("ws2api:leases", "one-1-7")
        status, text = readiness(counters, valkey.url)
        redis.flushall()
    assert (status, text) == (503, "worker 1 has yet to enter its clients into redis\n")


def test_names_redis_when_it_is_away(counters: c.Counters, tmp_path: Path) -> None:
    status, text = readiness(counters, f"unix://{tmp_path}/nothing")
    assert status == 503
    assert text.startswith("redis: ")
    assert text.count("\n") == 1


def test_does_not_hang_when_redis_hangs(counters: c.Counters) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        status, text = readiness(counters, f"redis://127.0.0.1:{silent.getsockname()[1]}")
    assert (status, text) == (503, "redis did not answer within 1 s\n")


def test_a_crowd_takes_one_connection_to_redis(counters: c.Counters) -> None:
    """Whoever can reach /readyz must not be able to use up the connections that Redis takes."""

    async def ask() -> tuple[set[int], int]:
        accepted = 0

        async def stay_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal accepted
            accepted += 1
            await reader.read()  # all, to the end
            writer.close()

        async with await asyncio.start_server(stay_silent, "127.0.0.1", 0) as silent:
            url = f"redis://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
            application = port(counters, url).application()
            async with TestClient(TestServer(application)) as client:
                replies = await asyncio.gather(
                    *(client.get(path) for path in ["/readyz", "/status"] * 30)
                )
                return {reply.status for reply in replies}, accepted

    statuses, accepted = asyncio.run(ask())
    assert statuses == {200, 503}
    assert accepted <= 2


def test_names_everything_that_is_not_ready(counters: c.Counters, tmp_path: Path) -> None:
    counters.settle(0, 0)
    counters.settle(1, 0)
    _, text = readiness(counters, f"unix://{tmp_path}/nothing")
    assert [line.split()[0] for line in text.splitlines()] == ["worker", "worker", "redis:"]


def test_is_ready_again_after_redis_restarted(counters: c.Counters, tmp_path: Path) -> None:
    async def ask(valkey: ValkeyProcess) -> list[int]:
        statuses = []
        application = port(counters, valkey.url).application()
        async with TestClient(TestServer(application)) as client:
            for change in (valkey.start, valkey.stop, valkey.start):
                await asyncio.to_thread(change)
                async with client.get("/readyz") as reply:
                    statuses.append(reply.status)
        return statuses

    valkey = ValkeyProcess(tmp_path)
    try:
        assert asyncio.run(ask(valkey)) == [200, 503, 200]
    finally:
        valkey.stop()


def test_status_tells_about_each_worker(counters: c.Counters, valkey: ValkeyProcess) -> None:
    slot = counters.bank(0, 0)
    slot[c.CONNECTIONS_OPENED], slot[c.CONNECTIONS_CLOSED] = 9, 2
    counters.bank(1, 0)[c.RESTARTS] = 4
    counters.settle(1, 0)
    ((status, text, content_type),) = get(counters, valkey.url, "/status")
    assert status == 200
    assert content_type.startswith("application/json")
    document = json.loads(text)
    first, second = document["workers"]
    assert first.pop("uptime_s") >= 0
    assert (
        first.items()
        >= {
            "worker": 0,
            "state": "serving",
            "pid": 100,
            "restarts": 0,
            "connections": 7,
            "push_lag_ms": 1.5,
            "redis_up": True,
            "breaker": "closed",
        }.items()
    )
    assert (
        second.items()
        >= {
            "worker": 1,
            "state": "down",
            "pid": None,
            "uptime_s": None,
            "restarts": 4,
            "connections": 0,
            "push_lag_ms": None,
            "redis_up": False,
        }.items()
    )
    assert document["uptime_s"] > 0


def test_status_tells_about_disconnects(counters: c.Counters, valkey: ValkeyProcess) -> None:
    counters.reaper[c.DISCONNECTS_PENDING] = 70
    counters.reaper[c.DISCONNECTS_OLDEST_S] = 8
    counters.reaper[c.DISCONNECTS_HELD] = 32
    counters.reaper[c.DISCONNECTS_DROPPED] = 1
    ((_, text, _),) = get(counters, valkey.url, "/status")
    assert json.loads(text)["disconnects"] == {
        "pending": 70,
        "oldest_s": 8,
        "held": 32,
        "dropped": 1,
    }


def test_cuts_off_a_viewer_that_does_not_read(
    counters: c.Counters, valkey: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_port, "_EVERY_S", 0.0)
    monkeypatch.setattr(admin_port, "_STREAM_TIMEOUT_S", 0.5)

    async def view() -> None:
        application = port(counters, valkey.url).application()
        async with TestServer(application) as server:
            _, writer = await asyncio.open_connection(server.host, server.port, limit=1)
            writer.write(b"GET /events HTTP/1.1\r\nHost: gateway\r\n\r\n")
            runner = server.runner
            assert runner is not None
            async with asyncio.timeout(2 * DEADLINE_S):
                while not runner.server.connections:
                    await asyncio.sleep(0.01)
                while runner.server.connections:
                    await asyncio.sleep(0.01)
            writer.close()

    asyncio.run(view())


def test_metrics_are_prometheus_text(counters: c.Counters, valkey: ValkeyProcess) -> None:
    ((status, text, content_type),) = get(counters, valkey.url, "/metrics")
    assert status == 200
    assert content_type.startswith("text/plain; version=")
    assert 'ws2api_connections_opened_total{worker="1"} 0.0' in text


def test_unknown_path_is_not_found(counters: c.Counters, valkey: ValkeyProcess) -> None:
    ((status, _, _),) = get(counters, valkey.url, "/nothing")
    assert status == 404


def test_lists_the_workers_that_live() -> None:
    counters = c.Counters(3)
    counters.bank(0, 0)[c.FORK] = 1
    counters.bank(2, 0)[c.FORK] = 5
    counters.bank(2, 1)[c.FORK] = 4
    assert admin.list_living(counters, "4711") == {"4711-0-0", "4711-2-4", "4711-2-3"}


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let more be logged for a moment only, and leave the configuration as it was."""
    former = structlog.get_config()
    monkeypatch.setattr(logs, "RAISED_S", 0.2)
    yield
    logs.restore_level()
    structlog.configure(**former)


@pytest.mark.usefixtures("levels")
def test_logs_less_again_when_it_was_born_logging_more() -> None:
    async def run() -> None:
        logs.raise_level()  # the supervisor, before the fork
        Verbosity(asyncio.get_running_loop())
        async with asyncio.timeout(DEADLINE_S):
            while logs.is_written("debug"):
                await asyncio.sleep(0.01)

    asyncio.run(run())


@pytest.mark.usefixtures("levels")
def test_logs_more_for_the_whole_time_after_the_last_signal() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        verbosity = Verbosity(loop)
        verbosity.rise()
        first = verbosity._restoring
        verbosity.rise()
        assert first is not None
        assert first.cancelled()
        async with asyncio.timeout(DEADLINE_S):
            while logs.is_written("debug"):
                await asyncio.sleep(0.01)

    asyncio.run(run())


class TestProcess:
    @pytest.fixture
    def listener(self) -> Iterator[socket.socket]:
        with closing(socket.create_server(("127.0.0.1", 0))) as listener:
            listener.setblocking(False)
            yield listener

    def run(
        self, listener: socket.socket, counters: c.Counters, url: str, *options: str
    ) -> tuple[int, int]:
        """Start the process; return its id and its port."""
        settings = load(options)
        pid = process.fork(
            lambda: admin.run(listener, NOBODY, share(counters), url, time.time(), settings, "4711")
        )
        return pid, listener.getsockname()[1]

    def end(self, pid: int) -> int:
        """Tell the process to stop; return its exit status."""
        os.kill(pid, signal.SIGTERM)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def test_ends_on_sigterm(
        self, listener: socket.socket, counters: c.Counters, valkey: ValkeyProcess
    ) -> None:
        pid, port = self.run(listener, counters, valkey.url)
        try:
            # Left open: an idle keep-alive connection must not delay the end.
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)) as one:
                one.request("GET", "/healthz")
                assert one.getresponse().read() == b"ok\n"
                assert self.end(pid) == 0
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise

    @pytest.mark.parametrize(
        ("redis", "fork", "status"), [("embedded", 0, 1), ("embedded", 1, 0), ("unix://it", 0, 0)]
    )
    def test_complains_about_what_ends_with_the_embedded_server(
        self, listener: socket.socket, counters: c.Counters, redis: str, fork: int, status: int
    ) -> None:
        """It is lost with the last worker; while one lives, this is not the end of the server."""
        counters.bank(0, 0)[c.FORK] = fork
        with (
            TemporaryDirectory() as folder,
            ValkeyProcess(Path(folder)) as valkey,
            socket.socket() as reserved,
        ):
            reserved.bind(("127.0.0.1", 0))  # nobody listens
            api = f"http://127.0.0.1:{reserved.getsockname()[1]}/"
            with Redis.from_url(valkey.url) as client:
                client.xadd(
                    "ws2api:" + disconnects.STREAM,
                    {"id": "ann", "generation": 1, "code": 1000, "reason": ""},
                )
            pid, port = self.run(listener, counters, valkey.url, "--redis", redis, "--api", api)
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)) as one:
                one.request("GET", "/healthz")
                one.getresponse().read()
            assert self.end(pid) == status
