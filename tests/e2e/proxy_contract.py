"""State what holds behind every proxy; a test module inherits it and says which proxy it means."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Final

import pytest
from harness.api import FakeApi, Reply, echo
from harness.gateway import GatewayProcess
from harness.http_messages import read_response
from harness.proxies import OWN_PAGE, ProxyProcess, find_program
from harness.waiting import DEADLINE_S
from harness.ws import Op, WsClient, upgrade_request

MIB = 1 << 20
CLIENT_ADDRESS = "127.0.0.9"
"""An address that neither proxy nor gateway uses."""


def need(*programs: str) -> None:
    """Skip the module that calls this if one of its programs is missing."""
    for program in programs:
        if not find_program(program):
            pytest.skip(f"needs {program} (apt-get install {program})", allow_module_level=True)


def start_single_port_gateway(api: FakeApi) -> GatewayProcess:
    """Run a gateway that only the proxy protects.

    It takes pushes on its client port, and passes on what a client says about its own address.
    """
    return GatewayProcess(
        api=api.url,
        trusted_proxy="127.0.0.1",
        single_port=True,
        forward_header=["Forwarded", "X-Real-IP", "X-Forwarded-Proto"],
        path=["/{id}", "/ocpp/{id}"],
        workers=2,
    )


PINGS_IN_FAST_MOTION: Final = {"ping_interval": "500ms", "ping_timeout": "600ms"}
TUNNEL_TIMEOUT: Final = "2s"
PINGS: Final = 17
"""Ten minutes in fast motion: 10 s are five times the timeout, as with the 2 minutes of the files.

The gateway pings when the later of its two times is over.
"""


def assert_stays_up_while_idle(client: WsClient) -> None:
    """Answer pings and say nothing else, for many times the proxy's timeout; then speak."""
    for _ in range(PINGS):
        frame = client.receive_frame()
        assert frame.opcode == Op.PING
        client.send_frame(Op.PONG, frame.payload)
    client.send("still here")
    assert client.receive() == "still here"
    client.close()


@contextmanager
def idling(api: FakeApi, proxy: ProxyProcess) -> Iterator[Future[None]]:
    """Let a client idle while other tests run, and one leave its request unfinished.

    Args:
        api: of a gateway that pings as in `PINGS_IN_FAST_MOTION`.
        proxy: in front of it, with `TUNNEL_TIMEOUT`.
    """
    api.on("idle", "POST", echo)
    client, slow = proxy.connect("idle"), proxy.open_stream()
    slow.write(b"GET /slow HTTP/1.1\r\nHost: x\r\nX-Wait: ")

    def watch() -> None:
        assert_stays_up_while_idle(client)
        assert slow.read_to_end()[9:12] in (b"408", b"")  # nginx just ends it

    with ThreadPoolExecutor(1) as executor:
        yield executor.submit(watch)


def assert_is_cut_while_idle(client: WsClient) -> None:
    """See the connection end without a close frame: nothing kept it up."""
    with pytest.raises((EOFError, ConnectionError)):
        client.receive_frame()


def assert_lets_subdomains_in(proxy: ProxyProcess, client_id: str) -> None:
    """Try pages of the site, and of others that are named alike."""
    for origin in (OWN_PAGE, "https://www.shop.example", "https://chat-2.shop.example"):
        proxy.connect(client_id, {"Origin": origin}).close()
    for origin in (
        "https://chat.shopxexample",
        "https://chatxshop.example",
        "https://chat.shop.example.evil.example",
        "https://evil.example/https://chat.shop.example",
        "http://chat.shop.example",
    ):
        assert proxy.handshake(client_id, {"Origin": origin}).status == 403, origin


class Report:
    """Say how the threads that connect all the time have fared."""

    def __init__(self) -> None:
        self.count = 0
        self.failures: list[str] = []
        self.is_over = threading.Event()


