"""Read opening handshakes in every split, judge them, and answer them."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
from itertools import pairwise
from typing import Any
from urllib.parse import unquote_to_bytes

import httptools
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ws2api.gateway.errors import HandshakeError, HeadTooLarge, OriginRefused, UpgradeRequired
from ws2api.gateway.handshake import (
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    MAX_LINE_BYTES,
    Handshake,
    HandshakePolicy,
    RequestHead,
    allows_retry,
    error_response,
    refusal,
    split_target,
    to_origin_form,
)
from ws2api.gateway.http_wire import ReplyReader
from ws2api.gateway.settings import Settings

PEER = "192.0.2.7"
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # of that key, RFC 6455, 1.3

UPGRADE_FIELDS = {
    "Host": "gateway.example",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": KEY,
    "Sec-WebSocket-Version": "13",
}


def upgrade(
    target: str = "/me",
    changes: dict[str, str | None] | None = None,
    *lines: str,
    method: str = "GET",
) -> bytes:
    """Encode an upgrade request; a change to None leaves a field out, lines come in addition."""
    fields = UPGRADE_FIELDS | (changes or {})
    all_lines = [
        f"{method} {target} HTTP/1.1",
        *(f"{name}: {value}" for name, value in fields.items() if value is not None),
        *lines,
    ]
    return "".join(line + "\r\n" for line in [*all_lines, ""]).encode("latin-1")


def head_of(*pieces: bytes) -> RequestHead:
    """Feed pieces; the head must be complete with the last."""
    head = RequestHead()
    *before, last = [head.feed(piece) for piece in pieces]
    assert not any(before)
    assert last
    return head


def policy(**options: Any) -> HandshakePolicy:
    return HandshakePolicy(Settings(**{"workers": 1, **options}))


PLAIN_POLICY = policy()


def check(request: bytes, peer: str = PEER, **options: Any) -> Handshake:
    return (policy(**options) if options else PLAIN_POLICY).check(head_of(request), peer)


def refused(request: bytes, **options: Any) -> HandshakeError:
    """Return the error that refuses a request."""
    with pytest.raises(HandshakeError) as caught:
        check(request, **options)
    return caught.value


def lines_of(handshake: Handshake) -> list[str]:
    """Return what the API is told of the client's headers."""
    assert handshake.header_lines.endswith(b"\r\n")
    return handshake.header_lines.decode("latin-1").split("\r\n")[:-1]


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    """Split data; a cut is taken modulo the length."""
    positions = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in pairwise(positions)]


def bytes_of(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


# The head.


def test_reads_a_head() -> None:
    head = head_of(upgrade("/me?a=b", {"X-A": "one", "x-a": "two"}) + b"\x81\x80more")
    assert (head.method, head.target) == (b"GET", b"/me?a=b")
    assert head.headers[b"host"] == b"gateway.example"
    assert head.headers[b"x-a"] == b"one, two"
    assert head.is_upgrade
    assert head.wants_websocket
    assert not head.has_body
    assert head.rest == b"\x81\x80more"


def test_plain_request_is_no_upgrade() -> None:
    head = head_of(b"POST /me HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")
    assert (head.method, head.is_upgrade, head.wants_websocket) == (b"POST", False, False)
    assert head.has_body


@pytest.mark.parametrize("trailer", [b"X-A: b\r\n", b"Upgrade: websocket\r\n", b"Host: b\r\n"])
def test_trailer_is_no_header(trailer: bytes) -> None:
    head = b"POST /me HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    read = head_of(head + b"0\r\n" + trailer + b"\r\n")
    assert read.headers == {b"host": b"a", b"transfer-encoding": b"chunked"}


def test_upgrade_to_something_else_does_not_want_a_websocket() -> None:
    head = head_of(upgrade("/me", {"Upgrade": "h2c"}))
    assert head.is_upgrade
    assert not head.wants_websocket


def test_cookies_are_joined_as_cookies() -> None:
    head = head_of(upgrade("/me", {}, "Cookie: a=1", "cookie: b=2"))
    assert head.headers[b"cookie"] == b"a=1; b=2"


def outcome_of(pieces: list[bytes]) -> tuple[object, ...]:
    """Return what becomes of a stream: its head, its error, or that more is waited for."""
    head = RequestHead()
    for number, piece in enumerate(pieces):
        try:
            complete = head.feed(piece)
        except HandshakeError as error:
            return (type(error),)
        if complete:
            rest = head.rest + b"".join(pieces[number + 1 :]) if head.is_upgrade else b""
            return head.method, head.target, head.headers, head.is_upgrade, head.has_body, rest
    return ()


streams = st.lists(
    st.one_of(
        st.sampled_from(
            (
                upgrade(),
                upgrade("/me?x=%20y", {"Cookie": "a=b"}, "cookie: c=d") + b"\x81\x85mask",
                upgrade("/me", {"Upgrade": "h2c", "Content-Length": "2"}) + b"hi",
                upgrade("/me", {}, "Host: twice"),
                upgrade("/me", {"X": "\x01"}),
                upgrade("/me", {"X": "caf\xe9"}),
                upgrade(f"/{'x' * 9000}"),
                upgrade("/me", {f"X{i}": "y" * 1000 for i in range(30)}),
                upgrade("/me", {f"X{i}": "" for i in range(101)}),
                b"POST /me HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi",
                b"GET /a? HTTP/1.1\r\n\r\n",
                b"GET / HTTP/1.0\r\nHost: a\r\n\r\n",
                b"\r\n",
            )
        ),
        st.binary(max_size=30),
    ),
    max_size=3,
).map(b"".join)


@settings(deadline=None, max_examples=200)
@given(streams, st.lists(st.integers(0, 40_000), max_size=6))
def test_any_split_gives_the_same_head(data: bytes, cuts: list[int]) -> None:
    assert outcome_of(pieces_of(data, cuts)) == outcome_of([data])


@settings(deadline=None, max_examples=30)
@given(streams)
def test_byte_by_byte_gives_the_same_head(data: bytes) -> None:
    assert outcome_of(bytes_of(data)) == outcome_of([data])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.binary(min_size=1, max_size=100), max_size=8))
