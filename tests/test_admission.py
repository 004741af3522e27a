"""Lead clients to the gate, past the API and in, without a socket, an API or Redis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
from harness.looping import Clock
from ws2api.gateway import counters as c
from ws2api.gateway.client import Client
from ws2api.gateway.counters import Counters
from ws2api.gateway.errors import ApiTimeout
from ws2api.gateway.exchange import Exchange
from ws2api.gateway.gate import Gate
from ws2api.gateway.handshake import HandshakePolicy
from ws2api.gateway.http_wire import ReplyReader, RequestEncoder
from ws2api.gateway.hub import Hub
from ws2api.gateway.journal import Journal
from ws2api.gateway.recent import Recent
from ws2api.gateway.session import ASKING, CLAIMING, CLOSED, HANDSHAKE, OPEN, WAITING
from ws2api.gateway.settings import Settings
from ws2api.gateway.sweeper import Sweeper

HANDSHAKE_TIMEOUT_S = 10.0
API_URL = "http://127.0.0.1:1/"


class Transport:
    """Be a socket that takes everything."""

    def __init__(self) -> None:
        self.written = b""
        self.is_aborted = False
        self.has_ended = False

    def write(self, data: bytes) -> None:
        assert not self.has_ended
        self.written += data

    def write_eof(self) -> None:
        self.has_ended = True

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self.is_aborted

    def abort(self) -> None:
        self.is_aborted = True

    def close(self) -> None:
        self.is_aborted = True

    def get_extra_info(self, name: str) -> tuple[str, int]:
        assert name == "peername"
        return "192.0.2.7", 4711

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int) -> None:
        """Have no limits."""

    def pause_reading(self) -> None:
        """Have nothing to read."""

    resume_reading = pause_reading


class Registry:
    """Note what is asked of it; announces are answered when the test says so.

    Args:
        is_away: whether it answers at once, without Redis.
    """

    def __init__(self, *, is_away: bool = False) -> None:
        self.announced: list[tuple[bytes, Client]] = []
        self.withdrawn: list[tuple[bytes, int]] = []
        self.claimed: list[bytes] = []
        self.released: list[bytes] = []
        self._is_away = is_away

    def announce(self, client_id: bytes, client: Client) -> None:
        if self._is_away:
            client.on_announced(None)
        else:
            self.announced.append((client_id, client))

    def withdraw(self, client_id: bytes, generation: int) -> None:
        assert generation
        self.withdrawn.append((client_id, generation))

    def claim(self, client_id: bytes, generation: int, client: Client) -> None:
        self.claimed.append(client_id)

    def release(self, client: Client) -> None:
        self.released.append(client.client_id)


class Upstream:
    """Note what is submitted."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []

    def submit(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)


class Worker:
    """Hold what the clients of a worker share."""

    def __init__(self, limit: int = 1, *, redis_is_away: bool = False) -> None:
        settings = Settings(workers=1, api=API_URL)
        self.clock = Clock()
        self.slot = Counters(1).bank(0, 0)
        self.registry = Registry(is_away=redis_is_away)
        self.upstream = Upstream()
        sweeper = Sweeper(cast(Any, self.clock))
        sweeper.start()
        recent = Recent(1, 1)
        self.hub = Hub(
            slot=self.slot,
            sweeper=sweeper,
            upstream=cast(Any, self.upstream),
            registry=cast(Any, self.registry),
            outbox=cast(Any, None),
            gate=Gate(limit, HANDSHAKE_TIMEOUT_S, self.slot, sweeper),
            encoder=RequestEncoder(settings.api),
            policy=HandshakePolicy(settings),
            push_url=b"http://127.0.0.1:2",
            worker="host-0-1",
            max_in_flight=1,
            max_queue=4,
            max_message_size=1 << 20,
            max_write_buffer=1 << 18,
            ping_interval_s=0.0,
            ping_timeout_s=20.0,
            handshake_timeout_s=HANDSHAKE_TIMEOUT_S,
            write_timeout_s=30.0,
            reroute=lambda ask: None,
            most_clients=1000,
            serve_http=None,
            call_soon=lambda callback: None,
            journal=Journal(
                self.slot, sweeper, recent.closes(0, 0), recent.errors(0, 0), logs_connections=False
            ),
            limit=None,
        )

    @property
    def asked(self) -> str:
        """Whom the API was asked about so far, one letter each."""
        return "".join(
            cast(Client, each.owner).client_id.decode() for each in self.upstream.exchanges
        )

    def connects(self, name: str) -> Connection:
        return Connection(self, name)

    def connect(self, names: str) -> list[Connection]:
        return [self.connects(name) for name in names]

    def marks(self) -> None:
        """Let Redis mark what was announced."""
        announced, self.registry.announced = self.registry.announced, []
        for number, (_, client) in enumerate(announced):
            client.on_announced(17 + number)


