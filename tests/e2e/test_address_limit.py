"""Come from one address more often than allowed, through all workers and a proxy."""

from __future__ import annotations

import itertools
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Final

import pytest
from harness.api import FakeApi
from harness.gateway import GatewayProcess
from harness.http_messages import Response
from harness.processes import Process
from harness.stream import Stream
from harness.waiting import DEADLINE_S, until
from harness.ws import WsClient, handshake, upgrade_request

LIMIT: Final = 6
WORKERS: Final = 3
PROXY: Final = "127.0.0.3"

# All of 127.0.0.0/8 is this machine, so that each test has addresses of its own.
_addresses = (f"127.0.7.{number}" for number in itertools.count(1))
_names = (f"limited-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def limited(shared_api: FakeApi) -> Iterator[GatewayProcess]:
    """Run one gateway for all of this; its clients stay for as long as a test wants them to."""
    with GatewayProcess(
        api=shared_api.url,
        workers=WORKERS,
        max_connections_per_ip=LIMIT,
        trusted_proxy=f"{PROXY}/32",
        drain_seconds="600s",
    ) as gateway:
        yield gateway


class Visitors:
    """Open connections from chosen addresses; they are closed when the test is over."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self.gateway = gateway
        self._streams: list[Stream] = []

    def opens(self, source: str) -> Stream:
        """Open a TCP connection and say nothing yet."""
        sock = socket.socket()
        sock.settimeout(DEADLINE_S)
        sock.bind((source, 0))
        stream = Stream(sock)
        self._streams.append(stream)
        sock.connect(self.gateway.clients_address)
        return stream

    def connects(self, source: str, behind: str | None = None) -> WsClient:
        """Open a WebSocket, which must be accepted."""
        return WsClient(self.opens(source), f"/{next(_names)}", {"X-Forwarded-For": behind})

    def fill(self, source: str, behind: str | None = None) -> list[WsClient]:
        return [self.connects(source, behind) for _ in range(LIMIT)]

    def asks(self, source: str, behind: str | None = None) -> Response:
        """Ask for a WebSocket; close the connection after the answer."""
        stream = self.opens(source)
        try:
            request = upgrade_request(f"/{next(_names)}", {"X-Forwarded-For": behind})
            return handshake(stream, request)
        finally:
            stream.close()

    def assert_full(self, source: str, behind: str | None = None) -> None:
        answer = self.asks(source, behind)
        assert answer.status == 429
        assert answer.headers["Retry-After"] == "1"
        assert answer.text == "too many connections from this address\n"
        assert not answer.keeps_connection

    def await_place(self, source: str, behind: str | None = None) -> WsClient:
        """Come again and again until there is a place, and take it."""

        def try_it() -> WsClient | None:
            try:
                return self.connects(source, behind)
            except (AssertionError, EOFError, ConnectionError):  # refused, or not even that
                self._streams.pop().close()
                return None

        place = until(try_it, what="a place")
        assert place is not None
        return place

    def close(self) -> None:
        for stream in self._streams:
            stream.close()


@pytest.fixture
def visitors(limited: GatewayProcess) -> Iterator[Visitors]:
    visitors = Visitors(limited)
    yield visitors
    visitors.close()
    assert limited.is_running
    assert not limited.complaints


@pytest.fixture
def source() -> str:
    return next(_addresses)


def over_all_workers(visitors: Visitors, source: str) -> dict[Process, list[WsClient]]:
    """Fill an address with clients of at least two workers; return them by worker."""
    clients = visitors.fill(source)
    while True:
        found: dict[Process, list[WsClient]] = {}
        for client in clients:
            found.setdefault(visitors.gateway.worker_of(client), []).append(client)
        if len(found) > 1:
            return found
        clients.pop().close()  # the kernel has led all of them to one worker
        clients.append(visitors.await_place(source))


def test_one_too_many_is_refused_wherever_the_others_are(visitors: Visitors, source: str) -> None:
    limited_before = visitors.gateway.count("connections_limited")
    refused_before = visitors.gateway.count("handshakes_refused", status="429")
    over_all_workers(visitors, source)
    for _ in range(10):
        visitors.assert_full(source)
    assert visitors.gateway.count("connections_limited") >= limited_before + 10
    assert visitors.gateway.count("handshakes_refused", status="429") >= refused_before + 10


def test_others_are_not_affected(visitors: Visitors, source: str) -> None:
    visitors.fill(source)
    visitors.assert_full(source)
    other = next(_addresses)
    visitors.fill(other)
    visitors.assert_full(other)


@pytest.mark.parametrize("end", [WsClient.close, WsClient.hang_up, WsClient.abort])
def test_place_is_free_when_a_client_has_left(
    visitors: Visitors, source: str, end: Callable[[WsClient], None]
) -> None:
    clients = visitors.fill(source)
    visitors.assert_full(source)
    end(clients[0])
    visitors.await_place(source)
    visitors.assert_full(source)


def test_connections_that_never_ask_count_as_well(visitors: Visitors, source: str) -> None:
    silent = [visitors.opens(source) for _ in range(LIMIT)]
    silent[0].write(b"GET /slow HTTP/1.1\r\nHost:")
    # They are accepted in the order of their coming, but by several workers.
    until(lambda: visitors.asks(source).status == 429, what="the last of them")
    for stream in silent:
        stream.close()
    for _ in range(LIMIT):
        visitors.await_place(source)
    visitors.assert_full(source)


def test_flood_gets_no_answer(visitors: Visitors, source: str) -> None:
    visitors.fill(source)
    refused = [visitors.opens(source) for _ in range(LIMIT)]
    for stream in refused:
        assert stream.read_through(b"\r\n").startswith(b"HTTP/1.1 429 ")
    # Those wait for our end of the closing, and count until it comes.
    assert visitors.opens(source).read_to_end() == b""
    for stream in refused:
        stream.close()
    until(lambda: visitors.opens(source).read_to_end() != b"", what="an answer")


def test_clients_behind_a_proxy_are_counted_one_by_one(visitors: Visitors) -> None:
    some, other = next(_addresses), next(_addresses)
    visitors.fill(PROXY, behind=some)
    visitors.assert_full(PROXY, behind=some)
    visitors.assert_full(PROXY, behind=f"203.0.113.5, {some}")
    visitors.assert_full(PROXY, behind=f"{some}:4711")
    visitors.fill(PROXY, behind=other)
    # It is the same client that comes without the proxy.
    visitors.assert_full(some)
    # And the proxy may have more than that, for it is none.
    for _ in range(LIMIT + 2):
        visitors.connects(PROXY)


def test_place_behind_a_proxy_is_free_when_a_client_has_left(
    visitors: Visitors, source: str
) -> None:
    clients = visitors.fill(PROXY, behind=source)
    clients[0].abort()
    visitors.await_place(PROXY, behind=source)
    visitors.assert_full(PROXY, behind=source)


def test_claims_of_a_stranger_are_not_believed(visitors: Visitors, source: str) -> None:
    for number in range(LIMIT):
        visitors.connects(source, behind=f"198.51.100.{number}")
    visitors.assert_full(source, behind="198.51.100.200")


def test_killed_worker_leaves_its_places_to_others(visitors: Visitors, source: str) -> None:
    by_worker = over_all_workers(visitors, source)
    visitors.assert_full(source)
    victim, lost = next(iter(by_worker.items()))
    lost_before = visitors.gateway.count("closes", cause="worker_lost")
    os.kill(victim.pid, signal.SIGKILL)
    until(lambda: not victim.is_alive)
    for _ in lost:
        visitors.await_place(source)
    visitors.assert_full(source)
    assert visitors.gateway.count("closes", cause="worker_lost") >= lost_before + len(lost)
    for worker, clients in by_worker.items():
        if worker != victim:
            for client in clients:
                client.close()


def test_rolling_restart_keeps_count(visitors: Visitors, source: str) -> None:
    gateway = visitors.gateway
    by_worker = over_all_workers(visitors, source)
    done = gateway.stderr.count("all workers are replaced")
    os.kill(gateway.pid, signal.SIGHUP)
    until(lambda: gateway.stderr.count("all workers are replaced") > done, timeout_s=2 * DEADLINE_S)
    # The clients are still with the old workers, and those who come meet the new ones.
    visitors.assert_full(source)
    fresh = []
    for clients in by_worker.values():
        clients[0].close()
        fresh.append(visitors.await_place(source))
        visitors.assert_full(source)
    # An old worker ends when its last client has left; then its count is wiped.
    ended = gateway.stderr.count("the old workers have ended")
    for clients in by_worker.values():
        for client in clients[1:]:
            client.close()
    until(
        lambda: gateway.stderr.count("the old workers have ended") > ended,
        timeout_s=2 * DEADLINE_S,
    )
    for _ in range(LIMIT - len(fresh)):
        visitors.await_place(source)
    visitors.assert_full(source)
