"""Deliver pushes through any worker, and answer honestly when it cannot be done."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pytest
from harness.api import FakeApi, Reply, Request, echo
from harness.gateway import GatewayProcess
from harness.http_messages import encode_head, read_response
from harness.push import BINARY, PushClient
from harness.stream import Stream
from harness.valkey import ValkeyProcess
from harness.waiting import until
from harness.ws import WsClient

from .conftest import StartGateway

WORKERS: Final = 4
MIB: Final = 1 << 20
TOKEN: Final = "s3cret-token"


@pytest.fixture(scope="module")
def shared_gateway(shared_api: FakeApi) -> Iterator[GatewayProcess]:
    """Run four workers, so that a push rarely arrives where the client is."""
    with GatewayProcess(api=shared_api.url, workers=WORKERS) as gateway:
        yield gateway


@dataclass(frozen=True)
class Connected:
    """Hold a client and the push address of its own worker."""

    client_id: str
    client: WsClient
    worker_address: tuple[str, int]


def connect(gateway: GatewayProcess, api: FakeApi, client_id: str) -> Connected:
    """Connect a client, and find out which worker has it."""
    client = gateway.connect(client_id)
    return Connected(client_id, client, api.requests(client_id, "GET")[-1].worker_address)


def connect_apart(
    gateway: GatewayProcess, api: FakeApi, client_id: str
) -> tuple[Connected, Connected]:
    """Connect two clients that different workers hold."""
    first = connect(gateway, api, f"{client_id}-first")
    for number in range(100):
        second = connect(gateway, api, f"{client_id}-second-{number}")
        if second.worker_address != first.worker_address:
            return first, second
    raise AssertionError("all the connections are on one worker")


@pytest.fixture
def near(gateway: GatewayProcess, api: FakeApi, client_id: str) -> Connected:
    """Hold a client, to be reached through its own worker."""
    return connect(gateway, api, client_id)


class TestDelivery:
    @pytest.mark.parametrize(
        ("content_type", "expected"),
        [
            (None, "grüße"),
            ("text/plain", "grüße"),
            ("text/plain; charset=utf-8", "grüße"),
            ("application/json", "grüße"),
            (BINARY, "grüße".encode()),
            ("Application/Octet-Stream", "grüße".encode()),
        ],
    )
    def test_content_type_decides_between_text_and_binary(
        self,
        gateway: GatewayProcess,
        client_id: str,
        content_type: str | None,
        expected: str | bytes,
    ) -> None:
        client = gateway.connect(client_id)
        pushed = gateway.push_client().push(client_id, "grüße", content_type=content_type)
        assert (pushed.status, pushed.text) == (200, "ok")
        assert client.receive() == expected

    def test_through_every_worker(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        first, second = connect_apart(gateway, api, client_id)
        for sender in (first, second):
            pushes = gateway.push_client(sender.worker_address)
            for receiver in (first, second):
                message = f"{sender.client_id} → {receiver.client_id}"
                assert pushes.push(receiver.client_id, message).status == 200
                assert receiver.client.receive() == message

    @pytest.mark.parametrize("size", [MIB, MIB - 1])
    def test_largest(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, size: int
    ) -> None:
        first, second = connect_apart(gateway, api, client_id)
        message = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        pushes = gateway.push_client(first.worker_address)
        for receiver in (first, second):
            assert pushes.push(receiver.client_id, message).status == 200
            assert receiver.client.receive() == message

    def test_with_the_generation(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        first, second = connect_apart(gateway, api, client_id)
        pushes = gateway.push_client(first.worker_address)
        for receiver in (first, second):
            name = receiver.client_id
            generation = api.wait_for_one(name, "GET").generation
            assert pushes.push(name, "to this one", generation=generation).status == 200
            assert receiver.client.receive() == "to this one"
            assert pushes.push(name, "to another", generation=generation - 1).status == 412

    def test_to_a_former_generation(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        gateway.connect(client_id).close()
        former = api.wait_for_one(client_id, "DELETE").generation
        client = gateway.connect(client_id)
        for _ in range(2 * WORKERS):
            pushes = gateway.push_client()
            assert pushes.push(client_id, "stale", generation=former).status == 412
            assert pushes.push(client_id, "fresh").status == 200
            assert client.receive() == "fresh"

    def test_in_any_spelling_of_the_id(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        tail = "*DE:1+'!;a=(b)&$,@%2F%C3%BC~"
        first, second = connect_apart(gateway, api, client_id + tail)
        for receiver in (first, second):
            sent = receiver.client_id.replace("~", "%7e").replace("%2F", "%2f")
            renewed = gateway.connect(sent)
            receiver.client.assert_closed(4008, "replaced")
            pushes = gateway.push_client(first.worker_address)
            for spelling in (receiver.client_id, sent):
                assert pushes.push(spelling, "to the one client").status == 200
                assert renewed.receive() == "to the one client"
                assert json.loads(pushes.get(spelling).body)["id"] == receiver.client_id
            renewed.close()
            api.wait_for_one(receiver.client_id, "DELETE")
            escaped = receiver.client_id.replace("*", "%2A")
            assert pushes.push(escaped, "another client").status == 404

    def test_to_nobody(self, gateway: GatewayProcess, client_id: str) -> None:
        for _ in range(2 * WORKERS):
            assert gateway.push_client().push(client_id, "anyone?").status == 404

    def test_to_one_who_has_left(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        gateway.connect(client_id).close()
        api.wait_for_one(client_id, "DELETE")
        for _ in range(2 * WORKERS):
            assert gateway.push_client().push(client_id, "still there?").status == 404

    def test_to_one_whom_the_api_refused(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        api.on(client_id, "GET", Reply("ko"))
        gateway.handshake(client_id)
        assert gateway.push_client().push(client_id, "still there?").status == 404


class TestOrder:
    def test_of_pushes_on_one_connection(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        first, second = connect_apart(gateway, api, client_id)
        messages = [f"message {number}" for number in range(100)]
        pushes = gateway.push_client(first.worker_address)
        for receiver in (first, second):
            for message in messages:
                assert pushes.push(receiver.client_id, message).status == 200
            assert [receiver.client.receive() for _ in messages] == messages

    def test_of_pipelined_pushes_and_their_answers(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        first, second = connect_apart(gateway, api, client_id)
        pushes = gateway.push_client(first.worker_address)
        for number in range(50):
            pushes.send_push(second.client_id, f"far {number}")
            pushes.send_push(f"{client_id}-nobody", "anyone?")
            pushes.send_push(first.client_id, f"near {number}")
        statuses = [pushes.receive().status for _ in range(150)]
        assert statuses == [200, 404, 200] * 50
        assert [second.client.receive() for _ in range(50)] == [f"far {n}" for n in range(50)]
        assert [first.client.receive() for _ in range(50)] == [f"near {n}" for n in range(50)]

    def test_of_large_and_small_pushes(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        first, second = connect_apart(gateway, api, client_id)
        messages = [str(n) * (200_000 if n % 3 == 0 else 1) for n in range(10)]
        pushes = gateway.push_client(first.worker_address)
        for message in messages:
            pushes.send_push(second.client_id, message)
        assert [second.client.receive() for _ in messages] == messages
        assert {pushes.receive().status for _ in messages} == {200}


class OkThenPush:
    """Accept a client, and push to it in the same breath."""

    def __init__(self, pushes: PushClient, client_id: str) -> None:
        self._pushes = pushes
        self._client_id = client_id
        self._status = 0

    def send(self, stream: Stream) -> bool:
        """Write the answer, then push."""
        keeps_connection = Reply("ok").send(stream)
        self._status = self._pushes.push(self._client_id, "welcome").status
        return keeps_connection

    def wait_for_status(self) -> int:
        """Return the answer to the push."""
        return until(lambda: self._status)


class TestDuringTheHandshake:
    """The API may push as soon as it knows of a client."""

    def test_after_the_ok(self, gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
        for number in range(50):
            name = f"{client_id}-{number}"
            greeting = OkThenPush(gateway.push_client(), name)
            api.on(name, "GET", greeting)
            client = gateway.connect(name)
            assert greeting.wait_for_status() == 200
            assert client.receive() == "welcome"

    @pytest.mark.parametrize("through", ["own-worker", "any-worker"])
    def test_before_the_ok(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, through: str
    ) -> None:
        statuses: list[int] = []

        def push_then_accept(request: Request) -> Reply:
            own = request.worker_address if through == "own-worker" else None
            statuses.append(gateway.push_client(own).push(client_id, "early").status)
            return Reply("ok")

        api.on(client_id, "GET", push_then_accept)
        client = gateway.connect(client_id)
        assert gateway.push_client().push(client_id, "later").status == 200
        assert statuses[0] in (200, 404)
        expected = ["early", "later"] if statuses == [200] else ["later"]
        assert [client.receive() for _ in expected] == expected

    def test_before_a_refusal(self, gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
        statuses: list[int] = []

        def push_then_refuse(request: Request) -> Reply:
            pushes = gateway.push_client(request.worker_address)
            statuses.append(pushes.push(client_id, "early").status)
            return Reply("ko")

        api.on(client_id, "GET", push_then_refuse)
        assert gateway.handshake(client_id).status == 403
        assert statuses == [404]


class TestSlowClient:
    @pytest.mark.parametrize("through", ["own-worker", "other-worker"])
    def test_is_refused_what_it_does_not_read(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, through: str
    ) -> None:
        slow, bystander = connect_slow_one_and_bystander(gateway, api, client_id)
        sender = slow if through == "own-worker" else bystander
        pushes = gateway.push_client(sender.worker_address)
        accepted = push_until_refused(pushes, slow.client_id)
        assert pushes.push(bystander.client_id, "undisturbed").status == 200
        assert bystander.client.receive() == "undisturbed"
        for number in range(accepted):
            assert slow.client.receive() == numbered(number)

    def test_is_served_again_once_it_reads(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        slow, _ = connect_slow_one_and_bystander(gateway, api, client_id)
        pushes = gateway.push_client(slow.worker_address)
        for _ in range(push_until_refused(pushes, slow.client_id)):
            slow.client.receive()
        until(lambda: pushes.push(slow.client_id, "again").status == 200)
        assert slow.client.receive() == "again"


def connect_slow_one_and_bystander(
    gateway: GatewayProcess, api: FakeApi, client_id: str
) -> tuple[Connected, Connected]:
    """Connect a client with hardly any room for what it does not read, and one elsewhere."""
    client = gateway.connect(client_id, receive_buffer_bytes=4096)
    slow = Connected(client_id, client, api.wait_for_one(client_id, "GET").worker_address)
    for number in range(100):
        bystander = connect(gateway, api, f"{client_id}-bystander-{number}")
        if bystander.worker_address != slow.worker_address:
            return slow, bystander
    raise AssertionError("all the connections are on one worker")


def numbered(number: int) -> bytes:
    """Return a large message that tells its number."""
    return b"%08d" % number + bytes(200_000)


def push_until_refused(pushes: PushClient, client_id: str) -> int:
    """Push large messages until the client is said to be too slow; return how many it took."""
    for number in range(1000):
        status = pushes.push(client_id, numbered(number)).status
        if status == 429:
            return number
        assert status == 200
    raise AssertionError("200 MB were taken for a client that does not read")


class TestQuestions:
    def test_about_a_client(self, gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
        first, second = connect_apart(gateway, api, client_id)
        pushes = gateway.push_client(first.worker_address)
        descriptions = [pushes.describe(each.client_id) for each in (first, second)]
        for connected, description in zip((first, second), descriptions, strict=True):
            assert description["id"] == connected.client_id
            generation = api.wait_for_one(connected.client_id, "GET").generation
            assert int(description["generation"]) == generation
        assert descriptions[0]["worker"] != descriptions[1]["worker"]

    def test_about_nobody(self, gateway: GatewayProcess, client_id: str) -> None:
        assert gateway.push_client().get(client_id).status == 404


class TestDelete:
    def test_closes_a_client(self, gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
        first, second = connect_apart(gateway, api, client_id)
        pushes = gateway.push_client(first.worker_address)
        for connected in (first, second):
            assert pushes.delete(connected.client_id, code=4100, reason="paid out").status == 200
            connected.client.assert_closed(4100, "paid out")
            delete = api.wait_for_one(connected.client_id, "DELETE")
            assert delete.generation == api.wait_for_one(connected.client_id, "GET").generation
            assert pushes.push(connected.client_id, "after the end").status == 404

    def test_without_code_and_reason(self, gateway: GatewayProcess, client_id: str) -> None:
        client = gateway.connect(client_id)
        assert gateway.push_client().delete(client_id).status == 200
        client.assert_closed(1000, "")

    def test_comes_after_the_pushes_before_it(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        first, second = connect_apart(gateway, api, client_id)
        pushes = gateway.push_client(first.worker_address)
        for connected in (first, second):
            pushes.send_push(connected.client_id, "last words")
            assert pushes.delete(connected.client_id, code=1000, reason="bye").status == 200
            assert pushes.receive().status == 200
            assert connected.client.receive() == "last words"
            connected.client.assert_closed(1000, "bye")

    @pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 2999, 5000, "", "x", "-1"])
    def test_invalid_code(self, gateway: GatewayProcess, client_id: str, code: int | str) -> None:
        gateway.connect(client_id)
        pushes = gateway.push_client()
        assert pushes.delete(client_id, code=code).status == 400
        assert pushes.get(client_id).status == 200

    def test_too_long_reason(self, gateway: GatewayProcess, client_id: str) -> None:
        client = gateway.connect(client_id)
        pushes = gateway.push_client()
        assert pushes.delete(client_id, code=1000, reason="x" * 124).status == 400
        assert pushes.delete(client_id, code=1000, reason="é" * 61).status == 200
        client.assert_closed(1000, "é" * 61)

    def test_of_nobody(self, gateway: GatewayProcess, client_id: str) -> None:
        assert gateway.push_client().delete(client_id).status == 404


@pytest.fixture(scope="module")
def guarded(shared_api: FakeApi) -> Iterator[GatewayProcess]:
    """Run a gateway that demands a token."""
    with GatewayProcess(api=shared_api.url, push_token=TOKEN, single_port=True) as gateway:
        yield gateway


class TestToken:
    def test_right_one(self, guarded: GatewayProcess, client_id: str) -> None:
        client = guarded.connect(client_id)
        pushes = guarded.push_client(token=TOKEN)
        assert pushes.push(client_id, "with token").status == 200
        assert client.receive() == "with token"
        assert pushes.get(client_id).status == 200
        assert pushes.delete(client_id).status == 200

    @pytest.mark.parametrize("token", [None, "wrong", TOKEN[:-1], TOKEN + "x", TOKEN.upper()])
    def test_missing_or_wrong_one(
        self, guarded: GatewayProcess, client_id: str, token: str | None
    ) -> None:
        guarded.connect(client_id)
        for method in ("POST", "GET", "DELETE"):
            pushes = guarded.push_client(token=token)
            response = pushes.request(method, f"/{client_id}", b"x" if method == "POST" else None)
            assert response.status == 401
            assert response.headers["WWW-Authenticate"].startswith("Bearer")
        assert guarded.push_client(token=TOKEN).get(client_id).status == 200

    def test_other_scheme(self, guarded: GatewayProcess, client_id: str) -> None:
        headers = {"Authorization": f"Basic {TOKEN}"}
        pushes = guarded.push_client()
        assert pushes.request("POST", f"/{client_id}", b"x", headers).status == 401

    def test_is_demanded_on_the_single_port_too(
        self, guarded: GatewayProcess, client_id: str
    ) -> None:
        client = guarded.connect(client_id)
        for token, status in ((None, 401), ("wrong", 401), (TOKEN, 200)):
            pushes = guarded.push_client(guarded.clients_address, token=token)
            assert pushes.push(client_id, f"with {token}").status == status
        assert client.receive() == f"with {TOKEN}"

    def test_says_nothing_about_clients(self, guarded: GatewayProcess, client_id: str) -> None:
        assert guarded.push_client().push(client_id, "anyone?").status == 401


class TestRequests:
    def test_chunked_body(self, gateway: GatewayProcess, near: Connected) -> None:
        pushes = gateway.push_client(near.worker_address)
        head = {"Host": "push.example", "Transfer-Encoding": "chunked"}
        pushes.send_raw(encode_head(f"POST /{near.client_id} HTTP/1.1", head))
        pushes.send_raw(b"4\r\nin c\r\n5;ext=1\r\nhunks\r\n0\r\nTrailer: x\r\n\r\n")
        assert pushes.receive().status == 200
        assert near.client.receive() == "in chunks"

    def test_body_that_waits_to_be_asked_for(
        self, gateway: GatewayProcess, near: Connected
    ) -> None:
        stream = gateway.push_client(near.worker_address).stream
        head = {"Host": "push.example", "Content-Length": "7", "Expect": "100-continue"}
        stream.write(encode_head(f"POST /{near.client_id} HTTP/1.1", head))
        assert stream.read_through(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        stream.write(b"at last")
        assert read_response(stream).status == 200
        assert near.client.receive() == "at last"

    def test_in_single_bytes(self, gateway: GatewayProcess, near: Connected) -> None:
        stream = gateway.push_client(near.worker_address).stream
        head = {"Host": "push.example", "Content-Length": "5"}
        stream.write(encode_head(f"POST /{near.client_id} HTTP/1.1", head) + b"drips", chop=1)
        assert read_response(stream).status == 200
        assert near.client.receive() == "drips"

    def test_http_1_0(self, gateway: GatewayProcess, near: Connected) -> None:
        stream = gateway.push_client(near.worker_address).stream
        head = {"Content-Length": "3"}
        stream.write(encode_head(f"POST /{near.client_id} HTTP/1.0", head) + b"old")
        assert read_response(stream).status == 200
        assert stream.read_to_end() == b""
        assert near.client.receive() == "old"

    def test_http_1_0_that_keeps_the_connection(
        self, gateway: GatewayProcess, near: Connected
    ) -> None:
        stream = gateway.push_client(near.worker_address).stream
        head = {"Content-Length": "3", "Connection": "Keep-Alive"}
        for _ in range(2):
            stream.write(encode_head(f"POST /{near.client_id} HTTP/1.0", head) + b"old")
            response = read_response(stream)
            assert (response.status, response.headers["Connection"]) == (200, "keep-alive")
            assert near.client.receive() == "old"

    @pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
    def test_on_the_single_port(
        self, guarded: GatewayProcess, client_id: str, version: str
    ) -> None:
        client = guarded.connect(client_id)
        stream = guarded.push_client(guarded.clients_address).stream
        head = {
            **{"Host": "push.example", "Authorization": f"Bearer {TOKEN}"},
            **{"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"},
            "Transfer-Encoding": "chunked",
        }
        if version == "HTTP/1.0":
            head = {"Authorization": f"Bearer {TOKEN}", "Content-Length": "2"}
        target = f"http://gateway.example/{client_id}"
        stream.write(encode_head(f"POST {target} {version}", head))
        stream.write(b"hi" if version == "HTTP/1.0" else b"2\r\nhi\r\n0\r\n\r\n")
        assert read_response(stream).status == 200
        assert client.receive() == "hi"

    def test_connection_that_is_to_be_closed(
        self, gateway: GatewayProcess, near: Connected
    ) -> None:
        pushes = gateway.push_client(near.worker_address)
        closing = {"Connection": "close"}
        response = pushes.request("POST", f"/{near.client_id}", b"last", closing)
        assert response.status == 200
        assert not response.keeps_connection
        assert near.client.receive() == "last"

    @pytest.mark.parametrize("method", ["HEAD", "PUT", "PATCH", "OPTIONS"])
    def test_other_method(self, gateway: GatewayProcess, near: Connected, method: str) -> None:
        response = gateway.push_client().request(method, f"/{near.client_id}")
        assert response.status == 405
        allowed = {name.strip() for name in response.headers["Allow"].split(",")}
        assert allowed == {"POST", "GET", "DELETE"}

    @pytest.mark.parametrize(
        "target",
        ["/", "/@groups", "/.", "/..", f"/{'x' * 256}", "/%zz", "/a%4", '/a"b', "/caf\xc3\xa9"],
        ids=repr,
    )
    @pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
    def test_invalid_client_id(self, gateway: GatewayProcess, method: str, target: str) -> None:
        body = b"x" if method == "POST" else None
        assert gateway.push_client().request(method, target, body).status == 400

    @pytest.mark.parametrize(
        "data",
        [
            b"\r\n\r\nnonsense\r\n\r\n",
            b"POST\r\n\r\n",
            b"POST /id HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
            b"POST /id HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            b"POST /id HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"POST /id HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"POST /id HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
            b"POST /i\x01d HTTP/1.1\r\nHost: a\r\n\r\n",
            b"POST /id HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600),
        ],
        ids=[
            "nonsense",
            "no-target",
            "bad-length",
            "two-lengths",
            "bad-chunk",
            "length-and-chunked",
            "other-coding",
            "control-character",
            "no-colon",
            "tls",
        ],
    )
    def test_malformed(self, gateway: GatewayProcess, near: Connected, data: bytes) -> None:
        stream = gateway.push_client(near.worker_address).stream
        stream.write(data)
        assert read_response(stream).status == 400
        assert stream.read_to_end() == b""
        assert gateway.push_client().push(near.client_id, "undisturbed").status == 200
        assert near.client.receive() == "undisturbed"

    @pytest.mark.parametrize(
        "headers",
        [{"X-Long": "x" * 300_000}, {f"X-{n}": "x" for n in range(2000)}],
        ids=["one", "many"],
    )
    def test_too_large_headers(
        self, gateway: GatewayProcess, near: Connected, headers: dict[str, str]
    ) -> None:
        pushes = gateway.push_client()
        assert pushes.request("POST", f"/{near.client_id}", b"x", headers).status == 431

    def test_body_over_the_limit(self, gateway: GatewayProcess, near: Connected) -> None:
        assert gateway.push_client().push(near.client_id, b"x" * (MIB + 1)).status == 413

    def test_body_announced_over_the_limit(self, gateway: GatewayProcess, near: Connected) -> None:
        stream = gateway.push_client().stream
        head = {"Host": "push.example", "Content-Length": str(1 << 40)}
        stream.write(encode_head(f"POST /{near.client_id} HTTP/1.1", head))
        assert read_response(stream).status == 413

    def test_chunked_body_over_the_limit(self, gateway: GatewayProcess, near: Connected) -> None:
        pushes = gateway.push_client()
        head = {"Host": "push.example", "Transfer-Encoding": "chunked"}
        pushes.send_raw(encode_head(f"POST /{near.client_id} HTTP/1.1", head))
        pushes.send_raw(b"%x\r\n" % (MIB + 1) + b"x" * (MIB + 1))
        assert pushes.receive().status == 413

    def test_text_that_is_not_utf8(self, gateway: GatewayProcess, near: Connected) -> None:
        pushes = gateway.push_client()
        assert pushes.push(near.client_id, b"\xff", content_type="text/plain").status == 400
        assert pushes.push(near.client_id, b"\xff", content_type=BINARY).status == 200
        assert near.client.receive() == b"\xff"

    @pytest.mark.parametrize("generation", ["x", "-1", "", "1.5"])
    def test_malformed_generation(
        self, gateway: GatewayProcess, near: Connected, generation: str
    ) -> None:
        headers = {"Ws2api-Generation": generation}
        pushes = gateway.push_client()
        assert pushes.request("POST", f"/{near.client_id}", b"x", headers).status == 400

    def test_many_connections_at_once(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        client = gateway.connect(client_id)
        pushes = [gateway.push_client() for _ in range(20)]
        threads = [
            threading.Thread(target=lambda p=p, n=n: p.push(client_id, str(n)))
            for n, p in enumerate(pushes)
        ]
        for thread in threads:
            thread.start()
        received = {client.receive() for _ in threads}
        for thread in threads:
            thread.join()
        assert received == {str(number) for number in range(20)}


class TestWithoutRedis:
    def test_local_clients_are_served_and_others_come_back(
        self,
        own_api: FakeApi,
        start_gateway: StartGateway,
        valkey: ValkeyProcess,
        client_id: str,
    ) -> None:
        gateway = start_gateway(api=own_api.url, redis=valkey.url, workers=2, push_timeout="1s")
        near, far = connect_apart(gateway, own_api, client_id)
        pushes = gateway.push_client(near.worker_address)
        assert pushes.push(far.client_id, "before").status == 200
        valkey.stop()

        until(lambda: pushes.push(far.client_id, "away").status == 503, what="503")
        assert pushes.get(far.client_id).status == 503
        assert pushes.delete(far.client_id).status == 503
        assert pushes.push(near.client_id, "local").status == 200
        assert near.client.receive() == "local"
        own_api.on(far.client_id, "POST", echo)
        far.client.send("to the API")
        assert far.client.receive() == "before"
        assert far.client.receive() == "to the API"

        valkey.start()

        def is_back() -> bool:
            status = pushes.push(far.client_id, "back").status
            assert status in (200, 503), "the gateway cannot know that the client is gone"
            return status == 200

        until(is_back)
        assert far.client.receive() == "back"

    def test_clients_may_still_connect(
        self,
        own_api: FakeApi,
        start_gateway: StartGateway,
        valkey: ValkeyProcess,
        client_id: str,
    ) -> None:
        gateway = start_gateway(api=own_api.url, redis=valkey.url)
        valkey.stop()
        own_api.on(client_id, "POST", echo)
        client = gateway.connect(client_id)
        client.send("hello")
        assert client.receive() == "hello"
        valkey.start()
        until(lambda: gateway.admin_get("/readyz").status == 200, what="readiness")
        assert gateway.push_client().push(client_id, "welcome back").status == 200
