"""Run each first API of docs/first-api behind the real gateway, and hold it to its page."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.fault_proxy import FaultProxy
from harness.gateway import GatewayProcess
from harness.waiting import until
from harness.ws import WsClient

from . import first_apis
from .browser import CHROMIUM, Browser
from .first_apis import FirstApi
from .programs import ROOT

Start = Callable[[Path, str], AbstractContextManager[FirstApi]]

APIS: tuple[Start, ...] = (
    first_apis.php_alone,
    first_apis.php_fpm,
    first_apis.laravel,
    first_apis.django,
    first_apis.express,
    first_apis.fastapi,
)


@dataclass(frozen=True)
class Setup:
    """Hold a first API, the gateway in front of it, and what stands before its push port."""

    gateway: GatewayProcess
    api: FirstApi
    push_port: FaultProxy

    def connect(self, user: str) -> WsClient:
        """Connect a user who has logged in."""
        return self.gateway.connect(user, {"Cookie": self.api.log_in(self.api, user)})


@pytest.fixture(scope="module", params=APIS, ids=lambda start: start.__name__)
def setup(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Setup]:
    """Run an API behind a gateway of two workers, whose push port can be taken away."""
    start: Start = request.param
    folder = tmp_path_factory.mktemp(start.__name__)
    with FaultProxy(("127.0.0.1", 1)) as push_port:
        push = f"127.0.0.1:{push_port.port}"
        with (
            start(folder, push) as api,
            GatewayProcess(
                workers=2,
                api=f"http://127.0.0.1:{api.port}/ws/",
                push_token=first_apis.PUSH_TOKEN,
            ) as gateway,
        ):
            push_port.upstream = gateway.pushes_address
            yield Setup(gateway, api, push_port)


@pytest.fixture
def first(setup: Setup) -> Iterator[Setup]:
    """Use the shared setup, and leave no client and no fault behind."""
    yield setup
    setup.push_port.restore()
    setup.gateway.disconnect_all()
    assert not setup.gateway.complaints


def test_user_who_has_logged_in_talks_to_the_api_and_to_others(first: Setup) -> None:
    ann, bob = first.connect("ann"), first.connect("bob")

    ann.send("hello, wörld")
    assert ann.receive() == "you said: hello, wörld"

    ann.send("@bob lunch at\nnoon?")
    assert bob.receive() == "ann: lunch at\nnoon?"
    assert ann.receive() == "delivered"

    ann.send("@carol are you there?")
    assert ann.receive() == "carol is not here"

    bob.close(1000, "that is all")
    first.api.program.wait_for_output("bob left: that is all")


def test_push_finds_its_way_without_the_push_port(first: Setup) -> None:
    ann, bob = first.connect("ann"), first.connect("bob")
    first.push_port.refuse()
    ann.send("@bob still there?")
    assert bob.receive() == "ann: still there?"
    assert ann.receive() == "delivered"


def test_stranger_and_impostor_are_refused(first: Setup) -> None:
    assert first.gateway.handshake("ann").status == 401
    cookie = first.api.log_in(first.api, "bob")
    assert first.gateway.handshake("ann", {"Cookie": cookie}).status == 403


def test_message_that_comes_twice_is_done_once(first: Setup) -> None:
    ann, bob = first.connect("ann"), first.connect("bob")
    ann.send("hello")
    assert ann.receive() == "you said: hello"
    push_client = first.gateway.push_client(token=first_apis.PUSH_TOKEN)
    generation = str(push_client.describe("ann")["generation"])

    key = {"Ws2api-Generation": generation, "Ws2api-Sequence": "2", "Content-Type": "text/plain"}
    answers = [first.api.request("POST", "/ws/ann", "@bob once", key) for _ in range(2)]
    assert [(answer.status, answer.text) for answer in answers] == [(200, "delivered")] * 2
    assert push_client.push("bob", "the end").status == 200
    assert bob.receive() == "ann: once"
    assert bob.receive() == "the end"


def test_late_end_of_an_old_connection_leaves_the_new_one_alone(first: Setup) -> None:
    ann, bob = first.connect("ann"), first.connect("bob")
    old = {"Ws2api-Generation": "1", "Ws2api-Close-Code": "1006", "Content-Type": "text/plain"}
    assert first.api.request("DELETE", "/ws/bob", "worker lost", old).status in range(200, 300)
    first.push_port.refuse()  # now only what the API knows of bob's connection leads to him
    ann.send("@bob still there?")
    assert bob.receive() == "ann: still there?"
    assert ann.receive() == "delivered"


def test_connection_is_kept_as_the_page_says(first: Setup, request: pytest.FixtureRequest) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", first.api.port, timeout=15)
    with contextlib.closing(connection):
        connection.request("GET", "/ws/ann")
        answer = connection.getresponse()
        assert answer.read()
        is_phps_own_server = "php_alone" in request.node.name
        assert answer.will_close == is_phps_own_server


def test_laravel_in_maintenance_loses_no_message(tmp_path: Path) -> None:
    with (
        first_apis.laravel(tmp_path, "127.0.0.1:1") as api,
        GatewayProcess(api=f"http://127.0.0.1:{api.port}/ws/") as gateway,
    ):
        ann = gateway.connect("ann", {"Cookie": api.log_in(api, "ann")})
        first_apis.run(["php", "artisan", "down"], tmp_path)
        ann.send("hello")
        until(lambda: gateway.count("requests_retried"), what="a retry")
        first_apis.run(["php", "artisan", "up"], tmp_path)
        assert ann.receive() == "you said: hello"


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_browser_sends_its_session_cookie_to_the_gateway(tmp_path: Path) -> None:
    with (
        first_apis.php_alone(tmp_path, "127.0.0.1:1") as api,
        GatewayProcess(api=f"http://127.0.0.1:{api.port}/ws/") as gateway,
        Browser() as browser,
    ):
        page = browser.open(f"http://127.0.0.1:{api.port}/")
        page.fill("[name=user]", "ann")
        page.fill("[name=password]", first_apis.password("ann"))
        page.press_enter()
        page.wait_for("document.body?.innerText == 'you are ann'")
        lines = (ROOT / "docs" / "first-api" / "README.md").read_text().splitlines()
        start = next(n for n, line in enumerate(lines) if line.startswith("ws = new WebSocket("))
        typed = "; ".join(line.strip().rstrip(";") for line in lines[start : start + 3])
        assert typed.count("ws.on") == 2
        typed = typed.replace("127.0.0.1:7001", "{}:{}".format(*gateway.clients_address))
        page.evaluate("console.log = (text) => document.body.append(text)")
        page.evaluate(f"{typed}; 0")
        page.wait_for("document.body.innerText.includes('you said: hello')")
