"""Read what real gateways log of connections, and look for what must never stand there."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
from harness.api import Drop, FakeApi, Raw, Reply, echo
from harness.gateway import GatewayProcess
from harness.waiting import until
from harness.ws import WsClient

from .conftest import StartGateway

PROXY: Final = "127.0.0.1"
START: Final = "client connected"
END: Final = "client disconnected"

# Each is found in whatever spelling it is logged: as it is, in base64, in a URL.
SECRETS: Final = {
    "authorization": "Bearer-s3cret-of-the-client",
    "cookie": "session-s3cret",
    "query": "query-s3cret",
    "push token": "push-s3cret",
    "admin token": "admin-s3cret",
    "wrong token": "wrong-s3cret",
    "message": "message-s3cret",
    "reply": "reply-s3cret",
    "push": "pushed-s3cret",
    "header": "header-s3cret",
    "set-cookie": "set-cookie-s3cret",
}


@pytest.fixture(scope="module")
def logging_api() -> Iterator[FakeApi]:
    """Serve this module alone: what goes wrong on purpose is nobody else's."""
    with FakeApi() as api:
        yield api
        assert not api.violations


@pytest.fixture(scope="module", params=["json", "text"])
def talkative(request: pytest.FixtureRequest, logging_api: FakeApi) -> Iterator[GatewayProcess]:
    """Run a gateway that logs all it can, behind a proxy that is trusted, with every token."""
    with GatewayProcess(
        api=logging_api.url,
        workers=2,
        log_level="debug",
        log_format=request.param,
        trusted_proxy=f"{PROXY}/32",
        push_token=SECRETS["push token"],
        admin_token=SECRETS["admin token"],
        api_timeout="2s",
        forward_header="X-Tenant",
    ) as gateway:
        yield gateway


Line = dict[str, Any]

_TEXT_LINE = re.compile(r"(\S+Z) (debug|info|warning|error|critical) +(.*)")
_PAIR = re.compile(r' (\w+)=("(?:[^"\\]|\\.)*"|\S+)')


def read_lines(gateway: GatewayProcess, start: int = 0) -> list[Line]:
    """Parse the log, in either format."""
    lines = gateway.stderr.splitlines()[start:]
    return [json.loads(line) if line.startswith("{") else _read_text(line) for line in lines]


def _read_text(line: str) -> Line:
    found = _TEXT_LINE.fullmatch(line)
    assert found, line
    first = _PAIR.search(found[3])
    event = found[3][: first.start()] if first else found[3]
    values = {name: json.loads(v) if v[0] == '"' else v for name, v in _PAIR.findall(found[3])}
    return {"timestamp": found[1], "level": found[2], "event": event, **values}


def lines_of(gateway: GatewayProcess, client_id: str) -> list[Line]:
    return [line for line in read_lines(gateway) if line.get("client") == client_id]


def await_end(gateway: GatewayProcess, client_id: str, count: int = 1) -> tuple[Line, Line]:
    """Wait for the lines of a connection; there are no more than these."""
    until(
        lambda: [line["event"] for line in lines_of(gateway, client_id)].count(END) == count,
        what=f"the end of {client_id}",
    )
    lines = [line for line in lines_of(gateway, client_id) if line["event"] in (START, END)]
    assert [line["event"] for line in lines] == [START, END] * count
    assert all(line["level"] == "debug" for line in lines)
    return lines[-2], lines[-1]


# A connection's lines.