@contextmanager
def connecting_all_the_time(proxy: ProxyProcess, client_id: str) -> Iterator[Report]:
    """Open a WebSocket, leave, and so on, in three threads."""
    report = Report()

    def connect(thread: int) -> None:
        number = 0
        while not report.is_over.is_set():
            number += 1
            try:
                proxy.connect(f"{client_id}-{thread}-{number}").hang_up()
                report.count += 1
            except (OSError, EOFError, AssertionError) as error:
                report.failures.append(repr(error))

    threads = [threading.Thread(target=connect, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield report
    finally:
        report.is_over.set()
        for thread in threads:
            thread.join(2 * DEADLINE_S)


class ProxyContract:
    """Test the contract, and what must not pass; the module has the fixture `proxy`."""

    def test_connect_message_push_and_close(
        self, proxy: ProxyProcess, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        api.on(client_id, "POST", echo)
        client = proxy.connect(f"{client_id}?room=7", {"Cookie": "a=b"})
        asked = api.wait_for_one(client_id, "GET")
        assert (asked.query, asked.headers["Cookie"]) == ("room=7", "a=b")
        client.send("hello")
        assert client.receive() == "hello"
        client.send(b"x" * MIB)
        assert client.receive() == b"x" * MIB
        assert gateway.push_client().push(client_id, "pushed").status == 200
        assert client.receive() == "pushed"
        client.close(4000, "bye")
        told = api.wait_for_one(client_id, "DELETE")
        assert (told.close_code, told.text) == (4000, "bye")

    def test_path_with_a_prefix(self, proxy: ProxyProcess, api: FakeApi, client_id: str) -> None:
        """What docs/haproxy.md says of chargers that are set to wss://host/ocpp/CP001."""
        proxy.connect(f"ocpp/{client_id}%2fDE*A:1?a=b")
        name = f"{client_id}%2FDE*A:1"
        connect = api.wait_for_one(name, "GET")
        assert connect.target == f"/{name}?a=b"
        assert connect.headers["Ws2api-Path"] == f"/ocpp/{client_id}%2fDE*A:1"

    def test_client_that_is_cut_off_is_reported(
        self, proxy: ProxyProcess, api: FakeApi, client_id: str
    ) -> None:
        proxy.connect(client_id).abort()
        told = api.wait_for_one(client_id, "DELETE")
        assert (told.close_code, told.text) == (1006, "EOF")

    def test_close_by_the_api(
        self, proxy: ProxyProcess, gateway: GatewayProcess, client_id: str
    ) -> None:
        client = proxy.connect(client_id)
        assert gateway.push_client().delete(client_id, code=4001, reason="out").status == 200
        client.assert_closed(4001, "out")

    def test_refusal_by_the_api(self, proxy: ProxyProcess, api: FakeApi, client_id: str) -> None:
        api.on(client_id, "GET", Reply("not you", 401, {"WWW-Authenticate": "Basic"}))
        response = proxy.handshake(client_id)
        assert (response.status, response.text) == (401, "not you")
        assert response.headers["WWW-Authenticate"] == "Basic"

    @pytest.mark.parametrize(
        "claims",
        [
            {},
            {"X-Forwarded-For": "203.0.113.66"},
            {"x-forwarded-for": "203.0.113.66, 127.0.0.1"},
            {
                "X-Real-IP": "203.0.113.66",
                "forwarded": "for=203.0.113.66",
                "X-Forwarded-Proto": "http",
            },
        ],
        ids=["nothing", "another", "a chain", "otherwise"],
    )
    def test_api_gets_the_true_address(
        self, proxy: ProxyProcess, api: FakeApi, client_id: str, claims: dict[str, str | None]
    ) -> None:
        proxy.connect(client_id, claims, source=CLIENT_ADDRESS)
        asked = api.wait_for_one(client_id, "GET")
        assert asked.headers["X-Forwarded-For"] == f"{CLIENT_ADDRESS}, 127.0.0.1"
        assert asked.headers["X-Forwarded-Proto"] == "https"
        assert "203.0.113.66" not in str(asked)

    def test_pushes_do_not_pass(
        self, proxy: ProxyProcess, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        client = proxy.connect(client_id)
        target = f"/{client_id}"
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade"}
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            for headers in ({}, upgrade):
                response = proxy.request(method, target, {"Content-Length": "0"} | headers)
                assert response.status in (400, 405), (method, headers, response)
                assert response.status == 400 or response.text.strip() == "WebSockets only"
        for url in (target, "/", "/metrics", "/readyz"):
            response = proxy.request("GET", url)
            assert response.status == 426, (url, response)
            assert response.headers["Upgrade"] == "websocket"
            assert response.text.strip() == "WebSockets only"
        # Behind a handshake that is refused, and so is no tunnel.
        api.on(f"{client_id}-no", "GET", Reply("no", 403))
        push = f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\nsmuggled"
        stream = proxy.open_stream()
        stream.write(upgrade_request(f"{target}-no") + push.encode())
        assert read_response(stream).status == 403
        with suppress(EOFError, ConnectionError):
            assert read_response(stream).status == 405
        assert gateway.push_client().push(client_id, "the only one").status == 200
        assert client.receive() == "the only one"
        assert gateway.push_client().describe(client_id)["id"] == client_id

    def test_foreign_pages_do_not_pass(
        self, proxy: ProxyProcess, api: FakeApi, client_id: str
    ) -> None:
        for origin in (
            "https://evil.example",
            "http://shop.example",
            "https://shop.example.evil.example",
            "https://shop.example:8443",
            "null",
        ):
            response = proxy.handshake(client_id, {"Origin": origin})
            assert response.status == 403, (origin, response)
            assert response.text.strip() == "connections from this origin are not allowed"
        assert not api.requests(client_id)
        proxy.connect(client_id, {"Origin": OWN_PAGE}).close()
        proxy.connect(client_id).close()

    def test_speaks_no_old_tls(self, proxy: ProxyProcess) -> None:
        version = proxy.open_stream().socket.version()  # type: ignore[attr-defined]
        assert version == "TLSv1.3"