class Connection:
    """Be a client that has sent its request."""

    def __init__(self, worker: Worker, name: str) -> None:
        self._worker = worker
        self.transport = Transport()
        self.client = Client(worker.hub)
        self.client.connection_made(cast(Any, self.transport))
        self.sends(
            f"GET /{name} HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )

    @property
    def state(self) -> int:
        return self.client.state

    @property
    def answer(self) -> str:
        """The head of the answer."""
        return self.transport.written.partition(b"\r\n\r\n")[0].decode()

    @property
    def status(self) -> int:
        return int(self.answer.split()[1])

    def sends(self, data: str) -> None:
        self.client.data_received(data.encode())

    def leaves(self) -> None:
        self.client.connection_lost(None)

    def is_answered(self, status: int = 200, body: bytes = b"ok", *lines: str) -> None:
        """Let the API answer the connect."""
        self.client.on_reply(self._exchange, reply(status, body, *lines))

    def times_out(self) -> None:
        self.client.on_failure(self._exchange, ApiTimeout("the API did not answer in time"))

    def is_claimed(self) -> None:
        self.client.on_claimed()

    @property
    def _exchange(self) -> Exchange:
        (exchange,) = (
            each for each in self._worker.upstream.exchanges if each.owner is self.client
        )
        return exchange


def reply(status: int, body: bytes, *lines: str) -> ReplyReader:
    reader = ReplyReader(1 << 20)
    reader.expect(want_headers=True)
    head = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", *lines, "", ""]
    reader.feed("\r\n".join(head).encode() + body)
    assert reader.complete
    return reader


Decision = Callable[[Connection], None]
DECISIONS: list[Decision] = [
    lambda it: it.is_answered(),
    lambda it: it.is_answered(403, b"no"),
    lambda it: it.is_answered(200, b"no"),
    lambda it: it.is_answered(200, b"ok", "Sec-WebSocket-Protocol: never-offered"),
    lambda it: it.times_out(),
]


# At the gate.


def test_api_is_asked_about_a_client_when_there_is_room() -> None:
    worker = Worker()
    me = worker.connects("a")
    assert me.state == ASKING
    assert worker.hub.connecting == {b"a": me.client}
    assert worker.asked == ""
    worker.marks()
    assert worker.asked == "a"


def test_client_waits_while_there_is_none() -> None:
    worker = Worker()
    a, b = worker.connect("ab")
    worker.marks()
    assert (a.state, b.state) == (ASKING, WAITING)
    assert worker.hub.connecting == {b"a": a.client}
    assert not worker.registry.announced, "no push is for it yet"
    assert worker.slot[c.CONNECTS_WAITING] == 1


@pytest.mark.parametrize("decide", DECISIONS)
def test_next_client_has_its_turn_when_the_api_has_decided(decide: Decision) -> None:
    worker = Worker()
    a, b, d = worker.connect("abd")
    worker.marks()
    decide(a)
    worker.marks()
    assert worker.asked == "ab"
    assert (b.state, d.state) == (ASKING, WAITING)


def test_client_that_left_has_its_turn_until_the_api_has_decided() -> None:
    worker = Worker()
    a, b = worker.connect("ab")
    worker.marks()
    a.leaves()
    assert b.state == WAITING
    a.is_answered()
    assert b.state == ASKING


def test_client_that_left_before_the_api_was_asked_has_no_turn() -> None:
    worker = Worker()
    a, _ = worker.connect("ab")
    a.leaves()
    worker.marks()
    assert a.state == CLOSED
    assert worker.registry.withdrawn == [(b"a", 17)]
    worker.marks()
    assert worker.asked == "b"


def test_client_that_left_the_line_has_no_turn() -> None:
    worker = Worker()
    a, b, d = worker.connect("abd")
    worker.marks()
    b.leaves()
    assert b.state == CLOSED
    assert b.client not in worker.hub.live
    a.is_answered()
    assert d.state == ASKING
    assert worker.slot[c.CONNECTS_WAITING] == 0
    assert worker.registry.withdrawn == []


def test_clients_have_their_turn_without_redis() -> None:
    worker = Worker(redis_is_away=True)
    connections = worker.connect("abdef")
    for connection in connections:
        assert connection.state == ASKING
        connection.is_answered()
    assert worker.asked == "abdef"
    births = [connection.client.generation for connection in connections]
    assert births == sorted(set(births))


def test_what_a_client_sends_while_it_waits_is_kept() -> None:
    worker = Worker()
    a, b = worker.connect("ab")
    worker.marks()
    b.sends("\x01")
    a.is_answered()
    worker.marks()
    b.sends("\x02")
    assert b.client._opening is not None
    assert b.client._opening.early == b"\x01\x02"


@pytest.mark.parametrize("decide", DECISIONS)
def test_nothing_is_left_at_the_gate(decide: Decision) -> None:
    worker = Worker(limit=2)
    for connection in worker.connect("ab"):
        worker.marks()
        decide(connection)
        connection.is_claimed()
        connection.leaves()
    c_, d = worker.connect("cd")
    assert (c_.state, d.state) == (ASKING, ASKING), "both places are free again"


# Turned back.


def assert_turned_back(connection: Connection, retry_after_s: int) -> None:
    assert connection.state == CLOSED
    assert connection.status == 503
    assert f"\r\nRetry-After: {retry_after_s}" in connection.answer
    assert connection.transport.has_ended


def test_client_that_would_wait_for_too_long_is_turned_back() -> None:
    worker = Worker()
    worker.connects("a")
    worker.marks()
    worker.clock.advance(HANDSHAKE_TIMEOUT_S + 1.5)
    late = worker.connects("b")
    assert_turned_back(late, retry_after_s=12)
    assert late.transport.written.endswith(b"\r\n\r\ntoo many are connecting\n")
    assert worker.slot[c.CONNECTS_OVERFLOWED] == 1
    assert sum(worker.slot[index] for index in c.HANDSHAKES_REFUSED.values()) == 1
    assert worker.registry.withdrawn == [], "it was never marked"


def test_client_that_has_waited_for_too_long_is_turned_back() -> None:
    worker = Worker()
    a, b = worker.connect("ab")
    worker.marks()
    worker.clock.advance(HANDSHAKE_TIMEOUT_S - 0.5)
    assert b.state == WAITING
    worker.clock.advance(1.0)
    assert_turned_back(b, retry_after_s=1)
    assert worker.slot[c.CONNECTS_OVERFLOWED] == 1
    assert worker.slot[c.CONNECTS_WAITING] == 0
    assert a.state == ASKING, "it is the API that takes its time"
    a.is_answered()
    assert worker.asked == "a"


def test_client_that_was_turned_back_has_its_time_to_go() -> None:
    worker = Worker()
    _, b = worker.connect("ab")
    b.client.turn_back(1.0)
    b.sends("whatever")
    worker.clock.advance(HANDSHAKE_TIMEOUT_S - 1)
    assert not b.transport.is_aborted
    worker.clock.advance(2)
    assert b.transport.is_aborted
    b.leaves()
    assert b.client not in worker.hub.live


def test_client_that_is_turned_back_gives_its_place_in_the_line_up() -> None:
    worker = Worker()
    a, b, d = worker.connect("abd")
    worker.marks()
    b.client.turn_back(1.0)
    assert_turned_back(b, retry_after_s=1)
    a.is_answered()
    assert d.state == ASKING


def test_client_that_waits_when_the_worker_ends_is_told_so() -> None:
    worker = Worker()
    _, b = worker.connect("ab")
    worker.hub.refusing = True
    b.client.turn_back(1.0)
    assert_turned_back(b, retry_after_s=1)
    assert b.transport.written.endswith(b"\r\n\r\nthe gateway is shutting down\n")


def test_nobody_comes_in_when_the_worker_ends() -> None:
    worker = Worker()
    worker.hub.refusing = True
    late = worker.connects("a")
    assert_turned_back(late, retry_after_s=1)
    assert late.transport.written.endswith(b"\r\n\r\nthe gateway is shutting down\n")
    assert worker.registry.announced == []


def test_slow_request_is_cut_off() -> None:
    worker = Worker()
    slow = Client(worker.hub)
    transport = Transport()
    slow.connection_made(cast(Any, transport))
    worker.clock.advance(HANDSHAKE_TIMEOUT_S - 1)
    slow.data_received(b"GET /a HT")
    assert slow.state == HANDSHAKE
    worker.clock.advance(2)
    assert transport.is_aborted
    assert worker.connects("b").state == ASKING


# The API's answer.


@pytest.mark.parametrize(("line", "allowed"), [("X-Other: a", False), ("Ws2api-Retry: safe", True)])
def test_api_says_whether_messages_may_come_twice(line: str, allowed: bool) -> None:
    worker = Worker()
    me = worker.connects("a")
    worker.marks()
    assert not me.client.retry_safe
    me.is_answered(200, b"ok", line)
    assert me.state == CLAIMING
    assert me.client.retry_safe == allowed


def test_accepted_client_is_welcome() -> None:
    worker = Worker()
    me = worker.connects("a")
    worker.marks()
    me.is_answered()
    assert worker.registry.claimed == [b"a"]
    me.is_claimed()
    assert me.state == OPEN
    assert me.status == 101
    assert worker.hub.clients == {b"a": me.client}
    assert worker.hub.connecting == {}


def test_refused_client_is_withdrawn() -> None:
    worker = Worker()
    me = worker.connects("a")
    worker.marks()
    me.is_answered(403, b"no")
    assert me.status == 403
    assert worker.registry.withdrawn == [(b"a", 17)]
    assert worker.hub.connecting == {}


def test_refused_client_leaves_a_newer_connect_alone() -> None:
    worker = Worker(limit=2)
    older, newer = worker.connects("a"), worker.connects("a")
    worker.marks()
    assert worker.hub.connecting == {b"a": newer.client}
    older.is_answered(403, b"no")
    assert worker.hub.connecting == {b"a": newer.client}
    assert worker.registry.withdrawn == [(b"a", 17)]


def test_who_comes_in_while_the_worker_ends_is_sent_away() -> None:
    worker = Worker()
    me = worker.connects("a")
    worker.marks()
    worker.hub.farewell = 1012, "service restart"
    me.is_answered()
    me.is_claimed()
    assert me.status == 101
    assert me.transport.written.endswith(b"\x88\x11\x03\xf4service restart")
    assert worker.registry.released == [b"a"]


def test_who_was_given_up_while_the_api_decided_is_sent_away() -> None:
    worker = Worker()
    me = worker.connects("a")
    worker.marks()
    me.client.give_up()
    me.is_answered()
    me.is_claimed()
    assert me.status == 101
    assert me.transport.written.endswith(b"\x88\x11\x03\xf4service restart")
    assert worker.hub.clients == {}
    assert worker.registry.released == [b"a"], "the API has said yes, and must hear of the end"
