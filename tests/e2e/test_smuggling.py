"""Try to make the API hear what no client may say.

The API notes the very bytes that it gets: each request must be the expected one, byte for byte,
with nothing before, between or behind. Random bytes are the affair of test_hostile_bytes; here each
case is one that has fooled some proxy or server before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import pytest

from .wire_side import (
    BASE,
    CONTROLS,
    HTTP_IN_HTTP,
    RawClient,
    Side,
    both_sides,
    new_marker,
    upgrade,
)

TENANT: Final = b"X-Tenant"
"""The header that the gateway is told to pass on."""


@pytest.fixture(scope="module")
def side() -> Iterator[Side]:
    """Run the gateway of most tests."""
    with both_sides(forward_header=[TENANT.decode()]) as running:
        yield running


@pytest.fixture(scope="module")
def trusting() -> Iterator[Side]:
    """Run a gateway that believes the X-Forwarded-For of whoever connects from this host."""
    with both_sides(trusted_proxy=["127.0.0.0/8"]) as running:
        yield running


@pytest.fixture
def marker() -> bytes:
    return new_marker()


class TestPath:
    @pytest.mark.parametrize(
        "encoded",
        [
            *(b"%0d%0a", b"%0D%0AEvil%3A%201", b"%00", b"a%00.txt", b"%2f", b"%2F%2f", b"a%2Fb"),
            *(
                b"%2e%2e",
                b"%2E%2E%2e",
                b"%c0%ae%c0%ae%c0%af",
                b"%e0%80%af",
                b"%ff%fe",
                b"%ed%a0%80",
            ),
            *(b"%252e%252e%252f", b"%2500", b"%25%32%65", b"%3fq%3d1", b"%23", b"%3b", b"%40all"),
            *(b"%20HTTP%2f1.1%0d%0aHost%3a%20evil%0d%0a%0d%0aGET%20%2fadmin", b"%41%62", b"~.-_"),
        ],
    )
    def test_arrives_as_it_was_meant(self, side: Side, marker: bytes, encoded: bytes) -> None:
        client = side.connect(b"/" + marker + encoded)
        # Escapes in capitals, and none of what needs none (RFC 3986, 6.2.2).
        tail = re.sub(rb"%..", lambda escape: escape[0].upper(), encoded)
        for escape, sign in ((b"%2E", b"."), (b"%41", b"A"), (b"%62", b"b"), (b"%65", b"e")):
            tail = tail.replace(b"%25%32%65", b"%252e").replace(escape, sign)
        client_id = marker + tail
        client.send("hi")
        side.api.await_requests(b"POST " + BASE + marker, 1)
        client.close(4000, "bye")
        heard = side.heard(marker, 3)
        assert heard == [
            side.expected_get(client_id),
            side.expected(b"POST", client_id, b"Ws2api-Sequence: 1", b"hi"),
            side.expected(b"DELETE", client_id, b"Ws2api-Close-Code: 4000", b"bye"),
        ]

    @pytest.mark.parametrize(
        "tail",
        [
            *(b"\rEvil: 1", b"\nEvil: 1", b"\0", b"\t", b"\x01", b"\x7f", b"\x80", b"\xc0\xae"),
            *(b" HTTP/1.1 x", b" HTTP/1.1 ", b" HTTP/1.0\r\nX:", b" x", b"\\..\\admin"),
            *(b"/", b"/../admin", b"/..", b"/./x", b"//", b"|a=b", b"#x", b"%", b"%0", b"%u002e"),
            *(b"%2f..;x", b"%2F..%3bx%2Fadmin"),
            *(b"%2f..", b"%2F..%2Fadmin", b"%2f%2e%2E%2fadmin", b"%5c..%5cadmin", b"%2f.%2fx"),
        ],
    )
    def test_that_is_no_client_id_is_refused(self, side: Side, marker: bytes, tail: bytes) -> None:
        side.refuse(upgrade(b"/" + marker + tail), marker)

    @pytest.mark.parametrize(
        "head", [b"..%2f", b"%2e%2e%2F", b".%2f", b"@", b"../", b"/", b"%5c..%2f", b"..;"]
    )
    def test_that_leads_elsewhere_is_refused(self, side: Side, marker: bytes, head: bytes) -> None:
        side.refuse(upgrade(b"/" + head + marker), marker)


class TestTarget:
    @pytest.mark.parametrize(
        "form",
        [
            *(b"http://gateway.example/a/%b", b"http:///%b", b"ws://u@a/%b", b"//a/%b"),
            *(
                b"http://127.0.0.1:8000/../%b",
                b"ftp://a/%b",
                b"http:/%b",
                b"http:%b",
                b"%b",
                b"%b:80",
            ),
            *(b"user@host/%b", b"*%b", b"?%b", b"\\%b", b"file:///%b", b" /%b x"),
        ],
    )
    def test_of_another_form_is_refused(self, side: Side, marker: bytes, form: bytes) -> None:
        side.refuse(upgrade(form % marker), marker)

    @pytest.mark.parametrize(
        "form",
        [
            *(b"http://gateway.example/%b", b"https://gateway.example/%b", b"WS://[::1]:1/%b"),
            *(b"http://127.0.0.1:8000/%b", b"wss://evil.example:443/%b"),
        ],
    )
    def test_of_the_absolute_form_says_nothing_but_its_path(
        self, side: Side, marker: bytes, form: bytes
    ) -> None:
        side.connect(form % marker + b"?http://b/")
        assert side.get(marker) == side.expected_get(marker, b"?http://b/")

    @pytest.mark.parametrize(
        ("line", "status"),
        [
            (b"CONNECT gateway.example:80 HTTP/1.1", 426),
            (b"CONNECT /%b HTTP/1.1", 426),
            (b"OPTIONS * HTTP/1.1", 426),
            (b"GET * HTTP/1.1", 400),
            (b"POST /%b HTTP/1.1", 426),
            (b"HEAD /%b HTTP/1.1", 426),
            (b"get /%b HTTP/1.1", 400),
            (b"GET /%b HTTP/1.0", 400),
            (b"GET /%b HTTP/2.0", 400),
            (b"GET /%b", 400),
            (b"GET\0/%b HTTP/1.1", 400),
        ],
    )
    def test_with_another_start_line_is_refused(
        self, side: Side, marker: bytes, line: bytes, status: int
    ) -> None:
        request = upgrade(b"/", b"X-Marker: " + marker)
        start = line.replace(b"%b", marker)
        side.refuse(start + request[request.index(b"\r\n") :], marker, status)

    @pytest.mark.parametrize(
        "query",
        [
            *(b"?a=%0d%0aEvil:%201", b"?%00", b"?/../../admin", b"?http://evil.example/", b"??&&="),
            *(b"?%2e%2e%2f", b'?"<>\\^`{|}', b"?a=b HTTP/1.1"[:4], b"?%", b"?%zz", b"?@!$'()*+,;:"),
        ],
    )
    def test_query_arrives_as_it_was_sent_and_once(
        self, side: Side, marker: bytes, query: bytes
    ) -> None:
        client = side.connect(b"/" + marker + query)
        client.send("hi")
        client.close()
        heard = side.heard(marker, 3)
        assert heard[0] == side.expected_get(marker, query)
        assert not [request for request in heard[1:] if query in request]

    @pytest.mark.parametrize(
        "query", [b"?a\r\n", b"?a\rb", b"?a\nEvil: 1", b"?\0", b"?\t", b"?\x80", b"?\x7f", b"?a#b"]
    )
    def test_query_with_a_byte_that_must_be_encoded_is_refused(
        self, side: Side, marker: bytes, query: bytes
    ) -> None:
        side.refuse(upgrade(b"/" + marker + query), marker)


PASSED_ON: Final = (
    *(b"Authorization", b"Cookie", b"Origin", b"User-Agent", TENANT),
    b"Sec-WebSocket-Protocol",
)


class TestHeaders:
    @pytest.mark.parametrize("name", [*PASSED_ON, b"X-Forwarded-For", b"X-Other"])
    @pytest.mark.parametrize("value", CONTROLS.values(), ids=CONTROLS)
    def test_value_with_a_control_is_refused(
        self, side: Side, marker: bytes, name: bytes, value: bytes
    ) -> None:
        side.refuse(upgrade(b"/" + marker, name + b": " + value), marker)

    @pytest.mark.parametrize("name", PASSED_ON)
    def test_line_that_follows_is_a_line_of_its_own(
        self, side: Side, marker: bytes, name: bytes
    ) -> None:
        # What a page or a program that escapes nothing can make of one value: further lines,
        # which are judged like any others.
        side.connect(b"/" + marker, name + b": a\r\nEvil: 1\r\nWs2api-Generation: 1")
        assert side.get(marker) == side.expected_get(marker, b"", name + b": a")

    @pytest.mark.parametrize("name", PASSED_ON)
    @pytest.mark.parametrize("value", [b"%0d%0aEvil:%201", b"a%00b", b"a\tb: c", b"\xff\xc3\xa9"])
    def test_value_arrives_as_it_was_sent(
        self, side: Side, marker: bytes, name: bytes, value: bytes
    ) -> None:
        if name == b"Sec-WebSocket-Protocol":
            value = b"a%0d%0aEvil%00, b"  # tokens only
        side.connect(b"/" + marker, name + b": " + value)
        assert side.get(marker) == side.expected_get(marker, b"", name + b": " + value)

    @pytest.mark.parametrize(
        "line",
        [
            *(b"Evil : 1", b"Evil\t: 1", b" Evil: 1", b"\tEvil: 1", b": 1", b"Evil", b"E\0vil: 1"),
            *(
                b"E\rvil: 1",
                b"E\nvil: 1",
                b"E(vil): 1",
                b"\xe9vil: 1",
                b"Evil\x0b: 1",
                b"Evil\xa0: 1",
            ),
            b"Content-Length : 5",
            b"Transfer-Encoding : chunked",
        ],
    )
    def test_name_that_is_none_is_refused(self, side: Side, marker: bytes, line: bytes) -> None:
        side.refuse(upgrade(b"/" + marker, line), marker)

    @pytest.mark.parametrize(
        ("before", "after"),
        [(b"\r\n", b"\n"), (b"\r\n", b"\r"), (b"\r\n\r\n", b"\n\n"), (b"\r\n\r\n", b"\r\r")],
        ids=["LF", "CR", "LF-at-the-end", "CR-at-the-end"],
    )
    def test_other_line_ends_are_refused(
        self, side: Side, marker: bytes, before: bytes, after: bytes
    ) -> None:
        # With a good request behind, which such a parser would take for the body or the next.
        request = upgrade(b"/" + marker).replace(before, after) + upgrade(b"/" + marker)
        side.refuse(request, marker)

    def test_client_cannot_set_what_the_gateway_says(self, side: Side, marker: bytes) -> None:
        client = side.connect(
            b"/" + marker,
            *(
                b"Ws2api-Generation: 1",
                b"ws2api-push-url: http://evil.example/",
                b"WS2API-RETRY: safe",
            ),
            *(b"Ws2api-Sequence: 9", b"Ws2api-Close-Code: 1000", b"Ws2api_Generation: 2"),
            *(
                b"X-Forwarded-For: 10.0.0.1",
                b"X_Forwarded_For: 10.0.0.2",
                b"Forwarded: for=10.0.0.3",
            ),
            *(b"X-Real-IP: 10.0.0.4", b"Client-IP: 10.0.0.5", b"X-Forwarded-Host: evil.example"),
            *(b"X-Original-URL: /admin", b"X-HTTP-Method-Override: PUT", b"X-Rewrite-Url: /admin"),
        )
        client.send(b"hi")
        client.close()
        heard = side.heard(marker, 3)
        assert heard == [
            side.expected_get(marker),
            side.expected(b"POST", marker, b"Ws2api-Sequence: 1 binary", b"hi"),
            side.expected(b"DELETE", marker, b"Ws2api-Close-Code: 1000", b""),
        ]

    def test_client_cannot_take_headers_out(self, side: Side, marker: bytes) -> None:
        # A proxy that obeys would drop what Connection names (RFC 9110, 7.6.1).
        request = upgrade(
            b"/" + marker,
            *(
                b"Authorization: Bearer x",
                b"Cookie: a=b",
                b"Keep-Alive: timeout=1",
                b"TE: trailers",
            ),
            *(
                b"Trailer: Cookie",
                b"Proxy-Connection: close",
                b"Expect: 100-continue",
                b"Via: 1.1 x",
            ),
        ).replace(
            b"Connection: Upgrade",
            b"Connection: close, Upgrade, Authorization, Cookie, Host, Ws2api-Generation, "
            b"X-Forwarded-For",
        )
        RawClient(side.gateway.open_stream(), request)
        passed_on = (b"Authorization: Bearer x", b"Cookie: a=b")
        assert side.get(marker) == side.expected_get(marker, b"", *passed_on)

    def test_cookies_of_several_lines_are_one(self, side: Side, marker: bytes) -> None:
        side.connect(b"/" + marker, b"Cookie: a=1", b"cookie: b=2; c", b"COOKIE: Host: evil")
        cookie = b"Cookie: a=1; b=2; c; Host: evil"
        assert side.get(marker) == side.expected_get(marker, b"", cookie)

    @pytest.mark.parametrize(
        "name",
        [
            b"Host",
            b"Authorization",
            b"Origin",
            b"Sec-WebSocket-Key",
            b"User-Agent",
            b"Content-Length",
        ],
    )
    def test_second_line_of_what_may_stand_once_is_refused(
        self, side: Side, marker: bytes, name: bytes
    ) -> None:
        side.refuse(upgrade(b"/" + marker, name + b": 0", name.lower() + b": 0"), marker)


class TestBody:
    @pytest.mark.parametrize(
        "lines",
        [
            (b"Content-Length: %d" % len(HTTP_IN_HTTP),),
            (b"Content-Length: 5", b"Content-Length: 5"),
            (b"Content-Length: 5, 5",),
            (b"Content-Length: +5",),
            (b"Content-Length: 0x5",),
            (b"Content-Length: -1",),
            (b"Content-Length: 00",),
            (b"Content-Length: 5", b"Content-Length: 0"),
            (b"Content-Length: " + b"9" * 25,),
            (b"Transfer-Encoding: chunked",),
            (b"Transfer-Encoding: chunked", b"Content-Length: 5"),
            (b"Content-Length: 5", b"Transfer-Encoding: chunked"),
            (b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"),
            (b"Transfer-Encoding: identity",),
            (b"Transfer-Encoding: xchunked",),
            (b"Transfer-Encoding:\x0bchunked",),
            (b"transfer-encoding: gzip, chunked",),
        ],
        ids=lambda lines: b" & ".join(lines).decode("latin-1")[:60],
    )
    def test_of_an_upgrade_is_refused(
        self, side: Side, marker: bytes, lines: tuple[bytes, ...]
    ) -> None:
        for body in (HTTP_IN_HTTP, b"5\r\nhello\r\n0\r\n\r\n" + upgrade(b"/" + marker)):
            side.refuse(upgrade(b"/" + marker, *lines) + body, marker)

    @pytest.mark.parametrize("behind", [HTTP_IN_HTTP, upgrade(b"/smuggler-behind"), b"\r\n\r\n"])
    def test_request_behind_an_upgrade_is_no_request(
        self, side: Side, marker: bytes, behind: bytes
    ) -> None:
        stream = side.gateway.open_stream()
        client = RawClient(stream, upgrade(b"/" + marker, b"Content-Length: 0") + behind)
        client.assert_closed(1002)  # it was read as frames
        heard = [request.split(b" ")[0] for request in side.api.await_requests(marker, 2)]
        assert heard == [b"GET", b"DELETE"]

    @pytest.mark.parametrize("behind", [HTTP_IN_HTTP, upgrade(b"/smuggler-behind")])
    def test_request_behind_a_refused_one_is_not_read(
        self, side: Side, marker: bytes, behind: bytes
    ) -> None:
        side.api.answer(b"GET " + BASE + marker, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno")
        assert side.ask(upgrade(b"/" + marker) + behind).status == 403
        side.refuse(upgrade(b"/" + marker + b"/") + behind, marker + b"/")
        assert len(side.api.await_requests(marker, 1)) == 1


class TestForwardedFor:
    @pytest.mark.parametrize(
        "lines",
        [
            (b"X-Forwarded-For: 10.0.0.1",),
            (b"X-Forwarded-For: 127.0.0.1, 10.0.0.1",),
            (b"x-forwarded-for: 10.0.0.1", b"X-FORWARDED-FOR: 10.0.0.2"),
            (b"X-Forwarded-For: [2001:db8::1]:4711",),
            (b"X-Forwarded-For:",),
        ],
    )
    def test_of_anybody_is_replaced(
        self, side: Side, marker: bytes, lines: tuple[bytes, ...]
    ) -> None:
        side.connect(b"/" + marker, *lines)
        assert side.get(marker) == side.expected_get(marker)

    @pytest.mark.parametrize(
        ("lines", "address"),
        [
            ((), b"127.0.0.1"),
            ((b"X-Forwarded-For: 10.0.0.1",), b"10.0.0.1, 127.0.0.1"),
            (
                (b"X-Forwarded-For: 6.6.6.6", b"x-forwarded-for: 10.0.0.1"),
                b"6.6.6.6, 10.0.0.1, 127.0.0.1",
            ),
            ((b"X-Forwarded-For: 2001:db8::1",), b"2001:db8::1, 127.0.0.1"),
            ((b'X-Forwarded-For: "[2001:db8::1]:4711"',), b'"[2001:db8::1]:4711", 127.0.0.1'),
            ((b"X-Forwarded-For: 10.0.0.1:4711",), b"10.0.0.1:4711, 127.0.0.1"),
            (
                (b"X-Forwarded-For: unknown, _x, \xff;%0d%0a",),
                b"unknown, _x, \xff;%0d%0a, 127.0.0.1",
            ),
            ((b"X_Forwarded_For: 6.6.6.6", b"Forwarded: for=6.6.6.6"), b"127.0.0.1"),
        ],
    )
    def test_of_a_trusted_proxy_is_kept_as_it_is_and_appended_to(
        self, trusting: Side, marker: bytes, lines: tuple[bytes, ...], address: bytes
    ) -> None:
        # The last entry is always the gateway's own, so what a client puts in front never is.
        trusting.connect(b"/" + marker, *lines)
        assert trusting.get(marker) == trusting.expected_get(marker, address=address)

    @pytest.mark.parametrize("value", CONTROLS.values(), ids=CONTROLS)
    def test_of_a_trusted_proxy_holds_no_control(
        self, trusting: Side, marker: bytes, value: bytes
    ) -> None:
        trusting.refuse(upgrade(b"/" + marker, b"X-Forwarded-For: " + value), marker)
