"""Ask the gateway's admin and push ports over HTTP, with a limit on the time and size of all.

`http.client` rather than aiohttp: it loads in a tenth of the time, and one request at a time is
all that a command needs.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

from .access import Access
from .errors import RefusedError, UnreachableError

_MAX_BYTES: Final = 64 << 20
"""A larger answer comes from something else than a gateway; files have no limit."""
_PIECE_BYTES: Final = 1 << 16
_MAX_REFUSAL_CHARACTERS: Final = 300


@dataclass(frozen=True, slots=True)
class Request:
    """Hold one request.

    Attributes:
        path: begins with a slash, percent-encoded.
        query: those that are None are left out.
        work_s: time that the gateway takes for the work before it answers.
    """

    method: str
    path: str
    query: Mapping[str, object] | None = None
    body: bytes | None = None
    headers: Mapping[str, str] | None = None
    work_s: float = 0.0

    @property
    def target(self) -> str:
        """The path with the query."""
        encoded = urlencode({k: v for k, v in (self.query or {}).items() if v is not None})
        return f"{self.path}?{encoded}" if encoded else self.path


class Port:
    """Ask one port, each time on a connection of its own.

    Args:
        access: where it is, and the token.
        timeout_s: for one answer, beyond the time that the gateway needs for the work.
    """

    def __init__(self, access: Access, timeout_s: float) -> None:
        self.access = access
        self._timeout_s = timeout_s
        self._base = urlsplit(access.url)

    def __str__(self) -> str:
        return f"the {self.access.port} at {self.access.url}"

    def ask(self, request: Request) -> bytes:
        """Send a request; return the body of the answer.

        Raises:
            RefusedError: if its status is not one of success.
            UnreachableError: if there is no answer, or none in time.
        """
        with self._answer(request) as response:
            return b"".join(self._pieces(response))

    def ask_object(
        self, method: str, path: str, query: Mapping[str, object] | None = None
    ) -> dict[str, Any]:
        """Do as `ask` does; return the JSON object that the gateway answered."""
        value = parse_object(self.ask(Request(method, path, query)))
        if value is None:
            raise UnreachableError(f"{self} answers {method} {path} as no gateway does")
        return value

    @contextlib.contextmanager
    def download(self, request: Request) -> Iterator[Iterator[bytes]]:
        """Do as `ask` does; give the body in pieces, because it may be large."""
        with self._answer(request) as response:
            yield self._stream(response)

    @contextlib.contextmanager
    def _answer(self, request: Request) -> Iterator[http.client.HTTPResponse]:
        """Send a request; give the answer, whose body is not yet read, if it is one of success."""
        timeout_s = self._timeout_s + request.work_s
        connection = self._connection(timeout_s)
        try:
            with self._translating(timeout_s), _cut_after(timeout_s, connection):
                self._send(connection, request)
                response = connection.getresponse()
            if not 200 <= response.status <= 299:
                raise self._refusal(request, response.status, b"".join(self._pieces(response)))
            yield response
        finally:
            connection.close()

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        is_tls = self._base.scheme == "https"
        kind = http.client.HTTPSConnection if is_tls else http.client.HTTPConnection
        return kind(self._base.hostname or "", self._base.port, timeout=timeout_s)

    def _send(self, connection: http.client.HTTPConnection, request: Request) -> None:
        fields = {"Connection": "close", "User-Agent": "ws2api-ctl", **(request.headers or {})}
        if self.access.token is not None:
            fields["Authorization"] = f"Bearer {self.access.token}"
        connection.connect()
        # One that is refused half-way, as it is too large, has an answer nevertheless.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(
                request.method, self._base.path + request.target, request.body, fields
            )

    def _pieces(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """Yield the body; all of it must come in time, and be no larger than the limit."""
        deadline, size = time.monotonic() + self._timeout_s, 0
        for piece in self._stream(response):
            size += len(piece)
            if size > _MAX_BYTES:
                raise UnreachableError(f"{self} answers with more than any gateway does")
            if time.monotonic() > deadline:
                raise self._late(self._timeout_s)
            yield piece

    def _stream(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """Yield the body, and hold it to the size that was announced."""
        with self._translating(self._timeout_s):
            try:
                while piece := response.read1(_PIECE_BYTES):
                    yield piece
            except (http.client.IncompleteRead, ConnectionError):
                raise self._broken_off() from None
            if response.length:
                raise self._broken_off()

    @contextlib.contextmanager
    def _translating(self, timeout_s: float) -> Iterator[None]:
        """Turn what a socket and a parser raise into one line."""
        try:
            yield
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # Unicode: a host name
            if isinstance(error, TimeoutError):
                raise self._late(timeout_s) from None
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UnreachableError(
                f"cannot reach {self}: {why}; is the gateway running? "
                f"{self.access.option} URL or --config FILE says where it is"
            ) from None

    def _late(self, timeout_s: float) -> UnreachableError:
        return UnreachableError(
            f"{self} did not answer within {timeout_s:g} s; --timeout waits longer"
        )

    def _broken_off(self) -> UnreachableError:
        return UnreachableError(f"{self} has ended in the midst of its answer; was it reloaded?")

    def _refusal(self, request: Request, status: int, body: bytes) -> RefusedError:
        """Put a status that is not one of success into words."""
        access = self.access
        told = parse_object(body) or {}
        text = told.get("error") or _first_line(body) or http.client.responses.get(status, "")
        if status == 401 and access.token is None:
            text = f"the {access.port} wants a token: give it with {access.token_hint}"
        elif status == 401:
            text = f"the {access.port} does not accept the token of {access.source}"
        elif status in (404, 405) and access.option == "--admin" and "error" not in told:
            text = f"{self} knows no {request.method} {request.path}; is it of this version?"
        return RefusedError(str(text)[:_MAX_REFUSAL_CHARACTERS], status)


@contextlib.contextmanager
def _cut_after(timeout_s: float, connection: http.client.HTTPConnection) -> Iterator[None]:
    """Cut a connection off whose answer trickles: the socket's own limit is for each step."""

    is_late = threading.Event()

    def cut() -> None:
        is_late.set()
        with contextlib.suppress(OSError):
            if connection.sock is not None:
                connection.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(timeout_s, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception:
        if not is_late.is_set():
            raise
    finally:
        timer.cancel()
    if is_late.is_set():  # the parser takes the end of the connection for the end of the head
        raise TimeoutError


def parse_object(body: bytes) -> dict[str, Any] | None:
    """Return the JSON object that bytes are; None if they are none."""
    try:
        value = json.loads(body)
    except ValueError:  # also for bytes that are no UTF-8
        return None
    return value if isinstance(value, dict) else None


def _first_line(body: bytes) -> str:
    return body.decode(errors="replace").strip().partition("\n")[0]
