"""Let real charge points of PyPI's ocpp boot, send heartbeats and answer a pushed call."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import pytest
from harness.api import Answer, FakeApi, Reply, Request
from harness.gateway import GatewayProcess
from ocpp.routing import on
from ocpp.v16 import ChargePoint, call, call_result
from ocpp.v16.enums import Action, RegistrationStatus, RemoteStartStopStatus
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

CALL, CALL_RESULT = 2, 3  # the first element of a message, OCPP-J 1.6, 4.2
PASSWORD: Final = "sixteen-chars-or"
OCPP: Final = Subprotocol("ocpp1.6")


class CentralSystem(FakeApi):
    """Be the HTTP API of a charging network, in the few lines that it takes."""

    def add(self, charge_point_id: str) -> None:
        """Expect this charge point."""
        self.on(charge_point_id, "GET", self._authenticate)
        self.on(charge_point_id, "POST", self._answer)

    def push_call(self, gateway: GatewayProcess, charge_point_id: str, *message: Any) -> int:
        """Send a call to a charge point, and return the status of the push."""
        push_client = gateway.push_client()
        response = push_client.push(charge_point_id, json.dumps([CALL, *message]))
        push_client.close()
        return response.status

    def _authenticate(self, request: Request) -> Answer:
        token = base64.b64encode(f"{request.client_id}:{PASSWORD}".encode()).decode()
        if request.headers.get("Authorization") != f"Basic {token}":
            return Reply("wrong password", 401, {"WWW-Authenticate": 'Basic realm="charging"'})
        assert OCPP in request.headers["Sec-WebSocket-Protocol"]
        return Reply("ok", headers={"Sec-WebSocket-Protocol": OCPP})

    def _answer(self, request: Request) -> Answer:
        kind, unique_id, *rest = json.loads(request.body)
        if kind != CALL:
            return Reply()  # the result of a call of ours: nothing to say
        now = datetime.now(UTC).isoformat()
        results: dict[str, dict[str, Any]] = {
            "BootNotification": {"currentTime": now, "interval": 300, "status": "Accepted"},
            "Heartbeat": {"currentTime": now},
        }
        return Reply(json.dumps([CALL_RESULT, unique_id, results[rest[0]]]))


class Charger(ChargePoint):  # type: ignore[misc]
    """Accept whatever transaction is started from afar."""

    @on(Action.remote_start_transaction)  # type: ignore[untyped-decorator]
    def on_remote_start(self, id_tag: str, **_: Any) -> call_result.RemoteStartTransaction:
        """Start charging for this tag."""
        self.started_for = id_tag
        return call_result.RemoteStartTransaction(status=RemoteStartStopStatus.accepted)


@contextlib.asynccontextmanager
async def plugged_in(
    gateway: GatewayProcess, charge_point_id: str, *, password: str = PASSWORD
) -> AsyncIterator[Charger]:
    """Connect a charge point, and let it listen while the context lasts."""
    host, port = gateway.clients_address
    url = f"ws://{charge_point_id}:{password}@{host}:{port}/{charge_point_id}"
    async with connect(
        url, subprotocols=[Subprotocol("ocpp2.0.1"), OCPP], proxy=None
    ) as connection:
        assert connection.subprotocol == OCPP
        charger = Charger(charge_point_id, connection)
        listening = asyncio.create_task(charger.start())
        try:
            yield charger
        finally:
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening


@pytest.fixture(scope="module")
def central_system() -> Iterator[CentralSystem]:
    """Run the API for all the tests."""
    api = CentralSystem()
    with api:
        yield api
        assert not api.violations


@pytest.fixture(scope="module")
def charging(central_system: CentralSystem) -> Iterator[GatewayProcess]:
    """Run four workers in front of the central system."""
    with GatewayProcess(workers=4, api=central_system.url) as gateway:
        yield gateway


def test_charge_points_boot_beat_and_answer_a_pushed_call(
    charging: GatewayProcess, central_system: CentralSystem
) -> None:
    async def live(charge_point_id: str, pool: ThreadPoolExecutor) -> None:
        # Not the loop's own pool of threads: ocpp validates messages there.
        run = partial(asyncio.get_running_loop().run_in_executor, pool)
        async with plugged_in(charging, charge_point_id) as charger:
            booted = await charger.call(call.BootNotification("Wallbox", "ACME"), suppress=False)
            assert booted.status == RegistrationStatus.accepted
            for _ in range(3):
                beat = await charger.call(call.Heartbeat(), suppress=False)
                assert beat.current_time
            start = ("call-1", "RemoteStartTransaction", {"idTag": "ann"})
            assert await run(central_system.push_call, charging, charge_point_id, *start) == 200
            posts = await run(partial(central_system.wait_for, charge_point_id, "POST", count=5))
            assert charger.started_for == "ann"
        messages = [json.loads(post.body) for post in posts]
        assert [m[2] for m in messages[:4]] == ["BootNotification", *["Heartbeat"] * 3]
        assert messages[4] == [CALL_RESULT, "call-1", {"status": "Accepted"}]
        assert [post.sequence for post in posts] == [1, 2, 3, 4, 5]

    async def live_all() -> None:
        with ThreadPoolExecutor(len(names)) as pool:
            await asyncio.gather(*(live(name, pool) for name in names))

    names = [f"CP{number:03}" for number in range(12)]
    for name in names:
        central_system.add(name)
    asyncio.run(live_all())
    for name in names:
        central_system.wait_for_one(name, "DELETE")


def test_charge_point_with_a_wrong_password_is_told_so(
    charging: GatewayProcess, central_system: CentralSystem
) -> None:
    async def plug_in() -> None:
        async with plugged_in(charging, "CP-thief", password="guess"):
            raise AssertionError("the central system let it in")

    central_system.add("CP-thief")
    with pytest.raises(InvalidStatus) as refusal:
        asyncio.run(plug_in())
    response = refusal.value.response
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == 'Basic realm="charging"'
    assert response.body == b"wrong password"
    assert not central_system.requests("CP-thief", "DELETE")