def test_random_bytes_are_refused_or_waited_for(pieces: list[bytes]) -> None:
    outcome_of(pieces)
    outcome_of([b"GET /me HTTP/1.1\r\n", *pieces])


def test_requests_in_one_packet_are_not_mixed() -> None:
    head = head_of(b"POST /a? HTTP/1.1\r\nContent-Length: 0\r\n\r\n" + upgrade("/b"))
    assert (head.method, head.target, head.headers) == (b"POST", b"/a?", {b"content-length": b"0"})
    assert not head.is_upgrade


@pytest.mark.parametrize(
    "wire",
    [
        b"nonsense\r\n\r\n",
        b"GET\r\n\r\n",
        b"get /me HTTP/1.1\r\n\r\n",
        b"GET /me HTTP/0.9\r\nHost: a\r\n\r\n",
        b"GET /me HTTP/2.0\r\nHost: a\r\n\r\n",
        b"GET /me\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
        b"GET /m\x01e HTTP/1.1\r\n\r\n",
        b"GET /m e HTTP/1.1\r\n\r\n",
        # What one parser reads otherwise than the next.
        upgrade("/me", {}, "X: a", " folded: b"),
        upgrade("/me", {}, "X: a", "\tfolded"),
        upgrade("/me", {}, " X: a"),
        upgrade("/me", {}, "X : a"),
        upgrade("/me", {}, "X Y: a"),
        upgrade("/me", {}, ": a"),
        upgrade("/me", {}, "no colon"),
        upgrade("/me", {"X": "a\0b"}),
        upgrade("/me", {"X": "a\rb"}),
        upgrade("/me", {"X": "a\nY: b"}),
        upgrade("/me", {"X": "\x7f"}),
        upgrade("/me", {"X": "\x1b[31m"}),
        upgrade().replace(b"\r\n", b"\n"),
        upgrade("/me", {"Content-Length": "2", "Transfer-Encoding": "chunked"}),
        upgrade("/me", {"Transfer-Encoding": "chunked", "Content-Length": "2"}),
        upgrade("/me", {"Content-Length": "2"}, "Content-Length: 2"),
        upgrade("/me", {"Content-Length": "0"}, "Content-Length: 2"),
        upgrade("/me", {"Content-Length": "-1"}),
        upgrade("/me", {"Content-Length": "0x2"}),
        upgrade("/me", {"Content-Length": "1, 1"}),
        upgrade("/me", {"Transfer-Encoding": "chunked"}, "Transfer-Encoding: chunked"),
    ],
)
def test_malformed_request_is_refused_in_any_split(wire: bytes) -> None:
    for pieces in ([wire], bytes_of(wire)):
        outcome = outcome_of(pieces)
        assert outcome == (HandshakeError,), "neither accepted nor waited for"


@pytest.mark.parametrize(
    "name",
    [
        *("Host", "Origin", "Authorization", "User-Agent"),
        *("Sec-WebSocket-Key", "Sec-WebSocket-Version", "sec-websocket-key"),
    ],
)
def test_field_that_may_stand_once_is_refused_twice(name: str) -> None:
    wire = upgrade("/me", {}, f"{name}: 13", f"{name.upper()}: 13")
    with pytest.raises(HandshakeError, match=r"is sent twice"):
        RequestHead().feed(wire)


# Limits of the head.


