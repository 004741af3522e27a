"""Operate a real gateway through its admin port: clients, draining, replacing, profiles."""

from __future__ import annotations

import http.client
import json
import os
import pstats
import signal
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.api import FakeApi, Reply
from harness.gateway import GatewayProcess
from harness.http_messages import Response, read_head
from harness.push import PushClient
from harness.valkey import ValkeyProcess
from harness.waiting import DEADLINE_S, until
from harness.workers import worker_pids

from .conftest import StartGateway

TOKEN = "open-sesame"
GUARDED = [
    ("GET", "/errors"),
    ("GET", "/clients"),
    ("GET", "/clients/ann"),
    ("DELETE", "/clients/ann"),
    ("POST", "/reload"),
    ("POST", "/drain"),
    ("DELETE", "/drain"),
    ("POST", "/workers/0/drain"),
    ("POST", "/workers/0/profile?seconds=1"),
]
WORKERS = 2


@pytest.fixture(scope="module")
def operated(shared_api: FakeApi) -> Iterator[GatewayProcess]:
    """Run a gateway that has an admin token."""
    with GatewayProcess(
        api=shared_api.url,
        workers=WORKERS,
        admin_token=TOKEN,
        push_token="pushing",
        drain_seconds="200ms",
        api_timeout="5s",
    ) as gateway:
        yield gateway


@pytest.fixture
def gateway(operated: GatewayProcess) -> Iterator[GatewayProcess]:
    """Use it, and leave it alive and without a complaint in its log."""
    yield operated
    operated.disconnect_all()
    assert operated.is_running
    assert not operated.complaints


@pytest.fixture
def admin(gateway: GatewayProcess) -> Iterator[PushClient]:
    """Speak to the admin port with the token."""
    return gateway.push_client(gateway.admin_address, token=TOKEN)


def json_of(response: Response, status: int = 200) -> Any:
    assert response.status == status, response
    assert response.headers["Content-Type"].startswith("application/json")
    return json.loads(response.body)


def error_of(response: Response, status: int) -> str:
    (message,) = json_of(response, status).values()
    assert isinstance(message, str)
    return message


# Who may do what.


