"""Redis is away, frozen, or has forgotten everything: clients stay, and messages flow."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import redis
from harness.fault_proxy import FaultProxy
from harness.gateway import GatewayProcess
from harness.push import PushClient
from harness.traffic import Traffic
from harness.traffic_clients import TrafficClient
from harness.valkey import ValkeyProcess
from harness.waiting import until

WORKERS = 3
CLIENTS = 60
PREFIX = "ws2api:"


@dataclass
class Scene:
    """Hold a gateway, and the traffic through it; every push is made at each worker."""

    gateway: GatewayProcess
    traffic: Traffic
    ports: list[tuple[str, int]]
    """The push address of each worker."""

    def begin(self) -> list[TrafficClient]:
        """Let clients talk, on every worker."""
        clients = self.traffic.fleet.add(*(f"client-{number}" for number in range(CLIENTS)))
        self.ports = sorted({self.traffic.owner_of(client.stay) for client in clients})
        assert len(self.ports) == WORKERS
        self.expect_local_traffic()
        # A busy machine may need more than the short --push-timeout for the first ones.
        until(lambda: self.push_everywhere() == {"near": {200}, "far": {200}}, what="all reached")
        return clients

    @property
    def connected(self) -> list[TrafficClient]:
        return [client for client in self.traffic.fleet.clients.values() if client.is_open]

    def push_everywhere(self) -> dict[str, set[int]]:
        """Push to each client at each worker; return the statuses, at its own and at others."""
        near: list[tuple[tuple[str, int], str]] = []
        far: list[tuple[tuple[str, int], str]] = []
        for client in self.connected:
            owner = self.traffic.owner_of(client.stay)
            for port in self.ports:
                (near if port == owner else far).append((port, client.client_id))
        return {
            "near": {record.status for record in self.traffic.pusher.push_at_once(near)},
            "far": {record.status for record in self.traffic.pusher.push_at_once(far)},
        }

    def expect_local_traffic(self) -> None:
        """See every client's messages answered."""
        self.traffic.fleet.talk(1, 0.01)
        clients = self.connected
        goals = {client.client_id: len(client.stay.answered) + 5 for client in clients}
        until(lambda: all(len(c.stay.answered) >= goals[c.client_id] for c in clients))

    def expect_as_before(self) -> None:
        """See pushes reach every client through every worker, and each be found there."""
        until(lambda: self.push_everywhere() == {"near": {200}, "far": {200}}, what="all reached")
        for port in self.ports:
            at_worker = self.gateway.push_client(port)
            for client in self.connected:
                found = at_worker.describe(client.client_id)
                assert found["generation"] == client.stay.generation
        self.expect_local_traffic()

    def finish(self, *gone: TrafficClient) -> None:
        """See that nobody was closed but those that left, and that those are unknown and told."""
        for port in self.ports:
            at_worker = self.gateway.push_client(port)
            for client in gone:  # 503 while it might be one that has yet to be entered
                until(partial(is_unknown, at_worker, client.client_id))
        assert self.traffic.fleet.ends == ({"close": len(gone)} if gone else {})
        self.traffic.fleet.fall_silent()
        self.traffic.settle()
        self.traffic.ledger().assert_balanced()


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyProcess]:
    """Run a server that can be killed and started again."""
    with tempfile.TemporaryDirectory() as folder, ValkeyProcess(Path(folder)) as server:
        yield server


@pytest.fixture(scope="module")
def proxy(valkey: ValkeyProcess) -> Iterator[FaultProxy]:
    with FaultProxy(Path(valkey.url.removeprefix("unix://"))) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def own_redis(proxy: FaultProxy) -> Iterator[Scene]:
    """Run a gateway that uses the server through the proxy."""
    with (
        Traffic() as traffic,
        GatewayProcess(
            api=traffic.api.url,
            redis=f"redis://127.0.0.1:{proxy.port}/0",
            workers=WORKERS,
            push_timeout="1s",
        ) as gateway,
    ):
        yield Scene(gateway, traffic, [])
        assert not gateway.complaints, gateway.stderr


@pytest.fixture
def scene(own_redis: Scene, proxy: FaultProxy) -> Iterator[Scene]:
    """Use the gateway, and leave it with the processes that it had."""
    pids = {child.pid for child in own_redis.gateway.children}
    with own_redis.traffic.attach(own_redis.gateway):
        yield own_redis
        proxy.restore()
    own_redis.gateway.disconnect_all()
    assert {child.pid for child in own_redis.gateway.children} == pids


def is_unknown(at_worker: PushClient, client_id: str) -> bool:
    status = at_worker.get(client_id).status
    assert status in (404, 503, 504)  # 504: Redis was lost while it was asked
    return status == 404


def registered(valkey: ValkeyProcess) -> set[str]:
    """Read from Redis itself which clients it knows."""
    with redis.Redis(unix_socket_path=valkey.url.removeprefix("unix://")) as connection:
        keys = connection.keys(f"{PREFIX}c:*")
        listed = [id for key in connection.keys(f"{PREFIX}w:*") for id in connection.hkeys(key)]
    known = {key.decode().removeprefix(f"{PREFIX}c:") for key in keys}
    assert sorted(id.decode() for id in listed) == sorted(known)
    return known


