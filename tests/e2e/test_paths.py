"""Let clients use other paths than their id, and ids with slashes, from end to end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Final

import pytest
from harness.api import FakeApi, echo
from harness.gateway import GatewayProcess
from harness.waiting import until

from .test_ctl import Ctl

TOKEN: Final = "s3same"


@pytest.fixture(scope="module")
def shared_gateway(shared_api: FakeApi) -> Iterator[GatewayProcess]:
    """Run two workers for chargers below /ocpp, and for those of several owners below /org."""
    with GatewayProcess(
        api=shared_api.url,
        workers=2,
        path=["/ocpp/{id}", "/org/{id...}"],
        admin_token=TOKEN,
    ) as gateway:
        yield gateway


def test_rest_of_the_path_is_dropped_and_told(
    gateway: GatewayProcess, api: FakeApi, client_id: str
) -> None:
    api.on(client_id, "POST", echo)
    client = gateway.connect(f"/ocpp/{client_id}?a=b")
    connect = api.wait_for_one(client_id, "GET")
    assert connect.target == f"/{client_id}?a=b"
    assert connect.headers["Ws2api-Path"] == f"/ocpp/{client_id}"
    assert connect.headers["Ws2api-Push-Url"].endswith(f":{connect.worker_address[1]}/{client_id}")
    client.send("hi")
    assert client.receive() == "hi"
    assert gateway.push_client().push(client_id, "for you").status == 200
    assert client.receive() == "for you"
    client.close()
    assert api.wait_for_one(client_id, "DELETE").target == f"/{client_id}"
    (post,) = api.requests(client_id, "POST")
    assert post.target == f"/{client_id}"
    assert "Ws2api-Path" not in post.headers


@pytest.mark.parametrize("path", ["/{}", "/{}/x", "/OCPP/{}", "/ocpp/x/{}", "/orga/{}"])
def test_other_path_is_not_found(
    gateway: GatewayProcess, api: FakeApi, client_id: str, path: str
) -> None:
    response = gateway.handshake(path.format(client_id))
    assert response.status == 404
    assert response.text == "clients connect to /ocpp/{id} or /org/{id...} here\n"
    assert not api.requests(client_id)


@pytest.mark.parametrize("path", ["/ocpp/{}%2f..", "/org/{}/../x", "/org/{}//x", "/org/@{}"])
def test_what_is_no_id_is_refused(
    gateway: GatewayProcess, api: FakeApi, client_id: str, path: str
) -> None:
    assert gateway.handshake(path.format(client_id)).status == 400
    assert not api.requests(client_id)


def test_id_with_slashes_is_taken_by_everything(
    gateway: GatewayProcess, api: FakeApi, client_id: str
) -> None:
    name = f"acme/north/{client_id}"
    client = gateway.connect(f"/org/{name}")
    assert api.wait_for_one(client_id, "GET").target == f"/{name}"
    for _ in range(4):  # to either worker
        pushes = gateway.push_client()
        for spelling in (name, name.replace("acme", "%61cme")):
            assert pushes.push(spelling, "for you").status == 200
            assert client.receive() == "for you"
        assert json.loads(pushes.get(name).body)["id"] == name
        assert pushes.push(name.replace("/", "%2F"), "for another").status == 404
    admin = gateway.push_client(gateway.admin_address, token=TOKEN)
    found = json.loads(admin.get(f"clients/{name}").body)
    assert found["id"] == found["connection"]["id"] == name
    listed = json.loads(admin.get("clients").body)["clients"]
    assert name in [each["id"] for each in listed]


def test_operator_closes_a_client_with_slashes(
    gateway: GatewayProcess, api: FakeApi, client_id: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = f"acme/{client_id}"
    client = gateway.connect(f"/org/{name}")
    ctl = Ctl(gateway, tmp_path_factory.mktemp("ctl"), WS2API_ADMIN_TOKEN=TOKEN)
    assert ctl.run("push", name, "hello").stdout == b"delivered\n"
    assert client.receive() == "hello"
    ctl.run("close", name, "--code=4000")
    client.assert_closed(4000, "")
    assert api.wait_for_one(client_id, "DELETE").target == f"/{name}"


def test_loss_of_a_client_with_slashes_is_reported(
    gateway: GatewayProcess, api: FakeApi, client_id: str
) -> None:
    client = gateway.connect(f"/org/acme/{client_id}")
    os.kill(gateway.worker_of(client).pid, signal.SIGKILL)
    told = api.wait_for_one(client_id, "DELETE")
    assert (told.target, told.text) == (f"/acme/{client_id}", "worker lost")
    until(lambda: gateway.admin_get("/readyz").status == 200, what="readiness")
