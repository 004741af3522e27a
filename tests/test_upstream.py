"""Send exchanges to an API on loopback whose every answer, and every hour, is up to the test."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, NamedTuple, cast

import pytest
import uvloop
from ws2api.gateway import counters as c
from ws2api.gateway.counters import Counters
from ws2api.gateway.errors import (
    ApiDisconnected,
    ApiError,
    ApiReplyInvalid,
    ApiTimeout,
    ApiUnreachable,
)
from ws2api.gateway.exchange import CONNECT, DISCONNECT, MESSAGE, Exchange
from ws2api.gateway.http_wire import ReplyReader
from ws2api.gateway.settings import Settings
from ws2api.gateway.sweeper import Sweeper
from ws2api.gateway.upstream import Upstream

DEADLINE_S = 10.0
API_TIMEOUT_S = 10.0
IDLE_LIMIT_S = 50.0
TICK_S = 0.1
# Longer than the longest wait between two attempts of a message.
LONGEST_BACKOFF_S = 2.0
MAX_REPLY_BYTES = 1000

METHODS = {CONNECT: "GET", MESSAGE: "POST", DISCONNECT: "DELETE"}

Test = Callable[..., Coroutine[Any, Any, None]]


def in_loop(test: Test) -> Callable[..., None]:
    """Run a test inside a loop, in time, and let no exception get lost there."""

    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        complaints: list[dict[str, Any]] = []

        async def main() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: complaints.append(context))
            async with asyncio.timeout(DEADLINE_S):
                await test(*args, **kwargs)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
        assert not complaints

    return run


class Clock:
    """Be the loop that a sweeper sees: time goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._tick: Callable[[], None] | None = None

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> None:
        self._tick = callback

    def advance(self, seconds: float) -> None:
        """Let time go by, one tick after the other."""
        assert self._tick is not None
        for _ in range(round(seconds / TICK_S)):
            self.now += TICK_S
            self._tick()


# The API.


class Arrived:
    """Be a request that has arrived at the API and waits for its answer."""

    def __init__(self, connection: ApiSide, method: str, target: str, body: bytes) -> None:
        self._connection = connection
        self.number = connection.number
        self.method = method
        self.name = target[1:]
        self.body = body

    def answers(self, status: int = 200, body: bytes = b"", *lines: str) -> None:
        length = [] if status == 204 else [f"Content-Length: {len(body)}"]
        head = [f"HTTP/1.1 {status} Whatever", *length, *lines, "", ""]
        self.sends("\r\n".join(head).encode() + body)

    def sends(self, wire: bytes) -> None:
        self._connection.transport.write(wire)

    def hangs_up(self) -> None:
        self._connection.transport.close()

    async def is_given_up(self) -> None:
        """Wait until the gateway has closed the connection."""
        await self._connection.lost.wait()


