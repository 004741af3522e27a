"""Play the API server behind the gateway: record each request, answer as the test scripts it."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final, Literal, Protocol
from urllib.parse import urlsplit

from .http_messages import Headers, encode_head, read_body, read_head
from .ports import free_port
from .stream import Stream
from .waiting import DEADLINE_S, until

MAX_CONNECTIONS: Final = 2000
"""More than any test needs; a gateway that opens more is broken."""

FRAMED_METHODS: Final = {"POST", "DELETE"}
"""Methods whose requests must carry a Content-Length."""


@dataclass(frozen=True)
class Request:
    """Hold one request as the gateway sent it."""

    method: str
    target: str
    headers: Headers
    body: bytes
    connection: int
    """Which TCP connection it came on, counted from 0."""

    @property
    def client_id(self) -> str:
        """The last segment of the path, as it stood on the wire."""
        return self.target.partition("?")[0].rpartition("/")[2]

    @property
    def query(self) -> str:
        """What follows the question mark, empty if there is none."""
        return self.target.partition("?")[2]

    @property
    def text(self) -> str:
        """The body, decoded."""
        return self.body.decode()

    @property
    def generation(self) -> int:
        """The birth of the client's connection, in microseconds."""
        return int(self.headers["Ws2api-Generation"])

    @property
    def sequence(self) -> int:
        """The number of the message within the generation."""
        return int(self.headers["Ws2api-Sequence"])

    @property
    def close_code(self) -> int:
        """The close code that a DELETE tells."""
        return int(self.headers["Ws2api-Close-Code"])

    @property
    def worker_address(self) -> tuple[str, int]:
        """The push address of the worker that holds the client."""
        url = urlsplit(self.headers["Ws2api-Push-Url"])
        assert url.hostname, url
        assert url.port, url
        return url.hostname, url.port


class Answer(Protocol):
    """Say how a request is answered."""

    def send(self, stream: Stream) -> bool:
        """Write to the gateway; return whether the connection stays open."""
        ...


Handler = Callable[[Request], Answer]


@dataclass(frozen=True)
class Reply:
    """Answer in well-formed HTTP, framed one way or another, in one piece or chopped."""

    body: bytes | str = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "text/plain"
    framing: Literal["length", "chunked", "close", "eof"] = "length"
    chop: int | None = None
    """Send pieces of so many bytes; None sends one piece."""

    def send(self, stream: Stream) -> bool:
        stream.write(self._head() + self._framed_body(), chop=self.chop)
        return self.framing in ("length", "chunked")

    def _head(self) -> bytes:
        version = "HTTP/1.0" if self.framing == "eof" else "HTTP/1.1"
        headers = dict(self.headers)
        if self._content:
            headers = {"Content-Type": self.content_type} | headers
        if self.framing == "chunked":
            headers["Transfer-Encoding"] = "chunked"
        elif self.framing != "eof" and self.status != HTTPStatus.NO_CONTENT:
            headers["Content-Length"] = str(len(self._content))
        if self.framing == "close":
            headers["Connection"] = "close"
        phrase = HTTPStatus(self.status).phrase
        return encode_head(f"{version} {self.status} {phrase}", headers)

    def _framed_body(self) -> bytes:
        if self.framing != "chunked":
            return self._content
        size = max(1, len(self._content) // 3)
        pieces = [self._content[i : i + size] for i in range(0, len(self._content), size)]
        chunks = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces]
        return b"".join([*chunks, b"0\r\n\r\n"])

    @property
    def _content(self) -> bytes:
        return self.body.encode() if isinstance(self.body, str) else self.body


@dataclass(frozen=True)
class Raw:
    """Answer with these very bytes; unless told otherwise, nothing ends the connection."""

    data: bytes
    then_close: bool = False

    def send(self, stream: Stream) -> bool:
        stream.write(self.data)
        return not self.then_close


@dataclass(frozen=True)
class Drop:
    """Close the connection instead of answering, with a FIN or a RST."""

    reset: bool = False

    def send(self, stream: Stream) -> bool:
        if self.reset:
            stream.reset()
        return False


