"""The API is away, hangs, resets or refuses: what must survive, survives, and is counted."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from harness.fault_proxy import FaultProxy
from harness.gateway import GatewayProcess
from harness.traffic import Traffic
from harness.traffic_api import ApiAnswer, ApiRequest, accept_and_echo
from harness.waiting import until
from harness.workers import resident_bytes, worker_pids

WORKERS = 2
CLIENTS = 200
CONNECTIONS = 32
"""To the API, over all workers: fewer than clients, so that each is used all the time."""
FAULT_S = 2.0
"""How long a fault lasts where its length is what matters."""
MIB = 1 << 20


@dataclass
class Scene:
    """Hold a gateway, the API behind a proxy, and the traffic between them."""

    gateway: GatewayProcess
    proxy: FaultProxy
    traffic: Traffic

    def names(self, count: int) -> list[str]:
        return [f"client-{number}" for number in range(count)]

    def begin(self) -> None:
        """Let many clients talk."""
        self.traffic.fleet.add(*self.names(CLIENTS))
        self.traffic.fleet.talk(2, 0.005)
        self.saturate()

    def saturate(self) -> None:
        """Wait until every connection to the API has been used and used again."""
        until(lambda: self.gateway.count("api_connections") == CONNECTIONS, what="a full pool")
        self.await_answers(20 * CLIENTS)

    def await_answers(self, count: int) -> None:
        """Wait until so many more messages are answered."""
        fleet = self.traffic.fleet
        goal = fleet.answers + count
        until(lambda: fleet.answers >= goal, what=f"{count} more answers")

    def take_api_away(self) -> None:
        """End the API as a restart does: what it has answered it has done, and nothing else."""
        self.proxy.refuse()
        self.traffic.api.close()

    def bring_api_back(self) -> None:
        self.traffic.api.open()
        self.proxy.restore()

    def finish(self) -> None:
        """Let everybody finish; nothing may be lost, come twice, or be out of order."""
        self.traffic.fleet.fall_silent()
        self.traffic.settle()
        self.traffic.ledger().assert_balanced()


def run_scene(**options: str | int) -> Iterator[Scene]:
    with (
        Traffic() as traffic,
        FaultProxy(traffic.api.address) as proxy,
        GatewayProcess(
            api=f"http://127.0.0.1:{proxy.port}/",
            workers=WORKERS,
            api_max_connections=CONNECTIONS,
            **options,
        ) as gateway,
    ):
        yield Scene(gateway, proxy, traffic)
        assert not gateway.complaints, gateway.stderr


@pytest.fixture(scope="module")
def patient_gateway() -> Iterator[Scene]:
    """Run a gateway that waits for the API for longer than any test."""
    yield from run_scene(api_timeout="60s")


@pytest.fixture(scope="module")
def impatient_gateway() -> Iterator[Scene]:
    """Run a gateway that gives the API one second, and keeps no connection to it idle."""
    yield from run_scene(api_timeout="1s", api_max_idle=0)


def play(scene: Scene) -> Iterator[Scene]:
    pids = {child.pid for child in scene.gateway.children}
    with scene.traffic.attach(scene.gateway):
        yield scene
        scene.bring_api_back()
    assert {child.pid for child in scene.gateway.children} == pids, scene.gateway.stderr


@pytest.fixture
def scene(patient_gateway: Scene) -> Iterator[Scene]:
    """Use the patient gateway, and leave it with the processes that it had."""
    yield from play(patient_gateway)


@pytest.fixture
def impatient(impatient_gateway: Scene) -> Iterator[Scene]:
    """Use the impatient gateway, and leave it with the processes that it had."""
    yield from play(impatient_gateway)


def let_it_last() -> None:
    """Let a fault last; nothing that follows depends on how long it was."""
    time.sleep(FAULT_S)


class TestApiAwayForSeconds:
    def test_api_away_for_seconds(self, scene: Scene) -> None:
        scene.traffic.api.behaviour = allow_repetition
        scene.begin()
        failed = scene.gateway.count("requests_failed")
        scene.take_api_away()
        away = "API away: Connection refused, since "
        until(lambda: away in scene.gateway.admin_get("/readyz").text)
        let_it_last()
        readiness = scene.gateway.admin_get("/readyz")
        assert readiness.status == 200
        assert readiness.text.startswith(f"ready\n{away}")
        status = json.loads(scene.gateway.admin_get("/status").text)
        assert status["ready"] and status["findings"] == [readiness.text.splitlines()[1]]
        refused = scene.traffic.fleet.try_to_add("late-1", "late-2", "late-3")
        assert [client.stay.status for client in refused] == [502] * 3
        assert scene.traffic.fleet.open_count == CLIENTS
        scene.bring_api_back()
        scene.await_answers(10 * CLIENTS)
        scene.finish()
        assert scene.gateway.count("requests_failed") == failed + len(refused)
        assert scene.gateway.admin_get("/readyz").text == "ready\n"

    def test_again_and_again(self, scene: Scene) -> None:
        scene.traffic.api.behaviour = allow_repetition
        scene.begin()
        for _ in range(3):
            opened = scene.gateway.count("breaker_opened")
            scene.take_api_away()
            until(lambda opened=opened: scene.gateway.count("breaker_opened") > opened)
            scene.bring_api_back()
            scene.saturate()
        scene.finish()

    def test_reading_is_paused(self, scene: Scene) -> None:
        clients, messages, size = 50, 500, 4_000
        fleet = scene.traffic.fleet
        fleet.add(*scene.names(clients))
        before = worker_memory(scene.gateway)
        received = scene.gateway.count("messages_received")
        scene.take_api_away()
        fleet.talk(messages, padding=size)
        until(lambda: scene.gateway.count("messages_received") >= received + 16 * clients)
        let_it_last()
        grown = worker_memory(scene.gateway) - before
        assert clients * messages * size >= 100_000_000
        assert grown < 40 * MIB, f"{grown / MIB:.0f} MiB"
        # One in flight and a queue of 16 for each.
        assert scene.gateway.count("messages_received") <= received + 17 * clients
        scene.bring_api_back()
        fleet.fall_silent()
        scene.finish()

    def test_api_answers_503_to_all(self, scene: Scene) -> None:
        scene.begin()
        api = scene.traffic.api
        api.behaviour = overloaded
        attempts = api.attempts["POST"]
        let_it_last()
        attempts = api.attempts["POST"] - attempts
        assert attempts <= CONNECTIONS + 20 * WORKERS, "every client hammers the API"
        api.behaviour = accept_and_echo
        scene.await_answers(10 * CLIENTS)
        scene.finish()


def allow_repetition(request: ApiRequest) -> ApiAnswer:
    answer = accept_and_echo(request)
    return ApiAnswer(answer.body, headers=f"{answer.headers}Ws2api-Retry: safe\r\n")


def overloaded(request: ApiRequest) -> ApiAnswer:
    return ApiAnswer(status=503)


def worker_memory(gateway: GatewayProcess) -> int:
    return sum(resident_bytes(pid) for pid in worker_pids(gateway))


class TestApiAwayForLong:
    def test_api_away_for_long(self, impatient: Scene) -> None:
        gateway, fleet = impatient.gateway, impatient.traffic.fleet
        staying = fleet.add(*impatient.names(20))
        leaving = fleet.add("leaves-1", "leaves-2", "leaves-3")
        failed = gateway.count("requests_failed")
        impatient.take_api_away()
        fleet.send(*staying)
        fleet.close(*leaving)
        until(lambda: gateway.count("requests_failed") >= failed + len(staying) + len(leaving))
        assert fleet.open_count == len(staying)
        until(lambda: gateway.count("disconnects_pending") == len(leaving))
        impatient.bring_api_back()
        impatient.traffic.settle_ends()
        fleet.send(*staying)
        until(lambda: fleet.answers == len(staying), what="as before")
        ledger = impatient.traffic.ledger(may_give_up=len(staying))
        ledger.assert_balanced()
        assert ledger.messages.counts["given up"] == len(staying)


class TestApiHangs:
    def test_api_hangs_for_half_of_the_clients(self, scene: Scene) -> None:
        fleet = scene.traffic.fleet
        clients = fleet.add(*scene.names(20))
        hanging = {client.client_id for client in clients[:10]}
        gate = scene.traffic.api.hold(lambda request: request.client_id in hanging)
        fleet.talk(1)
        until(lambda: gate.waiting == len(hanging))
        scene.await_answers(1_000)
        gate.open()
        scene.finish()

    def test_for_longer_than_the_timeout(self, impatient: Scene) -> None:
        gateway, fleet = impatient.gateway, impatient.traffic.fleet
        clients = fleet.add(*impatient.names(10))
        failed = gateway.count("requests_failed")
        gate = impatient.traffic.api.hold(lambda request: request.method == "POST")
        fleet.send(*clients)
        until(lambda: gateway.count("requests_failed") == failed + len(clients))
        gate.open()
        fleet.send(*clients)
        until(lambda: fleet.answers == len(clients), what="as before")
        ledger = impatient.traffic.ledger(may_give_up=len(clients))
        ledger.assert_balanced()
        assert ledger.messages.counts["given up"] == len(clients)

    def test_for_more_clients_than_there_are_connections(self, impatient: Scene) -> None:
        fleet = impatient.traffic.fleet
        hanging = fleet.add(*impatient.names(3 * CONNECTIONS))
        [bystander] = fleet.add("bystander")
        gate = impatient.traffic.api.hold(lambda request: request.client_id != "bystander")
        for _ in range(5):
            fleet.send(*hanging)
        until(lambda: gate.waiting == CONNECTIONS)

        def gets_an_answer() -> bool:
            fleet.send(bystander)
            return bool(bystander.stay.answered)

        until(gets_an_answer)
        assert gate.waiting
        gate.open()


class TestApiResets:
    def test_after_a_request_on_a_fresh_connection(self, impatient: Scene) -> None:
        assert self._numbers_that_arrive(impatient) == [1, 2]

    def test_after_a_request_that_is_safe_to_repeat(self, impatient: Scene) -> None:
        impatient.traffic.api.behaviour = allow_repetition
        assert self._numbers_that_arrive(impatient) == [1, 1, 2]

    def _numbers_that_arrive(self, impatient: Scene) -> list[int]:
        """Break the connection after the first of two messages; return what the API gets."""
        fleet = impatient.traffic.fleet
        [client] = fleet.add("client")
        impatient.proxy.reset_after(0)
        fleet.send(client)
        fleet.send(client)
        until(lambda: client.stay.answered[-1:] == [2])
        assert client.is_open
        [life] = impatient.traffic.api.lives_of("client")
        return [sequence for sequence, _ in life.posts]

    def test_idle_connections(self, scene: Scene) -> None:
        scene.traffic.fleet.add(*scene.names(10))
        for _ in range(3):
            scene.traffic.fleet.talk(2)
            scene.await_answers(200)
            scene.traffic.fleet.fall_silent()
            until(lambda: not scene.traffic.fleet.unanswered)
            scene.proxy.reset()
        scene.traffic.fleet.talk(2)
        scene.await_answers(200)
        scene.finish()

    def test_new_connections(self, scene: Scene) -> None:
        [client] = scene.traffic.fleet.add("client")
        scene.proxy.reset()
        until(lambda: not scene.gateway.count("api_connections"))
        scene.proxy.refuse()
        scene.traffic.fleet.send(client)
        until(lambda: scene.gateway.count("api_queue_length") == 1)
        scene.proxy.restore()
        until(lambda: client.stay.answered == [1])
        scene.finish()

    def test_in_the_middle_of_an_answer(self, scene: Scene) -> None:
        [client] = scene.traffic.fleet.add("client")
        failed = scene.gateway.count("requests_failed")
        for number, cut in enumerate((scene.proxy.truncate, scene.proxy.reset_after), 1):
            cut(20)
            scene.traffic.fleet.send(client)
            until(lambda number=number: scene.gateway.count("requests_failed") == failed + number)
        scene.traffic.fleet.send(client)
        until(lambda: client.stay.answered == [3], what="an answer to the last one")
        scene.finish()


class TestMassDisconnect:
    def test_is_paced_and_lets_messages_go_first(self, scene: Scene) -> None:
        fleet, api = scene.traffic.fleet, scene.traffic.api
        [bystander] = fleet.add("bystander")
        clients = fleet.add(*scene.names(2_000))
        gate = api.hold(lambda request: request.method == "DELETE")
        bound = CONNECTIONS // 4
        fleet.hang_up(*clients)
        until(lambda: gate.waiting == bound)
        for count in range(1, 21):
            fleet.send(bystander)
            until(lambda count=count: len(bystander.stay.answered) == count)
        gate.open()
        scene.traffic.settle()
        assert api.most_at_once["DELETE"] == bound
        scene.finish()
        assert scene.traffic.ledger().disconnects.counts["DELETE"] == len(clients)
