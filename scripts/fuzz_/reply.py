"""Any bytes are a reply, or are refused, or are waited for: in every split the same.

What a client gets to see of a reply to its connect is one sound answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import httptools
from ws2api.gateway.errors import HandshakeError
from ws2api.gateway.handshake import (
    Handshake,
    HandshakePolicy,
    allows_retry,
    error_response,
    refusal,
)
from ws2api.gateway.http_wire import ReplyReader, ReplyTooLarge
from ws2api.gateway.reply_body import BodyUnusable
from ws2api.gateway.settings import Settings

from .http import TOKENS, assert_refuses, read_message
from .splits import splits

DICTIONARY = (
    *TOKENS,
    *(b"HTTP/1.1 204 No Content\r\n", b"HTTP/1.1 304 x\r\n", b"HTTP/1.1 403 x\r\n"),
    *(b"HTTP/1.1 503 x\r\n", b"HTTP/1.1 101 x\r\n", b"HTTP/1.0 200 x\r\n", b"ok"),
    *(b"Set-Cookie: a=b\r\n", b"Sec-WebSocket-Protocol: a\r\n", b"Ws2api-Retry: safe\r\n"),
    *(
        b"Content-Encoding: gzip\r\n",
        b"Content-Encoding: deflate\r\n",
        b"Keep-Alive: timeout=5\r\n",
    ),
    *(b"WWW-Authenticate: Basic\r\n", b"Retry-After: 7\r\n"),
)

MAX_BODY_SIZE: Final = 100
_POLICY: Final = HandshakePolicy(Settings(workers=1))
_HANDSHAKE: Final = Handshake(b"me", b"", b"accept", (b"a", b"b"), b"", "192.0.2.1")


@dataclass(frozen=True)
class Reply:
    """Be what became of the bytes."""

    status: int
    body: bytes
    is_text: bool
    retry_after_s: float
    headers: tuple[tuple[bytes, bytes], ...]
    by_eof: bool


INVALID: Final = "invalid"
Outcome = Reply | str | None


def check(data: bytes) -> None:
    """Read a reply from the bytes, in several splits."""
    reader = _reader()
    whole = _read(reader, [data])
    for pieces in splits(data):
        assert _read(_reader(), pieces) == whole, f"in {len(pieces)} pieces"
    if isinstance(whole, Reply):
        assert not 100 <= whole.status < 200
        assert len(whole.body) <= MAX_BODY_SIZE
        assert whole.retry_after_s >= 0
        _answer_client(reader)
        if not whole.by_eof:
            _read_again(data, whole)


def _reader() -> ReplyReader:
    reader = ReplyReader(MAX_BODY_SIZE)
    reader.expect(want_headers=True)
    return reader


def _read(reader: ReplyReader, pieces: Iterable[bytes]) -> Outcome:
    """Feed the pieces and the end of the stream, as a connection does; None if it is cut off."""
    for piece in pieces:
        try:
            reader.feed(piece)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, ReplyTooLarge):
            if not reader.complete:
                return INVALID
        if reader.complete:
            return _outcome(reader, by_eof=False)
    try:
        return _outcome(reader, by_eof=True) if reader.feed_eof() else None
    except BodyUnusable:
        return INVALID


def _outcome(reader: ReplyReader, *, by_eof: bool) -> Reply:
    assert reader.complete
    return Reply(
        reader.status,
        reader.body,
        reader.is_text,
        reader.retry_after_s,
        tuple(reader.headers),
        by_eof,
    )


def _read_again(data: bytes, expected: Reply) -> None:
    """See that a reply leaves nothing behind for the next one of the connection."""
    reader = _reader()
    end = 0
    while not reader.complete:
        reader.feed(data[end : end + 1])
        end += 1
    if reader.keep_alive:
        reader.drop_body()
        reader.expect(want_headers=True)
        assert _read(reader, [data[:end]]) == expected


def _answer_client(reply: ReplyReader) -> None:
    """Answer the client whose connect the reply decides on."""
    allows_retry(reply)
    if reply.status != 200 or reply.body != b"ok":
        assert_refuses(refusal(reply))
        return
    try:
        response, chosen = _POLICY.accept(_HANDSHAKE, reply)
    except HandshakeError as error:
        assert_refuses(error_response(error.status, f"{error}\n".encode()))
        return
    answer = read_message(response)
    assert answer.status == 101
    assert answer.rest == b""
    assert chosen in (b"", *_HANDSHAKE.protocols)
    known = {b"upgrade", b"connection", b"sec-websocket-accept", b"sec-websocket-protocol"}
    assert {name for name, _ in answer.fields} <= known | {b"set-cookie"}