class Hold:
    """Keep a request waiting until the test releases it, then answer.

    Args:
        answer: what to send in the end.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._released = threading.Event()

    def release(self) -> None:
        """Let this request, and all later ones, be answered."""
        self._released.set()

    def send(self, stream: Stream) -> bool:
        self._released.wait(DEADLINE_S)
        return self._answer.send(stream)


def echo(request: Request) -> Reply:
    """Answer a message with itself."""
    binary = request.headers["Content-Type"] == "application/octet-stream"
    return Reply(request.body, content_type="application/octet-stream" if binary else "text/plain")


DEFAULT_ANSWERS: Final[dict[str, Answer]] = {
    "GET": Reply("ok"),
    "POST": Reply(),
    "DELETE": Reply("ok"),
}


class FakeApi:
    """Serve HTTP on a loopback port, a thread for each connection.

    Requests are recorded before they are answered. Closing keeps the port reserved, so that
    connections are refused until the same object opens again.

    Args:
        tls: serve https with this context; None serves http.
    """

    def __init__(self, *, tls: ssl.SSLContext | None = None) -> None:
        self.violations: list[str] = []
        """What the gateway sent that no HTTP client may send; tests assert that it is empty."""
        self._tls = tls
        self._lock = threading.Lock()
        self._recorded: list[Request] = []
        self._scripts: dict[tuple[str, str], deque[Answer | Handler]] = {}
        self._under_way: dict[tuple[str, str], int] = {}
        self._most_at_once: dict[tuple[str, str], int] = {}
        self._streams: dict[int, Stream] = {}
        self._threads: list[threading.Thread] = []
        self._connections_accepted = 0
        # By number: only such a binding outlives the end of listening.
        self.port = free_port()
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self.port))
        self.open()

    @property
    def url(self) -> str:
        """The value for --api."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/"

    def __enter__(self) -> FakeApi:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
        self._listener.close()

    def open(self) -> None:
        """Accept connections, for the first time or again."""
        self._listener.listen(1024)
        thread = threading.Thread(target=self._accept, name="api accept")
        self._threads = [thread]
        thread.start()

    def close(self) -> None:
        """End every connection and refuse new ones."""
        self._release_all()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(DEADLINE_S)
        with self._lock:
            streams = list(self._streams.values())
        for stream in streams:
            with contextlib.suppress(OSError):
                stream.socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), f"{thread.name} does not end"

    def on(self, client_id: str, method: str, *answers: Answer | Handler) -> None:
        """Script the answers to a client's requests of one method; the last one repeats."""
        with self._lock:
            self._scripts[client_id, method] = deque(answers)

    def requests(self, client_id: str, method: str | None = None) -> list[Request]:
        """Return what a client has caused so far, in the order of arrival."""
        with self._lock:
            recorded = list(self._recorded)
        return [r for r in recorded if r.client_id == client_id and method in (None, r.method)]

    def wait_for(self, client_id: str, method: str, *, count: int = 1) -> list[Request]:
        """Wait until so many requests of a client have arrived; return all of them."""
        return until(
            lambda: (found := self.requests(client_id, method))[count - 1 :] and found,
            what=f"{count} × {method} of {client_id}, got {self.requests(client_id)}",
        )

    def wait_for_one(self, client_id: str, method: str) -> Request:
        """Wait for the first request of this kind, and return it."""
        return self.wait_for(client_id, method)[0]

    def texts(self, client_id: str) -> list[str]:
        """Return the messages that a client has sent so far."""
        return [request.text for request in self.requests(client_id, "POST")]

    def most_at_once(self, client_id: str, method: str) -> int:
        """Return how many requests of this kind were under way at the same time, at most."""
        with self._lock:
            return self._most_at_once.get((client_id, method), 0)

    def _release_all(self) -> None:
        with self._lock:
            answers = [answer for script in self._scripts.values() for answer in script]
        for answer in answers:
            if isinstance(answer, Hold):
                answer.release()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was shut down
            while True:
                sock, _ = self._listener.accept()
                self._start(sock)

    def _start(self, sock: socket.socket) -> None:
        number = self._connections_accepted
        self._connections_accepted += 1
        if len(self._streams) >= MAX_CONNECTIONS:
            self.violations.append("too many connections")
            sock.close()
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = Stream(sock, timeout_s=None)
        with self._lock:
            self._streams[number] = stream
        name = f"api connection {number}"
        thread = threading.Thread(target=self._serve, args=(stream, number), name=name)
        self._threads.append(thread)
        thread.start()

    def _serve(self, stream: Stream, number: int) -> None:
        try:
            with contextlib.suppress(EOFError, OSError):  # the gateway has left
                if self._tls:
                    stream.socket = self._tls.wrap_socket(stream.socket, server_side=True)
                while self._serve_request(stream, number):
                    pass
        except AssertionError as error:
            self.violations.append(str(error))
        finally:
            stream.close()
            with self._lock:
                del self._streams[number]

    def _serve_request(self, stream: Stream, number: int) -> bool:
        line, headers = read_head(stream)
        method, target, version = line.split(" ")
        assert version == "HTTP/1.1", line
        assert headers["Host"] == f"127.0.0.1:{self.port}", headers
        assert method not in FRAMED_METHODS or "Content-Length" in headers, f"{line}: unframed"
        request = Request(method, target, headers, read_body(stream, headers), number)
        answer = self._record(request)
        try:
            if callable(answer):
                answer = answer(request)
            return answer.send(stream)
        finally:
            with self._lock:
                self._under_way[request.client_id, method] -= 1

    def _record(self, request: Request) -> Answer | Handler:
        key = request.client_id, request.method
        with self._lock:
            self._recorded.append(request)
            busy = self._under_way[key] = self._under_way.get(key, 0) + 1
            self._most_at_once[key] = max(busy, self._most_at_once.get(key, 0))
            script = self._scripts.get(key)
            if script is None:
                return DEFAULT_ANSWERS[request.method]
            return script.popleft() if len(script) > 1 else script[0]
