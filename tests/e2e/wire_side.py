"""Stand on both sides of a gateway at once: raw bytes in, and the very bytes that the API gets."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from harness.gateway import GatewayProcess, Option
from harness.http_messages import Response, read_response
from harness.stream import Stream
from harness.wire_api import WireApi
from harness.ws import KEY, WsClient

BASE: Final = b"/base/"
"""The path of --api."""

HTTP_IN_HTTP: Final = b"POST /base/admin HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"
CONTROLS: Final = {
    "CR": b"a\rEvil: 1",
    "LF": b"a\nEvil: 1",
    "NUL": b"a\0b",
    "fold": b"a\r\n Evil: 1",
    "fold-with-tab": b"a\r\n\tEvil: 1",
    "vertical-tab": b"a\x0bb",
    "delete": b"a\x7fb",
}
"""What no field value may hold (RFC 9110, 5.5; RFC 9112, 5.2)."""

_numbers = itertools.count()


def new_marker() -> bytes:
    """Begin the id of a client that nobody else has."""
    return b"smuggler%d-" % next(_numbers)


class Side:
    """Hold a gateway with one worker, and the API behind it."""

    def __init__(self, gateway: GatewayProcess, api: WireApi) -> None:
        self.gateway = gateway
        self.api = api

    def connect(self, target: bytes, *lines: bytes) -> WsClient:
        """Open a WebSocket with more header lines than usual."""
        return RawClient(self.gateway.open_stream(), upgrade(target, *lines))

    def ask(self, request: bytes) -> Response:
        """Send a request that is refused, and see the connection end after the answer."""
        stream = self.gateway.open_stream()
        stream.write(request)
        response = read_response(stream)
        assert response.status >= 400, response
        assert stream.read_to_end() == b"", "bytes after the refusal"
        return response

    def refuse(self, request: bytes, marker: bytes, status: int = 400) -> None:
        """Send a request that the gateway itself refuses: the API hears nothing of it."""
        assert marker in request
        assert self.ask(request).status == status
        assert not [heard for heard in self.api.requests if marker in heard]

    def heard(self, marker: bytes, count: int) -> list[bytes]:
        """Wait for so many requests of a client, and blank what is another each time."""
        return [_blank(request) for request in self.api.await_requests(marker, count)]

    def get(self, marker: bytes) -> bytes:
        """Wait for a client's GET."""
        (request,) = self.heard(b"GET " + BASE + marker, 1)
        return request

    def expected_get(
        self, client_id: bytes, query: bytes = b"", *lines: bytes, address: bytes = b"127.0.0.1"
    ) -> bytes:
        """Return what the API is to get when a client connects."""
        return b"\r\n".join(
            (
                b"GET " + BASE + client_id + query + b" HTTP/1.1",
                b"Host: " + self.api.host,
                b"Ws2api-Generation: N",
                b"Accept-Encoding: identity",
                b"Ws2api-Push-Url: http://127.0.0.1:P/" + client_id,
                *lines,
                b"X-Forwarded-For: " + address,
                b"",
                b"",
            )
        )

    def expected(self, method: bytes, client_id: bytes, line: bytes, body: bytes) -> bytes:
        """Return what the API is to get for a message or a disconnect."""
        binary = b"application/octet-stream"
        type_ = binary if line.endswith(b"binary") else b"text/plain; charset=utf-8"
        return b"\r\n".join(
            (
                method + b" " + BASE + client_id + b" HTTP/1.1",
                b"Host: " + self.api.host,
                b"Ws2api-Generation: N",
                b"Accept-Encoding: identity",
                line.removesuffix(b" binary"),
                b"Content-Type: " + type_,
                b"Content-Length: %d" % len(body),
                b"",
                body,
            )
        )


class RawClient(WsClient):
    """Open a WebSocket with a request of the test's own bytes."""

    def __init__(self, stream: Stream, request: bytes) -> None:
        self.stream = stream
        stream.write(request)
        self.response = read_response(stream)
        assert self.response.status == 101, self.response


def _blank(request: bytes) -> bytes:
    """Blank the generation and the port of the worker."""
    request = re.sub(rb"\r\nWs2api-Generation: \d+\r\n", b"\r\nWs2api-Generation: N\r\n", request)
    return re.sub(rb"(Ws2api-Push-Url: http://127\.0\.0\.1:)\d+/", rb"\1P/", request, count=1)


def upgrade(target: bytes, *lines: bytes) -> bytes:
    """Encode an upgrade request; nothing is checked and nothing is escaped."""
    head = (
        b"GET " + target + b" HTTP/1.1",
        b"Host: gateway.example",
        b"Upgrade: websocket",
        b"Connection: Upgrade",
        b"Sec-WebSocket-Key: " + KEY.encode(),
        b"Sec-WebSocket-Version: 13",
    )
    return b"\r\n".join((*head, *lines, b"", b""))


@contextmanager
def both_sides(**options: Option) -> Iterator[Side]:
    """Run a gateway; in the end no request has reached the API but those of clients."""
    with WireApi() as api:
        url = f"http://127.0.0.1:{api.port}{BASE.decode()}"
        with GatewayProcess(api=url, **options) as gateway:
            yield Side(gateway, api)
        for request in api.requests:
            assert re.match(rb"(GET|POST|DELETE) /base/smuggler\d+-", request), request
        assert not api.unfinished
