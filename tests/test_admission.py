"""Lead clients to the gate, past the API and in, without a socket, an API or Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import structlog
from harness.looping import Clock
from structlog.testing import capture_logs
from ws2api.gateway import causes
from ws2api.gateway import counters as c
from ws2api.gateway.address_limit import AddressLimit, AddressTable
from ws2api.gateway.client import Client
from ws2api.gateway.counters import Counters
from ws2api.gateway.errors import ApiTimeout, ApiUnreachable
from ws2api.gateway.exchange import Exchange
from ws2api.gateway.gate import Gate
from ws2api.gateway.handshake import HandshakePolicy
from ws2api.gateway.http_wire import ReplyReader, RequestEncoder
from ws2api.gateway.hub import Hub
from ws2api.gateway.journal import Journal
from ws2api.gateway.recent import ErrorRecord, Recent
from ws2api.gateway.session import ASKING, CLAIMING, CLOSED, HANDSHAKE, OPEN, WAITING
from ws2api.gateway.settings import Settings
from ws2api.gateway.sweeper import Sweeper

HANDSHAKE_TIMEOUT_S = 10.0
WRITE_TIMEOUT_S = 30.0
API_URL = "http://127.0.0.1:1/"
PEER = "192.0.2.7"
PROXY = "10.1.2.3"


class Transport:
    """Be a socket that takes everything."""

    def __init__(self, peer: str | None = PEER) -> None:
        self._peer = peer
        self.written = b""
        self.is_aborted = False
        self.has_ended = False
        self.unsent = 0

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

    def get_extra_info(self, name: str) -> tuple[str, int] | None:
        assert name == "peername"
        return (self._peer, 4711) if self._peer is not None else None

    def set_protocol(self, protocol: object) -> None:
        """Serve somebody else from now on."""

    def get_write_buffer_size(self) -> int:
        return self.unsent

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

    def __init__(
        self,
        limit: int = 1,
        *,
        redis_is_away: bool = False,
        per_address: int = 0,
        table: AddressTable | None = None,
        single_port: bool = False,
    ) -> None:
        settings = Settings(workers=1, api=API_URL, trusted_proxy=("10.0.0.0/8",))
        self.clock = Clock()
        self.slot = Counters(1).bank(0, 0)
        self.table = table or AddressTable(1)
        self.handed_over: list[bytes] = []
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
            write_timeout_s=WRITE_TIMEOUT_S,
            reroute=lambda ask: None,
            most_clients=1000,
            most_refused=16,
            serve_http=(lambda _, data: self.handed_over.append(data)) if single_port else None,
            call_soon=lambda callback: None,
            journal=Journal(
                self.slot, sweeper, recent.closes(0, 0), recent.errors(0, 0), logs_connections=False
            ),
            limit=AddressLimit(per_address, self.table, 0, 0) if per_address else None,
        )
        self._recent = recent

    @property
    def asked(self) -> str:
        """Whom the API was asked about so far, one letter each."""
        return "".join(
            cast(Client, each.owner).client_id.decode() for each in self.upstream.exchanges
        )

    @property
    def errors(self) -> list[str]:
        """What the operator can look up, the cause in front."""
        records = map(ErrorRecord.decode, self._recent.errors(0, 0).read())
        return [f"{record.cause}: {record.text}" for record in records]

    @property
    def refused(self) -> dict[str, int]:
        """Count the refused handshakes by status, without those of which there are none."""
        counts = {status: self.slot[i] for status, i in c.HANDSHAKES_REFUSED.items()}
        return {status: count for status, count in counts.items() if count}

    def counted(self, address: str = PEER) -> int:
        """Count the connections of an address."""
        return self.table.count(self.table.cells(address))

    def connects(self, name: str, **options: Any) -> Connection:
        return Connection(self, name, **options)

    def connect(self, names: str) -> list[Connection]:
        return [self.connects(name) for name in names]

    def marks(self) -> None:
        """Let Redis mark what was announced."""
        announced, self.registry.announced = self.registry.announced, []
        for number, (_, client) in enumerate(announced):
            client.on_announced(17 + number)


class Connection:
    """Be a client that has sent its request.

    Args:
        peer: address of the other end; None when it has gone already.
        behind: what a proxy says of where the client comes from.
        asks: whether the request is sent at once.
    """

    def __init__(
        self,
        worker: Worker,
        name: str,
        *,
        peer: str | None = PEER,
        behind: str = "",
        asks: bool = True,
    ) -> None:
        self._worker = worker
        self._request = (
            f"GET /{name} HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            + (f"X-Forwarded-For: {behind}\r\n" if behind else "")
            + "\r\n"
        )
        self.transport = Transport(peer)
        self.client = Client(worker.hub)
        self.client.connection_made(cast(Any, self.transport))
        if asks:
            self.asks()

    def asks(self) -> None:
        """Send the request."""
        self.sends(self._request)

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

    def comes_in(self) -> None:
        """Have everybody agree, up to the 101."""
        self._worker.marks()
        self.is_answered()
        self.is_claimed()
        assert self.status == 101

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


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    """Catch what is logged, whatever the level."""
    former = structlog.get_config()
    structlog.reset_defaults()
    with capture_logs() as lines:
        yield lines
    structlog.configure(**former)


@pytest.mark.parametrize("status", [200, 401, 404, 429])
def test_refusal_of_the_api_leaves_a_line(lines: list[Any], status: int) -> None:
    worker = Worker()
    me = worker.connects("a", peer="10.0.0.1", behind="192.0.2.9")
    worker.marks()
    me.is_answered(status, b"no, and private")
    (line,) = lines
    assert line == {
        "event": "connect refused",
        "log_level": "info",
        "client": "a",
        "status": 403 if status == 200 else status,
        "reason": "the API said no",
        "remote": "192.0.2.9",
    }


def test_refusal_of_the_gateway_leaves_a_line(lines: list[Any]) -> None:
    me = Worker().connects("a/b")
    (line,) = lines
    assert (line["client"], line["status"], line["remote"]) == ("", me.status, PEER)
    assert line["reason"] == "the path must be one segment, the client id"


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


def test_who_comes_in_after_all_was_left_to_the_reapers_is_left_to_them_too() -> None:
    worker = Worker()
    me = worker.connects("a")
    worker.marks()
    worker.hub.farewell = 1001, "going away"
    me.is_answered()
    worker.hub.is_over = True
    me.is_claimed()
    assert me.transport.written.endswith(b"\x88\x0c\x03\xe9going away")
    assert worker.registry.released == [], "it would be entered where nobody looks any more"
    assert me.state == CLOSED
    assert worker.asked == "a", "only of the connect"


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


# What the metrics and the log say.


def openings(worker: Worker) -> int:
    return sum(worker.slot[c.OPENING_TIME.first : c.OPENING_TIME.sum_index])


def test_time_to_the_101_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ns = [10**15]
    monkeypatch.setattr("time.monotonic_ns", lambda: now_ns[0])
    worker = Worker()
    me = worker.connects("a", asks=False)
    now_ns[0] += 30_000_000  # the slowness of the client is a part of it
    me.asks()
    now_ns[0] += 10_000_000
    assert openings(worker) == 0
    me.comes_in()
    assert openings(worker) == 1
    assert worker.slot[c.OPENING_TIME.sum_index] == 40_000
    me.leaves()
    assert openings(worker) == 1


@pytest.mark.parametrize("decide", DECISIONS[1:])
def test_time_of_who_gets_no_101_is_not_taken(decide: Decision) -> None:
    worker = Worker()
    me = worker.connects("a")
    worker.marks()
    decide(me)
    me.is_claimed()
    me.leaves()
    assert openings(worker) == 0


@pytest.mark.parametrize(
    ("status", "body", "counted"),
    [
        *((200, b"no", "403"), (401, b"", "401"), (403, b"", "403"), (404, b"", "404")),
        *((409, b"", "409"), (429, b"", "429"), (500, b"", "502"), (418, b"", "502")),
    ],
)
def test_refusal_is_counted_by_its_status(status: int, body: bytes, counted: str) -> None:
    worker = Worker()
    me = worker.connects("a")
    worker.marks()
    me.is_answered(status, body)
    assert worker.refused == {counted: 1}
    assert me.status == int(counted)
    me.leaves()
    assert worker.refused == {counted: 1}


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", "426"),
        ("no HTTP\r\n\r\n", "400"),
        (f"GET /{'a' * 9000} HTTP/1.1\r\n", "431"),
    ],
)
def test_request_that_is_none_is_counted_by_its_status(request_: str, status: str) -> None:
    worker = Worker()
    me = worker.connects("a", asks=False)
    me.sends(request_)
    assert worker.refused == {status: 1}
    assert not worker.errors, "it is no fault of the API"


@pytest.mark.parametrize(
    ("decide", "error"),
    [
        (lambda it: it.is_answered(500, b"no"), "status: connect refused: status 500"),
        (
            lambda it: it.is_answered(200, b"ok", "Sec-WebSocket-Protocol: never-offered"),
            "invalid_reply: connect refused: "
            "the API chose a subprotocol that the client did not offer",
        ),
    ],
)
def test_what_the_api_says_of_itself_is_told_to_the_operator(decide: Decision, error: str) -> None:
    worker = Worker()
    me = worker.connects("a")
    worker.marks()
    decide(me)
    assert worker.errors == [error]
    assert worker.slot[c.ERRORS[error.partition(":")[0]]] == 1
    assert sum(worker.slot[index] for index in c.ERRORS.values()) == 1


@pytest.mark.parametrize("status", [200, 401, 403, 404, 409, 429])
def test_what_the_api_says_of_the_client_is_no_error(status: int) -> None:
    worker = Worker()
    me = worker.connects("a")
    worker.marks()
    me.is_answered(status, b"no")
    assert not worker.errors
    assert not any(worker.slot[index] for index in c.ERRORS.values())


def test_connect_without_an_answer_is_an_error() -> None:
    worker = Worker()
    me = worker.connects("a")
    worker.marks()
    me._exchange.attempts = 1
    me.times_out()
    assert worker.slot[c.ERRORS[causes.TIMEOUT]] == 1
    assert worker.errors == [
        "timeout: the API did not take a connect: the API did not answer in time"
    ]


def test_connect_that_was_never_sent_is_counted_and_not_told_one_by_one() -> None:
    worker = Worker()
    me = worker.connects("a")
    worker.marks()
    me.client.on_failure(me._exchange, ApiUnreachable("the API is unreachable"))
    assert worker.slot[c.ERRORS[causes.UNREACHABLE]] == 1
    assert not worker.errors


def test_client_that_left_the_line_to_the_api_is_no_error_of_the_api() -> None:
    worker = Worker()
    me = worker.connects("a")
    worker.marks()
    me.leaves()
    me.client.on_failure(me._exchange, ApiUnreachable("the client has left"))
    assert not any(worker.slot[index] for index in c.ERRORS.values())
    assert not worker.errors


# So many that files could run out.


class Door:
    """Be where clients come in."""

    is_shut = False

    def shut(self) -> None:
        self.is_shut = True

    def reopen(self) -> None:
        self.is_shut = False


def full() -> tuple[Worker, Door]:
    """Have room for one client, and for four that are refused at a time."""
    worker, door = Worker(limit=9), Door()
    worker.hub.most_clients, worker.hub.most_refused = 1, 4
    worker.hub.door = cast(Any, door)
    worker.connects("a").comes_in()
    return worker, door


def test_who_finds_no_file_is_told_so_whatever_the_crowd() -> None:
    worker, door = full()
    refused = [worker.connects("b", asks=False) for _ in range(4)]
    for each in refused:
        assert each.status == 503
        assert "\r\nRetry-After: 1" in each.answer
        assert each.transport.has_ended
        assert not each.transport.is_aborted
    assert door.is_shut, "the next would be one too many: it waits"


def test_others_are_let_in_when_half_of_the_refused_have_gone() -> None:
    worker, door = full()
    refused = [worker.connects("b") for _ in range(4)]
    refused[0].leaves()
    assert door.is_shut
    refused[1].leaves()
    assert not door.is_shut


def test_door_is_opened_at_a_tick_if_nothing_else_does() -> None:
    worker, door = full()
    door.shut()
    worker.hub.let_in(worker.clock.now)
    assert not door.is_shut


def test_who_does_not_take_a_refusal_at_the_door_is_dropped_soon() -> None:
    worker, _ = full()
    me = worker.connects("b", asks=False)
    me.client.on_tick(worker.clock.now + 1.9)
    assert not me.transport.is_aborted
    me.client.on_tick(worker.clock.now + 2.1)
    assert me.transport.is_aborted


# So many of one address.


def assert_one_too_many(connection: Connection) -> None:
    assert connection.state == CLOSED
    assert connection.status == 429
    assert "\r\nRetry-After: 1" in connection.answer
    assert connection.transport.written.endswith(
        b"\r\n\r\ntoo many connections from this address\n"
    )
    assert connection.transport.has_ended


def test_connection_too_many_is_refused_before_it_has_said_anything() -> None:
    worker = Worker(limit=9, per_address=2)
    worker.connect("ab")
    third = worker.connects("c", asks=False)
    assert_one_too_many(third)
    third.asks()
    worker.marks()
    assert worker.asked == "ab"
    assert worker.slot[c.CONNECTIONS_LIMITED] == 1
    assert worker.refused == {"429": 1}
    assert worker.connects("d", peer="192.0.2.8").state == ASKING


def test_place_is_free_when_the_connection_has_ended() -> None:
    worker = Worker(limit=9, per_address=1)
    first = worker.connects("a")
    first.comes_in()
    assert_one_too_many(refused := worker.connects("b"))
    refused.leaves()
    first.leaves()
    assert worker.counted() == 0
    worker.connects("c").comes_in()


@pytest.mark.parametrize("decide", DECISIONS)
def test_every_end_of_a_connect_frees_the_place(decide: Decision) -> None:
    worker = Worker(limit=9, per_address=1)
    for name in "abc":
        me = worker.connects(name)
        worker.marks()
        decide(me)
        me.is_claimed()
        assert worker.counted() == 1
        me.leaves()
        assert worker.counted() == 0


def test_who_only_opens_connections_counts() -> None:
    worker = Worker(per_address=2)
    idle = [worker.connects("a", asks=False) for _ in range(2)]
    assert_one_too_many(worker.connects("b"))
    for each in idle:
        each.leaves()
    assert worker.counted() == 1


def test_refused_connection_counts_until_it_is_closed() -> None:
    worker = Worker(per_address=1)
    first = worker.connects("a")
    refused = worker.connects("b")
    first.leaves()
    assert_one_too_many(worker.connects("c"))
    worker.clock.advance(HANDSHAKE_TIMEOUT_S + 1)
    assert refused.transport.is_aborted, "it cannot be held open for ever"


def test_flood_is_not_answered() -> None:
    worker = Worker(per_address=2)
    worker.connect("abcd")
    fifth = worker.connects("e", asks=False)
    assert fifth.transport.is_aborted
    assert fifth.transport.written == b""
    assert worker.slot[c.CONNECTIONS_LIMITED] == 3
    fifth.leaves()
    assert fifth.client not in worker.hub.live
    assert worker.counted() == 4


def test_clients_of_a_proxy_are_told_apart() -> None:
    worker = Worker(limit=99, per_address=1)
    behind = [f"198.51.100.{number}" for number in range(1, 6)]
    for address in behind:
        assert worker.connects("a", peer=PROXY, behind=address).state == ASKING
    again = worker.connects("b", peer=PROXY, behind=f"{behind[2]}:4711")
    assert_one_too_many(again)
    assert worker.counted(PROXY) == 0
    again.leaves()
    assert worker.counted(behind[2]) == 1


def test_claims_of_a_client_change_nothing() -> None:
    worker = Worker(limit=99, per_address=1)
    assert worker.connects("a", behind="198.51.100.1").state == ASKING
    assert_one_too_many(worker.connects("b", behind="198.51.100.2"))
    spoofed = worker.connects("c", peer=PROXY, behind="198.51.100.9, 203.0.113.5")
    assert spoofed.state == ASKING
    assert_one_too_many(worker.connects("d", peer=PROXY, behind="198.51.100.8, 203.0.113.5"))


def test_flood_behind_a_proxy_is_not_answered() -> None:
    worker = Worker(limit=99, per_address=1)
    for _ in range(2):
        worker.connects("a", peer=PROXY, behind="198.51.100.1")
    third = worker.connects("b", peer=PROXY, behind="198.51.100.1")
    assert third.transport.is_aborted
    assert third.transport.written == b""
    third.leaves()
    assert third.state == CLOSED


def test_proxy_itself_is_not_limited() -> None:
    worker = Worker(limit=99, per_address=1)
    checks = [worker.connects("a", peer=PROXY, asks=False) for _ in range(5)]
    assert not any(each.transport.written for each in checks)
    assert [worker.connects("b", peer=PROXY).state for _ in range(3)] == [ASKING] * 3


def test_who_has_gone_before_it_was_accepted_hinders_nobody() -> None:
    worker = Worker(per_address=1)
    ghosts = [worker.connects("a", peer=None, asks=False) for _ in range(2)]
    assert worker.connects("b").state == ASKING
    for ghost in ghosts:
        ghost.leaves()
    assert sum(worker.table._words[: worker.table._end]) == len(worker.table.cells(PEER))


def test_request_that_is_handed_to_the_push_side_counts_no_longer() -> None:
    worker = Worker(per_address=1, single_port=True)
    request = "GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    for _ in range(3):
        api = worker.connects("-", asks=False)
        assert worker.counted() == 1
        api.sends(request)
        assert worker.counted() == 0
    assert worker.handed_over == [request.encode()] * 3
    assert worker.connects("a").state == ASKING


@pytest.mark.parametrize(
    "request_",
    [
        "POST /a HTTP/1.0\r\nContent-Length: 2\r\n\r\nhi",
        "POST http://gateway.example/a HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi",
        "POST /a HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n"
        "Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    ],
    ids=["old", "absolute", "offers-http2"],
)
def test_pushes_of_any_kind_are_handed_over_on_a_single_port(request_: str) -> None:
    worker = Worker(single_port=True)
    worker.connects("-", asks=False).sends(request_)
    assert worker.handed_over == [request_.encode()]
    api = Worker().connects("-", asks=False)
    api.sends(request_)
    assert b"HTTP/1.1 4" in api.transport.written


def test_workers_count_together() -> None:
    table = AddressTable(1)
    one, other = Worker(per_address=2, table=table), Worker(per_address=2, table=table)
    other.hub.limit = AddressLimit(2, table, 0, 1)
    first = one.connects("a")
    other.connects("b")
    assert_one_too_many(other.connects("c"))
    first.leaves()
    assert other.counted() == 2


# Clients that do not read.


def slow(worker: Worker) -> tuple[int, int]:
    return worker.slot[c.CLIENTS_SLOW], worker.slot[c.WRITE_BUFFER_BYTES]


def look(worker: Worker) -> tuple[int, int]:
    worker.hub.drop_slow(worker.clock.now)
    return slow(worker)


def test_slow_clients_and_what_waits_for_them_are_shown() -> None:
    worker = Worker(limit=9)
    a, b = worker.connect("ab")
    worker.marks()
    for each in (a, b):
        each.is_answered()
        each.is_claimed()
    assert look(worker) == (0, 0)
    a.transport.unsent, b.transport.unsent = 300_000, 400_000
    a.client.pause_writing()
    assert look(worker) == (1, 300_000)
    assert worker.slot[c.CLIENTS_PAUSED] == 1
    b.client.pause_writing()
    a.transport.unsent = 200_000
    assert look(worker) == (2, 600_000)
    a.client.resume_writing()
    assert look(worker) == (1, 400_000)
    b.leaves()
    assert look(worker) == (0, 0)
    assert worker.slot[c.CLIENTS_PAUSED] == 0


def test_client_that_reads_nothing_is_closed_as_too_slow_and_shown_until_it_has_gone() -> None:
    worker = Worker()
    me = worker.connects("a")
    me.comes_in()
    me.transport.unsent = 300_000
    me.client.pause_writing()
    worker.clock.advance(WRITE_TIMEOUT_S + 1)
    assert look(worker) == (1, 300_000)
    assert me.client.close_code == 1008
    assert worker.slot[c.CLOSES[causes.TOO_SLOW, "1008"]] == 1
    worker.clock.advance(WRITE_TIMEOUT_S + 1)
    look(worker)
    assert me.transport.is_aborted
    me.leaves()
    assert look(worker) == (0, 0)
    assert worker.slot[c.CLIENTS_PAUSED] == 0
    assert sum(worker.slot[index] for index in c.CLOSES.values()) == 1


# What the client breaks.


@pytest.mark.parametrize("when", ["at once", "when reading goes on"])
def test_protocol_error_is_counted_once_whenever_it_is_seen(when: str) -> None:
    worker = Worker()
    me = worker.connects("a")
    me.comes_in()
    unmasked = b"\x81\x01a"
    if when == "at once":
        me.client.data_received(unmasked)
    else:
        # In flight, then in the queue up to its bound, so that the rest is not looked at.
        me.client.data_received(b"\x81\x81\0\0\0\0a" * 5 + unmasked)
        assert not me.client.wants_messages
        me.client.on_reply(worker.upstream.exchanges[-1], reply(200, b""))
        me.client.on_reply(worker.upstream.exchanges[-1], reply(200, b""))
        me.client.on_reply(worker.upstream.exchanges[-1], reply(200, b""))
    assert worker.slot[c.PROTOCOL_ERRORS] == 1
    me.leaves()
    assert worker.slot[c.PROTOCOL_ERRORS] == worker.slot[c.CLOSES[causes.PROTOCOL, "1002"]] == 1


def test_protocol_error_that_is_seen_after_the_socket_has_ended_is_counted() -> None:
    worker = Worker()
    me = worker.connects("a")
    me.comes_in()
    # More events than are taken at once: the rest waits for the next turn of the loop.
    me.client.data_received(b"\x8a\x80\0\0\0\0" * 300 + b"\x81\x01a")
    assert me.client.state == OPEN
    me.leaves()
    assert worker.slot[c.PROTOCOL_ERRORS] == worker.slot[c.CLOSES[causes.PROTOCOL, "1002"]] == 1
