"""Behave as ws2api's own test suite expects it, pushes and counters on the client port."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness.api import FakeApi, Reply
from harness.gateway import GatewayProcess
from harness.waiting import until

CLIENT_ID = "test"

COUNTERS = {
    "requests_started",
    "connections_opened",
    "connections_closed",
    "requests_failed",
    "requests_succeeded",
}


@pytest.fixture(scope="module")
def shared_api() -> Iterator[FakeApi]:
    """Serve the client `test`, scripted anew by each scenario."""
    with FakeApi() as api:
        yield api


@pytest.fixture(scope="module")
def shared_gateway(shared_api: FakeApi) -> Iterator[GatewayProcess]:
    """Run the gateway the way ws2api ran."""
    with GatewayProcess(api=shared_api.url, single_port=True) as gateway:
        yield gateway


class Scenario:
    """See what one scenario adds: requests to the API, and the counters at `GET /`."""

    def __init__(self, gateway: GatewayProcess, api: FakeApi) -> None:
        self._gateway = gateway
        self._api = api
        self._old_requests = len(api.requests(CLIENT_ID))
        self._old_counters = self._read_counters()

    def script(self, method: str, answer: Reply) -> None:
        """Say how the API answers."""
        self._api.on(CLIENT_ID, method, answer)

    def expect_requests(self, *expected: tuple[str, bytes]) -> None:
        """Wait until the API was asked this, and exactly this, and the gateway has counted it."""
        until(lambda: len(self._requests) >= len(expected), what=f"{expected} in {self._requests}")
        assert self._requests == list(expected)
        until(lambda: self.added["requests_started"] == len(expected), what="requests_started")

    @property
    def added(self) -> dict[str, int]:
        """What the scenario has added to the counters so far."""
        now = self._read_counters()
        return {name: value - self._old_counters[name] for name, value in now.items()}

    @property
    def _requests(self) -> list[tuple[str, bytes]]:
        new = self._api.requests(CLIENT_ID)[self._old_requests :]
        assert {request.target for request in new} <= {"/test"}
        return [(request.method, request.body) for request in new]

    def _read_counters(self) -> dict[str, int]:
        pushes = self._gateway.push_client(self._gateway.clients_address)
        response = pushes.request("GET", "/")
        assert response.status == 200
        lines = [line.split(" ") for line in response.text.splitlines()]
        return {name: int(value) for name, value in lines}


@pytest.fixture
def scenario(gateway: GatewayProcess, api: FakeApi) -> Scenario:
    """Begin a scenario in which the API accepts and says nothing more."""
    api.on(CLIENT_ID, "GET", Reply("ok"))
    api.on(CLIENT_ID, "POST", Reply())
    return Scenario(gateway, api)


def test_prints_the_five_counters_a_line_each(scenario: Scenario) -> None:
    assert set(scenario.added) == COUNTERS


def test_accepted(scenario: Scenario, gateway: GatewayProcess) -> None:
    client = gateway.connect(CLIENT_ID)
    scenario.expect_requests(("GET", b""))
    client.close()
    scenario.expect_requests(("GET", b""), ("DELETE", b""))
    until(lambda: scenario.added["requests_succeeded"] == 2)
    assert scenario.added["connections_opened"] == 1
    assert scenario.added["connections_closed"] == 1
    assert scenario.added["requests_failed"] == 0


def test_rejected(scenario: Scenario, gateway: GatewayProcess) -> None:
    scenario.script("GET", Reply("ko"))
    assert gateway.handshake(CLIENT_ID).status == 403
    scenario.expect_requests(("GET", b""))
    assert scenario.added["connections_opened"] == 0


def test_failed(scenario: Scenario, gateway: GatewayProcess) -> None:
    scenario.script("GET", Reply(status=503))
    assert gateway.handshake(CLIENT_ID).status == 502
    scenario.expect_requests(("GET", b""))
    assert scenario.added["requests_failed"] == 1


def test_incoming(scenario: Scenario, gateway: GatewayProcess) -> None:
    scenario.script("POST", Reply("response_message"))
    client = gateway.connect(CLIENT_ID)
    client.send("request_message")
    assert client.stream.read_exactly(18) == b"\x81\x10response_message"
    client.close()
    scenario.expect_requests(("GET", b""), ("POST", b"request_message"), ("DELETE", b""))


def test_outgoing(scenario: Scenario, gateway: GatewayProcess) -> None:
    client = gateway.connect(CLIENT_ID)
    pushed = gateway.push_client(gateway.clients_address).push(CLIENT_ID, "server_message")
    assert (pushed.status, pushed.body) == (200, b"ok")
    assert client.stream.read_exactly(16) == b"\x81\x0eserver_message"
    client.close()
    scenario.expect_requests(("GET", b""), ("DELETE", b""))


def test_disconnect_with_reason(scenario: Scenario, gateway: GatewayProcess) -> None:
    gateway.connect(CLIENT_ID).close(1000, "disconnect")
    scenario.expect_requests(("GET", b""), ("DELETE", b"disconnect"))


def test_unexpected_disconnect(scenario: Scenario, gateway: GatewayProcess) -> None:
    gateway.connect(CLIENT_ID).hang_up()
    scenario.expect_requests(("GET", b""), ("DELETE", b"EOF"))
