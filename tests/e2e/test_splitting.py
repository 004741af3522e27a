"""Try to split what has one beginning and one end: a client's message, an answer of the API.

On the connection to the API a body must end where its Content-Length says; on the client's, nothing
of an answer may pass for another header, another response or another frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest
from harness.wire_api import OK
from harness.ws import Frame, Op

from .wire_side import BASE, CONTROLS, HTTP_IN_HTTP, Side, both_sides, new_marker, upgrade


@pytest.fixture(scope="module")
def side() -> Iterator[Side]:
    """Run the gateway of all these tests."""
    with both_sides() as running:
        yield running


@pytest.fixture
def marker() -> bytes:
    return new_marker()


PAYLOADS: Final = (
    *(HTTP_IN_HTTP, b"\r\n\r\n" + HTTP_IN_HTTP, b"0\r\n\r\n" + HTTP_IN_HTTP, b"\r\n", b"\0", b"\n"),
    HTTP_IN_HTTP * 3 + b"DELETE ",
    HTTP_IN_HTTP * 2000,
    b"Content-Length: 0\r\n\r\n" + HTTP_IN_HTTP,
)


class TestMessages:
    @pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: str(payload[:20]))
    @pytest.mark.parametrize("opcode", [Op.TEXT, Op.BINARY])
    def test_are_framed_by_their_length(
        self, side: Side, marker: bytes, opcode: Op, payload: bytes
    ) -> None:
        client = side.connect(b"/" + marker)
        half = len(payload) // 2
        client.send_frame(opcode, payload)
        client.send_fragments(opcode, [payload[:half], payload[half:]])
        client.close()
        heard = side.heard(b"/" + marker, 4)
        kind = b" binary" if opcode == Op.BINARY else b""
        assert heard[1:3] == [
            side.expected(b"POST", marker, b"Ws2api-Sequence: %d%b" % (number, kind), payload)
            for number in (1, 2)
        ]
        assert len(heard) == 4

    @pytest.mark.parametrize(
        "reason",
        [
            *(b"\r\n\r\n", b"\r\nEvil: 1", b"\0", b"EOF", b"worker lost", b"x" * 123, b""),
            (b"\r\n\r\n" + HTTP_IN_HTTP)[:123],
        ],
        ids=lambda reason: str(reason[:20]),
    )
    def test_close_reason_is_framed_by_its_length(
        self, side: Side, marker: bytes, reason: bytes
    ) -> None:
        client = side.connect(b"/" + marker)
        client.close(4000, reason.decode())
        heard = side.heard(b"/" + marker, 2)
        line = b"Ws2api-Close-Code: 4000"
        assert heard == [
            side.expected_get(marker),
            side.expected(b"DELETE", marker, line, reason),
        ]


class TestAnswersOfTheApi:
    @pytest.mark.parametrize("status", [b"200 OK", b"401 Unauthorized"])
    @pytest.mark.parametrize(
        "name",
        [
            b"Set-Cookie",
            b"Sec-WebSocket-Protocol",
            b"WWW-Authenticate",
            b"Retry-After",
            b"Content-Type",
        ],
    )
    @pytest.mark.parametrize("value", CONTROLS.values(), ids=CONTROLS)
    def test_control_in_a_header_is_a_bad_gateway(
        self, side: Side, marker: bytes, status: bytes, name: bytes, value: bytes
    ) -> None:
        line = name + b": " + value
        wire = b"HTTP/1.1 " + status + b"\r\n" + line + b"\r\nContent-Length: 2\r\n\r\nok"
        side.api.answer(b"GET " + BASE + marker, wire)
        response = side.ask(upgrade(b"/" + marker, b"Sec-WebSocket-Protocol: a"))
        assert response.status == 502
        assert {name for name, _ in response.headers} == {
            *("Content-Type", "Content-Length", "Connection")
        }
        assert b"Evil" not in response.body
        side.connect(
            b"/smuggler0-after-" + marker
        ).close()  # else the API would count as away in time

    @pytest.mark.parametrize("name", [b"Set-Cookie", b"Sec-WebSocket-Protocol"])
    def test_line_that_follows_is_not_passed_on(
        self, side: Side, marker: bytes, name: bytes
    ) -> None:
        lines = name + b": a\r\nEvil: 1\r\nConnection: close\r\nSec-WebSocket-Accept: evil\r\n"
        side.api.answer(
            b"GET " + BASE + marker,
            b"HTTP/1.1 200 OK\r\n" + lines + b"Content-Length: 2\r\n\r\nok",
        )
        client = side.connect(b"/" + marker, b"Sec-WebSocket-Protocol: a")
        got = [field for field, _ in client.response.headers]
        passed_on = ["Upgrade", "Connection", "Sec-WebSocket-Accept", name.decode()]
        assert sorted(got) == sorted(passed_on)
        assert client.response.headers["Connection"] == "Upgrade"

    @pytest.mark.parametrize("chosen", [b"a, b", b"a\tb", b"a;b", b"b", b'"a"', b"a%0d%0aEvil: 1"])
    def test_subprotocol_is_one_that_was_offered(
        self, side: Side, marker: bytes, chosen: bytes
    ) -> None:
        side.api.answer(
            b"GET " + BASE + marker,
            b"HTTP/1.1 200 OK\r\nSec-WebSocket-Protocol: " + chosen + b"\r\n"
            b"Content-Length: 2\r\n\r\nok",
        )
        response = side.ask(upgrade(b"/" + marker, b"Sec-WebSocket-Protocol: a"))
        assert response.status == 502
        assert b"Evil" not in response.body

    def test_headers_of_an_interim_answer_and_trailers_are_not_passed_on(
        self, side: Side, marker: bytes
    ) -> None:
        side.api.answer(
            b"GET " + BASE + marker,
            b"HTTP/1.1 103 Early Hints\r\nSet-Cookie: interim=1\r\n\r\n"
            b"HTTP/1.1 200 OK\r\nSet-Cookie: final=1\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2\r\nok\r\n0\r\nSet-Cookie: trailer=1\r\nSec-WebSocket-Protocol: a\r\n\r\n",
        )
        client = side.connect(b"/" + marker, b"Sec-WebSocket-Protocol: a")
        assert client.response.headers.all("Set-Cookie") == ["final=1"]
        assert "Sec-WebSocket-Protocol" not in client.response.headers

    def test_reason_phrase_is_not_passed_on(self, side: Side, marker: bytes) -> None:
        side.api.answer(
            b"GET " + BASE + marker, b"HTTP/1.1 403 Evil: 1\r\nContent-Length: 2\r\n\r\nno"
        )
        stream = side.gateway.open_stream()
        stream.write(upgrade(b"/" + marker))
        assert stream.read_to_end().startswith(b"HTTP/1.1 403 Forbidden\r\n")

    @pytest.mark.parametrize("body", [OK, b"\r\n\r\n" + OK, b"\x81\x02hi", b"0\r\n\r\n"])
    def test_body_of_a_refusal_is_framed_by_its_length(
        self, side: Side, marker: bytes, body: bytes
    ) -> None:
        head = b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n" % len(body)
        side.api.answer(b"GET " + BASE + marker, head + body)
        assert side.ask(upgrade(b"/" + marker)).body == body

    @pytest.mark.parametrize("body", [OK, b"\x81\x04evil", b"\x88\x02\x03\xe8", b"\r\n\r\n"])
    def test_reply_to_a_message_is_one_frame(self, side: Side, marker: bytes, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n"
        head += b"Content-Length: %d\r\n\r\n" % len(body)
        side.api.answer(b"POST " + BASE + marker, head + body)
        client = side.connect(b"/" + marker)
        client.send("hi")
        assert client.receive_frame() == Frame(Op.BINARY, body)
        client.close()

    def test_second_answer_is_nobodys(self, side: Side, marker: bytes) -> None:
        # What an API says unasked must not become the answer to somebody else.
        evil = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
        side.api.answer(b"POST " + BASE + marker + b"a", OK + evil)
        one, other = side.connect(b"/" + marker + b"a"), side.connect(b"/" + marker + b"b")
        for _ in range(5):
            one.send("hi")
            assert one.receive() == "ok"
            other.send("hi")
        other.send_close(1000)
        assert other.receive_frame().opcode == Op.CLOSE  # its messages were answered with 204
        one.close()
