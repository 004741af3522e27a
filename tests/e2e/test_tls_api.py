"""Ask an API over https, and only one whose certificate is trusted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.api import Drop, FakeApi, Reply, echo
from harness.certificates import Certificate, make_certificate
from harness.gateway import GatewayProcess
from harness.waiting import until

MIB = 1 << 20


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """Make the certificate of the API."""
    return make_certificate(tmp_path_factory.mktemp("api"), "api")


@pytest.fixture(scope="module")
def shared_api(certificate: Certificate) -> Iterator[FakeApi]:
    """Serve the API over https."""
    with FakeApi(tls=certificate.server_context()) as api:
        yield api


@pytest.fixture(scope="module")
def shared_gateway(shared_api: FakeApi, certificate: Certificate) -> Iterator[GatewayProcess]:
    """Run a gateway that trusts the API."""
    with GatewayProcess(api=shared_api.url, api_ca=str(certificate.certificate)) as gateway:
        yield gateway


def test_connect_message_and_close(gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
    api.on(client_id, "POST", echo)
    client = gateway.connect(client_id)
    client.send("over tls")
    assert client.receive() == "over tls"
    client.close(1000, "bye")
    assert api.wait_for_one(client_id, "DELETE").text == "bye"


def test_refusal(gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
    api.on(client_id, "GET", Reply("not you", 401))
    response = gateway.handshake(client_id)
    assert (response.status, response.text) == (401, "not you")


def test_large_messages(gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
    api.on(client_id, "POST", echo)
    client = gateway.connect(client_id)
    for _ in range(3):
        client.send(b"x" * MIB)
        assert client.receive() == b"x" * MIB


def test_connections_are_kept(gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
    api.on(client_id, "POST", echo)
    client = gateway.connect(client_id)
    for _ in range(5):
        client.send("again")
        assert client.receive() == "again"
    # One, or another while the client of the test before is reported on the first.
    assert len({post.connection for post in api.requests(client_id, "POST")}) <= 2


def test_message_that_arrived_on_a_reused_connection_is_not_sent_again(
    gateway: GatewayProcess, api: FakeApi, client_id: str
) -> None:
    api.on(client_id, "POST", echo, Drop(), echo)
    client = gateway.connect(client_id)
    client.send("first")
    assert client.receive() == "first"
    client.send("lost")
    client.send("third")
    assert client.receive() == "third"
    assert api.texts(client_id) == ["first", "lost", "third"]


def test_untrusted_certificate(api: FakeApi, tmp_path: Path, client_id: str) -> None:
    stranger = make_certificate(tmp_path, "stranger")
    with GatewayProcess(api=api.url, api_ca=str(stranger.certificate)) as gateway:
        assert gateway.handshake(client_id).status == 502
        until(lambda: "certificate" in gateway.stderr.lower(), what="a line in the log")
        assert not api.requests(client_id)
