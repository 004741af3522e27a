"""Hold the OpenAPI files and a real gateway to each other; schemathesis makes the requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import hypothesis
import pytest
import schemathesis
import yaml
from harness.api import FakeApi
from harness.gateway import GatewayProcess
from harness.waiting import DEADLINE_S, until
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from ws2api.gateway import causes

DOCS: Final = Path(__file__).parents[2] / "docs"
PUSH: Final = schemathesis.openapi.from_path(DOCS / "openapi-push.yaml")
ADMIN: Final = schemathesis.openapi.from_path(DOCS / "openapi-admin.yaml")
TOKEN: Final = "open-sesame"
CHECKS: Final = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
SETTINGS: Final = hypothesis.settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
# Never ends by itself; or takes its time; or replaces what the other requests need.
ONE_BY_ONE: Final = ("events", "tail", "tailClient", "profile", "reload", "replaceWorker")


@pytest.fixture(scope="module")
def gateway(shared_api: FakeApi) -> Iterator[GatewayProcess]:
    with GatewayProcess(
        api=shared_api.url, workers=2, push_token=TOKEN, admin_token=TOKEN, drain_seconds="100ms"
    ) as gateway:
        yield gateway


def url(address: tuple[str, int]) -> str:
    return f"http://{address[0]}:{address[1]}"


def authorized(case: schemathesis.Case) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKEN}"}


@PUSH.parametrize()
@SETTINGS
def test_push_port_keeps_its_word(case: schemathesis.Case, gateway: GatewayProcess) -> None:
    case.call_and_validate(
        base_url=url(gateway.pushes_address), headers=authorized(case), checks=CHECKS
    )


@ADMIN.exclude(operation_id=list(ONE_BY_ONE)).parametrize()
@SETTINGS
def test_admin_port_keeps_its_word(case: schemathesis.Case, gateway: GatewayProcess) -> None:
    checks = [check for check in CHECKS if case.path != "/readyz" or check != not_a_server_error]
    case.call_and_validate(
        base_url=url(gateway.admin_address), headers=authorized(case), checks=checks
    )


@ADMIN.parametrize()
@pytest.mark.parametrize("token", ["", "Bearer wrong"])
@hypothesis.settings(SETTINGS, max_examples=3)
def test_admin_port_wants_a_token_where_it_says_so(
    case: schemathesis.Case, gateway: GatewayProcess, token: str
) -> None:
    is_documented = case.method.lower() == case.operation.method.lower()
    if not is_documented or not case.operation.definition.raw.get("security"):
        return
    response = case.call(base_url=url(gateway.admin_address), headers={"Authorization": token})
    assert response.status_code == 401
    case.validate_response(response, checks=CHECKS)


@PUSH.parametrize()
@hypothesis.settings(SETTINGS, max_examples=3)
def test_push_port_wants_a_token(case: schemathesis.Case, gateway: GatewayProcess) -> None:
    response = case.call(base_url=url(gateway.pushes_address), headers={"Authorization": "x"})
    assert response.status_code in (401, 413)
    case.validate_response(response, checks=CHECKS)


def call(gateway: GatewayProcess, operation_id: str, status: int, **parts: dict[str, Any]) -> None:
    """Make one request of an operation, which must be answered like this and as documented."""
    operation = ADMIN.find_operation_by_id(operation_id)
    case = operation.Case(**parts)
    response = case.call(
        base_url=url(gateway.admin_address), headers={"Authorization": f"Bearer {TOKEN}"}
    )
    assert response.status_code == status, response.text
    case.validate_response(response, checks=[check for check in CHECKS if status < 500])


def test_a_client_that_is_there(gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
    client = gateway.connect(client_id)
    own = {"clientId": client_id}
    push = gateway.push_client(token=TOKEN)
    assert push.describe(client_id)["id"] == client_id
    for path, document in (
        (url(gateway.pushes_address), PUSH),
        (url(gateway.admin_address), ADMIN),
    ):
        name = "describe" if document is PUSH else "client"
        case = document.find_operation_by_id(name).Case(path_parameters=own)
        response = case.call(base_url=path, headers=authorized(case))
        assert response.status_code == 200
        case.validate_response(response, checks=CHECKS)
    call(gateway, "clients", 200, query={"limit": 10})
    call(gateway, "closeClient", 200, path_parameters=own, query={"code": 4000})
    client.assert_closed(4000)
    api.wait_for_one(client_id, "DELETE")
    call(gateway, "client", 200, path_parameters=own)  # its last close
    call(gateway, "errors", 200)


def test_what_takes_its_time(gateway: GatewayProcess) -> None:
    worker = {"worker": 1}
    for kind in ("cpu", "memory"):
        call(gateway, "profile", 200, path_parameters=worker, query={"kind": kind, "seconds": 1})
    call(gateway, "profile", 404, path_parameters={"worker": 9})
    call(gateway, "profile", 400, path_parameters=worker, query={"kind": "heap"})
    call(gateway, "replaceWorker", 404, path_parameters={"worker": 9})
    call(gateway, "replaceWorker", 202, path_parameters=worker)
    before = gateway.find_admin()
    call(gateway, "reload", 202)
    until(lambda: not before.is_alive, timeout_s=2 * DEADLINE_S, what="another admin process")
    until(lambda: not json.loads(gateway.admin_get("/status").body)["rolling"])


def test_events_carry_the_status(gateway: GatewayProcess) -> None:
    viewer = gateway.push_client(gateway.admin_address)
    viewer.send("GET", "/events")
    viewer.stream.read_through(b"data: ")
    event = json.loads(viewer.stream.read_through(b"\n"))
    viewer.close()
    status = json.loads(gateway.admin_get("/status").body)
    assert event.keys() == status.keys()
    assert event["workers"][0].keys() == status["workers"][0].keys()


def test_tail_carries_traces(gateway: GatewayProcess) -> None:
    trace = document("openapi-admin.yaml")["components"]["schemas"]["Trace"]
    viewer = gateway.push_client(gateway.admin_address, token=TOKEN)
    viewer.send("GET", "/tail/nobody")
    viewer.stream.read_through(b"\r\n\r\n")
    push = gateway.push_client(token=TOKEN)
    assert push.push("nobody", "hello").status == 404
    while not (line := viewer.stream.read_through(b"\n").strip()).startswith(b"{"):
        pass  # the size of a chunk
    viewer.close()
    assert set(json.loads(line)) == set(trace["properties"]) == set(trace["required"])


def document(name: str) -> Any:
    return yaml.safe_load((DOCS / name).read_text())


def test_lists_all_that_a_worker_tells(gateway: GatewayProcess) -> None:
    schemas = document("openapi-admin.yaml")["components"]["schemas"]
    status = json.loads(gateway.admin_get("/status").body)
    assert set(schemas["Status"]["properties"]) == set(status)
    assert set(schemas["Worker"]["properties"]) == set(status["workers"][0])


def test_lists_all_causes() -> None:
    schemas = document("openapi-admin.yaml")["components"]["schemas"]
    assert set(schemas["Cause"]["enum"]) == set(causes.OF_REQUESTS)
    assert set(schemas["CloseCause"]["enum"]) == set(causes.CODES)


def test_lists_all_routes(gateway: GatewayProcess) -> None:
    """Whatever else is asked for is not there."""
    paths = document("openapi-admin.yaml")["paths"]
    admin = gateway.push_client(gateway.admin_address, token=TOKEN)
    for path, item in paths.items():
        target = path.replace("{clientId}", "nobody").replace("{worker}", "9")
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
            if method.lower() not in item:
                assert admin.request(method, target).status == 405, (method, path)
