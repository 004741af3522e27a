"""Kill processes that hold clients, and count what the API hears of those clients' ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest
from harness.api import Answer, FakeApi, Hold, Reply, Request, echo
from harness.fault_proxy import FaultProxy
from harness.gateway import GatewayProcess
from harness.processes import Process, find_descendants, find_socket_owner
from harness.redis_server import RedisServer
from harness.valkey import ValkeyProcess
from harness.waiting import DEADLINE_S, until
from harness.ws import WsClient, upgrade_request
from redis import Redis
from ws2api.gateway.disconnects import LEASE_S

from .conftest import StartGateway

WORKERS: Final = 3
CLIENTS: Final = 45
LEASE_DEADLINE_S: Final = LEASE_S + DEADLINE_S

Clients = dict[str, WsClient]


@pytest.fixture
def gateway(own_api: FakeApi, start_gateway: StartGateway) -> GatewayProcess:
    """Run a gateway of the test's own, because workers will die; it must end cleanly yet."""
    return start_gateway(api=own_api.url, workers=WORKERS)


def connect_many(gateway: GatewayProcess, name: str, count: int = CLIENTS) -> Clients:
    return {f"{name}-{number}": gateway.connect(f"{name}-{number}") for number in range(count)}


def pick_victim(gateway: GatewayProcess, clients: Clients) -> tuple[Process, set[str]]:
    """Choose a worker; return it and the names of its clients."""
    workers = {name: gateway.worker_of(client) for name, client in clients.items()}
    victim = next(iter(workers.values()))
    return victim, {name for name, worker in workers.items() if worker == victim}


def kill(victim: Process) -> None:
    os.kill(victim.pid, signal.SIGKILL)
    until(lambda: not victim.is_alive)


def deletes(api: FakeApi, name: str) -> list[tuple[int, int, str]]:
    """Return generation, code and reason of each DELETE of a client so far."""
    return [(r.generation, r.close_code, r.text) for r in api.requests(name, "DELETE")]


def born(api: FakeApi, name: str) -> int:
    """Return the generation of a client's last connect."""
    return api.requests(name, "GET")[-1].generation


def expect_one_delete_each(
    api: FakeApi,
    names: Iterable[str],
    code: int = 1006,
    reason: str = "worker lost",
    timeout_s: float = DEADLINE_S,
) -> None:
    names = set(names)

    def missing() -> set[str]:
        return {name for name in names if not deletes(api, name)}

    until(lambda: not missing(), timeout_s=timeout_s, what=f"a DELETE of {missing()}")
    for name in names:
        assert deletes(api, name) == [(born(api, name), code, reason)]


def nothing_is_pending(gateway: GatewayProcess) -> bool:
    return gateway.count("disconnects_pending") == 0


