"""Read HTTP strictly, as whoever gets what the gateway writes may do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

TOKENS: Final = (
    *(b"GET ", b"POST ", b"DELETE ", b"HEAD ", b"CONNECT ", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    *(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
    *(b"\r\n", b"\r\n\r\n", b"\n", b"\0", b"\r\n ", b"\r\n\t", b": ", b" :", b"\x80", b"%2e", b"?"),
    *(b"Content-Length: 5\r\n", b"Content-Length: 5 \r\n", b"Content-Length: 0000000000000005\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n"),
    *(b"5\r\nhello\r\n", b"0\r\n\r\n", b"0\r\nTrailer: x\r\n\r\n", b"5;extension=1\r\nhello\r\n"),
    *(b"Connection: close\r\n", b"Connection: keep-alive\r\n", b"Connection: Upgrade\r\n"),
    *(b"Upgrade: h2c\r\n", b"Upgrade: websocket\r\n", b"Expect: 100-continue\r\n"),
    *(b"Host: x\r\n", b"Content-Type: application/octet-stream\r\n", b"http://x/"),
)

_STATUS_LINE: Final = re.compile(rb"HTTP/1\.1 ([1-5]\d\d) [ -~]+")
_FIELD_LINE: Final = re.compile(rb"([-!#$%&'*+.^_`|~0-9A-Za-z]+):[ \t]*([\t -~\x80-\xff]*)")


@dataclass(frozen=True)
class Message:
    """Hold a request or an answer whose head is well-formed."""

    start_line: bytes
    fields: list[tuple[bytes, bytes]]
    """Names in small letters."""
    rest: bytes
    """What follows the head."""

    @property
    def status(self) -> int:
        """The status of an answer."""
        match = _STATUS_LINE.fullmatch(self.start_line)
        assert match, self.start_line
        return int(match[1])

    def get(self, name: bytes) -> bytes | None:
        """Return a field's value, None if it is absent; it may not stand there twice."""
        values = [value for key, value in self.fields if key == name]
        assert len(values) < 2, self.fields
        return values[0] if values else None


def read_message(wire: bytes) -> Message:
    """Read the message at the front."""
    head, end, rest = wire.partition(b"\r\n\r\n")
    assert end, wire
    start_line, *lines = head.split(b"\r\n")
    fields = []
    for line in lines:
        match = _FIELD_LINE.fullmatch(line)
        assert match, wire
        fields.append((match[1].lower(), match[2].strip(b" \t")))
    return Message(start_line, fields, rest)


def assert_refuses(wire: bytes, body: bytes | None = None) -> None:
    """See that it is one answer that refuses, and the last of its connection."""
    answer = read_message(wire)
    assert 400 <= answer.status <= 599, wire
    assert answer.get(b"connection") == b"close", wire
    assert int(answer.get(b"content-length") or b"-1") == len(answer.rest), wire
    assert body is None or answer.rest == body, wire
