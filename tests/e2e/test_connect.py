"""Turn a handshake into one GET, and the API's answer into the handshake's."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest
from harness.api import Answer, Drop, FakeApi, Hold, Raw, Reply
from harness.gateway import GatewayProcess
from harness.http_messages import Response, read_response
from harness.waiting import until
from harness.ws import Frame, Op, upgrade_request

from .conftest import StartGateway

SECONDS_US = 1_000_000
CUT_OFF = Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no", then_close=True)


@pytest.fixture(scope="module")
def configured_api() -> Iterator[FakeApi]:
    """Serve the gateway that has every option of the handshake set."""
    with FakeApi() as api:
        yield api
    assert not api.violations


@pytest.fixture(scope="module")
def configured(configured_api: FakeApi) -> Iterator[GatewayProcess]:
    """Run a gateway with every option of the handshake set."""
    with GatewayProcess(
        api=f"{configured_api.url}under/path/",
        api_timeout="1s",
        trusted_proxy=["127.0.0.0/8"],
        forward_header=["X-Tenant", "Accept-Language"],
        subprotocol=["ocpp1.6", "ocpp2.0.1"],
        allow_origin=["https://app.example", "https://*.pages.example"],
    ) as gateway:
        yield gateway


def refuse(gateway: GatewayProcess, request: bytes) -> Response:
    """Send a request that must be refused; the connection ends after the answer."""
    stream = gateway.open_stream()
    stream.write(request)
    response = read_response(stream)
    assert 400 <= response.status < 500
    assert stream.read_to_end() == b""
    return response


class TestAnswersOfTheApi:
    def test_ok_accepts(self, gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
        gateway.connect(client_id)
        request = api.wait_for_one(client_id, "GET")
        assert (request.target, request.body) == (f"/{client_id}", b"")
        assert api.requests(client_id) == [request]

    def test_chunked_ok_accepts(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        api.on(client_id, "GET", Reply("ok", framing="chunked"))
        gateway.connect(client_id)

    @pytest.mark.parametrize("body", ["ko", "okay", "OK", ""])
    def test_another_body_is_an_error_message(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, body: str
    ) -> None:
        api.on(client_id, "GET", Reply(body))
        response = gateway.handshake(client_id)
        assert (response.status, response.text) == (403, body)

    @pytest.mark.parametrize("status", [401, 403, 404, 409, 429])
    def test_status_meant_for_the_client_is_passed_on(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, status: int
    ) -> None:
        explained = {"WWW-Authenticate": 'Basic realm="chargers"', "Retry-After": "120"}
        api.on(client_id, "GET", Reply("not like this", status, explained))
        response = gateway.handshake(client_id)
        assert (response.status, response.text) == (status, "not like this")
        assert response.headers["WWW-Authenticate"] == 'Basic realm="chargers"'
        assert response.headers["Retry-After"] == "120"

    @pytest.mark.parametrize("status", [201, 204, 302, 400, 500, 503])
    def test_other_status_is_a_bad_gateway(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, status: int
    ) -> None:
        body = "" if status == 204 else "ok"
        api.on(client_id, "GET", Reply(body, status, {"Location": "/elsewhere"}))
        assert gateway.handshake(client_id).status == 502

    def test_garbage_is_a_bad_gateway(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        api.on(client_id, "GET", Raw(b"SMTP ready\r\n\r\n"))
        assert gateway.handshake(client_id).status == 502

    def test_unreachable_is_a_bad_gateway(
        self, configured: GatewayProcess, configured_api: FakeApi, client_id: str
    ) -> None:
        configured_api.close()
        try:
            assert configured.handshake(client_id).status == 502
        finally:
            configured_api.open()

    def test_no_answer_in_time_is_a_gateway_timeout(
        self, configured: GatewayProcess, configured_api: FakeApi, client_id: str
    ) -> None:
        hold = Hold(Reply("ok"))
        configured_api.on(client_id, "GET", hold)
        assert configured.handshake(client_id).status == 504
        # It may have accepted all the same: then it must hear of the end.
        asked = configured_api.wait_for_one(client_id, "GET")
        told = configured_api.wait_for_one(client_id, "DELETE")
        assert (told.generation, told.close_code, told.text) == (asked.generation, 1006, "EOF")
        hold.release()

    @pytest.mark.parametrize("answer", [Drop(), Drop(reset=True), CUT_OFF], ids=repr)
    def test_answer_that_is_lost_is_followed_by_a_disconnect(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, answer: Answer
    ) -> None:
        api.on(client_id, "GET", answer)
        assert gateway.handshake(client_id).status == 502
        told = api.wait_for_one(client_id, "DELETE")
        assert told.generation == api.requests(client_id, "GET")[-1].generation

    def test_is_asked_once_even_if_it_fails(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        api.on(client_id, "GET", Reply(status=500))
        gateway.handshake(client_id)
        assert len(api.requests(client_id)) == 1


class TestWhatTheAnswerPassesOn:
    def test_subprotocol_that_the_api_chose(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        api.on(client_id, "GET", Reply("ok", headers={"Sec-WebSocket-Protocol": "soap"}))
        client = gateway.connect(client_id, {"Sec-WebSocket-Protocol": "wamp, soap"})
        assert client.response.headers["Sec-WebSocket-Protocol"] == "soap"
        assert api.wait_for_one(client_id, "GET").headers["Sec-WebSocket-Protocol"] == "wamp, soap"

    def test_no_subprotocol_unless_one_was_chosen(
        self, gateway: GatewayProcess, client_id: str
    ) -> None:
        client = gateway.connect(client_id, {"Sec-WebSocket-Protocol": "wamp, soap"})
        assert "Sec-WebSocket-Protocol" not in client.response.headers

    def test_no_subprotocol_that_was_not_offered(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        api.on(client_id, "GET", Reply("ok", headers={"Sec-WebSocket-Protocol": "mqtt"}))
        response = gateway.handshake(client_id, {"Sec-WebSocket-Protocol": "soap"})
        assert response.status in (101, 502)
        assert "Sec-WebSocket-Protocol" not in response.headers

    def test_configured_subprotocol_when_the_api_names_none(
        self, configured: GatewayProcess, client_id: str
    ) -> None:
        client = configured.connect(client_id, {"Sec-WebSocket-Protocol": "mqtt, ocpp1.6"})
        assert client.response.headers["Sec-WebSocket-Protocol"] == "ocpp1.6"

    def test_choice_of_the_api_wins_over_the_configured_one(
        self, configured: GatewayProcess, configured_api: FakeApi, client_id: str
    ) -> None:
        configured_api.on(client_id, "GET", Reply("ok", headers={"Sec-WebSocket-Protocol": "mqtt"}))
        client = configured.connect(client_id, {"Sec-WebSocket-Protocol": "mqtt, ocpp1.6"})
        assert client.response.headers["Sec-WebSocket-Protocol"] == "mqtt"

    def test_every_cookie(self, gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
        cookies = ["session=1; HttpOnly", "theme=dark; Path=/"]
        lines = "".join(f"Set-Cookie: {cookie}\r\n" for cookie in cookies)
        answer = f"HTTP/1.1 200 OK\r\n{lines}Content-Length: 2\r\n\r\nok"
        api.on(client_id, "GET", Raw(answer.encode()))
        assert gateway.connect(client_id).response.headers.all("Set-Cookie") == cookies

    def test_nothing_else(self, gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
        api.on(client_id, "GET", Reply("ok", headers={"X-Powered-By": "PHP", "Content-Type": "x"}))
        headers = gateway.connect(client_id).response.headers
        assert "X-Powered-By" not in headers
        assert "Content-Type" not in headers
        assert "Content-Length" not in headers


class TestWhatTheApiIsTold:
    def test_headers_of_the_client(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        headers = {
            "Authorization": "Basic dXNlcjpwYXNz",
            "Cookie": "session=1; theme=dark",
            "Origin": "https://app.example",
            "User-Agent": "charger/1.0",
            "Sec-WebSocket-Protocol": "soap",
        }
        gateway.connect(client_id, {**headers, "X-Tenant": "42", "Accept-Language": "de"})
        received = api.wait_for_one(client_id, "GET").headers
        assert {name: received[name] for name in headers} == headers
        assert "X-Tenant" not in received
        assert "Accept-Language" not in received
        assert "Upgrade" not in received
        assert "Sec-WebSocket-Key" not in received

    def test_no_header_that_the_client_did_not_send(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        gateway.connect(client_id)
        received = api.wait_for_one(client_id, "GET").headers
        for name in ("Authorization", "Cookie", "Origin", "Sec-WebSocket-Protocol"):
            assert name not in received

    def test_configured_headers(
        self, configured: GatewayProcess, configured_api: FakeApi, client_id: str
    ) -> None:
        configured.connect(client_id, {"x-tenant": "42", "Accept-Language": "de"})
        received = configured_api.wait_for_one(client_id, "GET").headers
        assert (received["X-Tenant"], received["Accept-Language"]) == ("42", "de")

    def test_own_headers_cannot_be_forged(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        forged = {"Ws2api-Generation": "1", "Ws2api-Push-Url": "http://evil.example/"}
        gateway.connect(client_id, forged)
        received = api.wait_for_one(client_id, "GET").headers
        assert received["Ws2api-Generation"] != "1"
        assert "evil" not in received["Ws2api-Push-Url"]

    def test_address_of_an_untrusted_peer_only(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        gateway.connect(client_id, {"X-Forwarded-For": "10.1.2.3"})
        assert api.wait_for_one(client_id, "GET").headers["X-Forwarded-For"] == "127.0.0.1"

    def test_address_appended_by_a_trusted_proxy(
        self, configured: GatewayProcess, configured_api: FakeApi, client_id: str
    ) -> None:
        configured.connect(client_id, {"X-Forwarded-For": "10.1.2.3, 10.9.9.9"})
        received = configured_api.wait_for_one(client_id, "GET").headers
        assert received["X-Forwarded-For"] == "10.1.2.3, 10.9.9.9, 127.0.0.1"

    def test_query_on_connect_only(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        client = gateway.connect(f"/{client_id}?room=1&name=a%20b&x")
        assert api.wait_for_one(client_id, "GET").query == "room=1&name=a%20b&x"
        client.send("hello")
        assert api.wait_for_one(client_id, "POST").target == f"/{client_id}"
        client.close()
        assert api.wait_for_one(client_id, "DELETE").target == f"/{client_id}"

    def test_path_of_the_base_url(
        self, configured: GatewayProcess, configured_api: FakeApi, client_id: str
    ) -> None:
        configured.connect(client_id)
        request = configured_api.wait_for_one(client_id, "GET")
        assert request.target == f"/under/path/{client_id}"

    def test_generation_in_microseconds(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        before_us = time.time_ns() // 1000 - SECONDS_US
        for _ in range(2):
            gateway.connect(client_id).close()
        first, second = api.wait_for(client_id, "GET", count=2)
        assert before_us < first.generation < second.generation
        assert second.generation < time.time_ns() // 1000 + SECONDS_US

    def test_push_url_reaches_the_client(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        client = gateway.connect(client_id)
        request = api.wait_for_one(client_id, "GET")
        assert request.headers["Ws2api-Push-Url"].endswith(f"/{client_id}")
        pushed = gateway.push_client(request.worker_address).push(client_id, "by its url")
        assert (pushed.status, pushed.text) == (200, "ok")
        assert client.receive() == "by its url"


class TestClientIds:
    @pytest.mark.parametrize(
        "encoded",
        ["a%20b", "a%2Fb", "caf%C3%A9", "%25", "~._-", "a%40b", "0", "DE*A:b+'!;@"],
    )
    def test_is_passed_on_exactly(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, encoded: str
    ) -> None:
        sent = f"{client_id.rpartition('-')[2]}{encoded}"
        client = gateway.connect(sent)
        assert api.wait_for_one(sent, "GET").target == f"/{sent}"
        assert gateway.push_client().push(sent, "for you").status == 200
        assert client.receive() == "for you"

    def test_255_bytes_are_accepted(self, gateway: GatewayProcess, api: FakeApi) -> None:
        longest = "x" * 255
        gateway.connect(longest)
        assert api.wait_for_one(longest, "GET").target == f"/{longest}"

    def test_absolute_target_and_another_spelling_are_the_same_client(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        stream = gateway.open_stream()
        stream.write(upgrade_request(f"ws://gateway.example:7001/{client_id}%c3%a9%61?a"))
        assert read_response(stream).status == 101
        name = f"{client_id}%C3%A9a"
        assert api.wait_for_one(name, "GET").target == f"/{name}?a"
        assert gateway.push_client().push(name, "for you").status == 200

    @pytest.mark.parametrize(
        "target",
        [
            "/",
            "/?only=query",
            "/.",
            "/..",
            "/../etc",
            "/%2e%2e",
            "/@groups",
            f"/{'x' * 256}",
            "/%zz",
            "/%4",
            "/100%",
            "/a\x01b",
            "/a\tb",
            "/a\x7fb",
            "/caf\xc3\xa9",
            '/a"b',
            "/a<b>",
            "/a\\b",
            "http://gateway.example/ab/solute",
            "ftp://gateway.example/absolute",
            "no-slash",
            "*",
        ],
        ids=repr,
    )
    def test_others_are_refused(self, gateway: GatewayProcess, api: FakeApi, target: str) -> None:
        assert refuse(gateway, upgrade_request(target)).status == 400
        asked = api.requests(target.partition("?")[0].rpartition("/")[2])
        assert not asked


class TestHandshakesOfTheField:
    @pytest.mark.parametrize(
        "headers",
        [
            {"Connection": "keep-alive, Upgrade"},
            {"Upgrade": "WebSocket", "Connection": "upgrade"},
            {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"},
            {"Sec-WebSocket-Protocol": "ocpp1.6,ocpp2.0.1"},
            {"Cookie": "x" * 4000},
        ],
        ids=["firefox", "case", "compression", "protocols", "cookie"],
    )
    def test_are_accepted(
        self, gateway: GatewayProcess, client_id: str, headers: dict[str, str]
    ) -> None:
        assert (
            "Sec-WebSocket-Extensions" not in gateway.connect(client_id, headers).response.headers
        )

    def test_may_arrive_byte_by_byte(self, gateway: GatewayProcess, client_id: str) -> None:
        stream = gateway.open_stream()
        stream.write(upgrade_request(f"/{client_id}"), chop=1)
        assert read_response(stream).status == 101


class TestWhatIsNoHandshake:
    def test_plain_get_is_told_to_upgrade(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        plain = upgrade_request(f"/{client_id}", {"Upgrade": None, "Connection": None})
        response = refuse(gateway, plain)
        assert response.status == 426
        assert response.headers["Upgrade"].lower() == "websocket"
        assert not api.requests(client_id)

    def test_plain_post_is_told_to_upgrade(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        fields = {"Upgrade": None, "Connection": None, "Content-Length": "2"}
        response = refuse(gateway, upgrade_request(f"/{client_id}", fields, method="POST"))
        assert response.status in (405, 426)
        assert not api.requests(client_id)

    def test_upgrade_to_something_else(self, gateway: GatewayProcess, client_id: str) -> None:
        assert refuse(gateway, upgrade_request(f"/{client_id}", {"Upgrade": "h2c"})).status == 426

    def test_other_version(self, gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
        response = refuse(
            gateway, upgrade_request(f"/{client_id}", {"Sec-WebSocket-Version": "12"})
        )
        assert response.status == 426
        assert response.headers["Sec-WebSocket-Version"] == "13"
        assert not api.requests(client_id)

    @pytest.mark.parametrize("key", [None, "", "short", "dGhlIHNhbXBsZQ=="])
    def test_missing_or_wrong_key(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, key: str | None
    ) -> None:
        assert refuse(gateway, upgrade_request(f"/{client_id}", {"Sec-WebSocket-Key": key}))
        assert not api.requests(client_id)

    @pytest.mark.parametrize(
        "headers",
        [{"X-Long": "x" * 70_000}, {f"X-{n}": "x" for n in range(1000)}],
        ids=["one", "many"],
    )
    def test_too_large_headers(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, headers: dict[str, str]
    ) -> None:
        assert refuse(gateway, upgrade_request(f"/{client_id}", headers)).status == 431
        assert not api.requests(client_id)

    def test_too_long_request_line(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        response = refuse(gateway, upgrade_request(f"/{client_id}?{'x' * 70_000}"))
        assert response.status in (400, 414, 431)
        assert not api.requests(client_id)

    @pytest.mark.parametrize(
        "data",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600),
            b"GET\r\n\r\n",
            b"GET /id HTTP/9.9\r\n\r\n",
            b"GET /id HTTP/1.1\r\nno colon\r\n\r\n",
            b"GET /id HTTP/1.1\r\n Folded: x\r\n\r\n",
            b"GET /id HTTP/1.1\r\nHost: a\r\nName : x\r\n\r\n",
            b"\r\n" * 10_000,
            b"A" * 100_000,
            bytes(range(256)) * 40,
        ],
        ids=["tls", "no-target", "version", "no-colon", "folded", "space", "lines", "A", "bytes"],
    )
    def test_hostile_bytes(self, gateway: GatewayProcess, client_id: str, data: bytes) -> None:
        stream = gateway.open_stream()
        stream.write(data)
        answer = stream.read_to_end()
        assert not answer or answer.startswith(b"HTTP/1.1 4")
        gateway.connect(client_id)


class TestOrigins:
    @pytest.mark.parametrize("origin", ["https://app.example", "https://a.pages.example", None])
    def test_allowed(self, configured: GatewayProcess, client_id: str, origin: str | None) -> None:
        configured.connect(client_id, {"Origin": origin})

    @pytest.mark.parametrize(
        "origin",
        [
            "https://evil.example",
            "http://app.example",
            "https://app.example.evil.example",
            "https://pages.example",
            "null",
        ],
    )
    def test_refused(
        self, configured: GatewayProcess, configured_api: FakeApi, client_id: str, origin: str
    ) -> None:
        assert configured.handshake(client_id, {"Origin": origin}).status == 403
        assert not configured_api.requests(client_id)


class TestWhileTheApiThinks:
    def test_client_that_has_left_is_reported(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        hold = Hold(Reply("ok"))
        api.on(client_id, "GET", hold)
        stream = gateway.open_stream()
        stream.write(upgrade_request(f"/{client_id}"))
        connect = api.wait_for_one(client_id, "GET")
        stream.reset()
        hold.release()
        left = api.wait_for_one(client_id, "DELETE")
        assert (left.text, left.close_code) == ("EOF", 1006)
        assert left.generation == connect.generation

    def test_client_that_was_refused_is_not_reported(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        hold = Hold(Reply("ko"))
        api.on(client_id, "GET", hold, Reply("ok"))
        stream = gateway.open_stream()
        stream.write(upgrade_request(f"/{client_id}"))
        api.wait_for_one(client_id, "GET")
        stream.reset()
        hold.release()
        gateway.connect(client_id).close()
        accepted = api.wait_for(client_id, "GET", count=2)[1]
        until(lambda: api.requests(client_id, "DELETE"))
        reported = {request.generation for request in api.requests(client_id, "DELETE")}
        assert reported == {accepted.generation}

    def test_early_data_is_not_lost(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        hold = Hold(Reply("ok"))
        api.on(client_id, "GET", hold)
        api.on(client_id, "POST", Reply("early reply"))
        stream = gateway.open_stream()
        early = Frame(Op.TEXT, b"early").encode() + Frame(Op.BINARY, b"bird").encode()
        stream.write(upgrade_request(f"/{client_id}") + early[:-3])
        api.wait_for_one(client_id, "GET")
        stream.write(early[-3:])
        hold.release()
        assert read_response(stream).status == 101
        posts = api.wait_for(client_id, "POST", count=2)
        assert [post.body for post in posts] == [b"early", b"bird"]

    def test_early_data_of_a_refused_client_is_dropped(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        api.on(client_id, "GET", Reply("ko"))
        stream = gateway.open_stream()
        stream.write(upgrade_request(f"/{client_id}") + Frame(Op.TEXT, b"early").encode())
        assert read_response(stream).status == 403
        assert stream.read_to_end() == b""
        assert not api.requests(client_id, "POST")


class TestMappedAddress:
    """An IPv6 wildcard socket takes clients of IPv4, and has a way of its own to name them."""

    def test_is_told_as_one_of_ipv4(
        self, own_api: FakeApi, start_gateway: StartGateway, client_id: str
    ) -> None:
        try:
            socket.create_server(("::", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("no IPv6 here")
        gateway = start_gateway(
            api=own_api.url,
            listen="[::]:0",
            trusted_proxy="::ffff:127.0.0.0/104",
            log_level="debug",
        )
        client = gateway.connect(client_id, {"X-Forwarded-For": "192.0.2.7"})
        connect = own_api.wait_for_one(client_id, "GET")
        assert connect.headers["X-Forwarded-For"] == "192.0.2.7, 127.0.0.1"
        told = json.loads(gateway.push_client().get(client_id).body)
        assert told["remote"] == "127.0.0.1"
        client.close()
        until(lambda: "client disconnected" in gateway.stderr, what="the end in the log")
        assert "192.0.2.7" in gateway.stderr
        assert "::ffff:" not in gateway.stderr
