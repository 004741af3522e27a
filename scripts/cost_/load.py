"""Put a system under load, cheaply, from a process of its own: raw bytes, no WebSocket library."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import re
import socket
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast
from urllib.parse import urlsplit

import uvloop

from cost_ import ANSWER, SENT, CostError
from cost_.systems import System

MASK: Final = b"\x37\xfa\x21\x3d"
SENT_FRAME: Final = (
    bytes([0x81, 0x80 | len(SENT)]) + MASK + bytes(b ^ MASK[i % 4] for i, b in enumerate(SENT))
)
RECEIVED_FRAME: Final = bytes([0x81, len(ANSWER)]) + ANSWER
UPGRADE: Final = (
    "GET /client-{} HTTP/1.1\r\nHost: gateway\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)

# Words that the measuring process and the load share.
RUN, READY, ENDING, IN_FLIGHT, DONE, FRAMES, FAILED, WORDS = range(8)
PAUSED, MESSAGES, REMOTE, LOCAL = range(4)  # values of RUN

Board = Any  # a ctypes array of WORDS 64-bit integers in shared memory


class Connection(asyncio.Protocol):
    """Keep the transport at hand; uvloop's is one without saying so to isinstance."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)


class Client(Connection):
    """Be a WebSocket client that expects one frame of known bytes, again and again."""

    def __init__(self, load: Load, number: int) -> None:
        self.opened = asyncio.get_running_loop().create_future()
        self._load = load
        self._number = number
        self._rest = b""  # the handshake's answer, later a part of a frame

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.write(UPGRADE.format(self._number).encode())

    def data_received(self, data: bytes) -> None:
        if data == RECEIVED_FRAME and not self._rest:
            self._load.received(self)
        elif self.opened.done():
            self._received_pieces(data)
        else:
            self._rest += data
            head, end, rest = self._rest.partition(b"\r\n\r\n")
            if end:
                self._rest = b""
                if head.startswith(b"HTTP/1.1 101 "):
                    self.opened.set_result(None)
                    self._received_pieces(rest)
                else:
                    self.opened.set_exception(CostError(f"connect refused: {head!r}"))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(CostError(f"connect failed: {error}"))
        elif not self._load.board[ENDING]:
            self._load.fail(f"connection lost: {error}")

    def _received_pieces(self, data: bytes) -> None:
        self._rest += data
        while self._rest.startswith(RECEIVED_FRAME):
            self._rest = self._rest[len(RECEIVED_FRAME) :]
            self._load.received(self)
        if self._rest.startswith(b"\x88"):
            self.transport.close()
        elif not RECEIVED_FRAME.startswith(self._rest):
            self._load.fail(f"unexpected frame: {self._rest[:80]!r}")


class Load:
    """Hold clients that stay silent."""

    def __init__(self, board: Board, port: int, clients: int, in_flight: int = 0) -> None:
        self.board = board
        self.clients: list[Client] = []
        self.in_flight = in_flight
        self._port = port
        self._numbers = iter(range(clients))

    async def run(self) -> None:
        await asyncio.gather(*(self._connect() for _ in range(32)))
        await self.prepare()
        self.board[READY] = 1
        while True:
            await asyncio.sleep(0.01)
            if (mode := self.board[RUN]) and not self.board[IN_FLIGHT]:
                self.start(mode)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        for number in self._numbers:
            _, client = await loop.create_connection(
                partial(Client, self, number), "127.0.0.1", self._port
            )
            await client.opened
            self.clients.append(client)

    async def prepare(self) -> None:
        """Do what is left to do once the clients are connected."""

    def start(self, mode: int) -> None:
        """Put `in_flight` requests under way; each answer leads to the next one."""
        raise NotImplementedError

    def received(self, client: Client) -> None:
        """Take note of a frame with the expected bytes."""
        self.board[FRAMES] += 1

    def fail(self, why: str) -> None:
        if not self.board[FAILED]:
            print(f"load: {why}", file=sys.stderr)
        self.board[FAILED] += 1


class MessageLoad(Load):
    """Let the clients send in turns: an answer to one makes the one idle for longest send."""

    async def prepare(self) -> None:
        self._ring = deque(self.clients)

    def start(self, mode: int) -> None:
        for _ in range(self.in_flight):
            self.board[IN_FLIGHT] += 1
            self._ring.popleft().transport.write(SENT_FRAME)

    def received(self, client: Client) -> None:
        board = self.board
        board[FRAMES] += 1
        board[DONE] += 1
        ring = self._ring
        ring.append(client)
        if board[RUN]:
            ring.popleft().transport.write(SENT_FRAME)
        else:
            board[IN_FLIGHT] -= 1


