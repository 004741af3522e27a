"""Hold requests and answers that the gateway writes to one meaning, whatever went into them."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import httptools
import pytest
from e2e.hostile_wires import HANDSHAKES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_guarantees import ROOT, names_in
from ws2api.gateway.errors import HandshakeError
from ws2api.gateway.handshake import (
    Handshake,
    HandshakePolicy,
    RequestHead,
    refusal,
    to_origin_form,
)
from ws2api.gateway.http_wire import ReplyReader, ReplyTooLarge, RequestEncoder
from ws2api.gateway.settings import ApiUrl, Settings, SettingsError, load, option_rows

PEER = "192.0.2.7"
ENCODER = RequestEncoder(ApiUrl("api.example", 80, False, "/ba%20se", "api.example"))
POLICIES = [
    HandshakePolicy(
        Settings(workers=1, forward_header=("X-Tenant", "X-Real-IP"), trusted_proxy=trusted)
    )
    for trusted in ((), (f"{PEER}/32",))
]
PASSED_ON = (
    *(b"Authorization", b"Cookie", b"Origin", b"User-Agent", b"Sec-WebSocket-Protocol"),
    *(b"X-Tenant", b"X-Real-IP"),
)
OF_THE_CONNECT = (b"Host", b"Ws2api-Generation", b"Ws2api-Push-Url", b"X-Forwarded-For")
OF_A_REFUSAL = {
    *(b"content-type", b"content-length", b"connection", b"www-authenticate", b"retry-after")
}
OF_THE_101 = {
    *(b"upgrade", b"connection", b"sec-websocket-accept", b"sec-websocket-protocol"),
    b"set-cookie",
}

often = settings(deadline=None, max_examples=500)


class Recorder:
    """Note each whole message that httptools finds; it calls this."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def on_message_begin(self) -> None:
        self._now: dict[str, Any] = {"target": b"", "headers": [], "body": b""}

    def on_url(self, url: bytes) -> None:
        self._now["target"] += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._now["headers"].append((name, value.rstrip(b" \t")))

    def on_body(self, body: bytes) -> None:
        self._now["body"] += body

    def on_message_complete(self) -> None:
        self.found.append(self._now)


def the_request_in(wire: bytes) -> dict[str, Any]:
    """Return the one request that the bytes are, seen by a strict parser."""
    recorder = Recorder()
    parser = httptools.HttpRequestParser(recorder)
    parser.feed_data(wire)
    assert len(recorder.found) == 1
    method = parser.get_method()
    assert not parser.should_upgrade()
    parser.feed_data(b"GET /next HTTP/1.1\r\n\r\n")  # nothing is left over that would spoil it
    first, following = recorder.found
    assert following["target"] == b"/next"
    return first | {"method": method}


def the_response_in(wire: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """Return status, headers (in lower case, their values joined) and body of one response."""
    head, end, body = wire.partition(b"\r\n\r\n")
    assert end
    first, *lines = head.split(b"\r\n")
    headers: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b": ")
        assert colon and re.fullmatch(rb"[A-Za-z-]+", name), line
        assert not re.search(rb"[\0-\x08\n-\x1f\x7f]", value), line
        headers[name.lower()] = value
    return int(first.split(b" ")[1]), headers, body


# What clients send.

NAMES = st.sampled_from((*PASSED_ON, *OF_THE_CONNECT[1:], b"TE", b"Evil"))
VALUES = st.one_of(
    st.text('ab,;:=/%09 \t\xff\x80"\\', max_size=20).map(lambda text: text.encode("latin-1")),
    st.sampled_from((b"a=b; c=%0d%0a", b"Bearer x", b"a, b", b"10.0.0.1, ::1", b"")),
)
HOSTILE_VALUES = st.one_of(
    st.binary(max_size=20),
    st.sampled_from((b"a\r\nEvil: 1", b"a\r\n\r\nGET /x HTTP/1.1\r\n", b"\0", b"a\r\n b", b"a\nb")),
)
IDS = st.from_regex(r"(?:[!$&'()*-;=@A-Z_a-z~]|%[0-9A-Fa-f]{2}){1,12}", fullmatch=True).map(
    str.encode
)
HOSTILE_IDS = st.text("a.%2fFeE0dDaA/\\@ \r\n", max_size=12).map(str.encode)
QUERIES = st.text('a=&%0dD/?:"', max_size=20).map(lambda text: b"?" + text.encode())
HOSTILE_QUERIES = st.text("a %0d#\\\r\n", max_size=20).map(lambda text: b"?" + text.encode())


