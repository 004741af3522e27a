"""Any bytes are a head, or are refused, or are waited for: in every split the same.

What the policy makes of a head is one sound request to the API, in which nothing stands that the
client did not send, and a 101; or a refusal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

from ws2api.gateway.client_id import normalise_client_id
from ws2api.gateway.errors import HandshakeError
from ws2api.gateway.handshake import (
    HandshakePolicy,
    RequestHead,
    error_response,
    to_origin_form,
)
from ws2api.gateway.http_wire import ReplyReader, RequestEncoder
from ws2api.gateway.settings import ApiUrl, Settings

from .http import TOKENS, assert_refuses, read_message
from .splits import splits

DICTIONARY = (
    *TOKENS,
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
    b"Sec-WebSocket-Version: 13\r\n",
    b"Sec-WebSocket-Protocol: a, b\r\n",
    b"Origin: https://app.example\r\n",
    b"X-Forwarded-For: 10.0.0.1\r\n",
    b"Cookie: a=b\r\n",
)

PEER: Final = "192.0.2.7"
_POLICIES: Final = (
    HandshakePolicy(Settings(workers=1)),
    HandshakePolicy(
        Settings(
            workers=1,
            forward_header=("X-Tenant",),
            trusted_proxy=("192.0.2.0/24",),
            allow_origin=("https://*.example",),
            subprotocol=("b",),
        )
    ),
    HandshakePolicy(Settings(workers=1, path=("/{id...}",))),
)
_OWN_FIELDS: Final = {
    *(b"host", b"ws2api-generation", b"ws2api-push-url", b"accept-encoding"),
}
_ENCODER: Final = RequestEncoder(ApiUrl("api", 80, False, "/base", "api"))


REFUSED: Final = "refused"
"""What becomes of bytes that are no head; which of two reasons counts may depend on the split."""


@dataclass(frozen=True)
class Head:
    """Be what becomes of bytes that are one."""

    method: bytes
    target: bytes
    headers: dict[bytes, bytes]
    is_upgrade: bool
    has_body: bool
    rest: bytes


def check(data: bytes) -> None:
    """Read a head from the bytes, in several splits, and judge it."""
    whole = _read([data])
    for pieces in splits(data):
        assert _read(pieces) == whole, f"in {len(pieces)} pieces"
    if isinstance(whole, Head):
        for policy in _POLICIES:
            _judge(policy, data, whole)


def _read(pieces: Iterable[bytes]) -> Head | str | None:
    """Return None while more is waited for."""
    head = RequestHead()
    left = list(pieces)
    while left:
        try:
            if not head.feed(left.pop(0)):
                continue
        except HandshakeError:
            return REFUSED
        rest = head.rest + b"".join(left) if head.is_upgrade else b""
        return Head(head.method, head.target, head.headers, head.is_upgrade, head.has_body, rest)
    return None


def _judge(policy: HandshakePolicy, data: bytes, expected: Head) -> None:
    head = RequestHead()
    assert head.feed(data)
    try:
        handshake = policy.check(head, PEER)
    except HandshakeError as error:
        text = f"{error}\n".encode()
        assert_refuses(error_response(error.status, text, b"", error.header_lines), text)
        return
    assert (expected.method, expected.has_body, expected.is_upgrade) == (b"GET", False, True)
    wire = _ENCODER.connect(
        handshake.client_id, handshake.query, 17, b"http://gateway:7002/x", handshake.header_lines
    )
    request = read_message(wire)
    path, mark, query = to_origin_form(expected.target).partition(b"?")
    client_id = handshake.client_id
    assert normalise_client_id(client_id, is_several=True) == client_id
    assert unquote_to_bytes(b"/" + client_id) == unquote_to_bytes(path)
    assert request.start_line == b"GET /base/%b%b HTTP/1.1" % (client_id, mark + query)
    assert request.rest == b""
    names = [name for name, _ in request.fields]
    assert len(set(names)) == len(names), wire
    for name, value in request.fields:
        if name == b"ws2api-path":
            assert value == path
        elif name == b"x-forwarded-for":
            assert value.endswith(PEER.encode())
        elif name not in _OWN_FIELDS:
            # What was joined with an empty value ends with a blank.
            assert value == expected.headers[name].strip(b" \t"), name
    response, chosen = policy.accept(handshake, ReplyReader(0))
    answer = read_message(response)
    assert answer.status == 101
    assert not chosen or chosen in handshake.protocols
    assert (answer.get(b"sec-websocket-protocol") or b"") == chosen
    assert answer.rest == b""