@pytest.mark.parametrize(("method", "target"), GUARDED)
@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer open", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x"],
)
def test_wants_the_token(
    gateway: GatewayProcess, method: str, target: str, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    client = gateway.push_client(gateway.admin_address)
    response = client.request(method, target, headers=headers)
    assert error_of(response, 401) == "a bearer token is required"
    assert response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(("method", "target"), GUARDED)
def test_does_none_of_it_without_a_token_of_its_own(
    shared_gateway: GatewayProcess, method: str, target: str
) -> None:
    client = shared_gateway.push_client(shared_gateway.admin_address, token="any")
    message = error_of(client.request(method, target), 403)
    assert message == "the gateway was started without --admin-token"
    client.close()


@pytest.mark.parametrize("target", ["/healthz", "/readyz", "/status", "/metrics", "/"])
def test_figures_need_no_token(gateway: GatewayProcess, target: str) -> None:
    assert gateway.admin_get(target).status == 200


@pytest.mark.parametrize(("method", "target"), [("GET", "/nothing"), ("POST", "/workers/x/drain")])
def test_what_is_not_there(admin: PushClient, method: str, target: str) -> None:
    assert admin.request(method, target).status == 404


def test_stream_has_no_head(gateway: GatewayProcess) -> None:
    client = gateway.push_client(gateway.admin_address)
    assert client.request("HEAD", "/events").status == 405


def test_does_not_log_what_is_no_request(gateway: GatewayProcess) -> None:
    """Anybody can send such, as often as he likes; and there may be a token in it."""
    for junk in (b"Authorization: Bearer sesame-\x01", b"X: y\r\n" * 1000):
        client = gateway.push_client(gateway.admin_address)
        client.stream.write(b"GET /healthz HTTP/1.1\r\nHost: gateway\r\n" + junk + b"\r\n\r\n")
        assert "400" in read_head(client.stream)[0]
        client.close()
    assert gateway.admin_get("/healthz").status == 200
    assert "sesame-" not in gateway.stderr
    assert "Error handling request" not in gateway.stderr


def test_idle_connections_do_not_keep_others_out(gateway: GatewayProcess) -> None:
    idle = [socket.create_connection(gateway.admin_address) for _ in range(600)]
    assert gateway.admin_get("/healthz").status == 200
    assert len(os.listdir(f"/proc/{gateway.find_admin().pid}/fd")) < 400
    for each in idle:
        each.close()


def test_no_client_is_named_without_the_token(gateway: GatewayProcess, client_id: str) -> None:
    gateway.connect(client_id)
    for target in ("/status", "/metrics", "/"):
        assert client_id not in gateway.admin_get(target).text


# Clients.


def test_pages_through_the_clients_of_all_workers(
    gateway: GatewayProcess, admin: PushClient
) -> None:
    names = {f"paged-{number}" for number in range(30)}
    for name in names:
        gateway.connect(name)
    found: list[dict[str, Any]] = []
    cursor, pages = "", 0
    while cursor is not None:
        page = json_of(admin.request("GET", f"/clients?limit=10&cursor={cursor}"))
        assert len(page["clients"]) <= 10
        found += page["clients"]
        cursor = page["cursor"]
        pages += 1
        assert pages <= 10
    mine = [each for each in found if each["id"] in names]
    assert sorted(each["id"] for each in mine) == sorted(names)
    assert len({each["worker"] for each in mine}) == WORKERS
    described = gateway.push_client(token="pushing").describe(mine[0]["id"])
    assert mine[0] == {key: described[key] for key in ("id", "generation", "worker")}


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("limit=0", "limit must be from 1 to 1000"),
        ("limit=1001", "limit must be from 1 to 1000"),
        ("limit=ten", "limit must be a whole number"),
        ("limit=-1", "limit must be a whole number"),
        ("limit=%D9%A3", "limit must be a whole number"),
        ("cursor=x", "no such cursor"),
        ("cursor=:5", "no such cursor"),
        ("cursor=w:x", "no such cursor"),
        ("cursor=w:%C2%B2", "no such cursor"),
        (f"cursor=w:{'9' * 21}", "no such cursor"),
        ("cursor=w:0:1001:x", "no such cursor"),
        ("cursor=w:0:10:", "no such cursor"),
    ],
)
def test_refuses_pages_that_are_none(admin: PushClient, query: str, message: str) -> None:
    assert error_of(admin.request("GET", f"/clients?{query}"), 400) == message


def test_cursor_of_a_worker_that_is_gone_goes_on_behind_it(
    gateway: GatewayProcess, admin: PushClient, client_id: str
) -> None:
    gateway.connect(client_id)
    page = json_of(admin.request("GET", "/clients?cursor=!:77"))
    assert client_id in [each["id"] for each in page["clients"]]
    assert json_of(admin.request("GET", "/clients?cursor=~:0")) == {"clients": [], "cursor": None}


def test_looks_a_client_up(
    gateway: GatewayProcess, admin: PushClient, api: FakeApi, client_id: str
) -> None:
    before = json_of(admin.get(f"clients/{client_id}"))
    assert before == {"id": client_id, "connected": False, "connection": None, "last_close": None}
    client = gateway.connect(client_id)
    api.on(client_id, "POST", Reply(b"answer"))
    client.send("question")
    assert client.receive() == "answer"
    found = json_of(admin.get(f"clients/{client_id}"))
    assert found["connected"]
    assert found["connection"]["messages_received"] == found["connection"]["messages_sent"] == 1
    assert found["last_close"] is None
    generation = found["connection"]["generation"]
    client.close(4321, "grün")
    api.wait_for_one(client_id, "DELETE")
    after = json_of(admin.get(f"clients/{client_id}"))
    assert (after["connected"], after["connection"]) == (False, None)
    last = after["last_close"]
    assert abs(last.pop("time_s") - time.time()) < 2 * DEADLINE_S
    assert last.pop("duration_s") >= 0
    assert last.pop("worker") in range(WORKERS)
    assert last == {
        "generation": generation,
        "code": 4321,
        "cause": "client",
        "reason": "grün",
        "messages_received": 1,
        "messages_sent": 1,
    }


