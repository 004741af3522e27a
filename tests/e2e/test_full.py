"""Give a worker few files, and connect more clients than it can bear."""

from __future__ import annotations

import os
import resource
import signal

from harness.api import FakeApi, Hold, Reply, echo
from harness.gateway import GatewayProcess
from harness.http_messages import read_response
from harness.waiting import DEADLINE_S, until
from harness.workers import worker_pids
from harness.ws import Frame, Op, handshake, upgrade_request

from .conftest import StartGateway

FILES = 200


def replace_worker(gateway: GatewayProcess) -> None:
    (before,) = worker_pids(gateway)
    os.kill(before, signal.SIGKILL)
    until(lambda: worker_pids(gateway) not in ([before], [None]), timeout_s=2 * DEADLINE_S)
    until(lambda: gateway.admin_get("/readyz").status == 200, timeout_s=2 * DEADLINE_S)


def is_let_in(gateway: GatewayProcess, client_id: str) -> bool:
    stream = gateway.open_stream()
    try:
        return handshake(stream, upgrade_request(f"/{client_id}")).status == 101
    except (ConnectionError, EOFError):
        return False
    finally:
        stream.close()


def test_refuses_clients_before_files_run_out(
    start_gateway: StartGateway, api: FakeApi, client_id: str
) -> None:
    gateway = start_gateway(api=api.url)
    # What is forked from now on has this limit.
    resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (FILES, FILES))
    replace_worker(gateway)
    assert resource.prlimit(worker_pids(gateway)[0], resource.RLIMIT_NOFILE) == (FILES, FILES)
    room = gateway.count("connections_max")
    assert FILES // 4 <= room < FILES

    clients = [gateway.connect(f"{client_id}-{number}") for number in range(room)]
    late = gateway.open_stream()
    response = handshake(late, upgrade_request(f"/{client_id}-late"))
    late.close()
    assert (response.status, response.headers["Retry-After"]) == (503, "1")
    assert response.text == "the gateway has as many clients as it can bear\n"
    assert gateway.count("handshakes_refused", status="503") == 1
    findings = gateway.admin_get("/readyz")
    assert findings.status == 503
    assert findings.text == "worker 0 has no room for clients: the limit of open files\n"
    assert "refusing clients: the limit of open files" in gateway.stderr

    # There are files left for everything else.
    api.on(f"{client_id}-0", "POST", echo)
    clients[0].send("hello")
    assert clients[0].receive() == "hello"
    assert gateway.push_client().push(f"{client_id}-1", "pushed").status == 200
    assert clients[1].receive() == "pushed"

    # And room again when somebody leaves.
    clients.pop().close()
    until(lambda: is_let_in(gateway, f"{client_id}-later"), what="room")
    assert "Too many open files" not in gateway.stderr


def test_each_of_a_storm_beyond_that_is_let_in_or_refused(
    start_gateway: StartGateway, api: FakeApi, client_id: str
) -> None:
    gateway = start_gateway(api=api.url)
    resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (FILES, FILES))
    replace_worker(gateway)
    room = gateway.count("connections_max")
    # All at once, more than there are files: those that are not accepted wait in the kernel.
    streams = [gateway.open_stream() for _ in range(2 * FILES)]
    for number, stream in enumerate(streams):
        stream.write(upgrade_request(f"/{client_id}-{number}"))
    clients, refused = [], 0
    for number, stream in enumerate(streams):
        response = read_response(stream)  # everybody gets one
        if response.status == 101:
            clients.append((f"{client_id}-{number}", stream))
        else:
            assert (response.status, response.headers["Retry-After"]) == (503, "1"), response
            assert stream.read_to_end() == b""
            stream.close()
            refused += 1
    assert (len(clients), refused) == (room, len(streams) - room)

    # Many connections to the push port take turns at what is there for them.
    pushers = [gateway.push_client() for _ in range(FILES // 8 + 3)]
    for pusher in pushers:
        assert pusher.push(clients[-1][0], "pushed").status == 200

    # Those who are in go on.
    name, stream = clients[0]
    api.on(name, "POST", echo)
    stream.write(Frame(Op.TEXT, b"hello").encode())
    assert stream.read_exactly(7) == b"\x81\x05hello"
    for _, stream in clients:
        stream.close()
    until(lambda: is_let_in(gateway, client_id), what="room")
    assert "Too many open files" not in gateway.stderr


def test_clients_that_do_not_take_their_refusal_hold_up_the_others_for_seconds(
    start_gateway: StartGateway, api: FakeApi, client_id: str
) -> None:
    gateway = start_gateway(api=api.url)
    resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (FILES, FILES))
    replace_worker(gateway)
    # None of them says a word, and the last are so many as are refused at the same time.
    count = gateway.count("connections_max") + (FILES - 32) // 16
    streams = [gateway.open_stream() for _ in range(count)]
    late = gateway.open_stream()
    assert handshake(late, upgrade_request(f"/{client_id}")).status == 503
    assert gateway.push_client().push("nobody", "x").status == 404
    for stream in [*streams, late]:
        stream.close()
    until(lambda: is_let_in(gateway, client_id), what="room")
    assert "Too many open files" not in gateway.stderr


def test_those_whose_end_the_api_has_yet_to_hear_of_take_no_room(
    start_gateway: StartGateway, api: FakeApi, client_id: str
) -> None:
    gateway = start_gateway(api=api.url)
    resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (FILES, FILES))
    replace_worker(gateway)
    count = gateway.count("connections_max") * 4 // 5
    hold = Hold(Reply(""))
    clients = []
    for number in range(count):
        api.on(f"{client_id}-{number}", "DELETE", hold)
        clients.append(gateway.connect(f"{client_id}-{number}"))
    for client in clients:
        client.close()
    until(lambda: gateway.count("connections_open") == 0, what="all gone")
    # As after a break of the network: everybody comes back at once.
    back = [gateway.connect(f"{client_id}-{number}-again") for number in range(count)]
    assert gateway.count("connections_open") == len(back)
    hold.release()
