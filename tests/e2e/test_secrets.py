"""Try to get past the token of the push port, and look for secrets where they must not be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from harness.api import FakeApi, Raw, Reply
from harness.gateway import GatewayProcess
from harness.http_messages import read_response
from harness.valkey import ValkeyProcess
from harness.waiting import until
from redis import Redis

from .conftest import StartGateway

TOKEN: Final = "tok-3n-0f-the-api"


@pytest.fixture(scope="module")
def guarded(shared_api: FakeApi) -> Iterator[GatewayProcess]:
    """Run a gateway that demands a token, on the port of the clients as well."""
    with GatewayProcess(api=shared_api.url, push_token=TOKEN, single_port=True) as gateway:
        yield gateway


def push(client_id: str, body: bytes, *lines: bytes) -> bytes:
    """Encode a push; nothing is checked."""
    head = (b"POST /" + client_id.encode() + b" HTTP/1.1", b"Host: a", *lines)
    return b"\r\n".join((*head, b"Content-Length: %d" % len(body), b"", body))


GOOD: Final = b"Authorization: Bearer " + TOKEN.encode()


class TestToken:
    @pytest.mark.parametrize(
        "line",
        [
            *(b"Authorization: " + TOKEN.encode(), b"Authorization:", GOOD + b"x", GOOD[:-1]),
            *(
                b"Authorization: bearer " + TOKEN.encode(),
                b"Authorization: Bearer  " + TOKEN.encode(),
            ),
            *(
                GOOD + b"\xff",
                GOOD + b",",
                GOOD + b"\0",
                b"Authorization : Bearer " + TOKEN.encode(),
            ),
            *(b"Proxy-" + GOOD, b"X-" + GOOD, b"Cookie: token=" + TOKEN.encode()),
            *(b"Authorization: Bearer\r\n " + TOKEN.encode(), b"X: y\n" + GOOD, b"X: y\r" + GOOD),
            GOOD + b"\r\nAuthorization: Bearer wrong",
        ],
    )
    def test_anything_else_is_refused(
        self, guarded: GatewayProcess, client_id: str, line: bytes
    ) -> None:
        client = guarded.connect(client_id)
        for address in (guarded.pushes_address, guarded.clients_address):
            stream = guarded.push_client(address).stream
            stream.write(push(client_id, b"evil", line))
            assert read_response(stream).status in (400, 401)
            assert stream.read_to_end() == b""
        assert guarded.push_client(token=TOKEN).push(client_id, "good").status == 200
        assert client.receive() == "good"

    @pytest.mark.parametrize(
        "target", ["/{}?token={}", "/{}?access_token={}", "//user:{1}@host/{0}"]
    )
    def test_does_not_count_in_the_url(
        self, guarded: GatewayProcess, client_id: str, target: str
    ) -> None:
        pushes = guarded.push_client()
        response = pushes.request("POST", target.format(client_id, TOKEN), b"evil")
        assert response.status == 401

    def test_is_demanded_of_each_request_of_a_connection(
        self, guarded: GatewayProcess, client_id: str
    ) -> None:
        client = guarded.connect(client_id)
        pushes = guarded.push_client()
        # The same fields again and again are looked up, not parsed; those of others are not.
        for _ in range(3):
            pushes.send_raw(push(client_id, b"good", GOOD))
            assert pushes.receive().status == 200
        pushes.send_raw(push(client_id, b"good", GOOD) + push(client_id, b"evil"))
        assert [pushes.receive().status for _ in range(2)] == [200, 401]
        assert [client.receive() for _ in range(4)] == ["good"] * 4
        assert guarded.push_client().push(client_id, "evil").status == 401
        assert guarded.push_client(token=TOKEN).push(client_id, "last").status == 200
        assert client.receive() == "last"

    def test_does_not_count_behind_the_message(
        self, guarded: GatewayProcess, client_id: str
    ) -> None:
        client = guarded.connect(client_id)
        pushes = guarded.push_client()
        head = f"POST /{client_id} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        pushes.send_raw(head.encode() + b"4\r\nevil\r\n0\r\n" + GOOD + b"\r\n\r\n")
        assert pushes.receive().status == 401
        assert guarded.push_client(token=TOKEN).push(client_id, "good").status == 200
        assert client.receive() == "good"

    def test_does_not_open_what_has_no_client(self, guarded: GatewayProcess) -> None:
        pushes = guarded.push_client(token=TOKEN)
        for target in ("/@all", "/.", "/..", "/%2e%2E", "/..%2fx", "/a%2f..", "*", "http://a/@b"):
            assert pushes.request("POST", target, b"x").status == 400


SECRETS: Final = {
    "authorization": "Bearer of-the-client",
    "cookie": "session=c00kie-of-the-client",
    "query": "q-uery-of-the-client",
    "message": "m3ssage-of-the-client",
    "binary": "b1nary-of-the-client",
    "reply": "r3ply-of-the-api",
    "push": "p-ushed-by-the-api",
    "refusal": "r3fusal-of-the-api",
    "set-cookie": "s3t-by-the-api",
    "redis": "p4ssword-of-redis",
    "token": TOKEN,
}


def test_secrets_are_neither_logged_nor_shown(
    start_gateway: StartGateway, own_api: FakeApi, tmp_path: Path
) -> None:
    with ValkeyProcess(tmp_path) as valkey:
        path = valkey.url.removeprefix("unix://")
        with Redis(unix_socket_path=path) as redis:
            redis.config_set("requirepass", SECRETS["redis"])
        gateway = start_gateway(
            api=own_api.url,
            api_timeout="1s",
            push_token=TOKEN,
            redis=f"unix://default:{SECRETS['redis']}@{path}",
            log_level="debug",
        )
        headers = {"Authorization": SECRETS["authorization"], "Cookie": SECRETS["cookie"]}
        answers = (
            Reply(SECRETS["reply"]),
            Reply(SECRETS["reply"], status=500),
            Raw(SECRETS["reply"].encode() + b"\r\n\r\n", then_close=True),
        )
        own_api.on("ann", "GET", Reply("ok", headers={"Set-Cookie": SECRETS["set-cookie"]}))
        own_api.on("ann", "POST", *answers)
        own_api.on("bob", "GET", Reply(SECRETS["refusal"]))
        own_api.on("eve", "GET", Raw(SECRETS["refusal"].encode(), then_close=True))
        ann = gateway.connect(f"/ann?{SECRETS['query']}", headers)
        for message in (SECRETS["message"], SECRETS["binary"].encode(), SECRETS["message"]):
            ann.send(message)
        own_api.wait_for("ann", "POST", count=3)
        for client_id, status in (("bob", 403), ("eve", 502)):
            assert gateway.handshake(f"/{client_id}?{SECRETS['query']}", headers).status == status
        assert gateway.push_client(token=TOKEN).push("ann", SECRETS["push"]).status == 200
        assert gateway.push_client(token=TOKEN + "x").push("ann", SECRETS["push"]).status == 401
        shown = [gateway.admin_get(path).text for path in ("/status", "/metrics", "/readyz")]
        shown.append(gateway.push_client(token=TOKEN).get("ann").text)
        valkey.stop()
        until(lambda: gateway.admin_get("/readyz").status == 503, what="Redis is missed")
        shown += [gateway.admin_get(path).text for path in ("/status", "/metrics", "/readyz")]
        ann.close()
        own_api.wait_for("ann", "DELETE")
        until(lambda: "client disconnected" in gateway.stderr, what="the end of ann in the log")
        gateway.terminate()
        until(lambda: not gateway.is_running, what="the end", timeout_s=30)
        shown += [gateway.stdout, gateway.stderr]
    found = [name for name, secret in SECRETS.items() for text in shown if secret in text]
    assert not found, shown
    assert "client connected" in gateway.stderr