def test_last_close_outlives_its_worker(
    gateway: GatewayProcess, admin: PushClient, api: FakeApi, client_id: str
) -> None:
    client = gateway.connect(client_id)
    worker = gateway.worker_of(client)
    client.close(1000, "bye")
    api.wait_for_one(client_id, "DELETE")
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: gateway.admin_get("/readyz").status == 200 and not worker.is_alive)
    assert json_of(admin.get(f"clients/{client_id}"))["last_close"]["reason"] == "bye"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("a%2fb", "a%2Fb"),
        ("%2e%61nn", ".ann"),
        ("ann~._-", "ann~._-"),
        ("x" * 255, "x" * 255),
        ("DE*A'B*(E1)!$&+,;=:@", "DE*A'B*(E1)!$&+,;=:@"),
    ],
)
def test_ids_have_one_spelling(
    gateway: GatewayProcess, admin: PushClient, name: str, meant: str
) -> None:
    client = gateway.connect(name)
    for spelling in (name, meant):
        found = json_of(admin.get(f"clients/{spelling}"))
        assert found["id"] == found["connection"]["id"] == meant
    assert admin.delete(f"clients/{name}", code=4001).status == 200
    client.assert_closed(4001, "")
    until(lambda: json_of(admin.get(f"clients/{name}"))["last_close"]["code"] == 4001)


@pytest.mark.parametrize("name", ["@all", "a%zz", "a|b", "x" * 256, "a%20b%0"])
def test_refuses_what_is_no_id(admin: PushClient, name: str) -> None:
    assert "client id" in error_of(admin.get(f"clients/{name}"), 400)


def test_closes_a_client(
    gateway: GatewayProcess, admin: PushClient, api: FakeApi, client_id: str
) -> None:
    client = gateway.connect(client_id)
    response = admin.delete(f"clients/{client_id}", code=4001, reason="kick & rush")
    assert json_of(response) == {"closed": True}
    client.assert_closed(4001, "kick & rush")
    assert api.wait_for_one(client_id, "DELETE").text == "kick & rush"
    last = json_of(admin.get(f"clients/{client_id}"))["last_close"]
    assert (last["code"], last["cause"]) == (4001, "api")
    assert error_of(admin.delete(f"clients/{client_id}"), 404) == "no such client"


def test_refuses_a_close_code_that_may_not_be_sent(
    gateway: GatewayProcess, admin: PushClient, client_id: str
) -> None:
    client = gateway.connect(client_id)
    message = error_of(admin.delete(f"clients/{client_id}", code=1006), 400)
    assert message == "this close code may not be sent"
    client.close()


def test_shows_the_latest_errors(
    gateway: GatewayProcess, admin: PushClient, api: FakeApi, client_id: str
) -> None:
    client = gateway.connect(client_id)
    api.on(client_id, "POST", Reply(b"", status=500))
    client.send("question")
    api.wait_for_one(client_id, "POST")

    def errors() -> list[dict[str, Any]]:
        found = json_of(admin.request("GET", "/errors"))["errors"]
        return [each for each in found if each["client"] == client_id]

    (error,) = until(errors, what="the error")
    assert abs(error.pop("time_s") - time.time()) < 2 * DEADLINE_S
    assert error.pop("worker") in range(WORKERS)
    text = "the API did not take a message: status 500"
    assert error == {"cause": "status", "client": client_id, "text": text}
    assert gateway.count("errors", cause="status") >= 1


# The gateway as a whole.


def test_drains_the_host_for_load_balancers(
    gateway: GatewayProcess, admin: PushClient, client_id: str
) -> None:
    client = gateway.connect(client_id)
    assert json_of(admin.request("POST", "/drain")) == {"draining": True}
    response = gateway.admin_get("/readyz")
    assert (response.status, response.text) == (503, "draining on request\n")
    assert gateway.admin_get("/healthz").status == 200
    status = json_of(gateway.admin_get("/status"))
    assert (status["ready"], status["draining"]) == (False, True)
    assert gateway.count("draining") == 1
    # Whoever was on the way gets in, and those who are connected stay.
    gateway.connect(f"{client_id}-late").close()
    assert json_of(admin.request("DELETE", "/drain")) == {"draining": False}
    assert gateway.admin_get("/readyz").status == 200
    client.close()


