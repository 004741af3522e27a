"""Open somebody else's page in a real browser, and see what it can do to the gateway.

A browser sends a user's cookies along with a WebSocket that any page opens, and lets any page send
simple requests to 127.0.0.1. What holds it off is that it always says which origin it acts for.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

import pytest
from harness.api import FakeApi, Reply
from harness.gateway import GatewayProcess
from harness.waiting import until

from .browser import CHROMIUM, Browser, Page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

PAGE: Final = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
TOKEN: Final = "s3cret-token"

# Each act has an outcome of its own: what an earlier socket has to say comes late.
OPEN: Final = """{
    const outcome = {};
    const socket = new WebSocket(%s);
    socket.onopen = () => socket.send('from the page');
    socket.onmessage = event => outcome.is ??= 'got ' + event.data;
    socket.onclose = event => outcome.is ??= 'closed ' + event.code;
    window.outcome = outcome;
}"""

# no-cors: the request goes out without asking, and the page does not see the answer.
SEND: Final = """{
    const outcome = {};
    fetch(%s, {method: %s, mode: %s, body: %s ?? undefined, headers: %s}).then(
        answer => outcome.is = answer.type + ' ' + answer.status,
        error => outcome.is = error.name);
    window.outcome = outcome;
}"""


class _Page(BaseHTTPRequestHandler):
    """Serve an empty page, and set a cookie as a shop would."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", "15")
        self.send_header("Set-Cookie", "session=of-the-user; SameSite=Lax")
        self.end_headers()
        self.wfile.write(b"<!doctype html>")

    def log_message(self, format: str, *arguments: object) -> None:
        """Be silent."""


@pytest.fixture(scope="module")
def sites() -> Iterator[tuple[str, str]]:
    """Serve two sites, the user's shop and somebody else's; return their origins."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _Page) for _ in range(2)]
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    shop, evil = (server.server_address[1] for server in servers)
    yield f"http://127.0.0.1:{shop}", f"http://localhost:{evil}"
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run one browser for all these tests."""
    with Browser() as running:
        yield running


@pytest.fixture(scope="module")
def shop(browser: Browser, sites: tuple[str, str]) -> Page:
    """Open the page whose origin is allowed; the user has a cookie from now on."""
    return browser.open(sites[0] + "/")


@pytest.fixture(scope="module")
def evil(browser: Browser, sites: tuple[str, str], shop: Page) -> Page:
    """Open the page of another origin."""
    return browser.open(sites[1] + "/")


@pytest.fixture(scope="module")
def careful(shared_api: FakeApi, sites: tuple[str, str]) -> Iterator[GatewayProcess]:
    """Run a gateway for the pages of the shop; pushes need a token."""
    with GatewayProcess(api=shared_api.url, allow_origin=[sites[0]], push_token=TOKEN) as gateway:
        yield gateway


def connect(page: Page, gateway: GatewayProcess, client_id: str) -> str:
    """Let the page open a WebSocket and send a message; return what came of it."""
    host, port = gateway.clients_address
    page.evaluate(OPEN % json.dumps(f"ws://{host}:{port}/{client_id}"))
    outcome: str = page.wait_for("window.outcome.is")
    return outcome


def send(
    page: Page,
    address: tuple[str, int],
    client_id: str,
    *,
    method: str = "POST",
    mode: str = "no-cors",
    body: str | None = "from the page",
    headers: dict[str, str] | None = None,
) -> str:
    """Let the page send a request to a port; return what it learns of the answer."""
    url = f"http://{address[0]}:{address[1]}/{client_id}"
    page.evaluate(SEND % tuple(map(json.dumps, (url, method, mode, body, headers or {}))))
    outcome: str = page.wait_for("window.outcome.is")
    return outcome