class PushLoad(Load):
    """Be the API: hear at connect which worker owns a client, and push to the clients in turns."""

    def __init__(self, board: Board, api: socket.socket, *args: int) -> None:
        super().__init__(board, *args)
        self.push_urls: dict[str, str] = {}
        self._api = api
        self._pushers: list[Pusher] = []

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(partial(Connects, self.push_urls), sock=self._api)
        await super().run()

    async def prepare(self) -> None:
        loop = asyncio.get_running_loop()
        owned: dict[int, list[bytes]] = defaultdict(list)
        for path, url in self.push_urls.items():
            owned[urlsplit(url).port or 80].append(_push(path))
        if len(owned) < 2:
            raise CostError("all clients are at one worker; try again with more --clients")
        turns = {
            port: {
                LOCAL: itertools.cycle(owned[port]),
                REMOTE: itertools.cycle(
                    [push for owner in owned if owner != port for push in owned[owner]]
                ),
            }
            for port in owned
        }
        for _, port in zip(range(self.in_flight), itertools.cycle(owned)):
            open_one = partial(Pusher, self, turns[port])
            _, pusher = await loop.create_connection(open_one, "127.0.0.1", port)
            self._pushers.append(pusher)

    def start(self, mode: int) -> None:
        for pusher in self._pushers:
            self.board[IN_FLIGHT] += 1
            pusher.send(mode)


class Pusher(Connection):
    """Push over one keep-alive connection to one worker, one request at a time."""

    def __init__(self, load: PushLoad, requests: Mapping[int, Iterator[bytes]]) -> None:
        self._load = load
        self._requests = requests

    def send(self, mode: int) -> None:
        self.transport.write(next(self._requests[mode]))

    def data_received(self, data: bytes) -> None:
        board = self._load.board
        if not data.startswith(b"HTTP/1.1 200 "):
            self._load.fail(f"push not confirmed: {data!r}")
        board[DONE] += 1
        if mode := board[RUN]:
            self.send(mode)
        else:
            board[IN_FLIGHT] -= 1


class Connects(Connection):
    """Answer ok to everything, and note the push URL that comes with a connect."""

    def __init__(self, push_urls: dict[str, str]) -> None:
        self._push_urls = push_urls

    def data_received(self, data: bytes) -> None:
        path = data.split(b" ", 2)[1].decode()
        if url := re.search(rb"\r\nws2api-push-url: *(\S+)", data, re.I):
            self._push_urls[path] = url[1].decode()
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


def _push(path: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: gateway\r\nContent-Type: text/plain\r\n"
    return f"{head}Content-Length: {len(ANSWER)}\r\n\r\n".encode() + ANSWER


class Generator:
    """Run a load in a forked process and steer it through the shared words.

    Args:
        load: class of the load.
        arguments: what its constructor wants after the board.
    """

    def __init__(self, load: type[Load], *arguments: Any) -> None:
        fork = multiprocessing.get_context("fork")
        self.board: Board = fork.RawArray("q", WORDS)
        self._load = partial(load, self.board, *arguments)
        self._process = fork.Process(target=self._run, daemon=True)

    def __enter__(self) -> Generator:
        self._process.start()
        self._wait_until(lambda: self.board[READY] == 1, "clients are not connected")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def _run(self) -> None:
        try:
            uvloop.run(self._load().run())
        except CostError as error:
            sys.exit(f"load: {error}")

    def expect_end(self) -> None:
        """Let the system close the clients' connections from now on."""
        self.board[ENDING] = 1

    def measure(self, system: System, mode: int, warm_up_s: float, seconds: float) -> Round:
        """Run a closed loop, measure it for a time after its warm-up, and let it end."""
        done, frames = self.board[DONE], self.board[FRAMES]
        self.board[RUN] = mode
        time.sleep(warm_up_s)
        t0, done0, cpu0 = time.monotonic(), self.board[DONE], system.cpu_us()
        time.sleep(seconds)
        t1, done1, cpu1 = time.monotonic(), self.board[DONE], system.cpu_us()
        self.board[RUN] = PAUSED
        self._wait_until(lambda: self.board[IN_FLIGHT] == 0, "requests remain unanswered", 15)
        done = self.board[DONE] - done
        self._wait_until(lambda: self.board[FRAMES] - frames >= done, "frames are missing", 5)
        frames = self.board[FRAMES] - frames
        if self.board[FAILED] or frames != done or done1 == done0:
            raise CostError(
                f"{system.name}: {done} answers, {frames} frames, "
                f"{self.board[FAILED]} unexpected ones"
            )
        count = done1 - done0
        return Round((cpu1 - cpu0) / count, count / (t1 - t0), done, frames)

    def _wait_until(self, holds: Callable[[], bool], otherwise: str, timeout_s: int = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            if not self._process.is_alive() or time.monotonic() > deadline:
                raise CostError(f"{otherwise} (words: {list(self.board)})")
            time.sleep(0.01)


@dataclass(frozen=True, slots=True)
class Round:
    """Hold what one round of a closed loop gave."""

    cpu_us: float
    per_second: float
    count: int
    """All requests that were answered, those of the warm-up included."""
    frames: int
    """All frames that reached clients meanwhile."""