def test_one_line_at_the_start_and_one_at_the_end(
    talkative: GatewayProcess, logging_api: FakeApi, client_id: str
) -> None:
    logging_api.on(client_id, "POST", echo)
    client = talkative.connect(client_id, {"X-Forwarded-For": "203.0.113.5, 198.51.100.7:4711"})
    for _ in range(3):
        client.send("hello")
        assert client.receive() == "hello"
    push = talkative.push_client(token=SECRETS["push token"])
    assert push.push(client_id, "you too").status == 200
    client.close(4001, "had enough")
    start, end = await_end(talkative, client_id)
    generation = logging_api.wait_for_one(client_id, "GET").generation
    for line in (start, end):
        assert int(line.pop("generation")) == generation
        assert line.pop("remote") == "198.51.100.7"
        assert int(line.pop("worker")) in (0, 1)
        assert line.pop("timestamp").endswith("Z")
    assert set(start) == {"event", "level", "client"}
    assert 0 <= float(end.pop("duration_s")) < 60
    assert {name: str(value) for name, value in end.items()} == {
        "event": END,
        "level": "debug",
        "client": client_id,
        "code": "4001",
        "cause": "client",
        "messages_received": "3",
        "messages_sent": "4",
    }


def _close_by_api(gateway: GatewayProcess, client: WsClient, client_id: str) -> None:
    push = gateway.push_client(token=SECRETS["push token"])
    assert push.delete(client_id, code=3456).status == 200
    client.assert_closed(3456)


def _replace(gateway: GatewayProcess, client: WsClient, client_id: str) -> None:
    newer = gateway.connect(client_id)
    client.assert_closed(4008)
    newer.close()


def _break_the_protocol(_: GatewayProcess, client: WsClient, __: str) -> None:
    client.send_frame(1, b"bare", mask=False)
    client.assert_closed(1002)


Ending = Callable[[GatewayProcess, WsClient, str], None]


@pytest.mark.parametrize(
    ("ending", "code", "cause"),
    [
        (lambda _, client, __: client.close(1000), 1000, "client"),
        (lambda _, client, __: client.hang_up(), 1006, "lost"),
        (lambda _, client, __: client.abort(), 1006, "lost"),
        (_break_the_protocol, 1002, "protocol"),
        (_close_by_api, 3456, "api"),
    ],
    ids=["close", "hang up", "reset", "protocol", "api"],
)
def test_end_says_what_ended_it(
    talkative: GatewayProcess, client_id: str, ending: Ending, code: int, cause: str
) -> None:
    before = talkative.count("closes", cause=cause)
    ending(talkative, talkative.connect(client_id), client_id)
    _, end = await_end(talkative, client_id)
    assert (int(end["code"]), end["cause"], end["remote"]) == (code, cause, PROXY)
    assert talkative.count("closes", cause=cause) == before + 1


def test_replaced_connection_has_lines_of_its_own(
    talkative: GatewayProcess, client_id: str
) -> None:
    _replace(talkative, talkative.connect(client_id), client_id)
    until(lambda: len([x for x in lines_of(talkative, client_id) if x["event"] == END]) == 2)
    lines = [x for x in lines_of(talkative, client_id) if x["event"] in (START, END)]
    by_birth = sorted({int(line["generation"]) for line in lines})
    ends = {int(line["generation"]): line["cause"] for line in lines if line["event"] == END}
    assert ends == {by_birth[0]: "replaced", by_birth[1]: "client"}
    assert [line["event"] for line in lines].count(START) == 2


def test_refused_client_has_no_start_and_no_end(
    talkative: GatewayProcess, logging_api: FakeApi, client_id: str
) -> None:
    logging_api.on(client_id, "GET", Reply("no", status=403))
    assert talkative.handshake(client_id).status == 403
    marker = f"{client_id}-after"
    talkative.connect(marker).close()
    await_end(talkative, marker)
    assert not [x for x in lines_of(talkative, client_id) if x["event"] in (START, END)]


# Nothing that is secret, whatever goes wrong.