def test_replaces_one_worker(gateway: GatewayProcess, admin: PushClient, client_id: str) -> None:
    before = worker_pids(gateway)
    client = gateway.connect(client_id)
    worker = before.index(gateway.worker_of(client).pid)
    assert json_of(admin.request("POST", f"/workers/{worker}/drain"), 202) == {"worker": worker}
    client.assert_closed(1012, "service restart")
    until(lambda: worker_pids(gateway)[worker] != before[worker], what="another process")
    after = worker_pids(gateway)
    assert [after[i] == before[i] for i in range(WORKERS)] == [i != worker for i in range(WORKERS)]
    last = json_of(admin.get(f"clients/{client_id}"))["last_close"]
    assert (last["code"], last["cause"]) == (1012, "restart")
    until(lambda: not json_of(gateway.admin_get("/status"))["rolling"])
    assert error_of(admin.request("POST", f"/workers/{WORKERS}/drain"), 404) == "no such worker"


def test_replaces_all_workers(gateway: GatewayProcess, admin: PushClient) -> None:
    before = worker_pids(gateway)
    assert json_of(admin.request("POST", "/reload"), 202) == {}

    def is_over() -> bool:
        try:
            status = json_of(gateway.admin_get("/status"))
        except (EOFError, OSError, AssertionError):
            return False  # the admin process is replaced, too
        pids = {worker["pid"] for worker in status["workers"]}
        return not pids & set(before) and not status["rolling"]

    until(is_over, timeout_s=2 * DEADLINE_S, what="all new")


def test_only_one_replacing_at_a_time(start_gateway: StartGateway, api: FakeApi) -> None:
    gateway = start_gateway(api=api.url, workers=2, admin_token=TOKEN, drain_seconds="30s")
    clients = [gateway.connect(f"long-{number}") for number in range(20)]
    admin = gateway.push_client(gateway.admin_address, token=TOKEN)
    json_of(admin.request("POST", "/workers/0/drain"), 202)
    until(lambda: json_of(gateway.admin_get("/status"))["rolling"])
    message = error_of(admin.request("POST", "/workers/1/drain"), 409)
    assert message == "workers are being replaced already"
    assert len(clients) == 20


# Live figures.


def test_streams_the_status(gateway: GatewayProcess, client_id: str) -> None:
    viewer = gateway.push_client(gateway.admin_address)
    viewer.send("GET", "/events")
    start_line, headers = read_head(viewer.stream)
    assert "200" in start_line
    assert headers["Content-Type"] == "text/event-stream"
    opened = []
    for _ in range(2):
        event = viewer.stream.read_through(b"\n\n")
        lines = [line for line in event.decode().splitlines() if line.startswith(("event", "data"))]
        assert lines[0] == "event: status"
        opened.append(json.loads(lines[1].removeprefix("data: "))["totals"]["connections_opened"])
        gateway.connect(client_id)
    assert opened[1] == opened[0] + 1
    viewer.close()


def test_streams_are_bounded_and_freed(start_gateway: StartGateway, api: FakeApi) -> None:
    gateway = start_gateway(api=api.url)
    viewers = [gateway.push_client(gateway.admin_address) for _ in range(64)]
    for viewer in viewers:
        viewer.send("GET", "/events")
        assert "200" in read_head(viewer.stream)[0]
    assert gateway.admin_get("/events").status == 503
    assert gateway.admin_get("/healthz").status == 200
    for viewer in viewers:
        viewer.close()

    def gets_in() -> bool:
        late = gateway.push_client(gateway.admin_address)
        late.send("GET", "/events")
        is_in = "200" in read_head(late.stream)[0]
        late.close()
        return is_in

    until(gets_in, what="room for a viewer")


# Profiles at run time.


class Chatter:
    """Send messages from one client until told to stop, and count the answers."""

    def __init__(self, gateway: GatewayProcess, client_id: str) -> None:
        self._client = gateway.connect(client_id)
        self.worker = worker_pids(gateway).index(gateway.worker_of(self._client).pid)
        self._stop = threading.Event()
        self.answered = 0
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Chatter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._client.send(str(self.answered))
            assert self._client.receive() == str(self.answered)
            self.answered += 1