@pytest.mark.parametrize(
    "wire",
    [
        upgrade(f"/{'x' * MAX_LINE_BYTES}"),
        upgrade("/me", {"X": "y" * MAX_LINE_BYTES}),
        upgrade("/me", {"X" * MAX_LINE_BYTES: "y"}),
        upgrade("/me", {f"X{i}": "y" for i in range(MAX_HEADERS)}),
        upgrade("/me", {f"X{i}": "y" * 4000 for i in range(5)}),
    ],
    ids=["line", "value", "name", "count", "sum"],
)
def test_head_that_is_too_large_is_refused_in_any_split(wire: bytes) -> None:
    for pieces in ([wire], pieces_of(wire, list(range(0, len(wire), 1400))), bytes_of(wire)):
        assert outcome_of(pieces) == (HeadTooLarge,)


@pytest.mark.parametrize("start", [b"GET /", b"GET /me HTTP/1.1\r\nX", b"GET /me HTTP/1.1\r\nX: "])
def test_line_without_an_end_is_refused(start: bytes) -> None:
    pieces = [start, *[b"x" * 1000] * (MAX_HEAD_BYTES // 1000 + 1)]
    assert outcome_of(pieces) == (HeadTooLarge,)


def test_head_near_the_limits_is_read() -> None:
    count = MAX_HEADERS - len(UPGRADE_FIELDS)
    assert head_of(upgrade("/me", {f"X{i}": "y" * 140 for i in range(count)})).is_upgrade
    assert head_of(upgrade(f"/{'x' * (MAX_LINE_BYTES - 1)}")).is_upgrade
    assert head_of(upgrade("/me", {"X": "y" * (MAX_LINE_BYTES - 1)})).is_upgrade


def test_what_follows_the_head_does_not_count() -> None:
    head = head_of(upgrade() + bytes(3 * MAX_HEAD_BYTES))
    assert len(head.rest) == 3 * MAX_HEAD_BYTES


# Targets.


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("/me", ("me", "")),
        ("/me?", ("me", "?")),
        ("/me?a=/b?c%20d", ("me", "?a=/b?c%20d")),
        ("/me?/../x", ("me", "?/../x")),
        ("/%6de%2f?%6de%2f", ("me%2F", "?%6de%2f")),
        ("/DE*ABC*E1", ("DE*ABC*E1", "")),
        # The absolute form, of which the scheme and the host say nothing.
        ("ws://gateway.example/me", ("me", "")),
        ("http://gateway.example:80/me?a=/b", ("me", "?a=/b")),
        ("HTTPS://10.0.0.1:/me", ("me", "")),
        ("wss://[::1]:7001/%6de?", ("me", "?")),
        ("http://ho_st/a:b@c", ("a:b@c", "")),
    ],
)
def test_target_is_split(target: str, parts: tuple[str, str]) -> None:
    assert split_target(target.encode()) == tuple(part.encode() for part in parts)


@pytest.mark.parametrize(
    "target",
    [
        *("", "me", "*", "/", "/?a", "//", "//me", "/me/", "/a/b", "/../me", "/me/..", "?a"),
        *("http://gateway.example/", "ws://gateway.example", "gateway.example:80", "http:/me"),
        *("http:///me", "http://:80/me", "http://a@b/me", "http://a:b/me", "http://a:80:/me"),
        *("ftp://a/me", "file:///me", "http:me", "http://a/b/me", "http://a/../me", "http://a/@me"),
        *("http://[::1/me", "http://[a]b/me", "http://a#/me", "http://a\\me", "//a/me", "a/me"),
        *("http://ü/me", "http://a b/me", "http://%zz/me", "javascript://a/me", "http://a/me#b"),
        *("/me#x", "/me?a#b", "/me?a b", "/me?ü", "/me?\x7f", "/me?\0"),
    ],
)
def test_target_that_names_no_client(target: str) -> None:
    with pytest.raises(HandshakeError):
        split_target(target.encode())


@settings(deadline=None, max_examples=200)
@given(
    st.binary(max_size=300)
    | st.text("/.%2eE@?#a~", max_size=12).map(str.encode)
    | st.text("/.%2eE@?#a~:[]", max_size=12).map(lambda rest: f"http://{rest}".encode())
)
def test_any_target_is_split_into_what_may_be_sent_on_or_refused(target: bytes) -> None:
    try:
        client_id, query = split_target(target)
    except HandshakeError:
        return
    path, mark, rest = to_origin_form(target).partition(b"?")
    assert unquote_to_bytes(b"/" + client_id) == unquote_to_bytes(path)
    assert query == mark + rest
    assert client_id.isascii()
    assert not set(client_id) & set(b"/?# \r\n")
    assert query == b"" or query.startswith(b"?")
    assert all(0x21 <= byte <= 0x7E for byte in query)


@settings(deadline=None, max_examples=300)
@given(st.text("/.;%2eE@?#a~!:", max_size=8).map(lambda rest: f"/{rest}".encode()))
@example(b"/" + b"a" * 255)
@example(b"/" + b"a" * 256)
def test_short_cut_leads_to_the_same_place(target: bytes) -> None:
    def split(given: bytes) -> tuple[bytes, bytes] | None:
        with contextlib.suppress(HandshakeError):
            return split_target(given)
        return None

    assert split(target) == split(b"http://host" + target)  # which goes the long way


