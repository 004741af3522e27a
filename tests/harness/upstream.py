"""Drive an upstream against an API on loopback; every answer, and every hour, is up to the test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple, cast

from ws2api.gateway import counters as c
from ws2api.gateway.counters import Counters
from ws2api.gateway.errors import ApiError
from ws2api.gateway.exchange import CONNECT, DISCONNECT, MESSAGE, Exchange
from ws2api.gateway.http_wire import ReplyReader
from ws2api.gateway.recent import ErrorRecord, Recent
from ws2api.gateway.settings import Settings
from ws2api.gateway.sweeper import Sweeper
from ws2api.gateway.upstream import Upstream

from .looping import Clock
from .names import NamingLoop

API_TIMEOUT_S = 10.0
IDLE_LIMIT_S = 50.0
SURPLUS_S = 1.0
TICK_S = 0.1
# Longer than the longest wait between two attempts of a message.
LONGEST_BACKOFF_S = 2.0
MAX_REPLY_BYTES = 1000

METHODS = {CONNECT: "GET", MESSAGE: "POST", DISCONNECT: "DELETE"}


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

    def resets(self) -> None:
        self._connection.transport.abort()

    @property
    def is_lost(self) -> bool:
        return self._connection.lost.is_set()

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
        self._api.accepted += 1
        if self._api.hangs_up_at_once:
            self.transport.close()

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

    def ends_unnoticed(self) -> None:
        """End the connection as a server does that has no request: what comes now is refused."""
        descriptor = os.dup(self.transport.get_extra_info("socket").fileno())
        with socket.socket(fileno=descriptor) as sock:
            sock.shutdown(socket.SHUT_RDWR)

    async def resets(self) -> None:
        """Reset the connection, and return in the very moment."""
        descriptor = os.dup(self.transport.get_extra_info("socket").fileno())
        with socket.socket(fileno=descriptor) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()
        await self.lost.wait()


class Api:
    """Listen on a port of its own, which stays reserved while nobody listens."""

    def __init__(self) -> None:
        self.connections: list[ApiSide] = []
        self.accepted = 0
        """Connections of the gateway so far."""
        self.on_request: Callable[[Arrived], None] | None = None
        """Answers the requests instead of the test, if set."""
        self.hangs_up_at_once = False
        self._arrived: asyncio.Queue[Arrived] = asyncio.Queue()
        self._server: asyncio.AbstractServer | None = None
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        # By number: only such a binding outlives the end of listening.
        self._socket.bind(("127.0.0.1", self.port))

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: ApiSide(self), sock=self._socket.dup())

    @contextlib.asynccontextmanager
    async def elsewhere(self, address: str) -> AsyncIterator[Api]:
        """Give another API, at the same port of another address."""
        other, loop = Api(), asyncio.get_running_loop()
        async with await loop.create_server(lambda: ApiSide(other), address, self.port):
            yield other
        await other.end()

    async def close(self) -> None:
        """End every connection and refuse new ones."""
        if self._server is not None:
            self.refuses()
        for connection in self.connections:
            connection.transport.abort()
            await connection.lost.wait()

    @property
    def is_open(self) -> bool:
        return self._server is not None

    def refuses(self) -> None:
        """Refuse new connections, and keep those that are there."""
        assert self._server is not None
        self._server.close()
        self._server = None
        self._socket.shutdown(socket.SHUT_RDWR)

    async def end(self) -> None:
        await self.close()
        self._socket.close()

    def takes(self, request: Arrived) -> None:
        if request.method == "PROBE":
            request.answers()
        elif self.on_request is not None:
            self.on_request(request)
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


class Parked(NamedTuple):
    """Note that a disconnect was left to Redis."""


class Sent:
    """Be the owner of one exchange, and wait for its outcome."""

    def __init__(
        self,
        event: int,
        name: str,
        *,
        left: bool = False,
        retry_safe: bool = False,
        size_bytes: int = 0,
    ) -> None:
        assert " " not in name
        self.left = left
        self.retry_safe = retry_safe
        self.name = name
        self.client_id = name.encode()
        lines = [f"{METHODS[event]} /{name} HTTP/1.1", "Host: api"]
        head = "\r\n".join([*lines, f"Content-Length: {size_bytes}", "", ""])
        self.exchange = Exchange(self, event, head.encode() + bytes(size_bytes))
        self._outcome: asyncio.Future[Reply | ApiError | Parked] = asyncio.Future()
        self.then: Callable[[], None] = lambda: None

    def on_reply(self, exchange: Exchange, reply: ReplyReader) -> None:
        assert exchange is self.exchange
        self._outcome.set_result(Reply(reply.status, reply.body, list(reply.headers)))
        self.then()

    def on_failure(self, exchange: Exchange, error: ApiError) -> None:
        assert exchange is self.exchange
        self._outcome.set_result(error)
        self.then()

    def on_parked(self, exchange: Exchange) -> None:
        assert exchange is self.exchange
        assert exchange.event == DISCONNECT
        self._outcome.set_result(Parked())
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

    async def error(self) -> ApiError:
        outcome = await self._outcome
        assert isinstance(outcome, ApiError), outcome
        return outcome

    async def failure(self) -> type[ApiError]:
        return type(await self.error())

    async def is_parked(self) -> None:
        assert await self._outcome == Parked()

    @property
    def outcome(self) -> str:
        """Say in a word how it ended."""
        outcome = self._outcome.result()
        return f"{outcome.status}" if isinstance(outcome, Reply) else type(outcome).__name__


class Redis:
    """Take disconnects that are parked."""

    def __init__(self) -> None:
        self.is_up = True
        self.parked: list[str] = []
        self.asked = 0

    def park(self, exchange: Exchange) -> bool:
        self.asked += 1
        if self.is_up:
            self.parked.append(cast(Sent, exchange.owner).name)
        return self.is_up


class CountingLoop(NamingLoop):
    """Be the loop that an upstream sees: count its attempts to connect."""

    def __init__(self) -> None:
        super().__init__()
        self.dialled = 0

    async def create_connection(self, *args: Any, **kwargs: Any) -> Any:
        self.dialled += 1
        return await self._loop.create_connection(*args, **kwargs)


class Gateway:
    """Hold an upstream with its clock and its API."""

    def __init__(self, api: Api, redis: Redis | None, options: dict[str, Any]) -> None:
        self.api = api
        self.redis = redis
        self.clock = Clock()
        self.slot = Counters(1).bank(0, 0)
        sweeper = Sweeper(cast(Any, self.clock))
        host = options.pop("host", "127.0.0.1")
        values = {
            "workers": 1,
            "api": f"http://{host}:{api.port}/",
            "api_timeout": API_TIMEOUT_S,
            "max_message_size": MAX_REPLY_BYTES,
            "api_max_age": 0,  # which is left to chance in part
        }
        files = options.pop("files", 1_000)  # that there are for connections
        settings = Settings(**{**values, **options})  # type: ignore[arg-type]
        loop = self.loop = CountingLoop()
        park = redis.park if redis is not None else None
        self.recent = Recent(1, 1)
        self.upstream = Upstream(
            settings,
            self.slot,
            sweeper,
            cast(Any, loop),
            None,
            park,
            files,
            self.recent.outage(0, 0),
        )
        sweeper.start()
        self.sent: list[Sent] = []

    def submits(self, event: int, name: str, **traits: Any) -> Sent:
        sent = Sent(event, name, **traits)
        self.upstream.submit(sent.exchange)
        assert not sent.is_done, "called back before submit returned"
        self.sent.append(sent)
        return sent

    def connects(self, name: str = "c", **traits: Any) -> Sent:
        return self.submits(CONNECT, name, **traits)

    def posts(self, name: str = "m", **traits: Any) -> Sent:
        return self.submits(MESSAGE, name, **traits)

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
        return all(self.shown(name) == count for name, count in counts.items())

    async def turns(self) -> None:
        """Let the loop do what it has to do next."""
        await asyncio.sleep(0)

    async def settles(self) -> None:
        """Wait until nothing is under way to the API."""
        await asyncio.sleep(0)
        while not self.shows(connecting=0) or self.busy:
            await asyncio.sleep(0)

    async def passes(self, seconds: float) -> None:
        """Let time go by, and all that is due take place at each tick."""
        for _ in range(round(seconds / TICK_S)):
            self.advance(TICK_S)
            await self.settles()

    @property
    def busy(self) -> int:
        """Count the requests under way."""
        return self.shown("connections") - self.shown("idle")

    def shown(self, name: str) -> int:
        """Return a number in the repr."""
        found = re.search(rf"\b{name}=(\d+)", repr(self.upstream))
        assert found is not None, name
        return int(found[1])

    @property
    def is_away(self) -> bool:
        """Tell whether the breaker has opened, and not closed since."""
        return "<Breaker closed" not in repr(self.upstream)

    @property
    def outage(self) -> str:
        """Return what the admin process sees of an API that is away; nothing if it is not."""
        [payload] = [*self.recent.outage(0, 0).read()] or [b""]
        return ErrorRecord.decode(payload).text if self.slot[c.API_AWAY] else ""

    async def loses_the_api(self) -> None:
        """Have connections refused until the breaker opens; a message remains in line."""
        await self.api.close()
        self.posts("in-vain")
        while not self.is_away:
            await self.passes(TICK_S)

    async def tries_again(self) -> Arrived:
        """Let time go by until the next attempt arrives."""
        await self.comes_to_show(connecting=0)
        while not self.busy:
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
async def gateway(
    *, listens: bool = True, redis: Redis | None = None, **options: Any
) -> AsyncIterator[Gateway]:
    """Give an upstream and its API; check that each request had one outcome in the end."""
    api = Api()
    if listens:
        await api.open()
    gateway = Gateway(api, redis, options)
    try:
        yield gateway
        gateway.assert_books_are_kept()
    finally:
        await gateway.upstream.close()
        await api.end()
    for sent in gateway.sent:  # each is a future, which would not take a second outcome
        assert sent.is_done, sent.name
    gateway.assert_books_are_kept()