@pytest.mark.parametrize("kind", ["cpu", "memory"])
def test_profiles_a_worker_under_traffic(
    gateway: GatewayProcess, api: FakeApi, client_id: str, tmp_path: Path, kind: str
) -> None:
    api.on(client_id, "POST", lambda request: Reply(request.body))
    connection = http.client.HTTPConnection(*gateway.admin_address, timeout=2 * DEADLINE_S)
    with Chatter(gateway, client_id) as chatter:
        before = chatter.answered
        connection.request(
            "POST",
            f"/workers/{chatter.worker}/profile?kind={kind}&seconds=1",
            headers={"Authorization": f"Bearer {TOKEN}"},
        )
        response = connection.getresponse()
        data = response.read()
        assert response.status == 200, data
        assert chatter.answered > before
    connection.close()
    path = tmp_path / "profile"
    path.write_bytes(data)
    if kind == "cpu":
        functions = {name for _, _, name in pstats.Stats(str(path)).stats}  # type: ignore[attr-defined]
        assert {"data_received", "on_message"} <= functions
        assert 'filename="ws2api-worker-' in (response.getheader("Content-Disposition") or "")
    else:
        snapshot = tracemalloc.Snapshot.load(str(path))
        assert any("gateway" in str(each.traceback) for each in snapshot.statistics("filename"))
    assert not [file for file in gateway.runtime_files if file.name.endswith(".part")]


@pytest.mark.parametrize(
    ("target", "status", "message"),
    [
        (f"/workers/{WORKERS}/profile", 404, "no such worker"),
        ("/workers/0/profile?kind=heap", 400, "kind must be one of cpu, memory"),
        ("/workers/0/profile?seconds=0", 400, "seconds must be from 1 to 300"),
        ("/workers/0/profile?seconds=301", 400, "seconds must be from 1 to 300"),
        ("/workers/0/profile?seconds=x", 400, "seconds must be a whole number"),
    ],
)
def test_refuses_profiles_that_are_none(
    admin: PushClient, target: str, status: int, message: str
) -> None:
    assert error_of(admin.request("POST", target), status) == message


def test_one_profile_of_a_worker_at_a_time(gateway: GatewayProcess, admin: PushClient) -> None:
    first = gateway.push_client(gateway.admin_address, token=TOKEN)
    first.send("POST", "/workers/1/profile?seconds=2")

    def refusal() -> Response | None:
        response = admin.request("POST", "/workers/1/profile?seconds=1")
        return response if response.status == 409 else None

    message = error_of(until(refusal), 409)
    assert message == "it is being profiled already"
    assert first.receive().status == 200


def test_stops_a_profile_when_nobody_waits_for_it(
    start_gateway: StartGateway, api: FakeApi
) -> None:
    """Whether it is the operator who goes away, or the admin process that is replaced."""
    gateway = start_gateway(api=api.url, workers=2, admin_token=TOKEN)

    def profile(worker: int, kind: str) -> PushClient:
        asking = gateway.push_client(gateway.admin_address, token=TOKEN)
        asking.send("POST", f"/workers/{worker}/profile?seconds=300&kind={kind}")
        until(lambda: f"kind={kind.title()}Profile worker={worker}" in gateway.stderr)
        return asking

    profile(0, "cpu").close()
    until(lambda: "profile called off" in gateway.stderr)
    profile(1, "memory")
    os.kill(gateway.find_admin().pid, signal.SIGKILL)
    until(lambda: gateway.stderr.count("profile called off") == 2)
    assert not [file for file in gateway.runtime_files if "profiles-" in file.parent.name]


# What is away.


def test_says_that_redis_is_away(
    api: FakeApi, valkey: ValkeyProcess, start_gateway: StartGateway
) -> None:
    gateway = start_gateway(api=api.url, redis=valkey.url, admin_token=TOKEN)
    client = gateway.connect("ann")
    valkey.stop()
    admin = gateway.push_client(gateway.admin_address, token=TOKEN)
    assert error_of(admin.request("GET", "/clients"), 503).startswith("redis: ")
    # Whoever is of the worker that is asked is found without it.
    assert json_of(admin.get("clients/ann"))["connected"]
    error_of(admin.get("clients/bob"), 503)
    assert not json_of(gateway.admin_get("/status"))["redis"]["up"]
    valkey.start()
    until(lambda: gateway.admin_get("/readyz").status == 200, timeout_s=2 * DEADLINE_S)
    client.close()
