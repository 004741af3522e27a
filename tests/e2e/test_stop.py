"""Stop the gateway while the API is away or hangs: what it owes the API is not lost."""

from __future__ import annotations

import os
import signal

from harness.api import FakeApi, Hold, Reply
from harness.gateway import GatewayProcess
from harness.processes import find_descendants
from harness.valkey import ValkeyProcess
from harness.waiting import DEADLINE_S, until
from harness.ws import upgrade_request
from redis import Redis

from .conftest import StartGateway


def stop(gateway: GatewayProcess) -> int:
    """Send SIGTERM and wait for the end; return the exit status."""
    gateway.terminate()
    until(lambda: not gateway.is_running, timeout_s=2 * DEADLINE_S, what="the end")
    assert not gateway.complaints
    assert gateway.status is not None
    return gateway.status


def test_stop_while_the_api_is_away_leaves_the_disconnects_to_the_next_start(
    own_api: FakeApi, valkey: ValkeyProcess, start_gateway: StartGateway
) -> None:
    gateway = start_gateway(
        api=own_api.url, redis=valkey.url, workers=2, shutdown_timeout="2s", drain_seconds="1s"
    )
    names = [f"left-{number}" for number in range(20)]
    clients = {name: gateway.connect(name) for name in names}
    generations = {name: own_api.wait_for_one(name, "GET").generation for name in names}
    own_api.close()
    for name in names[:3]:
        clients[name].send("a message that nobody takes")
    assert stop(gateway) == 0
    with Redis.from_url(valkey.url) as redis:
        assert redis.xlen("ws2api:disconnects") == len(names), "each is owed once"
    own_api.open()
    start_gateway(api=own_api.url, redis=valkey.url)
    for name in names:
        request = own_api.wait_for_one(name, "DELETE")
        assert request.generation == generations[name]
        assert (request.close_code, request.text) == (1001, "going away")


def test_stop_while_the_api_is_away_says_what_the_embedded_redis_takes_with_it(
    own_api: FakeApi, start_gateway: StartGateway
) -> None:
    gateway = start_gateway(api=own_api.url, shutdown_timeout="2s")
    clients = [gateway.connect(f"lost-{number}") for number in range(3)]
    own_api.close()
    for client in clients:
        client.send("a message that nobody takes")
    until(lambda: gateway.count("messages_received") == len(clients), what="all messages in")
    assert stop(gateway) == 1
    (line,) = [line for line in gateway.stderr.splitlines() if "disconnects are lost" in line]
    assert "missing=3" in line
    own_api.open()


def test_second_sigterm_hurries_and_loses_nothing(
    own_api: FakeApi, valkey: ValkeyProcess, start_gateway: StartGateway
) -> None:
    hold = Hold(Reply())
    own_api.on("held", "POST", hold)
    # Without the second signal this would take longer than the test waits.
    gateway = start_gateway(api=own_api.url, redis=valkey.url, shutdown_timeout="5m")
    processes = find_descendants(gateway.pid)
    client = gateway.connect("held")
    generation = own_api.wait_for_one("held", "GET").generation
    client.send("question")
    own_api.wait_for_one("held", "POST")
    gateway.terminate()
    until(lambda: "worker stops" in gateway.stderr, what="the first signal has arrived")
    assert client.stream.is_silent(), "the answer is waited for"
    gateway.terminate()
    client.assert_closed(1001)
    gateway.await_end(processes)
    hold.release()
    start_gateway(api=own_api.url, redis=valkey.url)
    request = own_api.wait_for_one("held", "DELETE")
    assert (request.generation, request.close_code) == (generation, 1001)


def test_worker_that_retires_moves_its_clients_and_reports_them(
    own_api: FakeApi, start_gateway: StartGateway
) -> None:
    gateway = start_gateway(api=own_api.url, drain_seconds="1s")
    clients = {f"moved-{number}": gateway.connect(f"moved-{number}") for number in range(20)}
    worker = gateway.worker_of(clients["moved-0"])
    hold = Hold(Reply("answer"))
    own_api.on("moved-7", "POST", hold)
    clients["moved-7"].send("question")
    own_api.wait_for_one("moved-7", "POST")
    os.kill(worker.pid, signal.SIGUSR2)
    for name, client in clients.items():
        if name != "moved-7":
            client.assert_closed(1012, "service restart")
    hold.release()
    assert clients["moved-7"].receive() == "answer"
    clients["moved-7"].assert_closed(1012, "service restart")
    until(lambda: not worker.is_alive, what="the worker ends")
    for name in clients:
        assert own_api.wait_for_one(name, "DELETE").close_code == 1012


def test_connect_that_the_api_is_still_deciding_is_reported_later(
    own_api: FakeApi, valkey: ValkeyProcess, start_gateway: StartGateway
) -> None:
    hold = Hold(Reply("ok"))
    own_api.on("undecided", "GET", hold)
    gateway = start_gateway(
        api=own_api.url, redis=valkey.url, shutdown_timeout="2s", api_timeout="4s"
    )
    stream = gateway.open_stream()
    stream.write(upgrade_request("/undecided"))
    generation = own_api.wait_for_one("undecided", "GET").generation
    assert stop(gateway) == 0
    hold.release()
    start_gateway(api=own_api.url, redis=valkey.url, api_timeout="1s")
    request = own_api.wait_for_one("undecided", "DELETE")
    assert (request.generation, request.text) == (generation, "worker lost")