# The policy.


def test_upgrade_is_accepted() -> None:
    handshake = check(upgrade("/me?a=b"))
    assert (handshake.client_id, handshake.query) == (b"me", b"?a=b")
    assert handshake.accept == ACCEPT
    assert handshake.protocols == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"Upgrade": "WebSocket"},
        {"Upgrade": "foo, websocket"},
        {"Connection": "keep-alive, Upgrade"},
        {"Connection": "UPGRADE"},
        {"Content-Length": "0"},
        {"Host": ""},
        {"Origin": "https://anywhere.example"},
        {"Sec-WebSocket-Extensions": "permessage-deflate"},
        {"Sec-WebSocket-Version": "13 ", "Sec-WebSocket-Key": f"{KEY} \t", "Content-Length": "0 "},
    ],
)
def test_upgrade_may_be_written_in_many_ways(changes: dict[str, str | None]) -> None:
    assert check(upgrade("/me", changes)).client_id == b"me"


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"Upgrade": None}, "GET"),
        ({"Upgrade": "h2c"}, "GET"),
        ({"Upgrade": "websockets"}, "GET"),
        ({"Connection": None}, "GET"),
        ({"Connection": "keep-alive"}, "GET"),
        ({"Sec-WebSocket-Version": None}, "GET"),
        ({"Sec-WebSocket-Version": "8"}, "GET"),
        ({"Sec-WebSocket-Version": "13, 8"}, "GET"),
        ({}, "POST"),
        ({}, "HEAD"),
        ({}, "OPTIONS"),
    ],
)
def test_what_is_no_upgrade_is_told_how_to_make_one(
    changes: dict[str, str | None], method: str
) -> None:
    error = refused(upgrade("/me", changes, method=method))
    assert isinstance(error, UpgradeRequired)
    assert error.status == 426
    assert error.header_lines == b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"


@pytest.mark.parametrize(
    "changes",
    [
        {"Host": None},
        {"Sec-WebSocket-Key": None},
        {"Sec-WebSocket-Key": ""},
        {"Sec-WebSocket-Key": base64.b64encode(bytes(15)).decode()},
        {"Sec-WebSocket-Key": base64.b64encode(bytes(17)).decode()},
        {"Sec-WebSocket-Key": "!" + KEY[1:]},
        {"Sec-WebSocket-Key": KEY.rstrip("=")},
        {"Sec-WebSocket-Key": KEY + "="},
        {"Sec-WebSocket-Key": KEY + ", " + KEY},
        {"Sec-WebSocket-Key": "\xfc" * 24},
        {"Content-Length": "2"},
        {"Transfer-Encoding": "chunked"},
        {"Sec-WebSocket-Protocol": "a b"},
        {"Sec-WebSocket-Protocol": "a, b/c"},
        {"Sec-WebSocket-Protocol": "\xfc"},
    ],
)
def test_upgrade_that_is_wrong_is_refused(changes: dict[str, str | None]) -> None:
    error = refused(upgrade("/me", changes))
    assert error.status == 400
    assert type(error) is HandshakeError


def test_target_is_judged() -> None:
    assert refused(upgrade("/")).status == 400
    assert refused(upgrade("http://gateway.example/")).status == 400
    assert check(upgrade("http://other.example/me?a")).client_id == b"me"


@pytest.mark.parametrize("host", ["", "a", "a.b:80", "[::1]", "[fe80::1%25eth0]:7001", "ho_st:"])
def test_host_is_taken(host: str) -> None:
    assert check(upgrade("/me", {"Host": host})).client_id == b"me"


@pytest.mark.parametrize(
    "host", ["a b", "a/b", "a, b", "a@b", "a:b", "[::1", "a:80:80", "\xfc", "<"]
)
def test_host_that_is_none_is_refused(host: str) -> None:
    assert refused(upgrade("/me", {"Host": host})).status == 400
    # Of which the host in the target takes the place (RFC 9112, 3.2.2).
    assert check(upgrade("http://gateway.example/me", {"Host": host})).client_id == b"me"


def test_host_must_be_there() -> None:
    for target in ("/me", "http://gateway.example/me"):
        assert "Host header is missing" in str(refused(upgrade(target, {"Host": None})))


def test_path_is_told_where_it_says_more_than_the_id() -> None:
    assert not [line for line in lines_of(check(upgrade("/CP1"))) if "Path" in line]
    wire = upgrade("http://a/%6fcpp/%43P1?q", {"Ws2api-Path": "/of/the/client"})
    handshake = check(wire, path=("/ocpp/{id}", "/{id...}"))
    assert (handshake.client_id, handshake.query) == (b"CP1", b"?q")
    assert [line for line in lines_of(handshake) if "Path" in line] == [
        "Ws2api-Path: /%6fcpp/%43P1"
    ]
    assert check(upgrade("/acme/CP1"), path=("/{id...}",)).client_id == b"acme/CP1"
    assert refused(upgrade("/CP1"), path=("/ocpp/{id}",)).status == 404