def speak_secrets(gateway: GatewayProcess, api: FakeApi, name: str) -> None:
    """Pass every secret through every path that may end in a line of the log."""
    secret = dict(SECRETS)
    headers: dict[str, str | None] = {
        "Authorization": f"Bearer {secret['authorization']}",
        "Cookie": f"sid={secret['cookie']}",
        "X-Tenant": secret["header"],
    }
    target = f"?token={secret['query']}"
    # All in order.
    set_cookie = {"Set-Cookie": f"a={secret['set-cookie']}"}
    api.on(name, "GET", Reply("ok", headers=set_cookie))
    api.on(name, "POST", Reply(secret["reply"]))
    client = gateway.connect(f"{name}{target}", headers)
    client.send(secret["message"])
    assert client.receive() == secret["reply"]
    push = gateway.push_client(token=secret["push token"])
    assert push.push(name, secret["push"]).status == 200
    assert client.receive() == secret["push"]
    # Messages and disconnects that the API does not take as it should.
    answers = (
        Reply(secret["reply"], status=500),
        Raw(f"{secret['reply']}\r\n\r\n".encode(), then_close=True),
        Raw(f"HTTP/1.1 200 {secret['reply']}\r\nContent-Length: x\r\n\r\n".encode()),
        Drop(),
        Reply(secret["reply"]),
    )
    api.on(name, "POST", *answers)
    for _ in answers:
        client.send(secret["message"])
    assert client.receive() == secret["reply"]
    api.on(name, "DELETE", Reply(secret["reply"], status=500), Reply("ok"))
    client.send_raw(b"\x81\x85" + secret["message"].encode())  # cut off, and then
    client.abort()
    api.wait_for(name, "DELETE")
    # Connects that the API, or the gateway, does not take.
    for number, answer in enumerate(
        (*answers[:4], Reply("ok", headers={"Sec-WebSocket-Protocol": secret["reply"]}))
    ):
        api.on(f"{name}-{number}", "GET", answer)
        assert gateway.handshake(f"{name}-{number}{target}", headers).status in (502, 504)
    stream = gateway.open_stream()
    stream.write(f"GET /{name}{target} HTTP/1.1\r\nCookie: {secret['cookie']}\0\r\n\r\n".encode())
    stream.read_to_end()
    # Pushes that are none.
    stranger = gateway.push_client(token=secret["wrong token"])
    assert stranger.push(name, secret["push"]).status == 401
    broken = gateway.push_client(token=secret["push token"])
    broken.send_raw(f"POST /{name} HTTP/9\r\nX: {secret['push']}\r\n\r\n".encode())
    assert broken.receive().status == 400
    assert push.push("nobody", secret["push"]).status == 404
    # The admin port.
    for token, status in ((secret["wrong token"], 401), (secret["admin token"], 200)):
        admin = gateway.push_client(gateway.admin_address, token=token)
        assert admin.request("GET", f"/clients?limit=5&x={secret['query']}").status == status


def assert_nothing_secret(log: str) -> None:
    for name, secret in SECRETS.items():
        assert secret not in log, name
        assert base64.b64encode(secret.encode()).decode().rstrip("=") not in log, name


def test_no_secret_is_logged_at_the_lowest_level(
    talkative: GatewayProcess, logging_api: FakeApi, client_id: str
) -> None:
    speak_secrets(talkative, logging_api, client_id)
    marker = f"{client_id}-after"
    talkative.connect(marker).close()
    await_end(talkative, marker)
    errors = [line for line in read_lines(talkative) if line["level"] in ("warning", "error")]
    assert errors, "the paths of errors were taken"
    assert_nothing_secret(talkative.stderr)
    assert not talkative.complaints


def test_no_secret_is_an_error_that_can_be_looked_up(
    talkative: GatewayProcess, logging_api: FakeApi, client_id: str
) -> None:
    speak_secrets(talkative, logging_api, client_id)
    admin = talkative.push_client(talkative.admin_address, token=SECRETS["admin token"])
    for path in ("/errors", f"/clients/{client_id}", "/status", "/metrics"):
        answer = admin.request("GET", path)
        assert answer.status == 200
        assert_nothing_secret(answer.text)


# At the usual level.


@pytest.fixture(scope="module")
def quiet(logging_api: FakeApi) -> Iterator[GatewayProcess]:
    with GatewayProcess(
        api=logging_api.url,
        workers=2,
        log_format="json",
        push_token=SECRETS["push token"],
        admin_token=SECRETS["admin token"],
        api_timeout="2s",
        forward_header="X-Tenant",
        drain_seconds="1s",
    ) as gateway:
        yield gateway


