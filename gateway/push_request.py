"""Make an ask of a request to the push port, and an HTTP answer of its outcome: pure."""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qs

from . import outcomes
from .ask import Ask
from .client_paths import IDS, ClientPaths
from .envelope import CLOSE, DESCRIBE, PUSH
from .errors import HandshakeError
from .frames import BINARY, TEXT, is_utf8
from .handshake import split_target

_MAX_REASON_BYTES: Final = 123  # RFC 6455, 5.5: 125 bytes less the code

OK: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 2\r\n\r\nok"
)
"""The answer to most pushes."""


def fill(
    ask: Ask,
    method: bytes,
    target: bytes,
    generation: bytes | None,
    binary: bool,
    body: bytes,
    paths: ClientPaths = IDS[False],
) -> tuple[int, bytes] | None:
    """Make the ask what the request says; return an outcome if it says nothing sound.

    Args:
        target: of the request line.
        generation: value of Ws2api-Generation, None when there is none.
        binary: whether the body is a binary message.
        paths: says where in the target the id is.
    """
    try:
        ask.client_id, query = split_target(target, paths)
    except HandshakeError as error:
        return outcomes.BAD_REQUEST, f"{error}\n".encode()
    if generation is not None:
        if not generation.isdigit() or len(generation) > 18:
            return outcomes.BAD_REQUEST, b"Ws2api-Generation must be a number\n"
        ask.generation = int(generation)
    if method == b"POST":
        return _fill_push(ask, binary, body)
    if method == b"GET":
        ask.kind = DESCRIBE
        return None
    if method == b"DELETE":
        return _fill_close(ask, query)
    return outcomes.METHOD_NOT_ALLOWED, b""


def _fill_push(ask: Ask, binary: bool, body: bytes) -> tuple[int, bytes] | None:
    ask.kind = PUSH
    ask.payload = body
    ask.code = BINARY if binary else TEXT
    if not binary and not is_utf8(body):
        return outcomes.BAD_REQUEST, b"a text message must be UTF-8\n"
    return None


def _fill_close(ask: Ask, query: bytes) -> tuple[int, bytes] | None:
    ask.kind = CLOSE
    try:
        fields = parse_qs(query[1:].decode("ascii"), keep_blank_values=True, errors="strict")
        code = _number(fields.get("code", ["1000"])[-1])
        reason = fields.get("reason", [""])[-1].encode("utf-8")
        reason.decode()
    except ValueError:
        return outcomes.BAD_REQUEST, b"code must be a number and reason UTF-8\n"
    # What an application may send, RFC 6455, 7.4: 1000 to 1003, 1007 to 1014, 3000 to 4999.
    if not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999) or code == 1010:
        return outcomes.BAD_REQUEST, b"this close code may not be sent\n"
    if len(reason) > _MAX_REASON_BYTES:
        return outcomes.BAD_REQUEST, b"the reason exceeds 123 bytes\n"
    ask.code = code
    ask.payload = reason
    return None


def _number(text: str) -> int:
    """Read digits, and nothing else that `int` would take."""
    if not (text.isascii() and text.isdigit()):
        raise ValueError
    return int(text)


def encode_answer(
    outcome: int, body: bytes, *, is_last: bool, with_body: bool, is_kept_alive: bool = False
) -> bytes:
    """Return the HTTP answer to an outcome.

    Args:
        body: what to answer; empty for what the outcome says by itself.
        is_last: whether the connection ends after it.
        with_body: False for the answer to a HEAD (RFC 9110, 9.3.2).
        is_kept_alive: whether to say that it does not end.
    """
    if not (outcome or body or is_last or is_kept_alive) and with_body:  # OK is 0
        return OK
    status, text, _ = outcomes.ANSWERS[outcome]
    content_type = b"application/json" if body.startswith(b"{") else b"text/plain; charset=utf-8"
    extra = outcomes.HEADER_LINES.get(outcome, b"")
    if is_last:
        extra += b"Connection: close\r\n"
    elif is_kept_alive:
        extra += b"Connection: keep-alive\r\n"
    body = body or text
    return b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n%b\r\n%b" % (
        status,
        content_type,
        len(body),
        extra,
        body if with_body else b"",
    )