def test_upgrade_by_http_1_0_is_refused() -> None:
    wire = upgrade("/me").replace(b"HTTP/1.1", b"HTTP/1.0")
    assert str(refused(wire)) == "HTTP/1.1 is required"


@pytest.mark.parametrize(
    ("value", "offered"),
    [("a", ("a",)), ("ocpp2.0.1, ocpp1.6", ("ocpp2.0.1", "ocpp1.6")), (" a ,, b,", ("a", "b"))],
)
def test_subprotocols_are_read_in_their_order(value: str, offered: tuple[str, ...]) -> None:
    protocols = check(upgrade("/me", {"Sec-WebSocket-Protocol": value})).protocols
    assert protocols == tuple(name.encode() for name in offered)


def test_subprotocols_in_several_lines_are_one_list() -> None:
    request = upgrade("/me", {}, "Sec-WebSocket-Protocol: a", "Sec-WebSocket-Protocol: b")
    assert check(request).protocols == (b"a", b"b")


# Origins.


@pytest.mark.parametrize(
    ("allowed", "origin"),
    [
        ("https://app.example", "https://app.example"),
        ("https://App.example", "HTTPS://app.EXAMPLE"),
        ("https://app.example:8443", "https://app.example:8443"),
        ("https://*.app.example", "https://a.app.example"),
        ("https://*.app.example", "https://a.b.app.example"),
        ("https://*", "https://anything.example:1"),
        ("http://localhost:*", "http://localhost:3000"),
        ("*://app.example", "http://app.example"),
        ("null", "null"),
        ("*", "https://app.example"),
        ("*", "null"),
    ],
)
def test_origin_that_is_allowed(allowed: str, origin: str) -> None:
    both = ["https://other.example", allowed]
    assert check(upgrade("/me", {"Origin": origin}), allow_origin=both)


@pytest.mark.parametrize(
    ("allowed", "origin"),
    [
        ("https://app.example", "http://app.example"),
        ("https://app.example", "https://app.example:8443"),
        ("https://app.example", "https://app.example.evil.example"),
        ("https://app.example", "https://evil.example/https://app.example"),
        ("https://app.example", "https://app-example"),
        ("https://app.example", "https://xapp.example"),
        ("https://app.example", "null"),
        ("https://app.example", ""),
        ("https://*.app.example", "https://app.example"),
        ("https://*.app.example", "https://evilapp.example"),
        ("https://*.app.example", "https://evil.example/.app.example"),
        ("https://*.app.example", "https://a.app.example.evil.example"),
        ("https://*.app.example", "http://a.app.example"),
        ("https://*", "http://a.example"),
        ("https://*", "https://a.example/b"),
        ("http://localhost:*", "http://localhost"),
        ("http://localhost:*", "http://localhostx:3000"),
    ],
)
def test_origin_that_is_not_allowed(allowed: str, origin: str) -> None:
    error = refused(upgrade("/me", {"Origin": origin}), allow_origin=[allowed])
    assert isinstance(error, OriginRefused)
    assert error.status == 403


def test_what_is_no_browser_has_no_origin() -> None:
    assert check(upgrade(), allow_origin=["https://app.example"])


# What the API is told.


def test_api_is_told_the_headers_that_concern_it() -> None:
    handshake = check(
        upgrade(
            "/me",
            {
                "authorization": "Basic eDp5",
                "Cookie": "a=b",
                "Origin": "https://app.example",
                "User-Agent": "caf\xe9/1",
                "Sec-WebSocket-Protocol": "a,  b",
                "X-Tenant": "t",
                "Ws2api-Generation": "5",
            },
        )
    )
    assert lines_of(handshake) == [
        "Authorization: Basic eDp5",
        "Cookie: a=b",
        "Origin: https://app.example",
        "User-Agent: caf\xe9/1",
        "Sec-WebSocket-Protocol: a,  b",
        f"X-Forwarded-For: {PEER}",
    ]


def test_blanks_after_a_value_are_no_part_of_it() -> None:
    handshake = check(
        upgrade("/me", {"Origin": "https://a.example \t"}, "Cookie: a=b ", "Cookie: c=d")
    )
    assert lines_of(handshake)[:2] == ["Cookie: a=b; c=d", "Origin: https://a.example"]


def test_api_is_told_nothing_that_was_not_said() -> None:
    assert lines_of(check(upgrade())) == [f"X-Forwarded-For: {PEER}"]


def test_api_is_told_further_headers_once() -> None:
    request = upgrade("/me", {"x-tenant": "t", "Cookie": "a=b"}, "X-Tenant: u")
    handshake = check(request, forward_header=["X-Tenant", "COOKIE", "X-Absent"])
    assert lines_of(handshake) == ["Cookie: a=b", "X-Tenant: t, u", f"X-Forwarded-For: {PEER}"]