class ApiSide(asyncio.Protocol):
    """Read requests from one connection of the gateway."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._buffer = b""
        self.transport: Any = None
        self.lost = asyncio.Event()
        self.number = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.number = len(self._api.connections)
        self._api.connections.append(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            head, _, rest = self._buffer.partition(b"\r\n\r\n")
            length = re.search(rb"Content-Length: (\d+)", head)
            size = int(length[1]) if length else 0
            if len(rest) < size:
                return
            self._buffer = rest[size:]
            method, target, _ = head.decode().split("\r\n")[0].split(" ")
            self._api.takes(Arrived(self, method, target, rest[:size]))

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


class Api:
    """Listen on a port of its own, which stays reserved while nobody listens."""

    def __init__(self) -> None:
        self.connections: list[ApiSide] = []
        self._arrived: asyncio.Queue[Arrived] = asyncio.Queue()
        self._server: asyncio.AbstractServer | None = None
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: ApiSide(self), sock=self._socket.dup())

    async def close(self) -> None:
        """End every connection and refuse new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        for connection in self.connections:
            connection.transport.abort()
            await connection.lost.wait()

    async def end(self) -> None:
        await self.close()
        self._socket.close()

    def takes(self, request: Arrived) -> None:
        if request.method == "PROBE":
            request.answers()
        else:
            self._arrived.put_nowait(request)

    async def next(self) -> Arrived:
        """Wait for the next request."""
        return await self._arrived.get()

    def has_more(self) -> bool:
        """Tell whether a request has arrived that was not taken yet."""
        return not self._arrived.empty()

    async def nothing_more_arrives(self) -> None:
        """Check that no request is under way: one sent now would overtake it."""
        for _ in range(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(b"PROBE / HTTP/1.1\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            writer.close()
            await writer.wait_closed()
            await self.connections.pop().lost.wait()
        assert self._arrived.empty()


# The gateway.


class Reply(NamedTuple):
    """Note what an owner saw of a reply."""

    status: int
    body: bytes
    headers: list[tuple[bytes, bytes]]


class Sent:
    """Be the owner of one exchange, and wait for its outcome."""

    def __init__(self, event: int, name: str) -> None:
        assert " " not in name
        wire = f"{METHODS[event]} /{name} HTTP/1.1\r\nHost: api\r\nContent-Length: 0\r\n\r\n"
        self.exchange = Exchange(self, event, wire.encode())
        self._outcome: asyncio.Future[Reply | ApiError] = asyncio.Future()
        self.then: Callable[[], None] = lambda: None

    def on_reply(self, exchange: Exchange, reply: ReplyReader) -> None:
        assert exchange is self.exchange
        self._outcome.set_result(Reply(reply.status, reply.body, list(reply.headers)))
        self.then()

    def on_failure(self, exchange: Exchange, error: ApiError) -> None:
        assert exchange is self.exchange
        self._outcome.set_result(error)
        self.then()

    @property
    def is_done(self) -> bool:
        return self._outcome.done()

    async def is_done_or(self, condition: Callable[[], bool]) -> None:
        """Wait for the outcome, or for something else if that is earlier."""
        while not self.is_done and not condition():
            await asyncio.sleep(0)

    async def reply(self) -> Reply:
        outcome = await self._outcome
        assert isinstance(outcome, Reply), outcome
        return outcome

    async def is_answered(self, status: int = 200, body: bytes = b"") -> None:
        assert (await self.reply())[:2] == (status, body)

    async def fails(self, error: type[ApiError]) -> None:
        assert type(await self._outcome) is error


class Gateway:
    """Hold an upstream with its clock and its API."""

    def __init__(self, api: Api, options: dict[str, Any]) -> None:
        self.api = api
        self.clock = Clock()
        self.slot = Counters(1).bank(0, 0)
        sweeper = Sweeper(cast(Any, self.clock))
        values = {
            "workers": 1,
            "api": f"http://127.0.0.1:{api.port}/",
            "api_timeout": API_TIMEOUT_S,
            "max_message_size": MAX_REPLY_BYTES,
        }
        settings = Settings(**{**values, **options})  # type: ignore[arg-type]
        loop = asyncio.get_running_loop()
        self.upstream = Upstream(settings, self.slot, sweeper, loop, None)
        sweeper.start()
        self.sent: list[Sent] = []

    def submits(self, event: int, name: str) -> Sent:
        sent = Sent(event, name)
        self.upstream.submit(sent.exchange)
        assert not sent.is_done, "called back before submit returned"
        self.sent.append(sent)
        return sent

    def connects(self, name: str = "c") -> Sent:
        return self.submits(CONNECT, name)

    def posts(self, name: str = "m") -> Sent:
        return self.submits(MESSAGE, name)

    def reports(self, name: str = "d") -> Sent:
        return self.submits(DISCONNECT, name)

    async def exchanges(self, name: str = "m", *lines: str) -> Arrived:
        """Post one message and have it answered; return what the API saw of it."""
        sent = self.posts(name)
        request = await self.api.next()
        request.answers(200, b"", *lines)
        await sent.is_answered()
        return request

    async def warms_up(self, count: int) -> list[int]:
        """Make so many connections idle; return their numbers, the one used last at the end."""
        sent = [self.posts(f"warm{i}") for i in range(count)]
        requests = [await self.api.next() for _ in sent]
        for request in requests:
            request.answers()
            await sent[int(request.name.removeprefix("warm"))].is_answered()
        return [request.number for request in requests]

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def shows(self, **counts: int) -> bool:
        """Tell whether the repr says so."""
        shown = dict(re.findall(r"(\w+)=(\d+)", repr(self.upstream)))
        return all(int(shown[name]) == count for name, count in counts.items())

    async def tries_again(self) -> Arrived:
        """Let time go by until the next attempt arrives."""
        await self.comes_to_show(connecting=0)
        while self.shows(connections=0) or self.shows(connections=1, idle=1):
            self.advance(TICK_S)
            await self.comes_to_show(connecting=0)
        return await self.api.next()

    async def comes_to_show(self, **counts: int) -> None:
        """Wait until the repr says so."""
        while not self.shows(**counts):
            await asyncio.sleep(0)

    def assert_books_are_kept(self) -> None:
        slot = self.slot
        finished = slot[c.REQUESTS_SUCCEEDED] + slot[c.REQUESTS_FAILED]
        assert slot[c.REQUESTS_STARTED] == len(self.sent)
        assert finished == sum(sent.is_done for sent in self.sent)


@contextlib.asynccontextmanager
async def gateway(*, listens: bool = True, **options: Any) -> AsyncIterator[Gateway]:
    api = Api()
    if listens:
        await api.open()
    gateway = Gateway(api, options)
    try:
        yield gateway
        gateway.assert_books_are_kept()
    finally:
        await gateway.upstream.close()
        await api.end()


# One exchange.


@in_loop
async def test_sends_a_request_and_passes_the_answer_on() -> None:
    async with gateway() as gw:
        sent = gw.posts("a%20b")
        request = await gw.api.next()
        assert (request.method, request.name) == ("POST", "a%20b")
        request.answers(200, b"answer")
        await sent.is_answered(200, b"answer")
        assert gw.slot[c.REQUESTS_SUCCEEDED] == 1
        assert gw.slot[c.API_CONNECTIONS] == 1


@pytest.mark.parametrize(
    ("event", "status", "is_success"),
    [
        (CONNECT, 200, True),
        (CONNECT, 204, False),
        (CONNECT, 403, False),
        (CONNECT, 503, False),
        (MESSAGE, 200, True),
        (MESSAGE, 204, True),
        (MESSAGE, 201, False),
        (MESSAGE, 404, False),
        (MESSAGE, 500, False),
        (DISCONNECT, 200, True),
        (DISCONNECT, 204, True),
        (DISCONNECT, 299, True),
    ],
)
@in_loop
async def test_counts_success_as_the_contract_has_it(
    event: int, status: int, is_success: bool
) -> None:
    async with gateway() as gw:
        sent = gw.submits(event, "a")
        (await gw.api.next()).answers(status)
        await sent.is_answered(status)
        assert gw.slot[c.REQUESTS_SUCCEEDED] == is_success
        assert gw.slot[c.REQUESTS_RETRIED] == 0


@in_loop
async def test_reply_in_pieces() -> None:
    async with gateway() as gw:
        sent = gw.posts()
        request = await gw.api.next()
        for piece in (b"HTTP/1.1 200 OK\r\nContent-Le", b"ngth: 4\r\n\r\n12", b"34"):
            assert not sent.is_done
            request.sends(piece)
            await gw.api.nothing_more_arrives()
        await sent.is_answered(200, b"1234")


@in_loop
async def test_only_a_connect_wants_the_headers() -> None:
    async with gateway(api_max_connections=1) as gw:
        connect, message = gw.connects(), gw.posts()
        (await gw.api.next()).answers(200, b"ok", "Set-Cookie: a=b")
        assert (b"set-cookie", b"a=b") in (await connect.reply()).headers
        (await gw.api.next()).answers(200, b"", "Set-Cookie: a=b")
        assert (await message.reply()).headers == []


# The pool.


@in_loop
async def test_connection_is_used_again() -> None:
    async with gateway() as gw:
        assert (await gw.exchanges()).number == (await gw.exchanges()).number == 0
        assert gw.shows(connections=1, idle=1)


@in_loop
async def test_connection_used_last_is_used_first() -> None:
    async with gateway() as gw:
        numbers = await gw.warms_up(3)
        assert gw.shows(connections=3, idle=3)
        for number in reversed(numbers):
            gw.posts()
            assert (await gw.api.next()).number == number


@in_loop
async def test_owner_may_send_the_next_from_within_the_answer() -> None:
    async with gateway() as gw:
        first = gw.posts("first")
        first.then = lambda: gw.posts("second") and None
        (await gw.api.next()).answers()
        second = await gw.api.next()
        assert (second.name, second.number) == ("second", 0)
        second.answers()
        await gw.sent[1].is_answered()


@pytest.mark.parametrize(
    "limits", [{"api_max_connections": 2}, {"api_max_connections": 9, "workers": 4}]
)
@in_loop
async def test_no_more_connections_than_allowed(limits: dict[str, int]) -> None:
    async with gateway(**limits) as gw:
        sent = [gw.posts(f"{i}") for i in range(6)]
        requests = [await gw.api.next() for _ in range(2)]
        await gw.api.nothing_more_arrives()
        assert gw.shows(connections=2, idle=0, queued=4)
        assert gw.upstream.unfinished == 6
        for i in range(2, 6):
            request = requests.pop(0)
            request.answers()
            requests.append(await gw.api.next())
            assert requests[-1].name == f"{i}", "first come, first served"
            assert requests[-1].number == request.number
        for request in requests:
            request.answers()
        for each in sent:
            await each.is_answered()
        assert gw.upstream.unfinished == 0
        assert len(gw.api.connections) == 2


@in_loop
async def test_one_connection_is_allowed_even_to_one_of_many_workers() -> None:
    async with gateway(api_max_connections=1, workers=8) as gw:
        await gw.exchanges()


@in_loop
async def test_answer_is_whole_though_its_connection_serves_the_next_already() -> None:
    async with gateway(api_max_connections=1) as gw:
        first, second = gw.posts("first"), gw.posts("second")
        (await gw.api.next()).answers(200, b"to the first")
        await first.is_answered(200, b"to the first")
        (await gw.api.next()).answers(200, b"to the second")
        await second.is_answered(200, b"to the second")


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (1, 1), (2, 2), (9, 3)])
@in_loop
async def test_no_more_idle_connections_than_allowed(limit: int, kept: int) -> None:
    async with gateway(api_max_idle=limit) as gw:
        await gw.warms_up(3)
        assert gw.shows(connections=kept, idle=kept)
        assert gw.slot[c.API_CONNECTIONS] == kept


