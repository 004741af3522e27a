"""Watch requests and pushes of real workers as they happen, and read them in the log."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from harness.api import FakeApi, Reply, echo
from harness.gateway import GatewayProcess
from harness.push import PushClient
from harness.waiting import DEADLINE_S, until

from .conftest import StartGateway

TOKEN = "open-sesame"


class Viewer:
    """Read what the admin port streams."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self._answer = answer

    def line(self) -> dict[str, Any]:
        """Return the next object; empty lines only tell that the gateway is there."""
        while not (text := self._answer.readline().strip()):
            assert not self._answer.isclosed()
        line: dict[str, Any] = json.loads(text)
        return line

    def until(self, *last: object) -> list[dict[str, Any]]:
        """Read up to the first line of this kind, method and status."""
        lines = [self.line()]
        while summary(lines[-1]) != last:
            lines.append(self.line())
        return lines


@contextmanager
def watching(gateway: GatewayProcess, client_id: str) -> Iterator[Viewer]:
    connection = http.client.HTTPConnection(*gateway.admin_address, timeout=DEADLINE_S)
    with closing(connection):
        headers = {"Authorization": f"Bearer {TOKEN}"}
        connection.request("GET", f"/tail/{client_id}", headers=headers)
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Content-Type"]) == (200, "application/x-ndjson")
        yield Viewer(answer)


def summary(line: dict[str, Any]) -> tuple[object, ...]:
    return line["kind"], line["method"], line["status"]


def push(gateway: GatewayProcess, client_id: str) -> int:
    """Push over a connection of its own, which any worker may get."""
    with closing(PushClient(gateway.pushes_address)) as client:
        return client.push(client_id, "pushed").status


@pytest.fixture
def tailed(start_gateway: StartGateway, shared_api: FakeApi) -> GatewayProcess:
    return start_gateway(api=shared_api.url, workers=2, admin_token=TOKEN, log_requests=True)


def test_shows_what_one_client_does(
    tailed: GatewayProcess, shared_api: FakeApi, client_id: str
) -> None:
    shared_api.on(client_id, "POST", echo)
    other = f"{client_id}-other"
    with watching(tailed, client_id) as viewer:
        # A refused push is shown once its worker has noticed that somebody watches.
        workers: set[int] = set()
        while workers != {0, 1}:
            assert push(tailed, client_id) == 404
            line = viewer.line()
            assert summary(line) == ("push", "POST", 404)
            assert line["reason"] == "no such client"
            workers.add(line["worker"])
        for name in (other, client_id):
            client = tailed.connect(name)
            client.send("hello")
            shared_api.wait_for_one(name, "POST")
            assert push(tailed, name) == 200
        tailed.disconnect_all()
        lines = viewer.until("request", "DELETE", 200)
        assert {line["client"] for line in lines} == {client_id}
        seen = [summary(line) for line in lines if line["status"] != 404]
        assert seen[0] == ("request", "GET", 200)
        assert sorted(seen[1:3], key=str) == [("push", "POST", 200), ("request", "POST", 200)]
        assert seen[3:] == [("request", "DELETE", 200)]
        post = next(line for line in lines if summary(line) == ("request", "POST", 200))
        assert (post["request_bytes"], post["reply_bytes"], post["reason"]) == (5, 5, None)
        assert post["ms"] >= 0


def test_logs_requests_of_all(tailed: GatewayProcess, shared_api: FakeApi, client_id: str) -> None:
    shared_api.on(client_id, "GET", Reply(b"who are you?"))
    assert tailed.handshake(client_id).status == 403
    assert push(tailed, client_id) == 404

    def is_logged(*parts: str) -> bool:
        return any(all(part in line for part in parts) for line in tailed.stderr.splitlines())

    until(lambda: is_logged(" API request ", "method=GET", f"client={client_id} ", "status=200"))
    until(lambda: is_logged(" push request ", "method=POST", f"client={client_id} ", "status=404"))
    assert "pushed" not in tailed.stderr
    assert "who are you" not in tailed.stderr
