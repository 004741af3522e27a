"""A push has one outcome, and 200 means that the client's socket has it, whatever dies."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from harness.gateway import GatewayProcess
from harness.traffic import Traffic
from harness.traffic_clients import TrafficClient
from harness.traffic_pushes import PushRecord
from harness.waiting import DEADLINE_S, until
from harness.workers import worker_pids

WORKERS = 3
CLIENTS = 60
AT_ONCE = 16


@dataclass
class Scene:
    """Hold a gateway whose clients listen, and the worker that something will happen to."""

    gateway: GatewayProcess
    traffic: Traffic
    victim: int
    """Process id of a worker."""
    its_clients: list[TrafficClient]
    other_ports: list[tuple[str, int]]
    """Push addresses of the other workers."""

    def push_while(self, action: Callable[[], None]) -> list[PushRecord]:
        """Push to the victim's clients at other workers, before, during and after an action."""
        names = [client.client_id for client in self.its_clients]
        pushes = [(port, name) for port in self.other_ports for name in names]
        records: list[PushRecord] = []
        counted = self.gateway.count("pushes")
        is_over = threading.Event()

        def push_on() -> None:
            while not is_over.is_set():
                records.extend(self.traffic.pusher.push_at_once(pushes[:AT_ONCE]))
                pushes.append(pushes.pop(0))

        thread = threading.Thread(target=push_on)
        thread.start()
        try:
            until(lambda: len(records) > 10 * AT_ONCE)
            action()
        finally:
            is_over.set()
            thread.join(DEADLINE_S)
        # An outcome is counted where the push was received, and once.
        assert self.gateway.count("pushes") == counted + len(records)
        return records


@pytest.fixture
def scene() -> Iterator[Scene]:
    with (
        Traffic() as traffic,
        GatewayProcess(api=traffic.api.url, workers=WORKERS, push_timeout="1s") as gateway,
        traffic.attach(gateway),
    ):
        clients = traffic.fleet.add(*(f"client-{number}" for number in range(CLIENTS)))
        ports = {client.client_id: traffic.owner_of(client.stay) for client in clients}
        home = ports["client-0"]
        its_clients = [client for client in clients if ports[client.client_id] == home]
        number = int(gateway.push_client(home).describe("client-0")["worker"].split("-")[-2])
        yield Scene(
            gateway,
            traffic,
            worker_pids(gateway)[number],
            its_clients,
            sorted(set(ports.values()) - {home}),
        )
        assert not gateway.complaints, gateway.stderr


def test_worker_killed_while_pushes_are_in_flight_to_it(scene: Scene) -> None:
    records = scene.push_while(lambda: kill_and_await_the_end(scene))
    statuses = Counter(record.status for record in records)
    assert set(statuses) <= {200, 404, 503, 504} and len(statuses) > 1, statuses
    # The kernel delivers what a process had handed to it, also after its end.
    received = sum(len(client.stay.pushes) for client in scene.its_clients)
    assert statuses[200] <= received <= len(records)
    scene.traffic.ledger().assert_balanced()


def kill_and_await_the_end(scene: Scene) -> None:
    os.kill(scene.victim, signal.SIGKILL)
    until(lambda: all(client.stay.has_ended for client in scene.its_clients))
    scene.traffic.settle_ends()


def test_worker_stopped_while_pushes_are_in_flight_to_it(scene: Scene) -> None:
    def stop_for_a_while() -> None:
        os.kill(scene.victim, signal.SIGSTOP)
        try:
            until(lambda: scene.gateway.count("pushes", outcome="timeout") >= AT_ONCE)
        finally:
            os.kill(scene.victim, signal.SIGCONT)

    records = scene.push_while(stop_for_a_while)
    statuses = Counter(record.status for record in records)
    assert set(statuses) == {200, 504}, statuses
    until(lambda: sum(len(client.stay.pushes) for client in scene.its_clients) == len(records))
    scene.traffic.ledger().assert_balanced()
    again = scene.traffic.pusher.push_at_once(
        (port, client.client_id) for port in scene.other_ports for client in scene.its_clients
    )
    assert {record.status for record in again} == {200}