class TestRedisAway:
    def test_redis_away_then_back(
        self, scene: Scene, proxy: FaultProxy, valkey: ValkeyProcess
    ) -> None:
        clients = scene.begin()
        proxy.refuse()
        proxy.reset()
        until(lambda: scene.gateway.count("redis_up") == 0)
        self._go_through(scene, clients)
        proxy.restore()
        self._see_it_end(scene, clients, valkey)

    def test_valkey_killed_and_restarted_empty(
        self, scene: Scene, valkey: ValkeyProcess, proxy: FaultProxy
    ) -> None:
        clients = scene.begin()
        valkey.stop()
        until(lambda: scene.gateway.count("redis_up") == 0)
        self._go_through(scene, clients)
        valkey.start()
        self._see_it_end(scene, clients, valkey)

    def _go_through(self, scene: Scene, clients: list[TrafficClient]) -> None:
        """See what still works; some leave and another one comes."""
        scene.expect_local_traffic()
        assert scene.push_everywhere() == {"near": {200}, "far": {503}}
        scene.traffic.fleet.close(*clients[:5])
        scene.traffic.fleet.add("newcomer")
        scene.traffic.settle_ends()
        assert scene.push_everywhere() == {"near": {200}, "far": {503}}

    def _see_it_end(
        self, scene: Scene, clients: list[TrafficClient], valkey: ValkeyProcess
    ) -> None:
        scene.expect_as_before()
        present = {client.client_id for client in scene.connected}
        until(lambda: registered(valkey) == present, what="stale entries to go")
        scene.finish(*clients[:5])


class TestRedisForgets:
    @pytest.mark.parametrize("command", ["FLUSHALL", "FLUSHDB"])
    def test_data_lost_while_the_connections_stay(
        self, scene: Scene, valkey: ValkeyProcess, command: str
    ) -> None:
        clients = scene.begin()
        with redis.Redis.from_url(valkey.url) as connection:
            connection.execute_command(command)

        def reaches_all() -> bool:
            statuses = scene.push_everywhere()
            assert statuses["near"] == {200}
            assert statuses["far"] <= {200, 503}, "nobody is gone"
            return statuses["far"] == {200}

        until(reaches_all)
        scene.traffic.fleet.close(*clients[:5])
        present = {client.client_id for client in scene.connected}
        until(lambda: registered(valkey) == present, what="all are entered")
        until(lambda: scene.gateway.admin_get("/readyz").status == 200)
        scene.finish(*clients[:5])


class TestRedisFrozen:
    def test_redis_frozen(self, scene: Scene, proxy: FaultProxy, valkey: ValkeyProcess) -> None:
        clients = scene.begin()
        proxy.freeze()
        scene.expect_local_traffic()
        assert scene.push_everywhere() == {"near": {200}, "far": {504}}
        scene.traffic.fleet.close(*clients[:5])
        scene.traffic.fleet.add("newcomer")  # waits until Redis is given up
        # Also those that are under way when Redis is given up: none with 503 may arrive later.
        until(lambda: self._push_on(scene) and scene.gateway.count("redis_up") == 0)
        scene.expect_local_traffic()
        assert scene.push_everywhere() == {"near": {200}, "far": {503}}
        proxy.thaw()
        scene.expect_as_before()
        present = {client.client_id for client in scene.connected}
        until(lambda: registered(valkey) == present, what="stale entries to go")
        scene.finish(*clients[:5])

    def _push_on(self, scene: Scene) -> bool:
        return scene.push_everywhere()["far"] <= {503, 504}

    def test_for_a_moment(self, scene: Scene, proxy: FaultProxy) -> None:
        scene.begin()
        proxy.freeze()
        assert scene.push_everywhere() == {"near": {200}, "far": {504}}
        proxy.thaw()
        scene.expect_as_before()
        scene.finish()

    def test_answers_come_late(self, scene: Scene, proxy: FaultProxy) -> None:
        scene.begin()
        proxy.delay(0.1)
        assert scene.push_everywhere() == {"near": {200}, "far": {200}}
        proxy.restore()
        scene.finish()


class TestHalfOfRedis:
    def test_nothing_is_taken_that_could_not_be_confirmed(
        self, scene: Scene, valkey: ValkeyProcess
    ) -> None:
        scene.begin()
        with redis.Redis(unix_socket_path=valkey.url.removeprefix("unix://")) as server:
            commands = [
                each["id"] for each in server.client_list() if each["name"].endswith("-commands")
            ]
            assert len(commands) == WORKERS
            most = server.config_get("maxclients")["maxclients"]
            count = server.info("clients")["connected_clients"] - len(commands)
            server.config_set("maxclients", count)  # so that they cannot come back
            for each in commands:
                server.client_kill_filter(_id=each)
            until(lambda: not server.pubsub_channels(f"{PREFIX}w:*"), what="nobody listens")
            scene.expect_local_traffic()
            assert scene.push_everywhere() == {"near": {200}, "far": {503}}
            server.config_set("maxclients", most)
        scene.expect_as_before()
        scene.finish()


class TestEmbeddedValkey:
    def test_embedded_valkey_killed(self) -> None:
        with (
            Traffic() as traffic,
            GatewayProcess(api=traffic.api.url, workers=WORKERS, push_timeout="1s") as gateway,
            traffic.attach(gateway),
        ):
            scene = Scene(gateway, traffic, [])
            clients = scene.begin()
            lost = gateway.count("redis_reconnects")
            [server] = [child for child in gateway.children if child.command == "valkey-server"]
            os.kill(server.pid, signal.SIGKILL)
            traffic.fleet.close(*clients[:5])
            scene.expect_local_traffic()
            until(lambda: gateway.count("redis_reconnects") == lost + WORKERS)
            scene.expect_as_before()
            scene.finish(*clients[:5])