@st.composite
def upgrades(draw: st.DrawFn) -> bytes:
    """Write an upgrade request that is sound but for one part, or altogether."""
    odd = draw(st.sampled_from((None, None, "id", "query", "value")))
    client_id = draw(HOSTILE_IDS if odd == "id" else IDS)
    query = draw(HOSTILE_QUERIES if odd == "query" else QUERIES)
    fields = draw(
        st.lists(st.tuples(NAMES, VALUES), min_size=2, max_size=6, unique_by=lambda field: field[0])
    )
    if odd == "value":
        fields.append((draw(NAMES), draw(HOSTILE_VALUES)))
    lines = (
        b"GET /%b%b HTTP/1.1" % (client_id, query),
        *(b"Host: x", b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Version: 13"),
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        *(b"%b: %b" % field for field in fields),
    )
    return b"\r\n".join((*lines, b"", draw(st.sampled_from((b"", b"GET / HTTP/1.1\r\n\r\n")))))


def admit(policy: HandshakePolicy, data: bytes, cuts: list[int]) -> tuple[Handshake, RequestHead]:
    """Read a request in pieces and judge it.

    Raises:
        HandshakeError: unless it is let in.
    """
    head = RequestHead()
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for start, end in pairwise(places):
        if head.feed(data[start:end]):
            return policy.check(head, PEER), head
    raise HandshakeError("not complete")


@often
@given(
    st.one_of(upgrades(), upgrades(), upgrades(), HANDSHAKES),
    st.lists(st.integers(0, 500), max_size=2),
    st.sampled_from(POLICIES),
)
def test_connect_is_one_request_with_what_the_client_said_and_nothing_else(
    data: bytes, cuts: list[int], policy: HandshakePolicy
) -> None:
    try:
        handshake, head = admit(policy, data, cuts)
    except HandshakeError:
        return
    push_url = b"http://127.0.0.1:1/" + handshake.client_id
    wire = ENCODER.connect(
        handshake.client_id, handshake.query, 7, push_url, handshake.header_lines
    )
    request = the_request_in(wire)
    assert (request["method"], request["body"]) == (b"GET", b"")
    path, mark, query = to_origin_form(head.target).partition(b"?")
    assert request["target"] == b"/ba%20se/" + handshake.client_id + mark + query
    assert unquote_to_bytes(b"/" + handshake.client_id) == unquote_to_bytes(path)
    *ours, last = request["headers"]
    assert ours[:4] == [
        (b"Host", b"api.example"),
        (b"Ws2api-Generation", b"7"),
        (b"Accept-Encoding", b"identity"),
        (b"Ws2api-Push-Url", push_url),
    ]
    assert ours[4:] == [
        (name, head.headers[name.lower()].rstrip(b" \t"))
        for name in PASSED_ON
        if name.lower() in head.headers
    ]
    assert last[0] == b"X-Forwarded-For"
    assert last[1].rpartition(b", ")[2] == PEER.encode()
    assert policy is not POLICIES[0] or last[1] == PEER.encode()
    # And to a parser that takes CR or LF alone for a line end, it has as many lines.
    assert len(re.split(rb"\r\n|\r|\n", wire)) == len(request["headers"]) + 3


@often
@given(
    st.from_regex(r"(?:[A-Za-z0-9._~-]|%[0-9A-Fa-f]{2}){1,12}", fullmatch=True).map(str.encode),
    st.one_of(st.binary(max_size=300), HANDSHAKES),
    st.booleans(),
    st.integers(1, 4999),
)
def test_message_and_disconnect_are_one_request_each(
    client_id: bytes, body: bytes, is_text: bool, number: int
) -> None:
    for method, wire in (
        (b"POST", ENCODER.message(client_id, 7, number, is_text, body)),
        (b"DELETE", ENCODER.disconnect(client_id, 7, number, body)),
    ):
        request = the_request_in(wire)
        assert request["method"] == method
        assert request["target"] == b"/ba%20se/" + client_id
        assert request["body"] == body
        assert len(request["headers"]) == 6
        assert dict(request["headers"])[b"Content-Length"] == b"%d" % len(body)


# What the API answers.


OFFER = (
    b"GET /me HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Protocol: a, b\r\n\r\n"
)


@st.composite
def replies(draw: st.DrawFn) -> bytes:
    """Write an answer to a connect with fields that anything may stand in."""
    names = st.sampled_from(
        (
            *(b"Set-Cookie", b"Sec-WebSocket-Protocol", b"WWW-Authenticate", b"Retry-After"),
            *(b"Content-Type", b"Connection", b"Upgrade", b"Sec-WebSocket-Accept", b"Location"),
        )
    )
    fields = draw(st.lists(st.tuples(names, st.one_of(VALUES, HOSTILE_VALUES)), max_size=5))
    body = draw(st.sampled_from((b"ok", b"no", b"", b"HTTP/1.1 200 OK\r\n\r\n", b"\x81\x01a")))
    status = draw(st.sampled_from((200, 200, 401, 403, 429, 500, 204, 302)))
    reason = draw(st.sampled_from((b"OK", b"", b"Set-Cookie: a")))
    lines = [b"HTTP/1.1 %d %b" % (status, reason), *(b"%b: %b" % field for field in fields)]
    return b"\r\n".join((*lines, b"Content-Length: %d" % len(body), b"", body))


@often
@given(replies())
def test_answer_to_the_client_is_one_response_with_what_it_may_say(data: bytes) -> None:
    reply = ReplyReader(1000)
    reply.expect(want_headers=True)
    try:
        reply.feed(data)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade, ReplyTooLarge):
        return
    if not reply.complete:
        return
    if reply.status == 200 and reply.body == b"ok":
        handshake, _ = admit(POLICIES[0], OFFER, [])
        try:
            wire, chosen = POLICIES[0].accept(handshake, reply)
        except HandshakeError:
            return
        status, headers, body = the_response_in(wire)
        assert (status, body) == (101, b"")
        assert set(headers) <= OF_THE_101
        assert headers[b"connection"] == b"Upgrade"
        assert headers[b"sec-websocket-accept"] == handshake.accept
        assert headers.get(b"sec-websocket-protocol", b"") == chosen
        assert chosen in (b"", b"a", b"b")
        return
    status, headers, body = the_response_in(refusal(reply))
    assert status in (401, 403, 429, 502)
    assert set(headers) <= OF_A_REFUSAL
    assert headers[b"connection"] == b"close"
    assert headers[b"content-length"] == b"%d" % len(body)


