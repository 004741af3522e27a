"""Let real charge points talk to the back office of docs/ocpp.md through the real gateway."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import pytest
from harness.gateway import GatewayProcess
from harness.ports import free_port
from harness.waiting import until
from ocpp.routing import on
from ocpp.v16 import ChargePoint, call, call_result
from ocpp.v16.enums import (
    Action,
    ChargePointErrorCode,
    ChargePointStatus,
    RegistrationStatus,
    RemoteStartStopStatus,
)
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from .programs import ROOT, Program

OCPP: Final = Subprotocol("ocpp1.6")
EXAMPLE: Final = ROOT / "docs" / "examples" / "ocpp_back_office.py"


@dataclass(frozen=True)
class Charging:
    """Hold the back office and the gateway in front of it."""

    gateway: GatewayProcess
    port: int

    def ask(self, method: str, path: str, body: str = "") -> tuple[int, str]:
        """Ask the back office as its operator."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=15)
        with contextlib.closing(connection):
            connection.request(method, path, body.encode())
            response = connection.getresponse()
            return response.status, response.read().decode()

    def show(self, charger_id: str) -> dict[str, Any]:
        """Return what the back office knows of a charger."""
        shown: dict[str, Any] = json.loads(self.ask("GET", f"/chargers/{charger_id}")[1])
        return shown

    def url(self, charger_id: str, password: str) -> str:
        """Return where a charger connects."""
        host, port = self.gateway.clients_address
        return f"ws://{charger_id}:{password}@{host}:{port}/{charger_id}"


@pytest.fixture(scope="module")
def charging() -> Iterator[Charging]:
    """Run the back office behind two workers, with the options of the page."""
    port = free_port()
    options = {"api_timeout": "25s", "max_message_size": "64KiB", "ping_interval": "4m"}
    options |= {"push_token": "s3cret"}
    with GatewayProcess(workers=2, api=f"http://127.0.0.1:{port}/ocpp/", **options) as gateway:
        push = "{}:{}".format(*gateway.pushes_address)
        environment = {"PORT": str(port), "PUSH": push, "PUSH_TOKEN": "s3cret"}
        with Program([sys.executable, str(EXAMPLE)], port=port, **environment):
            yield Charging(gateway, port)
            gateway.disconnect_all()
            gateway.stop()  # while its last requests still find the API


class Charger(ChargePoint):  # type: ignore[misc]
    """Start for two tags, one after the other, and tell how many calls came at once."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.started_for: list[str] = []

    @on(Action.remote_start_transaction)  # type: ignore[untyped-decorator]
    def on_remote_start(self, id_tag: str, **_: Any) -> call_result.RemoteStartTransaction:
        """Start charging for this tag."""
        self.started_for.append(id_tag)
        return call_result.RemoteStartTransaction(status=RemoteStartStopStatus.accepted)


@contextlib.asynccontextmanager
async def plugged_in(charging: Charging, charger_id: str) -> AsyncIterator[Charger]:
    """Connect a charge point, and let it listen while the context lasts."""
    url = charging.url(charger_id, f"password-of-{charger_id}")
    async with connect(url, subprotocols=[OCPP], proxy=None) as connection:
        assert connection.subprotocol == OCPP
        charger = Charger(charger_id, connection)
        listening = asyncio.create_task(charger.start())
        try:
            yield charger
        finally:
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening


def test_charge_point_boots_reports_and_is_started_from_afar(charging: Charging) -> None:
    def is_started(number: int) -> bool:
        results = charging.show("CP001")["results"]
        return list(results.values()) == [[{"status": "Accepted"}]] * number

    async def live(pool: ThreadPoolExecutor) -> None:
        # Not the loop's own pool of threads: ocpp validates messages there.
        run = partial(asyncio.get_running_loop().run_in_executor, pool)
        async with plugged_in(charging, "CP001") as charger:
            booted = await charger.call(call.BootNotification("Wallbox", "ACME"), suppress=False)
            assert booted.status == RegistrationStatus.accepted
            assert (await charger.call(call.Heartbeat(), suppress=False)).current_time
            status = call.StatusNotification(
                connector_id=1,
                error_code=ChargePointErrorCode.no_error,
                status=ChargePointStatus.available,
            )
            await charger.call(status, suppress=False)
            shown = await run(charging.show, "CP001")
            assert shown["connected"]
            assert shown["connectors"] == {"1": "Available"}
            for tag in ("ann", "bob"):
                status_code, _ = await run(charging.ask, "POST", "/chargers/CP001/start", tag)
                assert status_code == 202
            await run(until, partial(is_started, 2))
            assert charger.started_for == ["ann", "bob"]

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(live(pool))
    until(lambda: not charging.show("CP001")["connected"], what="the end of CP001")
    assert charging.ask("POST", "/chargers/CP001/start", "ann")[0] == 409


@pytest.mark.parametrize(
    ("charger_id", "password", "subprotocol", "status"),
    [
        ("CP002", "guess", "ocpp1.6", 401),
        ("CP999", "password-of-CP999", "ocpp1.6", 404),
        ("CP002", "password-of-CP002", "ocpp2.0.1", 403),
    ],
)
def test_stranger_is_told_why_it_is_refused(
    charging: Charging, charger_id: str, password: str, subprotocol: str, status: int
) -> None:
    async def plug_in() -> None:
        url = charging.url(charger_id, password)
        async with connect(url, subprotocols=[Subprotocol(subprotocol)], proxy=None):
            raise AssertionError("the back office let it in")

    with pytest.raises(InvalidStatus) as refusal:
        asyncio.run(plug_in())
    assert refusal.value.response.status_code == status


def test_unknown_action_gets_an_error_of_ocpp(charging: Charging) -> None:
    headers = {"Authorization": "Basic Q1AwMDI6cGFzc3dvcmQtb2YtQ1AwMDI="}
    client = charging.gateway.connect("CP002", headers | {"Sec-WebSocket-Protocol": "ocpp1.6"})
    client.send('[2, "7", "FlyToTheMoon", {}]')
    answer = client.receive()
    assert json.loads(answer) == [4, "7", "NotImplemented", "FlyToTheMoon", {}]
    client.close()