@pytest.mark.parametrize(
    ("trusted", "peer", "claimed", "told"),
    [
        ([], PEER, "10.9.9.9", PEER),
        ([], PEER, None, PEER),
        (["10.0.0.0/8"], PEER, "10.9.9.9", PEER),
        (["10.0.0.0/8"], "10.1.2.3", "198.51.100.1", "198.51.100.1, 10.1.2.3"),
        (["10.0.0.0/8"], "10.1.2.3", "a, b", "a, b, 10.1.2.3"),
        (["10.0.0.0/8"], "10.1.2.3", None, "10.1.2.3"),
        (["192.0.2.0/24", "10.0.0.0/8"], "10.1.2.3", "x", "x, 10.1.2.3"),
        (["10.0.0.0/8"], "2001:db8::1", "x", "2001:db8::1"),
        (["2001:db8::/32"], "2001:db8::1", "x", "x, 2001:db8::1"),
        (["2001:db8::/32"], PEER, "x", PEER),
        (["fe80::/10"], "fe80::1%eth0", "x", "x, fe80::1%eth0"),
        (["10.0.0.0/8"], "::ffff:10.1.2.3", "x", "x, ::ffff:10.1.2.3"),
        (["10.0.0.0/8"], "::ffff:192.0.2.7", "x", "::ffff:192.0.2.7"),
    ],
)
def test_only_a_trusted_proxy_is_believed(
    trusted: list[str], peer: str, claimed: str | None, told: str
) -> None:
    request = upgrade("/me", {"X-Forwarded-For": claimed})
    assert lines_of(check(request, peer, trusted_proxy=trusted)) == [f"X-Forwarded-For: {told}"]


INNER, OUTER = ["10.0.0.0/8"], ["10.0.0.0/8", "192.0.2.0/24", "2001:db8::/32"]
TRUSTING = policy(trusted_proxy=INNER)


@pytest.mark.parametrize(
    ("trusted", "peer", "claimed", "remote"),
    [
        # Nobody is believed but proxies.
        ([], PEER, None, PEER),
        ([], PEER, "198.51.100.1", PEER),
        (INNER, PEER, "198.51.100.1", PEER),
        (INNER, "2001:db8::1", "198.51.100.1", "2001:db8::1"),
        (INNER, "10.1.2.3", None, "10.1.2.3"),
        (INNER, "10.1.2.3", "198.51.100.1", "198.51.100.1"),
        # What a client claims stands in front of what its proxy has seen.
        (INNER, "10.1.2.3", "127.0.0.1, 198.51.100.1", "198.51.100.1"),
        (INNER, "10.1.2.3", "10.9.9.9, 198.51.100.1", "198.51.100.1"),
        (INNER, "10.1.2.3", "10.9.9.9, 198.51.100.1, 10.4.5.6", "198.51.100.1"),
        # Proxies behind each other.
        (OUTER, "10.1.2.3", "198.51.100.1, 192.0.2.9", "198.51.100.1"),
        (OUTER, "10.1.2.3", "198.51.100.1, 192.0.2.9, 10.4.5.6", "198.51.100.1"),
        (OUTER, "10.1.2.3", "192.0.2.9", "192.0.2.9"),
        (OUTER, "2001:db8::1", "198.51.100.1, 2001:db8::2", "198.51.100.1"),
        # As some write it.
        (INNER, "10.1.2.3", "198.51.100.1:54321", "198.51.100.1"),
        (INNER, "10.1.2.3", "2001:db8::7", "2001:db8::7"),
        (INNER, "10.1.2.3", "[2001:db8::7]", "2001:db8::7"),
        (INNER, "10.1.2.3", "[2001:DB8:0::7]:443", "2001:db8::7"),
        (INNER, "10.1.2.3", "::ffff:198.51.100.1", "198.51.100.1"),
        (INNER, "10.1.2.3", "[::ffff:198.51.100.1]:80", "198.51.100.1"),
        (INNER, "::ffff:10.1.2.3", "198.51.100.1", "198.51.100.1"),
        (INNER, "10.1.2.3", " ,198.51.100.1 , ", "198.51.100.1"),
        # What is no address ends the chain: nobody knows who stood before it.
        (INNER, "10.1.2.3", "unknown", "10.1.2.3"),
        (INNER, "10.1.2.3", "_hidden", "10.1.2.3"),
        (INNER, "10.1.2.3", "198.51.100.1, unknown", "10.1.2.3"),
        (INNER, "10.1.2.3", "198.51.100.1, unknown, 10.4.5.6", "10.4.5.6"),
        (INNER, "10.1.2.3", "198.51.100.256", "10.1.2.3"),
        (INNER, "10.1.2.3", "198.51.100.01", "10.1.2.3"),
        (INNER, "10.1.2.3", "198.51.100.\xb2", "10.1.2.3"),
        (INNER, "10.1.2.3", "[198.51.100.1", "198.51.100.1"),
        (INNER, "10.1.2.3", "[]", "10.1.2.3"),
        (INNER, "10.1.2.3", ":", "10.1.2.3"),
        (INNER, "10.1.2.3", ",", "10.1.2.3"),
        (INNER, "10.1.2.3", '"198.51.100.1"', "10.1.2.3"),
        (INNER, "10.1.2.3", "for=198.51.100.1", "10.1.2.3"),
        (INNER, "10.1.2.3", "3325256705", "10.1.2.3"),
        (INNER, "10.1.2.3", "198.51.100.1%eth0", "10.1.2.3"),
    ],
)
def test_remote_is_what_trusted_proxies_have_seen(
    trusted: list[str], peer: str, claimed: str | None, remote: str
) -> None:
    handshake = check(upgrade("/me", {"X-Forwarded-For": claimed}), peer, trusted_proxy=trusted)
    assert handshake.remote == remote