# Options.


@pytest.mark.parametrize(
    "name",
    [
        *("Ws2api-Generation", "ws2api-push-url", "WS2API-Sequence", "Ws2api-Anything"),
        *("Ws2api_Generation", "X_Forwarded_For", "Content_Length", "X-Forwarded-For", "Host"),
        *("Transfer-Encoding", "Connection", "Content-Length", "TE", "Upgrade"),
    ],
)
def test_header_that_the_gateway_sets_cannot_be_passed_on(name: str) -> None:
    with pytest.raises(SettingsError, match="cannot be forwarded"):
        load(["--forward-header", name])


@pytest.mark.parametrize("name", ["A: b", "A\r\nB", "A\0", "A B", "É"])
def test_header_name_that_is_none_cannot_be_passed_on(name: str) -> None:
    with pytest.raises(SettingsError, match="no header name"):
        load(["--forward-header", name])


def test_ports_that_are_not_the_clients_are_on_loopback_by_default() -> None:
    options = load([])
    assert options.push_listen.host == options.admin_listen.host == "127.0.0.1"
    assert not options.single_port


# The source.

SOURCES = [path for folder in ("gateway", "supervisor") for path in (ROOT / folder).glob("*.py")]
_SECRET = re.compile(r"token|secret|password|authorization", re.IGNORECASE)


def names_under(node: ast.AST) -> list[str]:
    """List the names and attributes in an expression."""
    return [
        found.id if isinstance(found, ast.Name) else found.attr
        for found in ast.walk(node)
        if isinstance(found, (ast.Name, ast.Attribute))
    ]


def leaks_in_time(tree: ast.AST) -> list[int]:
    """List the lines that compare a secret with == or !=, which end at the first difference."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        and any(isinstance(operator, (ast.Eq, ast.NotEq, ast.In)) for operator in node.ops)
        and any(
            _SECRET.search(name)
            for side in (node.left, *node.comparators)
            for name in names_under(side)
        )
    ]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_secrets_are_compared_in_constant_time(source: Path) -> None:
    assert not leaks_in_time(ast.parse(source.read_text()))


def test_that_test_sees_a_leak() -> None:
    assert leaks_in_time(ast.parse("if\\\n self._authorization == hub.token: pass")) == [2]
    assert not leaks_in_time(ast.parse("if hub.token is not None: pass"))


# The page.

PAGE = (ROOT / "docs" / "threat-model.md").read_text()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(tests/[^`]+)`", PAGE))))
def test_page_names_a_test_that_exists(name: str) -> None:
    file, *path = name.split("::")
    assert (ROOT / file).is_file()
    assert names_in(ast.parse((ROOT / file).read_text()).body, path), name


@pytest.mark.parametrize(
    ("flag", "default"),
    re.findall(r"^\|[^|]+\| `(--[a-z-]+)` \| `([^`]+)` \|$", PAGE, re.MULTILINE),
)
def test_page_tells_the_limits_as_they_are(flag: str, default: str) -> None:
    assert default in {row.default for row in option_rows() if row.flag == flag}


@pytest.mark.parametrize(
    ("flag", "default"), re.findall(r"^\| \w+, `(--[a-z-]+)` \| `([^`]+)` \|", PAGE, re.MULTILINE)
)
def test_page_tells_the_ports_as_they_are(flag: str, default: str) -> None:
    assert default in {row.default for row in option_rows() if row.flag == flag}


def test_page_links_only_to_headings_that_exist() -> None:
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= headings


def test_page_shows_what_it_claims() -> None:
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE):
        if "\n**" in section:
            assert "Shown by" in section, section[:60]