@in_loop
async def test_idle_connections_are_divided_among_the_workers() -> None:
    async with gateway(api_max_idle=4, workers=2) as gw:
        await gw.warms_up(3)
        assert gw.shows(idle=2)


@in_loop
async def test_connection_that_was_idle_for_long_is_closed() -> None:
    async with gateway() as gw:
        old, young = await gw.warms_up(2)
        gw.advance(30)
        assert (await gw.exchanges()).number == young
        gw.advance(IDLE_LIMIT_S - 30 + 1)
        await gw.api.connections[old].lost.wait()
        assert gw.shows(connections=1, idle=1)
        assert (await gw.exchanges()).number == young


@in_loop
async def test_connection_that_the_api_ends_is_not_used_again() -> None:
    async with gateway() as gw:
        first = await gw.exchanges("a", "Connection: close")
        await first.is_given_up()
        assert gw.shows(connections=0, idle=0)
        assert (await gw.exchanges("b")).number == 1


@in_loop
async def test_answer_that_ends_with_its_connection() -> None:
    async with gateway() as gw:
        sent = gw.posts()
        request = await gw.api.next()
        request.sends(b"HTTP/1.0 200 OK\r\n\r\nuntil the ")
        request.sends(b"end")
        request.hangs_up()
        await sent.is_answered(200, b"until the end")
        assert gw.shows(connections=0)