def test_remote_stands_in_the_last_line_of_several() -> None:
    lines = ("X-Forwarded-For: 203.0.113.5", "x-forwarded-for: 198.51.100.1, 10.4.5.6")
    handshake = check(upgrade("/me", {}, *lines), "10.1.2.3", trusted_proxy=INNER)
    assert handshake.remote == "198.51.100.1"


@settings(deadline=None)
@given(
    st.one_of(
        st.text("0123456789abcdef.:[]%, "),
        st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f")),
    )
)
def test_remote_is_an_address_whatever_a_client_claims(claimed: str) -> None:
    request = upgrade("/me", {"X-Forwarded-For": claimed})
    with contextlib.suppress(HandshakeError):  # control characters
        head = head_of(request)
        remote = TRUSTING.check(head, "10.1.2.3").remote
        assert str(ipaddress.ip_address(remote)) == remote
        assert TRUSTING.check(head, PEER).remote == PEER


def test_long_chain_is_followed_to_its_first_stranger() -> None:
    chain = ", ".join(["198.51.100.1", *(f"10.0.{n // 250}.{n % 250}" for n in range(500))])
    handshake = check(upgrade("/me", {"X-Forwarded-For": chain}), "10.1.2.3", trusted_proxy=INNER)
    assert handshake.remote == "198.51.100.1"


@pytest.mark.parametrize(
    ("trusted", "peer", "is_trusted"),
    [
        ([], "10.1.2.3", False),
        (INNER, "10.1.2.3", True),
        (INNER, "11.1.2.3", False),
        (INNER, "::ffff:10.1.2.3", True),
        (INNER, "::a01:203", False),
        (["::ffff:10.0.0.0/104"], "10.1.2.3", True),
        (["::ffff:10.0.0.0/104"], "11.1.2.3", False),
        (["::/0"], "10.1.2.3", False),
        (INNER, "2001:db8::1", False),
        (["2001:db8::/32"], "2001:db8::1", True),
        (["fe80::/10"], "fe80::1%eth0", True),
        (["0.0.0.0/0"], "2001:db8::1", False),
        (["0.0.0.0/0"], "198.51.100.1", True),
        (INNER, "", False),
        (INNER, "localhost", False),
    ],
)
def test_proxy_is_trusted_by_its_network(trusted: list[str], peer: str, is_trusted: bool) -> None:
    assert policy(trusted_proxy=trusted).trusts(peer) == is_trusted


def test_chain_in_several_lines_is_one_chain() -> None:
    request = upgrade("/me", {}, "X-Forwarded-For: a", "x-forwarded-for: b")
    handshake = check(request, "10.1.2.3", trusted_proxy=["10.0.0.0/8"])
    assert lines_of(handshake) == ["X-Forwarded-For: a, b, 10.1.2.3"]


# Answers.


class Response:
    """Be what a client makes of an answer; httptools calls it."""

    def __init__(self, wire: bytes) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.is_complete = False
        parser = httptools.HttpResponseParser(self)
        with contextlib.suppress(httptools.HttpParserUpgrade):
            parser.feed_data(wire)
        assert self.is_complete
        self.status = parser.get_status_code()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.is_complete = True

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]


def api_reply(status: int = 200, body: bytes = b"ok", *lines: str) -> ReplyReader:
    reader = ReplyReader(1 << 20)
    reader.expect(want_headers=True)
    head = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", *lines, "", ""]
    reader.feed("\r\n".join(head).encode("latin-1") + body)
    assert reader.complete
    return reader


def accepted(offer: str | None, *lines: str, **options: Any) -> tuple[Response, bytes]:
    """Return the 101 that answers an offer of subprotocols, and the one chosen."""
    handshake = check(upgrade("/me", {"Sec-WebSocket-Protocol": offer}))
    wire, chosen = policy(**options).accept(handshake, api_reply(200, b"ok", *lines))
    return Response(wire), chosen


