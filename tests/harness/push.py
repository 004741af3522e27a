"""Push to clients as an API server does: HTTP on a connection that is kept."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

from .http_messages import Response, encode_head, read_response
from .stream import Stream

BINARY = "application/octet-stream"


class PushClient:
    """Hold one keep-alive connection to a push port, opened when it is first needed.

    Args:
        address: host and port.
        token: the bearer token for every request; None sends none.
    """

    def __init__(self, address: tuple[str, int], *, token: str | None = None) -> None:
        self._address = address
        self._token = token
        self._stream: Stream | None = None

    @property
    def stream(self) -> Stream:
        """The connection, for bytes that no HTTP client sends."""
        if self._stream is None:
            self._stream = Stream.open(self._address)
        return self._stream

    def push(
        self,
        client_id: str,
        message: str | bytes,
        *,
        content_type: str | None = None,
        generation: int | None = None,
    ) -> Response:
        """Push a message, text or binary by its type unless a content type is given."""
        self.send_push(client_id, message, content_type=content_type, generation=generation)
        return self.receive()

    def send_push(
        self,
        client_id: str,
        message: str | bytes,
        *,
        content_type: str | None = None,
        generation: int | None = None,
    ) -> None:
        """Send a push without reading the answer."""
        headers = {} if isinstance(message, str) else {"Content-Type": BINARY}
        if content_type is not None:
            headers["Content-Type"] = content_type
        if generation is not None:
            headers["Ws2api-Generation"] = str(generation)
        body = message.encode() if isinstance(message, str) else message
        self.send("POST", f"/{client_id}", body, headers)

    def get(self, client_id: str) -> Response:
        """Ask about a client."""
        return self.request("GET", f"/{client_id}")

    def describe(self, client_id: str) -> dict[str, Any]:
        """Return what the gateway tells about a connected client."""
        response = self.get(client_id)
        assert response.status == 200, response
        assert response.headers["Content-Type"].partition(";")[0] == "application/json"
        described: dict[str, Any] = json.loads(response.body)
        return described

    def delete(
        self, client_id: str, *, code: int | str | None = None, reason: str | None = None
    ) -> Response:
        """Close a client."""
        query = {"code": code, "reason": reason}
        encoded = urlencode({k: v for k, v in query.items() if v is not None})
        return self.request("DELETE", f"/{client_id}" + (f"?{encoded}" if encoded else ""))

    def request(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Response:
        """Send any request and read its answer."""
        self.send(method, target, body, headers)
        return self.receive(to_head=method == "HEAD")

    def send(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Send any request without reading its answer."""
        fields = {"Host": "push.example"}
        if self._token is not None:
            fields["Authorization"] = f"Bearer {self._token}"
        if body is not None:
            fields["Content-Length"] = str(len(body))
        head = encode_head(f"{method} {target} HTTP/1.1", fields | (headers or {}))
        self.send_raw(head + (body or b""))

    def send_raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.stream.write(data)

    def receive(self, *, to_head: bool = False) -> Response:
        """Read the next answer; one that ends the connection closes this end too."""
        response = read_response(self.stream, to_head=to_head)
        if not response.keeps_connection:
            assert self.stream.read_to_end() == b"", "bytes after the last answer"
            self.close()
        return response

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