@in_loop
async def test_idle_connection_that_ends_is_forgotten() -> None:
    async with gateway() as gw:
        (number,) = await gw.warms_up(1)
        gw.api.connections[number].transport.close()
        await gw.comes_to_show(connections=0, idle=0)
        assert gw.slot[c.API_CONNECTIONS] == 0
        assert (await gw.exchanges()).number == 1


@in_loop
async def test_connection_with_bytes_that_nobody_asked_for_is_dropped() -> None:
    async with gateway() as gw:
        (number,) = await gw.warms_up(1)
        gw.api.connections[number].transport.write(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        await gw.comes_to_show(connections=0, idle=0)
        assert gw.slot[c.API_REPLIES_INVALID] == 0


@in_loop
async def test_bytes_behind_the_answer_cost_the_connection_only() -> None:
    async with gateway() as gw:
        sent = gw.posts()
        request = await gw.api.next()
        request.sends(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n")
        await sent.is_answered(200, b"ok")
        await request.is_given_up()
        assert gw.shows(connections=0)


@in_loop
async def test_repr_is_a_diagnosis() -> None:
    async with gateway(api_max_connections=1) as gw:
        gw.posts()
        gw.posts()
        assert repr(gw.upstream) == (
            f"<Upstream http://127.0.0.1:{gw.api.port}/ connections=0 idle=0"
            f" connecting=1 queued=2 retries=0>"
        )
        gw.advance(TICK_S)
        assert gw.slot[c.API_QUEUE] == 2
        (await gw.api.next()).answers(503)
        await gw.comes_to_show(connections=1, idle=0, connecting=0, queued=0, retries=1)
        gw.advance(TICK_S)
        assert gw.slot[c.API_QUEUE] in (0, 1)


# A connection that ends before the answer.


async def assert_lost_connection_is_made_good(gw: Gateway, sent: Sent) -> None:
    """Have a request arrive, lose its connection, and find it again on another."""
    lost = await gw.api.next()
    lost.hangs_up()
    await sent.is_done_or(gw.api.has_more)
    assert not sent.is_done
    again = await gw.api.next()
    assert (again.name, again.method) == (lost.name, lost.method)
    assert again.number != lost.number
    again.answers(200, b"at last")
    await sent.is_answered(200, b"at last")
    assert gw.slot[c.REQUESTS_RETRIED] == 1


@pytest.mark.parametrize("event", [CONNECT, MESSAGE, DISCONNECT])
@in_loop
async def test_request_on_a_connection_closed_while_idle_is_sent_again(event: int) -> None:
    async with gateway() as gw:
        await gw.warms_up(1)
        await assert_lost_connection_is_made_good(gw, gw.submits(event, "a"))


@in_loop
async def test_last_answer_is_not_taken_for_the_next_when_the_connection_ends() -> None:
    async with gateway() as gw:
        sent = gw.posts()
        (await gw.api.next()).answers(204)
        await sent.is_answered(204)
        await assert_lost_connection_is_made_good(gw, gw.posts("next"))


@in_loop
async def test_request_on_a_spare_connection_closed_while_idle_is_sent_again() -> None:
    async with gateway() as gw:
        too_late = gw.posts()
        gw.advance(API_TIMEOUT_S + 1)
        await too_late.fails(ApiTimeout)
        await gw.comes_to_show(connections=1, idle=1)
        await assert_lost_connection_is_made_good(gw, gw.posts("next"))


@in_loop
async def test_request_that_is_sent_again_goes_before_those_that_wait() -> None:
    async with gateway(api_max_connections=1) as gw:
        await gw.warms_up(1)
        first, second = gw.posts("first"), gw.posts("second")
        (await gw.api.next()).hangs_up()
        for sent, name in ((first, "first"), (second, "second")):
            request = await gw.api.next()
            assert request.name == name
            request.answers()
            await sent.is_answered()


@pytest.mark.parametrize("event", [CONNECT, MESSAGE])
@in_loop
async def test_request_on_a_fresh_connection_is_not_sent_again(event: int) -> None:
    async with gateway() as gw:
        sent = gw.submits(event, "a")
        (await gw.api.next()).hangs_up()
        await sent.fails(ApiDisconnected)
        await gw.api.nothing_more_arrives()
        assert gw.slot[c.REQUESTS_FAILED] == 1


@in_loop
async def test_request_is_not_sent_again_when_a_byte_of_the_answer_came() -> None:
    async with gateway() as gw:
        await gw.warms_up(1)
        sent = gw.posts()
        request = await gw.api.next()
        request.sends(b"H")
        request.hangs_up()
        await sent.fails(ApiDisconnected)
        await gw.api.nothing_more_arrives()


@in_loop
async def test_answer_that_is_cut_off_is_none() -> None:
    async with gateway() as gw:
        sent = gw.posts()
        request = await gw.api.next()
        request.sends(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        request.hangs_up()
        await sent.fails(ApiDisconnected)


@in_loop
async def test_others_that_wait_are_served_when_a_connection_ends() -> None:
    async with gateway(api_max_connections=1) as gw:
        first, second = gw.posts("first"), gw.posts("second")
        (await gw.api.next()).hangs_up()
        await first.fails(ApiDisconnected)
        request = await gw.api.next()
        assert request.name == "second"
        request.answers()
        await second.is_answered()


# Further attempts.


@in_loop
async def test_message_is_sent_again_after_503() -> None:
    async with gateway() as gw:
        sent = gw.posts("a")
        request = await gw.api.next()
        for attempt in range(4):
            request.answers(503, b"overloaded")
            await gw.comes_to_show(retries=1)
            assert gw.slot[c.REQUESTS_RETRIED] == attempt + 1
            request = await gw.tries_again()
        assert request.name == "a"
        request.answers(200, b"recovered")
        await sent.is_answered(200, b"recovered")
        assert gw.slot[c.REQUESTS_STARTED] == gw.slot[c.REQUESTS_SUCCEEDED] == 1


@in_loop
async def test_first_attempts_follow_soon_and_later_ones_less_so() -> None:
    async with gateway(api_timeout=1000) as gw:
        gw.posts()
        waited = []
        for _ in range(8):
            (await gw.api.next()).answers(503)
            await gw.comes_to_show(retries=1)
            before = gw.clock.now
            while gw.shows(retries=1):
                gw.advance(TICK_S)
            waited.append(gw.clock.now - before)
        assert waited[0] <= 2 * TICK_S
        assert max(waited[-3:]) <= LONGEST_BACKOFF_S + TICK_S
        assert min(waited[-3:]) >= LONGEST_BACKOFF_S / 2 - TICK_S


@in_loop
async def test_503_is_the_answer_when_the_time_is_up() -> None:
    async with gateway() as gw:
        sent = gw.posts()
        request = await gw.api.next()
        started = gw.clock.now
        while gw.clock.now < started + 0.6 * API_TIMEOUT_S:
            request.answers(503)
            await gw.comes_to_show(retries=1)
            request = await gw.tries_again()
        gw.advance(started + API_TIMEOUT_S - 5 * TICK_S - gw.clock.now)
        request.answers(503, b"still overloaded")
        await sent.is_answered(503, b"still overloaded")
        assert gw.slot[c.REQUESTS_FAILED] == 1


@pytest.mark.parametrize("status", [301, 404, 500, 503])
@in_loop
async def test_disconnect_is_sent_again_until_the_api_has_heard(status: int) -> None:
    async with gateway() as gw:
        sent = gw.reports("gone")
        request = await gw.api.next()
        end = gw.clock.now + 5 * API_TIMEOUT_S
        while gw.clock.now < end:
            request.answers(status)
            await gw.comes_to_show(retries=1)
            request = await gw.tries_again()
        assert (request.method, request.name) == ("DELETE", "gone")
        request.answers(204)
        await sent.is_answered(204)


@in_loop
async def test_disconnect_is_sent_again_after_a_lost_connection() -> None:
    async with gateway() as gw:
        sent = gw.reports()
        (await gw.api.next()).hangs_up()
        await gw.comes_to_show(retries=1)
        gw.advance(LONGEST_BACKOFF_S)
        (await gw.api.next()).answers()
        await sent.is_answered()


@in_loop
async def test_next_attempt_uses_an_idle_connection() -> None:
    async with gateway() as gw:
        gw.posts()
        request = await gw.api.next()
        request.answers(503)
        await gw.comes_to_show(retries=1, idle=1)
        gw.advance(LONGEST_BACKOFF_S)
        assert (await gw.api.next()).number == request.number


# Answers that cannot be used.


@pytest.mark.parametrize(
    "wire",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n" + b"x" * 1001,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"x" * 70_000,
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
    ],
)
@in_loop
async def test_answer_that_cannot_be_used(wire: bytes) -> None:
    async with gateway() as gw:
        sent = gw.posts()
        request = await gw.api.next()
        request.sends(wire)
        await sent.fails(ApiReplyInvalid)
        await request.is_given_up()
        assert gw.slot[c.API_REPLIES_INVALID] == 1
        assert gw.shows(connections=0)


@in_loop
async def test_disconnect_whose_answer_cannot_be_used_is_sent_again() -> None:
    async with gateway() as gw:
        sent = gw.reports()
        (await gw.api.next()).sends(b"nonsense\r\n\r\n")
        await gw.comes_to_show(retries=1)
        gw.advance(LONGEST_BACKOFF_S)
        (await gw.api.next()).answers()
        await sent.is_answered()


# An API that hangs.


@pytest.mark.parametrize("event", [CONNECT, MESSAGE])
@in_loop
async def test_answer_that_does_not_come_in_time(event: int) -> None:
    async with gateway() as gw:
        sent = gw.submits(event, "a")
        request = await gw.api.next()
        gw.advance(API_TIMEOUT_S - TICK_S)
        assert not sent.is_done
        gw.advance(3 * TICK_S)
        await sent.fails(ApiTimeout)
        await request.is_given_up()
        assert gw.shows(connections=0)


@in_loop
async def test_answer_that_comes_in_drops_is_timed_as_a_whole() -> None:
    async with gateway() as gw:
        sent = gw.posts()
        request = await gw.api.next()
        for byte in b"HTTP/1.1 ":
            request.sends(bytes((byte,)))
            gw.advance(1)
        assert not sent.is_done
        gw.advance(2)
        await sent.fails(ApiTimeout)


@in_loop
async def test_time_in_the_queue_counts() -> None:
    async with gateway(api_max_connections=1) as gw:
        first, second = gw.posts("first"), gw.posts("second")
        request = await gw.api.next()
        gw.advance(API_TIMEOUT_S - 1)
        request.answers()
        await first.is_answered()
        assert (await gw.api.next()).name == "second"
        gw.advance(1 + 3 * TICK_S)
        await second.fails(ApiTimeout)


@in_loop
async def test_what_waits_behind_a_hanging_api_fails_in_time() -> None:
    async with gateway(api_max_connections=1) as gw:
        sent = [gw.posts("first"), gw.connects("second"), gw.posts("third")]
        await gw.api.next()
        gw.advance(API_TIMEOUT_S + 3 * TICK_S)
        for each in sent:
            await each.fails(ApiTimeout)
        assert gw.upstream.unfinished == 0


@in_loop
async def test_message_that_was_put_off_fails_in_time_behind_younger_ones() -> None:
    async with gateway(api_max_connections=1) as gw:
        old = gw.posts("old")
        first = await gw.api.next()
        gw.advance(0.8 * API_TIMEOUT_S)
        young = [gw.posts("young"), gw.posts("younger")]
        first.answers(503)
        assert (await gw.api.next()).name == "young"
        gw.advance(0.2 * API_TIMEOUT_S + 3 * TICK_S)
        assert old.is_done
        assert not any(each.is_done for each in young)


@in_loop
async def test_hanging_request_does_not_hold_up_others() -> None:
    async with gateway() as gw:
        gw.posts("hangs")
        await gw.api.next()
        assert (await gw.exchanges("other")).number == 1


@in_loop
async def test_disconnect_that_is_not_answered_is_sent_again() -> None:
    async with gateway() as gw:
        sent = gw.reports()
        hanging = await gw.api.next()
        gw.advance(API_TIMEOUT_S + 3 * TICK_S)
        await hanging.is_given_up()
        assert not sent.is_done
        gw.advance(LONGEST_BACKOFF_S)
        (await gw.api.next()).answers()
        await sent.is_answered()


@in_loop
async def test_connection_that_cannot_be_opened_in_time() -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port = listener.getsockname()[1]
        for _ in range(4):  # fill the queue of connections that nobody accepts
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        options = {"api": f"http://127.0.0.1:{port}/", "api_connect_timeout": 0.05}
        async with gateway(**options) as gw:
            await gw.connects().fails(ApiUnreachable)


@in_loop
async def test_host_whose_name_cannot_be_one() -> None:
    async with gateway(api=f"http://{'x' * 64}.example/") as gw:
        await gw.connects().fails(ApiUnreachable)


# An API that is away.


@in_loop
async def test_connect_fails_at_once_while_the_api_is_away() -> None:
    async with gateway(listens=False) as gw:
        await gw.connects().fails(ApiUnreachable)
        await gw.comes_to_show(connecting=0)
        await gw.connects().fails(ApiUnreachable)


@pytest.mark.parametrize("event", [MESSAGE, DISCONNECT])
@in_loop
async def test_messages_and_disconnects_wait_for_the_api_to_come_back(event: int) -> None:
    async with gateway(listens=False) as gw:
        sent = [gw.submits(event, f"{i}") for i in range(3)]
        await gw.comes_to_show(connecting=0, queued=3)
        gw.advance(LONGEST_BACKOFF_S)
        await gw.comes_to_show(connecting=0, queued=3)
        await gw.api.open()
        gw.advance(LONGEST_BACKOFF_S + TICK_S)
        names = []
        for _ in sent:
            request = await gw.api.next()
            names.append(request.name)
            request.answers()
        assert sorted(names) == ["0", "1", "2"]
        for each in sent:
            await each.is_answered()


@in_loop
async def test_owner_may_try_again_from_within_the_failure() -> None:
    async with gateway(listens=False) as gw:
        first = gw.connects("first")
        first.then = lambda: gw.connects("second") and None
        await first.fails(ApiUnreachable)
        await gw.sent[1].fails(ApiUnreachable)


@in_loop
async def test_connect_that_fails_takes_nobody_with_it() -> None:
    async with gateway(listens=False) as gw:
        message, connect = gw.posts(), gw.connects()
        await connect.fails(ApiUnreachable)
        assert not message.is_done
        await gw.comes_to_show(queued=1)


@in_loop
async def test_message_fails_when_the_api_is_away_for_long() -> None:
    async with gateway(listens=False) as gw:
        sent = gw.posts()
        await gw.comes_to_show(connecting=0)
        gw.advance(API_TIMEOUT_S + 2 * TICK_S)
        await sent.fails(ApiUnreachable)


@in_loop
async def test_disconnect_waits_however_long_the_api_is_away() -> None:
    async with gateway(listens=False) as gw:
        sent = gw.reports()
        for _ in range(10):
            await gw.comes_to_show(connecting=0)
            gw.advance(API_TIMEOUT_S)
        await gw.api.open()
        (await gw.tries_again()).answers()
        await sent.is_answered()


@in_loop
async def test_disconnect_that_waits_is_not_counted_as_sent_again_at_each_tick() -> None:
    async with gateway(listens=False) as gw:
        gw.reports()
        for _ in range(600):
            await gw.comes_to_show(connecting=0)
            gw.advance(TICK_S)
        # A minute, with an attempt every second or two.
        assert gw.slot[c.REQUESTS_RETRIED] <= 120


@in_loop
async def test_api_that_is_away_is_tried_now_and_then() -> None:
    async with gateway(listens=False) as gw:
        gw.posts()
        await gw.comes_to_show(connecting=0)
        assert gw.shows(queued=1)
        gw.posts("another")
        assert gw.shows(connecting=0, queued=2)
        gw.advance(LONGEST_BACKOFF_S)
        assert not gw.shows(connecting=0)


@in_loop
async def test_busy_connections_serve_what_waits_when_no_more_can_be_opened() -> None:
    async with gateway() as gw:
        await gw.warms_up(1)
        busy = gw.posts("busy")
        request = await gw.api.next()
        gw.api._server.close()  # type: ignore[union-attr]
        gw.api._socket.shutdown(socket.SHUT_RDWR)
        waiting = gw.connects("waiting")
        await gw.comes_to_show(connecting=0)
        assert not waiting.is_done
        request.answers()
        await busy.is_answered()
        (await gw.api.next()).answers()
        await waiting.is_answered()


# The end.


@in_loop
async def test_close_drops_every_connection_and_opens_none() -> None:
    async with gateway(api_max_connections=2) as gw:
        await gw.warms_up(2)
        sent = [gw.posts("busy"), gw.posts("busy2"), gw.posts("waiting")]
        requests = [await gw.api.next() for _ in range(2)]
        await gw.upstream.close()
        for request in requests:
            await request.is_given_up()
        await gw.api.nothing_more_arrives()
        assert gw.shows(connections=0, connecting=0)
        assert not any(each.is_done for each in sent)


@in_loop
async def test_close_gives_up_connections_that_are_being_opened() -> None:
    async with gateway() as gw:
        gw.posts()
        assert gw.shows(connecting=1)
        await gw.upstream.close()
        await gw.comes_to_show(connecting=0, connections=0)
        await gw.api.nothing_more_arrives()
