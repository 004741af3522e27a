"""Write requests and read them back; read replies in every split."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ws2api.gateway.http_wire import (
    MAX_REPLY_HEAD_BYTES,
    KnownReplies,
    ReplyReader,
    ReplyTooLarge,
    RequestEncoder,
)
from ws2api.gateway.reply_body import BodyUnusable
from ws2api.gateway.settings import ApiUrl

MAX_BODY_BYTES = 100_000

# Requests.


class Request:
    """Be what a server makes of one request; httptools calls it."""

    def __init__(self, wire: bytes) -> None:
        self.target = self.body = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.count = 0
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(wire)
        assert self.count == 1, "not exactly one whole request"
        self.method = self._parser.get_method()
        assert self._parser.get_http_version() == "1.1"
        assert self._parser.should_keep_alive()

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.count += 1


def encoder(path: str = "", host_header: str = "api.example:8000") -> RequestEncoder:
    return RequestEncoder(ApiUrl("api.example", 8000, False, path, host_header))


def test_connect() -> None:
    header_lines = b"Cookie: a=b\r\nX-Forwarded-For: 10.1.2.3\r\n"
    wire = encoder("/ws").connect(b"me", b"?a=1&b", 1_700_000, b"http://gw:1/me", header_lines)
    request = Request(wire)
    assert (request.method, request.target, request.body) == (b"GET", b"/ws/me?a=1&b", b"")
    assert request.headers == [
        (b"Host", b"api.example:8000"),
        (b"Ws2api-Generation", b"1700000"),
        (b"Accept-Encoding", b"identity"),
        (b"Ws2api-Push-Url", b"http://gw:1/me"),
        (b"Cookie", b"a=b"),
        (b"X-Forwarded-For", b"10.1.2.3"),
    ]


def test_text_message() -> None:
    request = Request(encoder().message(b"me", 17, 3, True, "grün".encode()))
    assert (request.method, request.target) == (b"POST", b"/me")
    assert request.body.decode() == "grün"
    assert request.headers == [
        (b"Host", b"api.example:8000"),
        (b"Ws2api-Generation", b"17"),
        (b"Accept-Encoding", b"identity"),
        (b"Ws2api-Sequence", b"3"),
        (b"Content-Type", b"text/plain; charset=utf-8"),
        (b"Content-Length", b"5"),
    ]


def test_binary_message() -> None:
    request = Request(encoder().message(b"me", 17, 3, False, b"\0%b\r\n\r\n\xff"))
    assert request.body == b"\0%b\r\n\r\n\xff"
    assert (b"Content-Type", b"application/octet-stream") in request.headers


def test_disconnect() -> None:
    request = Request(encoder("/ws").disconnect(b"me", 17, 1006, b"EOF"))
    assert (request.method, request.target, request.body) == (b"DELETE", b"/ws/me", b"EOF")
    assert request.headers == [
        (b"Host", b"api.example:8000"),
        (b"Ws2api-Generation", b"17"),
        (b"Accept-Encoding", b"identity"),
        (b"Ws2api-Close-Code", b"1006"),
        (b"Content-Type", b"text/plain; charset=utf-8"),
        (b"Content-Length", b"3"),
    ]


def test_empty_bodies_have_a_length() -> None:
    for wire in (
        encoder().message(b"me", 1, 1, True, b""),
        encoder().message(b"me", 1, 1, False, b""),
        encoder().disconnect(b"me", 1, 1005, b""),
    ):
        assert (b"Content-Length", b"0") in Request(wire).headers


PATHS = ("", "/v1", "/100%25", "/a%20b/c", "/%62%64", "/%d%s", "/%%", "/a;b=c/~d")


@settings(deadline=None, max_examples=60)
@given(
    path=st.sampled_from(PATHS),
    host_header=st.sampled_from(("h", "h:80", "[::1]:8000", "[fe80::1%25eth0]:80")),
    client_id=st.sampled_from((b"me", b"%25", b"%62", b"a.b_c~d-e")),
    query=st.sampled_from((b"", b"?", b"?x=%25d&y=%b")),
    generation=st.integers(1, 1 << 53),
    body=st.binary(max_size=100),
)
def test_what_is_encoded_is_what_a_server_reads(
    path: str, host_header: str, client_id: bytes, query: bytes, generation: int, body: bytes
) -> None:
    api = encoder(path, host_header)
    target = path.encode() + b"/" + client_id
    connect = Request(api.connect(client_id, query, generation, b"http://gw/%62", b"A: %b\r\n"))
    message = Request(api.message(client_id, generation, 1, False, body))
    disconnect = Request(api.disconnect(client_id, generation, 1000, body))
    assert connect.target == target + query
    assert (b"A", b"%b") in connect.headers
    assert (message.target, message.body) == (target, body)
    assert (disconnect.target, disconnect.body) == (target, body)
    for request in (connect, message, disconnect):
        assert request.headers[0] == (b"Host", host_header.encode())
        assert request.headers[1] == (b"Ws2api-Generation", b"%d" % generation)


# Replies.


class Reply(NamedTuple):
    """Be what is known of a reply when it is complete."""

    status: int
    body: bytes
    content_type: bytes = b""
    keep_alive: bool = True


class Scripted(NamedTuple):
    """Pair the bytes of a reply with what they mean."""

    wire: bytes
    reply: Reply
    until_eof: bool = False


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


FIELDS = [
    b"Content-Length: 2\r\n",
    b"Content-Length: 9\r\n",
    b"Content-Length: 0\r\n",
    b"Content-Type: application/octet-stream\r\n",
    b"Content-Type: text/html\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: close\r\n",
    b"Connection: keep-alive\r\n",
    b"Retry-After: 3\r\n",
    b"Set-Cookie: a=b\r\n",
]


def seen(reader: ReplyReader) -> Reply:
    assert reader.complete
    return Reply(reader.status, reader.body, reader.content_type, reader.keep_alive)


def new_reader(*, want_headers: bool = False) -> ReplyReader:
    reader = ReplyReader(MAX_BODY_BYTES)
    reader.expect(want_headers)
    return reader


def read(*pieces: bytes, want_headers: bool = False) -> ReplyReader:
    reader = new_reader(want_headers=want_headers)
    feed(reader, pieces)
    return reader


def feed(reader: ReplyReader, pieces: Iterable[bytes]) -> None:
    for piece in pieces:
        assert not reader.complete
        reader.feed(piece)


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    """Split data; a cut is taken modulo the length."""
    positions = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in pairwise(positions)]


def bytes_of(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def chunked(body: bytes, size: int) -> bytes:
    chunks = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join([b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""]])


@st.composite
def scripted_replies(draw: st.DrawFn) -> Scripted:
    status = draw(st.sampled_from((200, 200, 201, 204, 403, 404, 500, 503)))
    body = b"" if status == 204 else draw(st.binary(max_size=200))
    type_ = draw(st.sampled_from((b"", b"text/plain", b"application/octet-stream")))
    interim = draw(
        st.sampled_from(
            (
                b"",
                b"HTTP/1.1 100 Continue\r\n\r\n",
                b"HTTP/1.1 103 Early Hints\r\nContent-Type: interim\r\nLink: </a>\r\n\r\n" * 2,
            )
        )
    )
    framing = draw(st.sampled_from(("length", "chunked", "eof", "close", "old", "old kept")))
    version = b"1.0" if framing.startswith("old") else b"1.1"
    lines = [b"HTTP/%b %d Whatever" % (version, status), b"Server: a", b"X-A: " + b"y" * 50]
    if type_:
        lines.append(b"content-TYPE: " + type_)
    wire, until_eof, keep_alive = body, False, framing in ("length", "chunked", "old kept")
    if status == 204:
        keep_alive = framing in ("length", "chunked", "eof", "old kept")
    elif framing == "chunked":
        lines.append(b"Transfer-Encoding: chunked")
        wire = chunked(body, draw(st.integers(1, 100)))
    elif framing == "eof":
        until_eof = True
    else:
        lines.append(b"Content-Length: %d" % len(body))
    if framing in ("close", "old kept"):
        lines.append(b"Connection: " + (b"close" if framing == "close" else b"keep-alive"))
    head = b"".join(line + b"\r\n" for line in [*lines, b""])
    return Scripted(interim + head + wire, Reply(status, body, type_, keep_alive), until_eof)


@settings(deadline=None, max_examples=200)
@given(scripted_replies(), st.lists(st.integers(0, 1000), max_size=8))
def test_any_split_gives_the_same_reply(scripted: Scripted, cuts: list[int]) -> None:
    reader = read(*pieces_of(scripted.wire, cuts))
    assert reader.feed_eof() == scripted.until_eof
    assert seen(reader) == scripted.reply


@settings(deadline=None, max_examples=50)
@given(scripted_replies())
def test_byte_by_byte_gives_the_same_reply(scripted: Scripted) -> None:
    reader = read(*bytes_of(scripted.wire))
    assert reader.feed_eof() == scripted.until_eof
    assert seen(reader) == scripted.reply


@settings(deadline=None, max_examples=100)
@given(st.lists(scripted_replies(), max_size=5), st.lists(st.integers(0, 1000), max_size=4))
def test_replies_follow_each_other_on_one_connection(
    conversation: list[Scripted], cuts: list[int]
) -> None:
    reader = ReplyReader(MAX_BODY_BYTES)
    for scripted in conversation:
        reader.expect(want_headers=False)
        feed(reader, pieces_of(scripted.wire, cuts))
        if scripted.until_eof:
            reader.feed_eof()
        assert seen(reader) == scripted.reply
        if not scripted.reply.keep_alive:
            break


@settings(deadline=None, max_examples=150)
@given(scripted_replies(), st.integers(0, 1000))
def test_reply_cut_off_by_the_end_is_not_complete(scripted: Scripted, cut: int) -> None:
    reader = read(scripted.wire[: cut % len(scripted.wire)])
    assert not reader.complete
    # Without a length the end of the stream is the end of the body, wherever it comes.
    in_body = scripted.until_eof and reader.status == scripted.reply.status
    assert reader.feed_eof() == in_body
    assert not in_body or scripted.reply.body.startswith(reader.body)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=50),
            scripted_replies().map(lambda scripted: scripted.wire),
            st.sampled_from((OK, b"Content-Length: 5\r\n", b"\r\n", b"HTTP/1.1 101 X\r\n")),
        ),
        max_size=6,
    )
)
def test_garbage_raises_only_errors_of_the_parser(pieces: list[bytes]) -> None:
    reader = new_reader()
    try:
        for piece in pieces:
            reader.feed(piece)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return
    reader.feed_eof()


@pytest.mark.parametrize(
    "wire",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        OK + b"Content-Length: x\r\n\r\n",
        OK + b"Content-Length: -1\r\n\r\n",
        OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        OK + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
        OK + b"Bad Name: x\r\n\r\n",
        OK + b"A: b\r\n folded\r\n\r\n",
        OK + b"A: b\0c\r\n\r\n",
    ],
)
def test_malformed_reply_is_refused(wire: bytes) -> None:
    with pytest.raises(httptools.HttpParserError):
        read(wire)
    with pytest.raises(httptools.HttpParserError):
        read(*bytes_of(wire))


def test_switching_protocols_is_no_reply() -> None:
    reader = new_reader()
    with pytest.raises((httptools.HttpParserError, httptools.HttpParserUpgrade)):
        reader.feed(b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n\xff\xff")
    assert not reader.complete
    assert not reader.feed_eof()


# What a reply says.


@pytest.mark.parametrize(
    ("content_type", "is_text"),
    [
        (b"", True),
        (b"text/plain; charset=utf-8", True),
        (b"application/json", True),
        (b"application/octet-stream", False),
        (b"Application/OCTET-stream; charset=binary", False),
        (b"application/octet-stream ;a=b", False),
        (b"application/octet-streams", True),
        (b"application/octet-stream+json", True),
    ],
)
def test_type_tells_text_from_binary(content_type: bytes, is_text: bool) -> None:
    line = b"Content-Type: %b\r\n" % content_type if content_type else b""
    assert read(OK + line + b"Content-Length: 1\r\n\r\nx").is_text == is_text


def test_headers_are_kept_when_they_are_wanted() -> None:
    wire = OK + b"Set-Cookie: a=1\r\nSET-cookie: b=2\r\nContent-Length: 0\r\n\r\n"
    headers = [(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), (b"content-length", b"0")]
    assert read(wire, want_headers=True).headers == headers
    assert read(wire).headers == []


def test_headers_of_interim_replies_are_not_those_of_the_reply() -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nContent-Type: application/octet-stream\r\n\r\n"
    reader = read(interim + OK + b"Content-Length: 2\r\n\r\nok", want_headers=True)
    assert reader.headers == [(b"content-length", b"2")]
    assert reader.is_text


def test_headers_of_the_last_reply_are_gone_with_the_next() -> None:
    reader = read(OK + b"A: b\r\nContent-Type: x/y\r\nContent-Length: 0\r\n\r\n", want_headers=True)
    reader.expect(want_headers=False)
    reader.feed(OK + b"Content-Length: 0\r\n\r\n")
    assert reader.headers == []
    assert reader.content_type == b""


def test_trailer_is_no_header() -> None:
    trailer = b"Content-Type: application/octet-stream\r\nSet-Cookie: a=b\r\n"
    head = OK + b"Transfer-Encoding: chunked\r\n\r\n"
    reader = read(head + b"2\r\nok\r\n0\r\n" + trailer + b"\r\n", want_headers=True)
    assert reader.body == b"ok"
    assert reader.is_text
    assert [name for name, _ in reader.headers] == [b"transfer-encoding"]


def test_reply_stays_readable_while_the_next_is_expected() -> None:
    reader = read(OK + b"Content-Length: 2\r\n\r\nok")
    reader.expect(want_headers=False)
    assert (reader.status, reader.body, reader.complete) == (200, b"ok", False)


def test_reply_that_was_passed_on_is_let_go() -> None:
    reader = read(OK + b"A: b\r\nContent-Length: 2\r\n\r\nok", want_headers=True)
    reader.drop_body()
    assert (reader.body, reader.headers) == (b"", [])
    reader.expect(want_headers=False)
    reader.feed(OK + b"Content-Length: 4\r\n\r\nnext")
    assert seen(reader) == Reply(200, b"next")


def test_closed_reader_is_no_garbage() -> None:
    freed: list[bool] = []

    class Noting(ReplyReader):
        def __del__(self) -> None:
            freed.append(True)

    gc.disable()
    try:
        reader = Noting(MAX_BODY_BYTES)
        reader.expect(want_headers=False)
        reader.feed(OK)
        reader.close()
        del reader
        assert freed
    finally:
        gc.enable()


# Known heads.


def recognise(data: bytes, known: KnownReplies) -> Reply | None:
    reader = ReplyReader(MAX_BODY_BYTES, known)
    if not reader.recognise(data):
        return None
    return Reply(reader.status, reader.body, keep_alive=reader.keep_alive)


def heads_of(*wires: bytes) -> KnownReplies:
    """Return what becomes known by reading the replies, each on a connection of its own."""
    known = KnownReplies()
    for wire in wires:
        reader = ReplyReader(MAX_BODY_BYTES, known)
        reader.expect(want_headers=False)
        reader.feed(wire)
        reader.remember(wire)
    return known


PLAIN = OK + b"Date: now\r\nContent-Length: 2\r\n\r\n"


def test_head_that_was_read_is_recognised() -> None:
    known = heads_of(PLAIN + b"ok")
    assert recognise(PLAIN + b"no", known) == Reply(200, b"no")


@pytest.mark.parametrize(
    "type_", [b"text/plain", b"application/octet-stream", b"APPLICATION/octet-stream; a"]
)
def test_recognised_reply_has_the_type_of_the_one_that_was_read(type_: bytes) -> None:
    wire = OK + b"content-type: %b\r\nContent-Length: 2\r\n\r\nok" % type_
    reader = ReplyReader(MAX_BODY_BYTES, heads_of(wire))
    assert reader.recognise(wire)
    assert reader.is_text == read(wire).is_text == (type_ == b"text/plain")


def test_reply_without_a_body_is_recognised() -> None:
    wire = b"HTTP/1.1 204 No Content\r\nDate: now\r\n\r\n"
    assert recognise(wire, heads_of(wire)) == Reply(204, b"")


@pytest.mark.parametrize(
    "data",
    [
        PLAIN,
        PLAIN + b"o",
        PLAIN + b"ok!",
        PLAIN[:-2] + b"ok",
        PLAIN[:-4],
        PLAIN.replace(b"now", b"NOW") + b"ok",
        PLAIN.replace(b"\r\n", b"\n") + b"ok",
        b"\r\n" + PLAIN + b"ok",
        b"",
    ],
)
def test_what_is_not_the_same_head_with_a_whole_body_is_left_to_the_parser(data: bytes) -> None:
    known = heads_of(PLAIN + b"ok")
    reader = ReplyReader(MAX_BODY_BYTES, known)
    assert not reader.recognise(data)
    assert reader.is_fresh
    assert (reader.status, reader.body) == (0, b"")


@pytest.mark.parametrize("wire", [b"HTTP/1.1 204 No\r\nA: b\r\n\r\n", PLAIN + b"ok"])
def test_beginning_of_a_known_reply_is_left_to_the_parser(wire: bytes) -> None:
    reader = ReplyReader(MAX_BODY_BYTES, heads_of(wire))
    assert [end for end in range(len(wire)) if reader.recognise(wire[:end])] == []
    assert reader.recognise(wire)


@pytest.mark.parametrize(
    "wire",
    [
        CHUNKED + b"2\r\nok\r\n0\r\n\r\n",
        CHUNKED + b"0\r\n\r\n",
        OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 503 Busy\r\nRetry-After: 3\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN + b"ok",
        OK + b"A: " + b"b" * 5_000 + b"\r\nContent-Length: 2\r\n\r\nok",
    ],
)
def test_head_of_a_reply_that_is_not_plain_is_not_kept(wire: bytes) -> None:
    assert heads_of(wire) == {}


def test_head_of_a_reply_in_pieces_is_not_kept() -> None:
    known = KnownReplies()
    reader = ReplyReader(MAX_BODY_BYTES, known)
    reader.expect(want_headers=False)
    feed(reader, [PLAIN[:9], PLAIN[9:] + b"ok"])
    reader.remember(PLAIN[9:] + b"ok")
    assert known == {}


def test_known_heads_are_bounded() -> None:
    wires = [PLAIN.replace(b"now", b"%d" % i) + b"ok" for i in range(1_000)]
    known = heads_of(*wires)
    assert 0 < len(known) <= 256
    assert recognise(wires[-1], known) == Reply(200, b"ok")


@given(
    fields=st.lists(st.sampled_from(FIELDS), max_size=4),
    bodies=st.tuples(st.binary(max_size=9), st.binary(max_size=9)),
    status=st.sampled_from([b"200 OK", b"204 No Content", b"404 No", b"200"]),
)
def test_what_is_recognised_is_what_the_parser_reads(
    fields: list[bytes], bodies: tuple[bytes, bytes], status: bytes
) -> None:
    head = b"HTTP/1.1 " + status + b"\r\n" + b"".join(fields) + b"\r\n"
    known = KnownReplies()
    first = ReplyReader(MAX_BODY_BYTES, known)
    first.expect(want_headers=False)
    try:
        first.feed(head + bodies[0])
    except (httptools.HttpParserError, ReplyTooLarge):
        return
    if first.complete:
        first.remember(head + bodies[0])
    again = ReplyReader(MAX_BODY_BYTES, known)
    if again.recognise(head + bodies[1]):
        parsed = read(head + bodies[1])
        assert parsed.complete
        for name in ("status", "body", "is_text", "keep_alive"):
            assert getattr(again, name) == getattr(parsed, name)


# Statuses that do not exist.


@pytest.mark.parametrize("status", [b"000", b"099", b"600", b"999"])
def test_impossible_status_is_that_of_a_reply(status: bytes) -> None:
    reader = read(b"HTTP/1.1 " + status + b" What\r\nContent-Length: 2\r\n\r\nok")
    assert (reader.complete, reader.status, reader.body) == (True, int(status), b"ok")


# The end of the stream.


def test_end_before_any_byte_completes_nothing() -> None:
    assert not new_reader().feed_eof()


def test_end_after_an_interim_reply_completes_nothing() -> None:
    assert not read(b"HTTP/1.1 100 Continue\r\n\r\n").feed_eof()


def test_end_of_the_body_that_an_interim_reply_may_not_have_completes_nothing() -> None:
    assert not read(b"HTTP/1.1 104 x\r\nTransfer-Encoding: gzip\r\n\r\nbody").feed_eof()


def test_end_after_a_complete_reply_completes_nothing_more() -> None:
    assert not read(OK + b"Content-Length: 0\r\n\r\n").feed_eof()


@pytest.mark.parametrize(
    "before", [OK + b"Content-Length: 2\r\n\r\nok", b"HTTP/1.1 204 No Content\r\n\r\n"]
)
def test_end_instead_of_the_next_reply_completes_nothing(before: bytes) -> None:
    reader = read(before)
    reader.expect(want_headers=False)
    assert not reader.feed_eof()
    assert not reader.complete


@pytest.mark.parametrize(
    ("lines", "is_framed"),
    [
        (b"Transfer-Encoding: chunked", True),
        (b"Transfer-Encoding: gzip, Chunked", True),
        (b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked", True),
        (b"Transfer-Encoding: gzip", False),
        (b"Transfer-Encoding: identity", False),
        (b"transfer-encoding: chunked, gzip", False),
        (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: gzip", False),
        (b"X-Transfer-Coding: chunked", False),
    ],
)
def test_end_completes_a_body_whose_last_coding_is_not_chunked(
    lines: bytes, is_framed: bool
) -> None:
    """RFC 9112, 6.3: such a body is as long as the stream, else the end cuts it off."""
    reader = read(OK + lines + b"\r\n\r\n", b"4\r\nbo")
    if not is_framed and b"gzip" in lines:
        with pytest.raises(BodyUnusable):
            reader.feed_eof()
        return
    assert reader.feed_eof() == reader.complete == (not is_framed)
    if not is_framed:
        assert reader.body == b"4\r\nbo"
        assert not reader.keep_alive


# A pause that is asked for.


@pytest.mark.parametrize(
    ("line", "seconds"),
    [
        (b"Retry-After: 3", 3.0),
        (b"retry-after: 120 \t", 120.0),
        (b"Retry-After: 0", 0.0),
        (b"Retry-After: -1", 0.0),
        (b"Retry-After: 1.5", 0.0),
        (b"Retry-After:", 0.0),
        (b"Retry-After: " + b"9" * 5000, 0.0),
        (b"Retry-After: Fri, 31 Dec 1999 23:59:59 GMT", 0.0),
        (b"Retry-Later: 3", 0.0),
        (b"Retry-Often: 3", 0.0),
    ],
)
def test_retry_after(line: bytes, seconds: float) -> None:
    head = b"HTTP/1.1 503 Service Unavailable\r\n" + line + b"\r\nContent-Length: 0\r\n\r\n"
    assert read(head).retry_after_s == seconds


def test_retry_after_of_one_reply_is_not_taken_for_that_of_the_next() -> None:
    reader = read(OK + b"Retry-After: 3\r\nContent-Length: 0\r\n\r\n")
    reader.expect(want_headers=False)
    reader.feed(OK + b"Content-Length: 0\r\n\r\n")
    assert reader.complete
    assert reader.retry_after_s == 0.0


# Limits.


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("framing", ["length", "chunked", "eof"])
def test_body_is_limited(framing: str, over: int) -> None:
    body = b"x" * (MAX_BODY_BYTES + over)
    wire = {
        "length": OK + b"Content-Length: %d\r\n\r\n" % len(body) + body,
        "chunked": OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(body, 1000),
        "eof": OK + b"\r\n" + body,
    }[framing]
    reader = new_reader()
    if over:
        with pytest.raises(httptools.HttpParserError) as caught:
            feed(reader, pieces_of(wire, list(range(0, len(wire), 30_000))))
        assert str(caught.value.__context__) == "reply body exceeds the limit"
        assert not reader.complete
    else:
        feed(reader, [wire])
        assert reader.feed_eof() == (framing == "eof")
        assert reader.body == body


def test_head_is_limited() -> None:
    line = b"A: " + b"x" * 999 + b"\r\n"
    count = MAX_REPLY_HEAD_BYTES // 1000
    assert read(OK + line * count + b"\r\n").status == 200
    with pytest.raises(httptools.HttpParserError) as caught:
        read(OK + line * (count + 1) + b"\r\n")
    assert str(caught.value.__context__) == "reply head exceeds the limit"


def test_head_of_each_reply_is_limited_alone() -> None:
    reader = ReplyReader(MAX_BODY_BYTES)
    for _ in range(5):
        reader.expect(want_headers=True)
        reader.feed(OK + b"A: " + b"x" * 20_000 + b"\r\nContent-Length: 0\r\n\r\n")
        assert reader.complete


@pytest.mark.parametrize("start", [OK + b"A: ", OK + b"A", b"HTTP/1.1 200 "])
def test_line_without_an_end_is_limited(start: bytes) -> None:
    with pytest.raises(ReplyTooLarge):
        read(start, *[b"x" * 1000] * (MAX_REPLY_HEAD_BYTES // 1000 + 1))


@pytest.mark.parametrize("start", [b"0\r\nA", b"0\r\nA: ", b"2;", b"0\r\n"])
def test_what_is_no_body_is_limited_after_the_head(start: bytes) -> None:
    more = b"x" * 1000 if start != b"0\r\n" else b"A: b\r\n" * 200
    with pytest.raises(ReplyTooLarge):
        read(CHUNKED + start, *[more] * (MAX_REPLY_HEAD_BYTES // 1000 + 1))


def test_largest_body_may_come_in_the_smallest_chunks() -> None:
    reader = read(CHUNKED, *[chunked(b"x" * 1000, 1)[:-5]] * (MAX_BODY_BYTES // 1000), b"0\r\n\r\n")
    assert reader.body == b"x" * MAX_BODY_BYTES


def test_tiny_chunks_cost_no_more_than_their_size() -> None:
    reader = read(CHUNKED)
    wire = chunked(b"xy" * (MAX_BODY_BYTES // 2), 2)
    tracemalloc.start()
    try:
        reader.feed(wire)
        assert reader.complete
        assert tracemalloc.get_traced_memory()[1] < 5 * MAX_BODY_BYTES
    finally:
        tracemalloc.stop()


# Bytes after the reply.


@pytest.mark.parametrize("head", [b"", b"Connection: close\r\n"])
@pytest.mark.parametrize("more", [b"x", b"\r\nx", OK, OK + b"Content-Length: 0\r\n\r\n"])
def test_bytes_after_the_reply_are_an_error_and_leave_it_whole(head: bytes, more: bytes) -> None:
    reader = new_reader()
    with pytest.raises(httptools.HttpParserError):
        reader.feed(OK + head + b"Content-Length: 2\r\n\r\nok" + more)
    assert reader.complete
    assert (reader.status, reader.body) == (200, b"ok")


def test_bytes_that_come_later_and_unasked_are_an_error() -> None:
    reader = read(OK + b"Content-Length: 2\r\n\r\nok")
    with pytest.raises(httptools.HttpParserError):
        reader.feed(OK + b"Content-Length: 0\r\n\r\n")