def test_connections_have_no_lines_at_the_usual_level(
    quiet: GatewayProcess, logging_api: FakeApi, client_id: str
) -> None:
    before = len(read_lines(quiet))
    for number in range(3):
        quiet.connect(f"{client_id}-{number}").close()
        logging_api.wait_for(f"{client_id}-{number}", "DELETE")
    assert read_lines(quiet, before) == []


def test_errors_of_many_clients_are_a_few_lines_and_a_count(
    quiet: GatewayProcess, logging_api: FakeApi, client_id: str
) -> None:
    before, errors_before = len(read_lines(quiet)), quiet.count("errors", cause="status")
    logging_api.on(client_id, "POST", Reply("", status=500))
    client = quiet.connect(client_id)
    count = 60
    for _ in range(count):
        client.send("hello")
    logging_api.wait_for(client_id, "POST", count=count)
    until(lambda: quiet.count("errors", cause="status") == errors_before + count)

    def told() -> int:
        """Count the complaints that have a line, or are in the count of one."""
        lines = read_lines(quiet, before)
        left_out = [line["count"] for line in lines if "left out" in line["event"]]
        return sum(left_out) + len([line for line in lines if line.get("client") == client_id])

    until(lambda: told() == count, what="all of them")
    lines = read_lines(quiet, before)
    assert {line["cause"] for line in lines if "cause" in line} == {"status"}
    assert len(lines) < count / 2
    client.close()


def test_no_secret_is_logged_at_the_usual_level(
    quiet: GatewayProcess, logging_api: FakeApi, client_id: str
) -> None:
    before = len(read_lines(quiet))
    speak_secrets(quiet, logging_api, client_id)
    until(lambda: any(x["level"] == "warning" for x in read_lines(quiet, before)))
    assert_nothing_secret(quiet.stderr)


# More for a while.


def test_signal_makes_every_process_log_more(
    start_gateway: StartGateway, logging_api: FakeApi, client_id: str
) -> None:
    """Raise the level; how it comes back after minutes is shown without them in test_logs."""
    gateway = start_gateway(api=logging_api.url, workers=2, log_format="json", drain_seconds="600s")
    early = gateway.connect(f"{client_id}-early")
    gateway.connect(f"{client_id}-quiet").close()
    os.kill(gateway.pid, signal.SIGUSR1)

    def told() -> list[str]:
        lines = read_lines(gateway)
        chosen = [line for line in lines if line["event"] == "logging more for a while"]
        return sorted(str(line.get("worker", line.get("process"))) for line in chosen)

    until(lambda: told() == ["0", "1", "None", "admin"], what="each process")
    gateway.connect(f"{client_id}-loud").close()
    start, end = await_end(gateway, f"{client_id}-loud")
    assert start["remote"] == end["remote"] == "127.0.0.1"
    assert not lines_of(gateway, f"{client_id}-quiet")
    # Who was there before has a line at the end, which does not know where it came from.
    early.close()
    until(lambda: lines_of(gateway, f"{client_id}-early"))
    (line,) = lines_of(gateway, f"{client_id}-early")
    assert (line["event"], line["remote"]) == (END, None)
    # A second signal only makes it last longer.
    os.kill(gateway.pid, signal.SIGUSR1)
    until(lambda: told() == sorted(["0", "1", "None", "admin"] * 2))
    gateway.connect(f"{client_id}-again").close()
    await_end(gateway, f"{client_id}-again")


def test_worker_that_takes_a_dead_ones_place_is_as_loud(
    start_gateway: StartGateway, logging_api: FakeApi, client_id: str
) -> None:
    gateway = start_gateway(api=logging_api.url, workers=1, log_format="json")
    os.kill(gateway.pid, signal.SIGUSR1)
    until(lambda: gateway.stderr.count("logging more for a while") == 3)
    victim = gateway.worker_of(gateway.connect(f"{client_id}-lost"))
    os.kill(victim.pid, signal.SIGKILL)
    until(lambda: not victim.is_alive)
    gateway.connect(f"{client_id}-next").close()
    await_end(gateway, f"{client_id}-next")