class TestWebSocket:
    def test_page_of_an_allowed_origin_is_let_in(
        self, shop: Page, careful: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        api.on(client_id, "POST", Reply("welcome"))
        assert connect(shop, careful, client_id) == "got welcome"
        told = api.wait_for_one(client_id, "GET").headers
        assert told["Cookie"] == "session=of-the-user"

    def test_page_of_another_origin_is_refused_before_the_api_is_asked(
        self, evil: Page, careful: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        refused = careful.count("handshakes_refused")
        assert connect(evil, careful, client_id) == "closed 1006"
        assert careful.count("handshakes_refused") == refused + 1
        assert not api.requests(client_id)

    def test_without_the_option_any_page_is_let_in(
        self, evil: Page, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        # What the option is for: the API is told the origin, and is alone with the decision.
        api.on(client_id, "POST", Reply("welcome"))
        assert connect(evil, gateway, client_id) == "got welcome"
        origin = api.wait_for_one(client_id, "GET").headers["Origin"]
        assert origin.startswith("http://localhost:")

    def test_page_without_an_origin_of_its_own_is_refused(
        self, evil: Page, careful: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        # A sandboxed frame says Origin: null, whoever it belongs to.
        host, port = careful.clients_address
        script = OPEN % json.dumps(f"ws://{host}:{port}/{client_id}")
        script += "setInterval(() => parent.postMessage(window.outcome.is, '*'), 20)"
        evil.evaluate(
            "window.outcome = null; onmessage = event => window.outcome ??= event.data;"
            "const frame = document.createElement('iframe'); frame.sandbox = 'allow-scripts';"
            f"frame.srcdoc = {json.dumps(f'<script>{script}</script>')}.replace('<\\\\/', '</');"
            "document.body.append(frame)"
        )
        assert evil.wait_for("window.outcome") == "closed 1006"
        assert not api.requests(client_id)

    def test_program_without_an_origin_is_let_in(
        self, careful: GatewayProcess, client_id: str
    ) -> None:
        careful.connect(client_id, {"Origin": None})


class TestPushPort:
    def test_page_cannot_push_without_the_token(
        self, evil: Page, careful: GatewayProcess, client_id: str
    ) -> None:
        client = careful.connect(client_id)
        assert send(evil, careful.pushes_address, client_id) == "opaque 0"
        assert careful.push_client(token=TOKEN).push(client_id, "from the API").status == 200
        assert client.receive() == "from the API"

    @pytest.mark.parametrize(
        ("method", "headers"),
        [("POST", {"Authorization": f"Bearer {TOKEN}"}), ("DELETE", {}), ("GET", {})],
    )
    def test_page_cannot_send_what_it_must_ask_for_nor_read(
        self,
        evil: Page,
        careful: GatewayProcess,
        client_id: str,
        method: str,
        headers: dict[str, str],
    ) -> None:
        client = careful.connect(client_id)
        outcome = send(
            evil,
            careful.pushes_address,
            client_id,
            method=method,
            mode="cors",
            body="from the page" if method == "POST" else None,
            headers=headers,
        )
        assert outcome == "TypeError"
        assert careful.push_client(token=TOKEN).push(client_id, "from the API").status == 200
        assert client.receive() == "from the API"

    def test_page_cannot_push_to_a_port_without_a_token(
        self, evil: Page, gateway: GatewayProcess, client_id: str
    ) -> None:
        client = gateway.connect(client_id)
        assert send(evil, gateway.pushes_address, client_id) == "opaque 0"
        assert gateway.push_client().push(client_id, "from the API").status == 200
        assert client.receive() == "from the API"


class TestConsole:
    """Say in docs/troubleshooting.md what Chromium says, word for word."""

    ROWS: Final = re.findall(r'^\| "([^|]*)" \|', PAGE.read_text(), re.MULTILINE)

    def complaints(
        self, browser: Browser, sites: tuple[str, str], address: tuple[str, int], offer: str = "[]"
    ) -> list[str]:
        """Open a WebSocket that fails; return what the console has of it."""
        page = browser.open(sites[0] + "/", watched=True)
        url = "ws://{}:{}/refused".format(*address)
        page.evaluate(f"window.socket = new WebSocket({json.dumps(url)}, {offer}); 0")
        page.wait_for("window.socket.readyState == WebSocket.CLOSED")
        said: list[str] = until(lambda: page.complaints, what="a complaint")
        page.close()
        return said

    def assert_is_told(self, complaints: list[str]) -> None:
        """See that a row of the page begins the end of the one complaint."""
        (text,) = complaints
        assert any(row in text for row in self.ROWS), (text, self.ROWS)

    @pytest.mark.parametrize("status", [401, 403])
    def test_of_a_refusal(
        self,
        browser: Browser,
        sites: tuple[str, str],
        gateway: GatewayProcess,
        api: FakeApi,
        status: int,
    ) -> None:
        api.on("refused", "GET", Reply("no", status))
        self.assert_is_told(self.complaints(browser, sites, gateway.clients_address))

    def test_of_a_subprotocol_that_was_not_chosen(
        self, browser: Browser, sites: tuple[str, str], gateway: GatewayProcess, api: FakeApi
    ) -> None:
        api.on("refused", "GET", Reply("ok"))
        said = self.complaints(browser, sites, gateway.clients_address, "['chat']")
        self.assert_is_told(said)

    def test_of_the_push_port(
        self, browser: Browser, sites: tuple[str, str], gateway: GatewayProcess
    ) -> None:
        self.assert_is_told(self.complaints(browser, sites, gateway.pushes_address))
