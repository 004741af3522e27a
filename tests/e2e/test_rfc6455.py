"""Keep RFC 6455 as the cases 1 to 7 and 10 of the Autobahn test suite examine it.

The API echoes. An empty message is an exception: its echo is empty, which means no message.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness.api import FakeApi, echo
from harness.gateway import GatewayProcess
from harness.stream import Stream
from harness.ws import Frame, Op, WsClient, close_payload

SIZES = [1, 125, 126, 127, 128, 65535, 65536]

RESERVED_OPCODES = [3, 4, 5, 6, 7, 11, 12, 13, 14, 15]

VALID_CODES = [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999]

INVALID_CODES = [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535]

VALID_TEXTS = [
    "Hello-µ@ßöäüàá-UTF-8!!",
    "κόσμε",
    "\0\x7f",
    "\x80\u07ff",
    "\u0800\ud7ff\ue000\ufffd",
    "\ufffe\uffff",
    "\U00010000\U0010ffff",
    "\ufeffbegins with a byte order mark",
]

INVALID_TEXTS = {
    "lone-continuation": b"\x80",
    "lone-start": b"\xc3",
    "start-without-continuation": b"\xce text",
    "cut-3-bytes": b"\xe2\x82",
    "cut-4-bytes": b"\xf0\x9f\x98",
    "overlong-2": b"\xc0\xaf",
    "overlong-3": b"\xe0\x80\xaf",
    "overlong-4": b"\xf0\x80\x80\xaf",
    "surrogate": b"\xed\xa0\x80",
    "surrogate-pair": b"\xed\xa0\xbd\xed\xb8\x80",
    "beyond-unicode": b"\xf4\x90\x80\x80",
    "5-bytes": b"\xf8\x88\x80\x80\x80",
    "6-bytes": b"\xfc\x84\x80\x80\x80\x80",
    "impossible-fe": b"\xfe",
    "impossible-ff": b"\xff",
    "after-valid-text": "κόσμε".encode() + b"\xed\xa0\x80edited",
}


@pytest.fixture(scope="module")
def bystander(shared_gateway: GatewayProcess, shared_api: FakeApi) -> Iterator[WsClient]:
    """Hold a client of the same worker that does everything right."""
    shared_api.on("bystander", "POST", echo)
    client = WsClient(Stream.open(shared_gateway.clients_address), "/bystander")
    yield client
    client.close()


@pytest.fixture(autouse=True)
def _bystander_is_served(bystander: WsClient) -> Iterator[None]:
    yield
    bystander.send("undisturbed")
    assert bystander.receive() == "undisturbed"


@pytest.fixture
def client(gateway: GatewayProcess, api: FakeApi, client_id: str) -> WsClient:
    """Hold a client whose messages come back."""
    api.on(client_id, "POST", echo)
    return gateway.connect(client_id)


def assert_works(client: WsClient) -> None:
    """See that the connection has survived what came before."""
    client.send("well?")
    assert client.receive() == "well?"


class TestFraming:
    """Case 1."""

    @pytest.mark.parametrize("chop", [None, 1, 997], ids=lambda chop: f"chop-{chop}")
    @pytest.mark.parametrize("size", SIZES)
    def test_text(self, client: WsClient, size: int, chop: int | None) -> None:
        if chop == 1:
            size = min(size, 1000)
        client.send("*" * size, chop=chop)
        assert client.receive() == "*" * size

    @pytest.mark.parametrize("chop", [None, 997], ids=lambda chop: f"chop-{chop}")
    @pytest.mark.parametrize("size", SIZES)
    def test_binary(self, client: WsClient, size: int, chop: int | None) -> None:
        client.send(b"\xfe" * size, chop=chop)
        assert client.receive() == b"\xfe" * size

    @pytest.mark.parametrize("empty", ["", b""])
    def test_empty(
        self, client: WsClient, api: FakeApi, client_id: str, empty: str | bytes
    ) -> None:
        client.send(empty)
        assert api.wait_for_one(client_id, "POST").body == b""
        assert_works(client)

    def test_length_in_more_bytes_than_needed(self, client: WsClient) -> None:
        client.send_raw(b"\x81\xfe\x00\x02\0\0\0\0hi")
        frame = client.receive_frame()
        assert frame == Frame(Op.TEXT, b"hi") or frame.payload[:2] == close_payload(1002)

    def test_unmasked_frame(self, client: WsClient) -> None:
        client.send_frame(Op.TEXT, b"bare", mask=False)
        client.assert_closed(1002)

    def test_masked_with_zeros(self, client: WsClient) -> None:
        client.send_raw(b"\x81\x82\0\0\0\0hi")
        assert client.receive() == "hi"

    def test_length_beyond_63_bits(self, client: WsClient) -> None:
        client.send_raw(b"\x82\xff" + b"\xff" * 8 + b"mask")
        frame = client.receive_frame()
        assert frame.opcode == Op.CLOSE
        assert frame.payload[:2] in (close_payload(1002), close_payload(1009))


class TestPings:
    """Case 2."""

    @pytest.mark.parametrize("payload", [b"", b"Hello, world!", b"\x00\xff\xfe\xfd", b"\xfe" * 125])
    def test_pong_carries_the_payload(self, client: WsClient, payload: bytes) -> None:
        client.send_frame(Op.PING, payload)
        assert client.receive_frame() == Frame(Op.PONG, payload)

    def test_in_single_bytes(self, client: WsClient) -> None:
        client.send_frame(Op.PING, b"\xfe" * 125, chop=1)
        assert client.receive_frame() == Frame(Op.PONG, b"\xfe" * 125)

    @pytest.mark.parametrize("opcode", [Op.PING, Op.PONG])
    def test_payload_beyond_125_bytes(self, client: WsClient, opcode: Op) -> None:
        client.send_frame(opcode, b"\xfe" * 126)
        client.assert_closed(1002)

    @pytest.mark.parametrize("payload", [b"", b"unsolicited"])
    def test_unsolicited_pong(self, client: WsClient, payload: bytes) -> None:
        client.send_frame(Op.PONG, payload)
        client.send_frame(Op.PING, b"asked")
        assert client.receive_frame() == Frame(Op.PONG, b"asked")

    def test_ten_at_once(self, client: WsClient) -> None:
        payloads = [f"ping {number}".encode() for number in range(10)]
        client.send_frames(*(Frame(Op.PING, payload) for payload in payloads))
        assert [client.receive_frame().payload for _ in payloads] == payloads


class TestReservedBits:
    """Case 3."""

    @pytest.mark.parametrize("opcode", [Op.TEXT, Op.BINARY, Op.PING, Op.CLOSE])
    @pytest.mark.parametrize("rsv", range(1, 8))
    def test_any(self, client: WsClient, rsv: int, opcode: Op) -> None:
        client.send_frame(opcode, b"", rsv=rsv)
        client.assert_closed(1002)

    def test_after_a_message(self, client: WsClient, api: FakeApi, client_id: str) -> None:
        client.send_frames(Frame(Op.TEXT, b"good"), Frame(Op.TEXT, b"bad", rsv=5))
        client.assert_closed(1002)
        api.wait_for_one(client_id, "DELETE")
        assert api.texts(client_id) == ["good"]


class TestReservedOpcodes:
    """Case 4."""

    @pytest.mark.parametrize("opcode", RESERVED_OPCODES)
    @pytest.mark.parametrize("payload", [b"", b"reserved"])
    def test_any(self, client: WsClient, opcode: int, payload: bytes) -> None:
        client.send_frame(opcode, payload)
        client.assert_closed(1002)

    def test_after_a_message_in_single_bytes(self, client: WsClient) -> None:
        client.send("good")
        assert client.receive() == "good"
        client.send_frame(3, b"bad", chop=1)
        client.assert_closed(1002)


class TestFragmentation:
    """Case 5."""

    @pytest.mark.parametrize("opcode", [Op.PING, Op.PONG, Op.CLOSE])
    def test_control_frame(self, client: WsClient, opcode: Op) -> None:
        client.send_frames(Frame(opcode, b"", fin=False), Frame(Op.CONTINUATION, b""))
        client.assert_closed(1002)

    @pytest.mark.parametrize("chop", [None, 1])
    def test_two_fragments(self, client: WsClient, chop: int | None) -> None:
        client.send_frame(Op.TEXT, b"fragment1", fin=False, chop=chop)
        client.send_frame(Op.CONTINUATION, b"fragment2", chop=chop)
        assert client.receive() == "fragment1fragment2"

    def test_control_frames_between(self, client: WsClient) -> None:
        client.send_frames(
            Frame(Op.BINARY, b"1", fin=False),
            Frame(Op.PING, b"a"),
            Frame(Op.CONTINUATION, b"2", fin=False),
            Frame(Op.PING, b"b"),
            Frame(Op.PONG, b"unsolicited"),
            Frame(Op.CONTINUATION, b"3", fin=False),
            Frame(Op.CONTINUATION, b""),
        )
        assert client.receive_frame() == Frame(Op.PONG, b"a")
        assert client.receive_frame() == Frame(Op.PONG, b"b")
        assert client.receive() == b"123"

    def test_pong_does_not_wait_for_the_last_fragment(self, client: WsClient) -> None:
        client.send_frames(Frame(Op.TEXT, b"1", fin=False), Frame(Op.PING, b"now"))
        assert client.receive_frame() == Frame(Op.PONG, b"now")
        client.send_frame(Op.CONTINUATION, b"2")
        assert client.receive() == "12"

    @pytest.mark.parametrize("fin", [True, False])
    @pytest.mark.parametrize("chop", [None, 1])
    def test_continuation_of_nothing(self, client: WsClient, fin: bool, chop: int | None) -> None:
        client.send_frame(Op.CONTINUATION, b"of what?", fin=fin, chop=chop)
        client.assert_closed(1002)

    def test_continuation_after_the_end(self, client: WsClient) -> None:
        client.send_fragments(Op.TEXT, [b"1", b"2"])
        client.send_frame(Op.CONTINUATION, b"3")
        client.assert_closed(1002)

    @pytest.mark.parametrize("opcode", [Op.TEXT, Op.BINARY])
    @pytest.mark.parametrize("fin", [True, False])
    def test_new_message_within_another(self, client: WsClient, opcode: Op, fin: bool) -> None:
        client.send_frames(Frame(Op.TEXT, b"1", fin=False), Frame(opcode, b"2", fin=fin))
        client.assert_closed(1002)

    def test_two_hundred_messages_in_fragments(self, client: WsClient) -> None:
        for _ in range(200):
            client.send_fragments(Op.TEXT, [b"a", b"b", b"c"])
        assert {client.receive() for _ in range(200)} == {"abc"}


class TestUtf8:
    """Case 6."""

    @pytest.mark.parametrize("text", VALID_TEXTS, ids=ascii)
    def test_valid(self, client: WsClient, text: str) -> None:
        client.send(text)
        assert client.receive() == text

    @pytest.mark.parametrize("text", VALID_TEXTS, ids=ascii)
    def test_valid_in_fragments_of_a_byte(self, client: WsClient, text: str) -> None:
        client.send_fragments(Op.TEXT, [bytes([byte]) for byte in text.encode()])
        assert client.receive() == text

    def test_valid_in_single_bytes_of_one_frame(self, client: WsClient) -> None:
        client.send(VALID_TEXTS[0], chop=1)
        assert client.receive() == VALID_TEXTS[0]

    @pytest.mark.parametrize("payload", INVALID_TEXTS.values(), ids=INVALID_TEXTS.keys())
    def test_invalid(self, client: WsClient, api: FakeApi, client_id: str, payload: bytes) -> None:
        client.send_frame(Op.TEXT, payload)
        client.assert_closed(1007)
        api.wait_for_one(client_id, "DELETE")
        assert not api.requests(client_id, "POST")

    @pytest.mark.parametrize("payload", INVALID_TEXTS.values(), ids=INVALID_TEXTS.keys())
    def test_invalid_in_fragments_of_a_byte(self, client: WsClient, payload: bytes) -> None:
        client.send_fragments(Op.TEXT, [bytes([byte]) for byte in payload])
        client.assert_closed(1007)

    def test_binary_need_not_be_text(self, client: WsClient) -> None:
        client.send_fragments(Op.BINARY, list(INVALID_TEXTS.values()))
        assert client.receive() == b"".join(INVALID_TEXTS.values())


class TestClose:
    """Case 7."""

    @pytest.mark.parametrize("code", VALID_CODES)
    def test_valid_code_is_echoed(self, client: WsClient, code: int) -> None:
        client.close(code, "for a reason")

    @pytest.mark.parametrize("code", INVALID_CODES)
    def test_invalid_code(self, client: WsClient, code: int) -> None:
        client.send_close(code)
        client.assert_closed(1002)

    def test_empty(self, client: WsClient) -> None:
        client.send_close()
        client.assert_closed(None)

    def test_half_a_code(self, client: WsClient) -> None:
        client.send_frame(Op.CLOSE, b"\x03")
        client.assert_closed(1002)

    def test_longest_reason(self, client: WsClient) -> None:
        client.close(1000, "*" * 123)

    def test_too_long_reason(self, client: WsClient) -> None:
        client.send_close(1000, "*" * 124)
        client.assert_closed(1002)

    def test_reason_that_is_not_utf8(self, client: WsClient) -> None:
        client.send_close(1000, INVALID_TEXTS["after-valid-text"])
        client.assert_closed(1007)

    def test_in_single_bytes(self, client: WsClient) -> None:
        client.send_raw(Frame(Op.CLOSE, close_payload(1000, "bye")).encode(), chop=1)
        client.assert_closed(1000, "bye")

    @pytest.mark.parametrize(
        "late",
        [
            Frame(Op.TEXT, b"too late"),
            Frame(Op.PING, b"too late"),
            Frame(Op.CLOSE, close_payload(1001)),
            Frame(3, b"not even valid"),
        ],
        ids=["message", "ping", "close", "reserved"],
    )
    def test_what_follows_is_ignored(
        self, client: WsClient, api: FakeApi, client_id: str, late: Frame
    ) -> None:
        client.send_frames(Frame(Op.CLOSE, close_payload(1000, "bye")), late)
        client.assert_closed(1000, "bye")
        assert api.wait_for_one(client_id, "DELETE").text == "bye"
        assert not api.requests(client_id, "POST")

    def test_within_a_fragmented_message(
        self, client: WsClient, api: FakeApi, client_id: str
    ) -> None:
        client.send_frames(
            Frame(Op.TEXT, b"1", fin=False),
            Frame(Op.CLOSE, close_payload(1000)),
            Frame(Op.CONTINUATION, b"2"),
        )
        client.assert_closed(1000)
        api.wait_for_one(client_id, "DELETE")
        assert not api.requests(client_id, "POST")

    def test_after_a_large_message(self, client: WsClient, api: FakeApi, client_id: str) -> None:
        client.send_frames(Frame(Op.TEXT, b"*" * 262_144), Frame(Op.CLOSE, close_payload(1000)))
        client.assert_closed(1000)
        api.wait_for_one(client_id, "DELETE")
        assert len(api.requests(client_id, "POST")[0].body) == 262_144


class TestAutoFragmentation:
    """Case 10."""

    def test_message_in_frames_of_1300_bytes(self, client: WsClient) -> None:
        payload = b"*" * 65536
        pieces = [payload[start : start + 1300] for start in range(0, len(payload), 1300)]
        client.send_fragments(Op.TEXT, pieces)
        assert client.receive() == payload.decode()
