"""Be an API for thousands of connections in one loop, and remember what it was told."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final, cast

import httptools

from .loop_thread import LoopThread

BACKLOG: Final = 4096
GENERATION_COOKIE: Final = "ws2api-generation"


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """Hold one request of the gateway."""

    method: str
    client_id: str
    generation: int
    sequence: int
    """Number of the message; 0 on a request that is none."""
    close_code: int
    """Of a DELETE; else 0."""
    body: bytes
    push_url: str
    """Of a GET; else empty."""


@dataclass(frozen=True, slots=True)
class ApiAnswer:
    """Say how to answer."""

    body: bytes = b""
    status: int = 200
    headers: str = ""
    """Header lines, each with its CRLF."""

    @property
    def is_good(self) -> bool:
        """Whether the API has done what it was asked."""
        return 200 <= self.status < 300

    def encode(self) -> bytes:
        """Return the bytes on the wire."""
        head = (
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\n{self.headers}"
            f"Content-Type: text/plain\r\nContent-Length: {len(self.body)}\r\n\r\n"
        )
        return head.encode("latin-1") + self.body


@dataclass(slots=True)
class Life:
    """Hold what the API was told of one connection of a client.

    A request counts when the API has processed it: one that it answers with an error, or that
    still waits behind a `Gate`, has changed nothing.
    """

    client_id: str
    generation: int
    is_accepted: bool = False
    push_url: str = ""
    posts: list[tuple[int, bytes]] = field(default_factory=list)
    """Sequence number and message, in the order in which they were processed."""
    deletes: list[tuple[int, str]] = field(default_factory=list)
    """Close code and reason."""


Behaviour = Callable[[ApiRequest], ApiAnswer]
Choice = Callable[[ApiRequest], bool]


def accept_and_echo(request: ApiRequest) -> ApiAnswer:
    """Let everybody in, tell the client its generation, send each message back."""
    if request.method == "GET":
        cookie = f"Set-Cookie: {GENERATION_COOKIE}={request.generation}\r\n"
        return ApiAnswer(b"ok", headers=cookie)
    return ApiAnswer(request.body if request.method == "POST" else b"")


class Gate:
    """Keep the requests of a kind waiting until it is opened.

    Args:
        api: to which they are made.
        concerns: tells which requests must wait.
    """

    def __init__(self, api: TrafficApi, concerns: Choice) -> None:
        self._api = api
        self._concerns = concerns
        self._waiting: list[tuple[_Connection, ApiRequest]] = []
        self._is_open = False

    @property
    def waiting(self) -> int:
        """Count the requests that wait."""
        return len(self._waiting)

    def open(self) -> None:
        """Let everything pass, from now on."""
        self._api.thread.call(self._open)

    def release(self, count: int) -> None:
        """Let so many pass that wait now, the oldest first."""
        self._api.thread.call(self._release, count)

    def stops(self, connection: _Connection, request: ApiRequest) -> bool:
        """Tell whether a request has to wait, and keep it if so."""
        if self._is_open or not self._concerns(request):
            return False
        self._waiting.append((connection, request))
        return True

    def forget(self, connection: _Connection) -> None:
        """Drop the request of a connection that has ended."""
        self._waiting = [pair for pair in self._waiting if pair[0] is not connection]

    def _open(self) -> None:
        self._is_open = True
        self._release(len(self._waiting))

    def _release(self, count: int) -> None:
        released, self._waiting = self._waiting[:count], self._waiting[count:]
        for connection, request in released:
            connection.answer(request)


class TrafficApi:
    """Serve HTTP on a loopback port from a loop.

    Every request of the gateway is processed at once when it has been read, or waits behind a
    gate; so whatever the API goes away with has not been processed.

    Args:
        thread: whose loop serves.
        behaviour: what to answer; may be set anew at any time.
    """

    def __init__(self, thread: LoopThread, behaviour: Behaviour = accept_and_echo) -> None:
        self.thread = thread
        self.behaviour = behaviour
        self.gates: list[Gate] = []
        self.violations: list[str] = []
        """What the gateway sent that is no HTTP."""
        self.lives: dict[tuple[str, int], Life] = {}
        """What was told of each connection, by client id and generation."""
        self.attempts: Counter[str] = Counter()
        """Requests that arrived, by method."""
        self.answers: Counter[tuple[str, int]] = Counter()
        """Answers that were written, by method and status."""
        self.under_way: Counter[str] = Counter()
        """Requests without an answer, by method."""
        self.most_at_once: Counter[str] = Counter()
        """The highest that `under_way` has been."""
        self.connections: set[_Connection] = set()
        self.connections_accepted = 0
        with socket.socket() as probe:  # only a port that was bound by number outlives `close`
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self.port))
        self._listener.setblocking(False)
        self._is_listening = False
        self.open()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return "127.0.0.1", self.port

    @property
    def url(self) -> str:
        """The value for --api."""
        return f"http://127.0.0.1:{self.port}/"

    def open(self) -> None:
        """Accept connections, for the first time or again."""
        self.thread.call(self._open)

    def close(self) -> None:
        """Go away: refuse connections, and end those that are open; the port stays reserved."""
        self.thread.run(self._close())

    def end(self) -> None:
        """Go away for good."""
        if not self.thread.loop.is_closed():
            self.close()
        self._listener.close()

    def hold(self, concerns: Choice) -> Gate:
        """Keep requests of a kind waiting from now on."""
        gate = Gate(self, concerns)
        self.gates.append(gate)
        return gate

    def forget_all(self) -> None:
        """Begin anew: answer well, hold nothing, remember nothing."""
        for gate in self.gates:
            gate.open()
        self.thread.call(self._forget_all)

    def snapshot(self) -> list[Life]:
        """Return every life so far; each goes on to change."""
        return self.thread.call(lambda: list(self.lives.values()))

    def lives_of(self, client_id: str) -> list[Life]:
        """Return the lives of one client, oldest first."""
        found = [life for life in self.snapshot() if life.client_id == client_id]
        return sorted(found, key=lambda life: life.generation)

    # In the loop's thread.

    def process(self, request: ApiRequest, answer: ApiAnswer) -> None:
        """Do what a request says."""
        self.answers[request.method, answer.status] += 1
        life = self.lives.get((request.client_id, request.generation))
        if life is None:
            life = Life(request.client_id, request.generation)
            self.lives[request.client_id, request.generation] = life
        if request.method == "GET":
            life.is_accepted |= answer.status == 200 and answer.body == b"ok"
            life.push_url = request.push_url
        elif answer.is_good and request.method == "POST":
            life.posts.append((request.sequence, request.body))
        elif answer.is_good:
            life.deletes.append((request.close_code, request.body.decode()))

    def _forget_all(self) -> None:
        self.behaviour = accept_and_echo
        self.gates.clear()
        self.lives.clear()
        for counter in (self.attempts, self.answers, self.most_at_once):
            counter.clear()

    def _open(self) -> None:
        if not self._is_listening:
            self._listener.listen(BACKLOG)
            self.thread.loop.add_reader(self._listener, self._accept)
            self._is_listening = True

    async def _close(self) -> None:
        if self._is_listening:
            self.thread.loop.remove_reader(self._listener)
            self._listener.shutdown(socket.SHUT_RDWR)
            self._is_listening = False
        while self.connections:
            for connection in list(self.connections):
                connection.close()
            await asyncio.sleep(0.001)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            while True:
                sock, _ = self._listener.accept()
                self.connections_accepted += 1
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.thread.loop.create_task(self._serve(sock))

    async def _serve(self, sock: socket.socket) -> None:
        connection = _Connection(self)
        self.connections.add(connection)
        await self.thread.loop.connect_accepted_socket(lambda: connection, sock)


class _Connection(asyncio.Protocol):
    """Serve one connection of the gateway; httptools calls it."""

    def __init__(self, api: TrafficApi) -> None:
        self._api = api
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._body = b""
        self._request: ApiRequest | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._api.violations.append(f"{error}: {data[:100]!r}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._api.connections.discard(self)
        if self._request is not None:
            self._api.under_way[self._request.method] -= 1
            for gate in self._api.gates:
                gate.forget(self)
        del self._parser  # it refers back to this object

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.close()

    def on_message_begin(self) -> None:
        self._url = self._body = b""
        self._headers = {}

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        api, headers = self._api, self._headers
        if self._request is not None:
            api.violations.append(f"{self._url!r} came before the answer to {self._request}")
        method = self._parser.get_method().decode()
        request = self._request = ApiRequest(
            method,
            self._url.partition(b"?")[0].rpartition(b"/")[2].decode(),
            int(headers.get(b"ws2api-generation", b"0")),
            int(headers.get(b"ws2api-sequence", b"0")),
            int(headers.get(b"ws2api-close-code", b"0")),
            self._body,
            headers.get(b"ws2api-push-url", b"").decode(),
        )
        api.attempts[method] += 1
        api.under_way[method] += 1
        api.most_at_once[method] = max(api.most_at_once[method], api.under_way[method])
        if not any(gate.stops(self, request) for gate in api.gates):
            self.answer(request)

    def answer(self, request: ApiRequest) -> None:
        """Process a request and write the answer."""
        if self._transport is None or self._transport.is_closing():
            return  # the gateway hears nothing, so nothing may have happened
        answer = self._api.behaviour(request)
        self._api.process(request, answer)
        self._api.under_way[request.method] -= 1
        self._request = None
        self._transport.write(answer.encode())