@contextmanager
def admin_stopped(gateway: GatewayProcess) -> Iterator[None]:
    """Keep the reaper from acting for a while."""
    admin = gateway.find_admin()
    os.kill(admin.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(admin.pid, signal.SIGCONT)


class Traffic:
    """Let clients send and receive all the time, and miss nothing."""

    def __init__(self, api: FakeApi, clients: Clients) -> None:
        self._clients = clients
        self._stop = threading.Event()
        self.rounds = 0
        for name in clients:
            api.on(name, "POST", echo)
        self._threads = ThreadPoolExecutor(1)
        self._talking = self._threads.submit(self._talk)

    def __enter__(self) -> Traffic:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._talking.result(4 * DEADLINE_S)
        self._threads.shutdown()

    def _talk(self) -> None:
        while not self._stop.is_set():
            for client in self._clients.values():
                client.send(f"round {self.rounds}")
            for client in self._clients.values():
                assert client.receive() == f"round {self.rounds}"
            self.rounds += 1

    def wait_for_rounds(self, count: int = 3) -> None:
        """Wait until everybody has sent and received so many times from now on."""
        aim = self.rounds + count
        until(lambda: self.rounds >= aim or self._talking.done(), what="undisturbed traffic")
        assert self.rounds >= aim


class TestKilledWorker:
    def test_each_client_is_reported_once_and_nobody_else_notices(
        self, gateway: GatewayProcess, own_api: FakeApi, client_id: str
    ) -> None:
        clients = connect_many(gateway, client_id)
        victim, lost = pick_victim(gateway, clients)
        kept = {name: client for name, client in clients.items() if name not in lost}
        with Traffic(own_api, kept) as traffic:
            traffic.wait_for_rounds()
            kill(victim)
            expect_one_delete_each(own_api, lost)
            traffic.wait_for_rounds()
        until(lambda: gateway.count("reaper_delivered") == len(lost))
        until(lambda: nothing_is_pending(gateway))
        assert gateway.count("reaper_taken_over") == len(lost)
        expect_one_delete_each(own_api, lost)
        assert not [name for name in kept if deletes(own_api, name)]

    def test_clients_come_back_at_once(
        self, gateway: GatewayProcess, own_api: FakeApi, client_id: str
    ) -> None:
        clients = connect_many(gateway, client_id)
        victim, lost = pick_victim(gateway, clients)
        with admin_stopped(gateway):  # until all are back, so that none needs to be reported
            kill(victim)
            away = lost.pop()
            back = {name: gateway.connect(name) for name in lost}
        expect_one_delete_each(own_api, [away])
        pushes = gateway.push_client()
        for name, client in back.items():
            assert pushes.push(name, "welcome back").status == 200
            assert client.receive() == "welcome back"
            assert not deletes(own_api, name)
        for name, client in back.items():
            client.close(1000, "bye")
            own_api.wait_for_one(name, "DELETE")
        expect_one_delete_each(own_api, lost, 1000, "bye")

    def test_one_that_comes_back_while_the_api_refuses_is_left_out_from_then_on(
        self, gateway: GatewayProcess, own_api: FakeApi, client_id: str
    ) -> None:
        own_api.on(client_id, "DELETE", Reply(status=500))
        client = gateway.connect(client_id)
        victim = gateway.worker_of(client)
        kill(victim)
        own_api.wait_for(client_id, "DELETE")
        gateway.connect(client_id)
        until(lambda: gateway.count("reaper_suppressed") == 1)
        until(lambda: nothing_is_pending(gateway))
        first, *_ = own_api.requests(client_id, "GET")
        assert {delete[0] for delete in deletes(own_api, client_id)} == {first.generation}
        own_api.on(client_id, "DELETE", Reply())

    def test_an_end_that_was_not_reported_keeps_its_code_and_reason(
        self, gateway: GatewayProcess, own_api: FakeApi, client_id: str
    ) -> None:
        held = Hold(Reply())
        own_api.on(client_id, "DELETE", held)
        client = gateway.connect(client_id)
        victim = gateway.worker_of(client)
        client.close(4321, "größer 🎉")
        own_api.wait_for_one(client_id, "DELETE")
        kill(victim)
        held.release()
        [first, second] = own_api.wait_for(client_id, "DELETE", count=2)
        assert first.generation == second.generation == born(own_api, client_id)
        assert (second.close_code, second.text) == (4321, "größer 🎉")

    def test_a_connect_that_the_api_was_asked_about_is_reported(
        self, own_api: FakeApi, start_gateway: StartGateway, client_id: str
    ) -> None:
        """The API may say ok, and take the client for connected; so it is told after its time."""
        gateway = start_gateway(api=own_api.url, workers=WORKERS, api_timeout="2s")
        held = Hold(Reply("ok"))
        own_api.on(client_id, "GET", held)
        stream = gateway.open_stream()
        stream.write(upgrade_request(f"/{client_id}"))
        own_api.wait_for_one(client_id, "GET")
        port = stream.socket.getsockname()[1]
        kill(find_owner(gateway, port))
        expect_one_delete_each(own_api, [client_id])
        held.release()

    def test_clients_that_left_before_are_not_reported_again(
        self, gateway: GatewayProcess, own_api: FakeApi, client_id: str
    ) -> None:
        clients = connect_many(gateway, client_id)
        victim, lost = pick_victim(gateway, clients)
        gone = set(sorted(lost)[: len(lost) // 2])
        for name in gone:
            clients[name].close(1000, "bye")
        expect_one_delete_each(own_api, gone, 1000, "bye")
        # A worker that dies before it has read the answer leaves the end to the reaper.
        answered = len(clients) + len(gone)
        until(lambda: gateway.count("requests_succeeded") >= answered)
        kill(victim)
        expect_one_delete_each(own_api, lost - gone)
        until(lambda: nothing_is_pending(gateway))
        expect_one_delete_each(own_api, gone, 1000, "bye")

    def test_after_redis_has_lost_its_data(
        self,
        own_api: FakeApi,
        start_gateway: StartGateway,
        valkey: ValkeyProcess,
        client_id: str,
    ) -> None:
        gateway = start_gateway(api=own_api.url, redis=valkey.url, workers=2)
        clients = connect_many(gateway, client_id)
        victim, lost = pick_victim(gateway, clients)
        os.kill(victim.pid, signal.SIGSTOP)  # so that it does not notice before we look
        with Redis.from_url(valkey.url) as redis:
            redis.flushall()
        ready = gateway.admin_get("/readyz")
        os.kill(victim.pid, signal.SIGCONT)
        assert ready.status == 503
        assert "has yet to enter its clients into redis" in ready.text
        until(lambda: gateway.admin_get("/readyz").status == 200)
        kill(victim)
        expect_one_delete_each(own_api, lost)
        pushes = gateway.push_client()
        for name in set(clients) - lost:
            until(lambda name=name: pushes.push(name, "hello").status == 200)

    def test_again_and_again(
        self, gateway: GatewayProcess, own_api: FakeApi, client_id: str
    ) -> None:
        for round_ in range(3):
            clients = connect_many(gateway, f"{client_id}-{round_}", 12)
            victim, lost = pick_victim(gateway, clients)
            kill(victim)
            expect_one_delete_each(own_api, lost)
            until(lambda: gateway.admin_get("/readyz").status == 200, what="a replacement")


class TestApiAway:
    RATE: Final = 30

    def test_while_the_worker_dies_and_after_it(
        self, own_api: FakeApi, start_gateway: StartGateway, client_id: str
    ) -> None:
        """The DELETEs wait, and then come at a pace."""
        times: list[float] = []

        def note(request: Request) -> Answer:
            times.append(time.monotonic())
            return Reply()

        gateway = start_gateway(api=own_api.url, workers=WORKERS, reap_rate=self.RATE)
        clients = connect_many(gateway, client_id, 120)
        for name in clients:
            own_api.on(name, "DELETE", note)
        victim, lost = pick_victim(gateway, clients)
        own_api.close()
        kill(victim)
        until(lambda: gateway.count("disconnects_pending") == len(lost))
        until(lambda: gateway.count("reaper_failures") >= 6, what="it is seen to be away")
        assert not times
        own_api.open()
        expect_one_delete_each(own_api, lost)
        # No more than a tenth of a second's worth may come at once.
        assert times[-1] - times[0] >= (len(lost) - self.RATE / 10 - 1) / self.RATE * 0.95
        until(lambda: nothing_is_pending(gateway))


class TestKilledReaper:
    def test_its_successor_goes_on(
        self, own_api: FakeApi, start_gateway: StartGateway, client_id: str
    ) -> None:
        gateway = start_gateway(api=own_api.url, workers=WORKERS, reap_rate=20)
        clients = connect_many(gateway, client_id, 90)
        victim, lost = pick_victim(gateway, clients)
        kill(victim)
        until(lambda: [name for name in lost if deletes(own_api, name)])
        admin = gateway.find_admin()
        kill(admin)
        until(lambda: all(deletes(own_api, name) for name in lost), what="all are reported")
        until(lambda: nothing_is_pending(gateway))
        for name in lost:
            assert set(deletes(own_api, name)) == {(born(own_api, name), 1006, "worker lost")}
        twice = [name for name in lost if len(deletes(own_api, name)) > 1]
        assert len(twice) <= 3, "only what was under way may come again"


class TestLostSupervisor:
    def test_a_new_one_reports_what_was_left(
        self,
        own_api: FakeApi,
        start_gateway: StartGateway,
        valkey: ValkeyProcess,
        client_id: str,
    ) -> None:
        old = start_gateway(
            api=own_api.url, redis=valkey.url, workers=WORKERS, shutdown_timeout="1s"
        )
        clients = connect_many(old, client_id)
        processes = find_descendants(old.pid)
        own_api.close()  # so that the workers, who end in good order, can tell nobody
        os.kill(old.pid, signal.SIGKILL)
        for client in clients.values():
            client.assert_closed(1001)
        until(lambda: not [p for p in processes if p.is_alive], what="no process left")
        own_api.open()
        assert not [name for name in clients if deletes(own_api, name)]
        new = start_gateway(api=own_api.url, redis=valkey.url, workers=WORKERS)
        expect_one_delete_each(own_api, clients, 1001, "going away")
        until(lambda: nothing_is_pending(new))


class TestFrozenRedis:
    def test_what_a_killed_worker_sent_last_takes_no_effect(
        self,
        own_api: FakeApi,
        start_gateway: StartGateway,
        valkey: ValkeyProcess,
        client_id: str,
    ) -> None:
        """A Redis that stood still carries out then what nobody waits for any more."""
        server = RedisServer(valkey, "ws2api:")
        gateway = start_gateway(api=own_api.url, redis=valkey.url, workers=1, api_timeout="1s")
        before = gateway.connect(f"{client_id}-before")
        victim = gateway.worker_of(before)
        [incarnation] = server.leases
        names = [f"{client_id}-{number}" for number in range(10)]
        server.freeze()
        try:
            for name in names:
                gateway.open_stream().write(upgrade_request(f"/{name}"))
            for name in names:  # which is when the worker has given Redis up
                own_api.wait_for_one(name, "GET")
            kill(victim)
        finally:
            server.thaw()
        expect_one_delete_each(own_api, [f"{client_id}-before"])

        def left() -> set[str]:
            return {key for key in server.keys if key.startswith(("a:", "p:", "e:", "w:"))}

        until(lambda: incarnation not in server.leases and not left(), what=f"nothing of {left()}")
        until(lambda: not server.stream, what="all of it is told")
        for name in names:
            assert {generation for generation, _, _ in deletes(own_api, name)} <= {
                born(own_api, name)
            }
        server.redis.close()


class TestLostMachine:
    def test_two_others_report_each_client_once_after_the_lease(
        self,
        own_api: FakeApi,
        start_gateway: StartGateway,
        valkey: ValkeyProcess,
        client_id: str,
    ) -> None:
        old = start_gateway(api=own_api.url, redis=valkey.url, workers=WORKERS)
        clients = connect_many(old, client_id, 200)
        kill_all_at_once(old)
        others = [start_gateway(api=own_api.url, redis=valkey.url, workers=1) for _ in range(2)]
        back = set(list(clients)[:20])
        for name in back:
            others[0].connect(name)
        lost = set(clients) - back
        expect_one_delete_each(own_api, lost, timeout_s=LEASE_DEADLINE_S)
        until(lambda: all(map(nothing_is_pending, others)))
        assert not [name for name in back if deletes(own_api, name)]
        until(lambda: sum(o.count("reaper_delivered") for o in others) == len(lost))
        expect_one_delete_each(own_api, lost)


class TestSharedRedis:
    def test_two_supervisors_report_each_client_once(
        self,
        own_api: FakeApi,
        start_gateway: StartGateway,
        valkey: ValkeyProcess,
        client_id: str,
    ) -> None:
        one, two = (
            start_gateway(api=own_api.url, redis=valkey.url, workers=WORKERS) for _ in range(2)
        )
        here, there = connect_many(one, f"{client_id}-a"), connect_many(two, f"{client_id}-b")
        first, lost_here = pick_victim(one, here)
        second, lost_there = pick_victim(two, there)
        kill(first)
        kill(second)
        expect_one_delete_each(own_api, lost_here | lost_there)
        count = len(lost_here) + len(lost_there)
        until(lambda: sum(each.count("reaper_delivered") for each in (one, two)) == count)
        until(lambda: nothing_is_pending(one))
        expect_one_delete_each(own_api, lost_here | lost_there)
        kept = {*here, *there} - lost_here - lost_there
        assert not [name for name in kept if deletes(own_api, name)]

    def test_a_host_that_was_cut_off_closes_the_clients_that_were_given_up(
        self,
        own_api: FakeApi,
        start_gateway: StartGateway,
        valkey: ValkeyProcess,
        client_id: str,
    ) -> None:
        """What the API was told must become true, and it is told only once."""
        with FaultProxy(Path(valkey.url.removeprefix("unix://"))) as proxy:
            far = f"redis://127.0.0.1:{proxy.port}/0"
            other = start_gateway(api=own_api.url, redis=valkey.url, workers=1)
            cut_off = start_gateway(api=own_api.url, redis=far, workers=1)
            clients = connect_many(cut_off, client_id, 10)
            proxy.refuse()
            proxy.reset()
            pushes = other.push_client()
            statuses: set[int] = set()

            def all_are_reported() -> bool:
                statuses.update(pushes.push(name, "hello").status for name in clients)
                return all(deletes(own_api, name) for name in clients)

            until(all_are_reported, timeout_s=2 * LEASE_DEADLINE_S)
            expect_one_delete_each(own_api, clients)
            statuses.update(pushes.push(name, "hello").status for name in clients)
            assert statuses == {503}, "nobody knows that they are gone"
            assert pushes.push(f"{client_id}-unknown", "hello").status == 404
            proxy.restore()
            for client in clients.values():
                client.assert_closed(1012)
            until(lambda: cut_off.count("connections_open") == 0)
            until(lambda: nothing_is_pending(cut_off))
            for name in clients:
                until(lambda name=name: pushes.push(name, "hello").status == 404)
            again = cut_off.connect(client_id)
            again.close(1000, "bye")
            own_api.wait_for_one(client_id, "DELETE")
            expect_one_delete_each(own_api, clients)


def find_owner(gateway: GatewayProcess, client_port: int) -> Process:
    """Return the worker that accepted a connection."""
    return find_socket_owner(gateway.children, gateway.clients_address[1], client_port)


def kill_all_at_once(gateway: GatewayProcess) -> None:
    """Let a machine lose its power: nobody has the time to learn of the others' end."""
    os.kill(gateway.pid, signal.SIGSTOP)
    processes = find_descendants(gateway.pid)
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    os.kill(gateway.pid, signal.SIGKILL)
    until(lambda: not gateway.is_running)
    until(lambda: not [process for process in processes if process.is_alive])
