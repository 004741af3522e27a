"""Operate a real gateway from its dashboard, in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from harness.api import FakeApi, Reply, echo
from harness.gateway import GatewayProcess
from harness.ports import free_port
from harness.waiting import until
from harness.ws import WsClient
from ws2api.supervisor import dashboard

from .browser import CHROMIUM, Browser
from .conftest import StartGateway
from .dashboard_page import Dashboard, open_dashboard

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

TOKEN = "open-sesame"
WORKERS = 2


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run one browser for all the tests."""
    with Browser() as running:
        yield running


@pytest.fixture(scope="module")
def operated(shared_api: FakeApi) -> Iterator[GatewayProcess]:
    """Run one gateway for all the tests that leave it as it was."""
    with GatewayProcess(api=shared_api.url, workers=WORKERS, admin_token=TOKEN) as gateway:
        yield gateway


@pytest.fixture
def page(browser: Browser, operated: GatewayProcess) -> Iterator[Dashboard]:
    """Open the page with the token."""
    with open_dashboard(browser, url_of(operated)) as page:
        page.expect_live()
        page.become_admin(TOKEN)
        yield page


def url_of(gateway: GatewayProcess) -> str:
    host, port = gateway.admin_address
    return f"http://{host}:{port}/"


def status_of(gateway: GatewayProcess) -> Any:
    return json.loads(gateway.admin_get("/status").text)


def processes_of(page: Dashboard) -> list[str]:
    return [page.worker(number)["PID"] for number in range(WORKERS)]


def talk(client: WsClient, times: int) -> None:
    for number in range(times):
        client.send(str(number))
        assert client.receive() == str(number)


def test_is_served_with_its_policy(operated: GatewayProcess) -> None:
    answer = operated.admin_get("/")
    assert answer.status == 200
    page, policy = dashboard.load()
    assert answer.body == page
    assert answer.headers["Content-Security-Policy"] == policy


def test_shows_what_happens(
    page: Dashboard, operated: GatewayProcess, api: FakeApi, client_id: str
) -> None:
    page.expect("#verdict.ok", f"Ready. {WORKERS} workers serve.")
    api.on(client_id, "POST", echo)
    client = operated.connect(client_id)
    page.page.wait_for("Number(document.querySelector('#connections').innerText) >= 1")
    talk(client, 20)
    assert operated.push_client().push(client_id, "hello").status == 200
    page.page.wait_for("samples.some(sample => sample.received > 0 && sample.pushed > 0)")
    page.page.wait_for("latencies('api_latency').some(row => row.quantiles[1] > 0)")
    processes = [str(worker["pid"]) for worker in status_of(operated)["workers"]]
    assert processes_of(page) == processes
    client.close()
    page.expect("#closes", "1000 client")


def test_finds_a_client_and_closes_it(
    page: Dashboard, operated: GatewayProcess, api: FakeApi, client_id: str
) -> None:
    api.on(client_id, "POST", echo)
    client = operated.connect(client_id)
    talk(client, 3)
    page.find(client_id)
    page.expect("#client-heading", f"{client_id} is connected")
    facts = page.facts()
    assert facts["Messages from it"] == "3"
    assert facts["Address"].startswith("127.0.0.1")
    assert facts["Worker"].split()[0] in ("0", "1")
    page.press_button("#close-client")
    page.page.fill("#close-code", "4001")
    page.page.fill("#close-reason", "<b>enough</b>")
    page.confirm(f"Close {client_id}?")
    client.assert_closed(4001, "<b>enough</b>")
    page.expect_outcome(f"{client_id} was closed.")
    until(lambda: api.requests(client_id, "DELETE"))
    page.find(client_id)
    page.expect("#client-heading", f"{client_id} is not connected")
    facts = page.facts()
    assert facts["… code and cause"].startswith("4001")
    assert facts["… reason"] == "<b>enough</b>"
    assert "3 messages in, 3 out" in facts["… after"]


def test_shows_errors_with_examples(
    page: Dashboard, operated: GatewayProcess, api: FakeApi, client_id: str
) -> None:
    api.on(client_id, "POST", Reply("broken", status=500))
    client = operated.connect(client_id)
    client.send("hello")
    page.expect("#errors tbody tr", "status")
    page.page.evaluate("examplesAt_ms = -Infinity")  # so that nobody waits for the pause
    page.expect("#examples tr", client_id)
    client.close()


def test_drains_a_worker(page: Dashboard) -> None:
    before = processes_of(page)
    page.press_button("#workers tr:nth-child(2) button")
    page.confirm("Drain worker 1?")
    page.expect_outcome("Worker 1 is being replaced")
    page.page.wait_for(f"latest.workers[1].pid != {before[1]} && latest.ready && !latest.rolling")
    page.expect("#log", "worker 1 was replaced")
    assert processes_of(page)[0] == before[0]


def test_restarts_all_workers(browser: Browser, operated: GatewayProcess) -> None:
    # The process that sends the events is replaced, too, which Chromium logs.
    with open_dashboard(browser, url_of(operated), "ERR_INCOMPLETE_CHUNKED_ENCODING") as page:
        page.become_admin(TOKEN)
        page.expect_live()
        before = processes_of(page)
        page.press_button("#restart")
        page.confirm("Restart all workers?")
        page.expect_outcome("The rolling restart has begun")
        page.page.wait_for(
            f"latest.workers.every((worker, number) => worker.pid != {before}[number])"
            " && latest.ready && !latest.rolling"
        )
        page.expect_live()


def test_drains_the_host_and_ends_that(page: Dashboard, operated: GatewayProcess) -> None:
    page.press_button("#drain-host")
    page.confirm("Drain this host?")
    page.expect_outcome("This host is drained")
    assert operated.admin_get("/readyz").status == 503
    page.expect("#verdict", "Draining")
    page.expect("#drain-host", "End the drain")
    page.press_button("#drain-host")
    page.confirm("End the drain?")
    page.expect_outcome("takes clients again")
    assert operated.admin_get("/readyz").status == 200
    page.expect("#verdict.ok", "Ready")


def test_recovers_when_the_gateway_is_started_anew(
    browser: Browser, shared_api: FakeApi, start_gateway: StartGateway
) -> None:
    address = f"127.0.0.1:{free_port()}"
    first = start_gateway(api=shared_api.url, admin_listen=address)
    with open_dashboard(browser, url_of(first), "ERR_") as page:
        page.expect_live()
        first.stop()
        page.expect("#lost-since", "Disconnected since")
        start_gateway(api=shared_api.url, admin_listen=address)
        page.expect_live()
        page.expect("#log", "the gateway was started anew")
        page.page.wait_for("isFinite(samples.at(-1).received)")
        assert page.count("#lost") == 0


def test_gateway_without_token_takes_no_commands(browser: Browser, gateway: GatewayProcess) -> None:
    with open_dashboard(browser, url_of(gateway), "403") as page:
        page.expect_live()
        page.use_token(TOKEN)
        page.expect("#token-problem", "the gateway was started without --admin-token")