def test_client_is_accepted() -> None:
    response, chosen = accepted(None)
    assert response.status == 101
    assert response.headers == [
        (b"Upgrade", b"websocket"),
        (b"Connection", b"Upgrade"),
        (b"Sec-WebSocket-Accept", ACCEPT),
    ]
    assert chosen == b""


@pytest.mark.parametrize(
    ("offer", "answer", "preferred", "chosen"),
    [
        ("a, b", "b", [], "b"),
        ("a, b", "  a ", [], "a"),
        ("a, b", "a", ["b"], "a"),
        ("a, b", None, ["c", "b", "a"], "b"),
        ("a, b", None, ["c"], ""),
        ("a, b", None, [], ""),
        ("a, b", "", ["a"], ""),
        (None, None, ["a"], ""),
        (None, "", [], ""),
    ],
)
def test_subprotocol_is_chosen(
    offer: str | None, answer: str | None, preferred: list[str], chosen: str
) -> None:
    lines = [] if answer is None else [f"Sec-WebSocket-Protocol: {answer}"]
    response, name = accepted(offer, *lines, subprotocol=preferred)
    assert name == chosen.encode()
    assert response.all(b"Sec-WebSocket-Protocol") == ([chosen.encode()] if chosen else [])


@pytest.mark.parametrize("offer", [None, "a, b"])
@pytest.mark.parametrize("answer", ["c", "a, b", "A"])
def test_subprotocol_that_was_not_offered_is_the_mistake_of_the_api(
    offer: str | None, answer: str
) -> None:
    with pytest.raises(HandshakeError) as caught:
        accepted(offer, f"Sec-WebSocket-Protocol: {answer}")
    assert caught.value.status == 502
    assert HandshakeError.status == 400


def test_cookies_are_passed_on_and_nothing_else() -> None:
    response, _ = accepted(
        None,
        "Set-Cookie: a=1; Path=/",
        "set-cookie: b=2",
        "X-Other: c",
        "Sec-WebSocket-Extensions: permessage-deflate",
    )
    assert response.all(b"Set-Cookie") == [b"a=1; Path=/", b"b=2"]
    assert len(response.headers) == 5


@pytest.mark.parametrize(
    ("lines", "allowed"),
    [
        ([], False),
        (["Ws2api-Retry: safe"], True),
        (["ws2api-retry:   SAFE  "], True),
        (["X-Other: safe", "Ws2api-Retry: safe", "Set-Cookie: a=b"], True),
        (["Ws2api-Retry: unsafe"], False),
        (["Ws2api-Retry: yes"], False),
        (["Ws2api-Retry:"], False),
        (["Ws2api-Retries: safe"], False),
        (["X-Other: Ws2api-Retry: safe"], False),
    ],
)
def test_message_is_sent_twice_only_if_the_api_says_so(lines: list[str], allowed: bool) -> None:
    assert allows_retry(api_reply(200, b"ok", *lines)) == allowed


@pytest.mark.parametrize("body", [b"no", b"", b"ok\n", b"OK"])
def test_anything_but_ok_is_the_reason_of_a_refusal(body: bytes) -> None:
    response = Response(refusal(api_reply(200, body, "Content-Type: text/html")))
    assert (response.status, response.body) == (403, body)
    assert response.all(b"Content-Type") == [b"text/html"]
    assert response.all(b"Connection") == [b"close"]


@pytest.mark.parametrize("status", [401, 403, 404, 409, 429])
def test_what_the_api_says_of_the_client_is_passed_on(status: int) -> None:
    lines = ["WWW-Authenticate: Basic", "Retry-After: 7", "X-Other: a", "Set-Cookie: b=c"]
    response = Response(refusal(api_reply(status, b"why", *lines)))
    assert (response.status, response.body) == (status, b"why")
    assert response.all(b"WWW-Authenticate") == [b"Basic"]
    assert response.all(b"Retry-After") == [b"7"]
    assert response.all(b"Content-Type") == [b"text/plain; charset=utf-8"]
    assert not response.all(b"X-Other")
    assert not response.all(b"Set-Cookie")


@pytest.mark.parametrize("status", [201, 204, 301, 400, 405, 418, 500, 502, 503])
def test_what_the_api_says_of_itself_is_a_bad_gateway(status: int) -> None:
    response = Response(refusal(api_reply(status, b"" if status == 204 else b"internals")))
    assert response.status == 502
    assert response.body == b"the API answered with status %d\n" % status


@pytest.mark.parametrize("status", [400, 403, 426, 431, 502, 503, 504])
def test_error_is_answered(status: int) -> None:
    response = Response(error_response(status, b"why\n", header_lines=b"X-A: b\r\n"))
    assert (response.status, response.body) == (status, b"why\n")
    assert response.headers == [
        (b"Content-Type", b"text/plain; charset=utf-8"),
        (b"Content-Length", b"4"),
        (b"Connection", b"close"),
        (b"X-A", b"b"),
    ]
