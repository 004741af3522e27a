"""Read HTTP/1.1 messages strictly: what a lenient parser would forgive is an error here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .stream import Stream

_FIELD_LINE = re.compile(r"([-!#$%&'*+.^_`|~0-9A-Za-z]+):[ \t]*([^\r\n\0]*?)[ \t]*")
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-5]\d\d) ([^\r\n]*)")


@dataclass(frozen=True)
class Headers:
    """Hold header fields in the order of the wire; names compare without regard to case."""

    pairs: tuple[tuple[str, str], ...]

    def all(self, name: str) -> list[str]:
        """Return the values of every field of that name."""
        return [value for key, value in self.pairs if key.lower() == name.lower()]

    def get(self, name: str) -> str | None:
        """Return the one value of that name, None if it is absent; two are an error."""
        values = self.all(name)
        assert len(values) < 2, f"{name} stands {len(values)} times in {self.pairs}"
        return values[0] if values else None

    def __getitem__(self, name: str) -> str:
        value = self.get(name)
        assert value is not None, f"no {name} in {self.pairs}"
        return value

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self.all(name))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.pairs)


@dataclass(frozen=True)
class Response:
    """Hold one answer that came over HTTP."""

    status: int
    headers: Headers
    body: bytes

    @property
    def text(self) -> str:
        """The body, decoded."""
        return self.body.decode()

    @property
    def keeps_connection(self) -> bool:
        """Whether another request may follow on the same connection."""
        return (self.headers.get("Connection") or "").lower() != "close"


def read_head(stream: Stream) -> tuple[str, Headers]:
    """Read a start line and the header fields."""
    lines = stream.read_through(b"\r\n\r\n").decode("latin-1").split("\r\n")[:-2]
    pairs = []
    for line in lines[1:]:
        field = _FIELD_LINE.fullmatch(line)
        assert field, f"malformed header line {line!r}"
        pairs.append((field[1], field[2]))
    return lines[0], Headers(tuple(pairs))


def read_body(stream: Stream, headers: Headers) -> bytes:
    """Read a body that its length or the chunked coding delimits; without either there is none."""
    coding = headers.get("Transfer-Encoding")
    length = headers.get("Content-Length")
    if coding is None:
        return stream.read_exactly(int(length or 0))
    assert coding.lower() == "chunked", f"unknown coding {coding}"
    assert length is None, "both Content-Length and Transfer-Encoding"
    return b"".join(_read_chunks(stream))


def _read_chunks(stream: Stream) -> Iterator[bytes]:
    while True:
        size = int(stream.read_through(b"\r\n")[:-2], 16)
        chunk = stream.read_exactly(size)
        assert stream.read_exactly(2) == b"\r\n", "chunk without its line end"
        if not size:
            return
        yield chunk


def read_response(stream: Stream, *, to_head: bool = False) -> Response:
    """Read one final answer; with `to_head` it answers a HEAD and has no body."""
    while True:
        line, headers = read_head(stream)
        status = _STATUS_LINE.fullmatch(line)
        assert status, f"malformed status line {line!r}"
        code = int(status[2])
        if code == 101 or code >= 200:
            break
    if to_head or code in (101, 204, 304):
        return Response(code, headers, b"")
    framed = "Content-Length" in headers or "Transfer-Encoding" in headers
    return Response(code, headers, read_body(stream, headers) if framed else stream.read_to_end())


def encode_head(start_line: str, headers: dict[str, str]) -> bytes:
    """Encode a start line and header fields, with the empty line that ends them."""
    lines = [start_line, *(f"{name}: {value}" for name, value in headers.items())]
    return "".join(line + "\r\n" for line in [*lines, ""]).encode("latin-1")
