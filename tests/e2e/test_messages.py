"""Turn each message into one POST, in order, and each answer into a message back."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator

import pytest
import websockets.sync.client
from harness.api import Drop, FakeApi, Handler, Hold, Raw, Reply, Request, echo
from harness.gateway import GatewayProcess
from harness.stream import Stream
from harness.waiting import DEADLINE_S, until
from harness.ws import Frame, Op, WsClient

from .conftest import StartGateway

MIB = 1 << 20
BINARY = "application/octet-stream"


@pytest.fixture(scope="module")
def impatient_api() -> Iterator[FakeApi]:
    """Serve the gateway that waits for one second."""
    with FakeApi() as api:
        yield api
    assert not api.violations


@pytest.fixture(scope="module")
def impatient(impatient_api: FakeApi) -> Iterator[GatewayProcess]:
    """Run a gateway that waits one second for the API, and keeps no connection to it."""
    with GatewayProcess(api=impatient_api.url, api_timeout="1s", api_max_idle=0) as gateway:
        yield gateway


def expect_working(client: WsClient, api: FakeApi, client_id: str) -> None:
    """Exchange one more message, the first to arrive from now on."""
    api.on(client_id, "POST", echo)
    client.send("still there?")
    assert client.receive() == "still there?"


class TestRequests:
    def test_text(self, gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
        client = gateway.connect(client_id)
        client.send("grüße, 世界")
        post = api.wait_for_one(client_id, "POST")
        assert post.target == f"/{client_id}"
        assert post.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert post.text == "grüße, 世界"

    def test_binary(self, gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
        client = gateway.connect(client_id)
        client.send(bytes(range(256)))
        post = api.wait_for_one(client_id, "POST")
        assert post.headers["Content-Type"] == BINARY
        assert post.body == bytes(range(256))

    def test_empty(self, gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
        client = gateway.connect(client_id)
        client.send("")
        client.send(b"")
        texts = api.wait_for(client_id, "POST", count=2)
        assert [post.body for post in texts] == [b"", b""]

    def test_fragmented(self, gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
        client = gateway.connect(client_id)
        client.send_fragments(Op.TEXT, [b"one ", b"", b"mess", b"age"])
        assert api.wait_for_one(client_id, "POST").text == "one message"

    def test_generation_and_sequence(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        client = gateway.connect(client_id)
        for message in ("a", b"b", "c"):
            client.send(message)
        posts = api.wait_for(client_id, "POST", count=3)
        assert [post.sequence for post in posts] == [1, 2, 3]
        generation = api.wait_for_one(client_id, "GET").generation
        assert {post.generation for post in posts} == {generation}

    def test_sequence_begins_anew_with_the_next_connection(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        for _ in range(2):
            client = gateway.connect(client_id)
            client.send("first")
            client.close()
        assert [post.sequence for post in api.wait_for(client_id, "POST", count=2)] == [1, 1]


class TestReplies:
    @pytest.mark.parametrize(
        ("content_type", "expected"),
        [
            ("text/plain", "reply"),
            ("text/html; charset=utf-8", "reply"),
            ("application/json", "reply"),
            (BINARY, b"reply"),
            ("Application/Octet-Stream", b"reply"),
            (f"{BINARY}; version=1", b"reply"),
        ],
    )
    def test_content_type_decides_between_text_and_binary(
        self,
        gateway: GatewayProcess,
        api: FakeApi,
        client_id: str,
        content_type: str,
        expected: str | bytes,
    ) -> None:
        api.on(client_id, "POST", Reply("reply", content_type=content_type))
        client = gateway.connect(client_id)
        client.send("ask")
        assert client.receive() == expected

    @pytest.mark.parametrize(
        "nothing",
        [Reply(), Reply(status=204), Reply(framing="chunked"), Reply(framing="close")],
        ids=["empty", "204", "chunked", "close"],
    )
    def test_empty_reply_is_no_message(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, nothing: Reply
    ) -> None:
        api.on(client_id, "POST", nothing, echo)
        client = gateway.connect(client_id)
        client.send("first")
        client.send("second")
        assert client.receive() == "second"

    @pytest.mark.parametrize(
        "reply",
        [
            Reply("reply", framing="chunked"),
            Reply("reply", framing="chunked", chop=1),
            Reply("reply", chop=1),
            Reply("reply", framing="close"),
            Reply("reply", framing="eof"),
            Reply("reply", framing="eof", chop=1),
            Raw(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nreply"),
            Raw(b"HTTP/1.1 200 \r\nContent-Length:5\r\n\r\nreply"),
            Raw(b"HTTP/1.1 200 OK\r\n\r\nreply", then_close=True),
        ],
        ids=[
            "chunked",
            "chunked-dripping",
            "dripping",
            "close",
            "http-1.0",
            "http-1.0-dripping",
            "interim",
            "terse",
            "to-eof",
        ],
    )
    def test_any_framing(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, reply: Reply
    ) -> None:
        api.on(client_id, "POST", reply, echo)
        client = gateway.connect(client_id)
        client.send("ask")
        assert client.receive() == "reply"
        expect_working(client, api, client_id)

    def test_connections_are_kept(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        api.on(client_id, "POST", echo)
        client = gateway.connect(client_id)
        for _ in range(5):
            expect_working(client, api, client_id)
        # One, or another while the client of the test before is reported on the first.
        assert len({post.connection for post in api.requests(client_id, "POST")}) <= 2

    def test_largest_message_both_ways(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        api.on(client_id, "POST", echo)
        client = gateway.connect(client_id)
        for message in ("x" * MIB, bytes(range(256)) * (MIB // 256)):
            client.send(message)
            assert client.receive() == message


class TestLimits:
    def test_larger_message_is_refused(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        client = gateway.connect(client_id)
        client.send(b"x" * (MIB + 1))
        client.assert_closed(1009)
        api.wait_for_one(client_id, "DELETE")
        assert not api.requests(client_id, "POST")

    def test_announced_size_suffices_to_refuse(
        self, gateway: GatewayProcess, client_id: str
    ) -> None:
        client = gateway.connect(client_id)
        client.send_raw(b"\x82\xff" + (1 << 62).to_bytes(8, "big") + b"mask")
        client.assert_closed(1009)

    def test_larger_message_in_fragments_is_refused(
        self, gateway: GatewayProcess, client_id: str
    ) -> None:
        client = gateway.connect(client_id)
        client.send_fragments(Op.TEXT, [b"x" * (MIB // 4)] * 4 + [b"x"])
        client.assert_closed(1009)

    def test_endless_empty_fragments_are_refused(
        self, gateway: GatewayProcess, client_id: str
    ) -> None:
        client = gateway.connect(client_id)
        client.send_frame(Op.TEXT, fin=False)
        client.send_raw(b"\x00\x80mask" * 20_000)
        client.assert_closed(1009)


class TestTroubleWithTheApi:
    @pytest.mark.parametrize("status", [201, 302, 400, 404, 500, 502])
    def test_other_status_loses_the_message_only(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, status: int
    ) -> None:
        api.on(client_id, "POST", Reply("not for the client", status), echo)
        failed = gateway.count("requests_failed")
        client = gateway.connect(client_id)
        client.send("lost")
        expect_working_after(client)
        assert api.texts(client_id) == ["lost", "next"]
        assert gateway.count("requests_failed") > failed

    @pytest.mark.parametrize(
        "reply",
        [
            Raw(b"SMTP ready\r\n\r\n"),
            Raw(b"\x00" * 100),
            Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc"),
            Raw(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nabc"),
            Raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc"),
            Raw(b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 300_000 + b"\r\n\r\n"),
            Reply("x" * (MIB + 1)),
            Reply("x" * (MIB + 1), framing="chunked"),
            Reply("x" * (MIB + 1), framing="eof"),
        ],
        ids=[
            "other-protocol",
            "zeros",
            "two-lengths",
            "negative-length",
            "bad-chunk",
            "long-header",
            "oversized",
            "oversized-chunked",
            "oversized-to-eof",
        ],
    )
    def test_invalid_reply_loses_the_message_only(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, reply: Reply
    ) -> None:
        api.on(client_id, "POST", reply, echo)
        invalid = gateway.count("api_replies_invalid")
        client = gateway.connect(client_id)
        client.send("lost")
        expect_working_after(client)
        assert gateway.count("api_replies_invalid") == invalid + 1
        lost, following = api.requests(client_id, "POST")
        assert lost.connection != following.connection

    def test_text_that_is_not_utf8_never_reaches_the_client(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        api.on(client_id, "POST", Reply(b"\xff\xfe"), echo)
        client = gateway.connect(client_id)
        client.send("lost")
        expect_working_after(client)

    @pytest.mark.parametrize("end", [Drop(), Drop(reset=True)], ids=["closed", "reset"])
    def test_message_that_arrived_on_a_reused_connection_is_not_sent_again(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, end: Drop
    ) -> None:
        api.on(client_id, "POST", echo, end, echo)
        client = gateway.connect(client_id)
        client.send("first")
        assert client.receive() == "first"
        client.send("lost")
        client.send("third")
        assert client.receive() == "third"
        assert api.texts(client_id) == ["first", "lost", "third"]

    def test_fresh_connection_that_ends_is_not_retried(
        self, impatient: GatewayProcess, impatient_api: FakeApi, client_id: str
    ) -> None:
        impatient_api.on(client_id, "POST", Drop(reset=True), echo)
        client = impatient.connect(client_id)
        client.send("lost")
        expect_working_after(client)
        assert impatient_api.texts(client_id) == ["lost", "next"]

    def test_reply_that_breaks_off_is_not_retried(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        broken = Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", then_close=True)
        api.on(client_id, "POST", broken, echo)
        client = gateway.connect(client_id)
        client.send("lost")
        expect_working_after(client)
        assert api.texts(client_id) == ["lost", "next"]

    def test_unavailable_is_retried(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        api.on(client_id, "POST", Reply(status=503), Reply(status=503), echo)
        client = gateway.connect(client_id)
        client.send("patient")
        client.send("next")
        assert [client.receive(), client.receive()] == ["patient", "next"]
        assert api.texts(client_id) == ["patient", "patient", "patient", "next"]
        assert [post.sequence for post in api.requests(client_id, "POST")] == [1, 1, 1, 2]

    def test_unavailable_for_long_loses_the_message_only(
        self, impatient: GatewayProcess, impatient_api: FakeApi, client_id: str
    ) -> None:
        def unavailable_for_the_first(request: Request) -> Reply:
            return Reply(status=503) if request.sequence == 1 else echo(request)

        impatient_api.on(client_id, "POST", unavailable_for_the_first)
        client = impatient.connect(client_id)
        client.send("lost")
        expect_working_after(client)
        assert len(impatient_api.requests(client_id, "POST")) > 2

    def test_hanging_request_times_out(
        self, impatient: GatewayProcess, impatient_api: FakeApi, client_id: str
    ) -> None:
        hold = Hold(Reply("too late"))
        impatient_api.on(client_id, "POST", hold, echo)
        client = impatient.connect(client_id)
        client.send("lost")
        expect_working_after(client)
        hold.release()
        assert impatient_api.texts(client_id) == ["lost", "next"]

    def test_restart_of_the_api_loses_nothing(
        self, own_api: FakeApi, start_gateway: StartGateway, client_id: str
    ) -> None:
        gateway = start_gateway(api=own_api.url)
        client = gateway.connect(client_id)
        own_api.on(client_id, "POST", echo)
        expect_working(client, own_api, client_id)
        own_api.close()
        for number in range(30):
            client.send(f"while away {number}")
        assert gateway.handshake(f"{client_id}-bystander").status == 502
        own_api.open()
        expected = [f"while away {number}" for number in range(30)]
        assert [client.receive() for _ in expected] == expected
        assert own_api.texts(client_id)[1:] == expected


class TestOrder:
    def test_pipelined_messages_are_posted_one_at_a_time(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        messages = [f"message {number}" for number in range(200)]
        api.on(client_id, "POST", echo)
        client = gateway.connect(client_id)
        client.send_frames(*(Frame(Op.TEXT, message.encode()) for message in messages))
        assert [client.receive() for _ in messages] == messages
        assert api.texts(client_id) == messages
        assert [post.sequence for post in api.requests(client_id, "POST")] == [*range(1, 201)]
        assert api.most_at_once(client_id, "POST") == 1

    def test_pushes_stand_between_replies_whole(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        reply, pushed = "r" * 100_000, "p" * 100_000
        api.on(client_id, "POST", Reply(reply))
        client = gateway.connect(client_id)
        pushes = gateway.push_client()
        for _ in range(20):
            client.send("ask")
            pushes.send_push(client_id, pushed)
        received = [client.receive() for _ in range(40)]
        assert sorted(set(received)) == [pushed, reply]
        assert received.count(reply) == 20
        assert {pushes.receive().status for _ in range(20)} == {200}

    def test_hanging_api_stops_the_reading_of_one_client_only(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        hold = Hold(Reply())
        api.on(client_id, "POST", hold)
        client = gateway.connect(client_id)
        sent = send_until_it_is_not_read(client.stream)
        bystander = gateway.connect(f"{client_id}-bystander")
        expect_working(bystander, api, f"{client_id}-bystander")
        hold.release()
        posts = api.wait_for(client_id, "POST", count=sent)
        assert [int(post.body[:8]) for post in posts] == [*range(sent)]
        assert [post.sequence for post in posts] == [*range(1, sent + 1)]

    def test_pings_among_messages_that_wait_are_answered(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        hold = Hold(Reply())
        api.on(client_id, "POST", hold)
        host, port = gateway.clients_address
        with websockets.sync.client.connect(f"ws://{host}:{port}/{client_id}") as client:
            for number in range(0, 60, 3):  # more than the queue takes
                for message in range(number, number + 3):
                    client.send(f"{message} {'x' * message * 10}")
                assert client.ping().wait(DEADLINE_S), "or the client would give up"
            hold.release()
            posts = api.wait_for(client_id, "POST", count=60)
        assert [post.text.partition(" ")[0] for post in posts] == [str(n) for n in range(60)]
        assert api.wait_for_one(client_id, "DELETE").close_code == 1000

    @pytest.mark.parametrize("farewell", ["close frame", "end of the stream"])
    def test_client_that_says_all_and_leaves_is_heard_to_the_end(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, farewell: str
    ) -> None:
        hold = Hold(Reply())
        api.on(client_id, "POST", hold)
        client = gateway.connect(client_id)
        for number in range(60):
            client.send(str(number))
        client.send_frame(Op.PING, b"read so far")
        assert client.receive_frame() == Frame(Op.PONG, b"read so far")
        if farewell == "close frame":
            client.send_close(1000)
        else:
            client.stream.socket.shutdown(socket.SHUT_WR)
        hold.release()
        api.wait_for_one(client_id, "DELETE")
        assert api.texts(client_id) == [str(number) for number in range(60)]

    def test_close_frame_behind_messages_that_wait_ends_what_the_api_closes(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        hold = Hold(Reply())
        api.on(client_id, "POST", hold)
        client = gateway.connect(client_id)
        for number in range(60):
            client.send(str(number))
        client.send_frame(Op.PING, b"read so far")
        client.send_close(1000)
        assert client.receive_frame().opcode == Op.PONG
        assert gateway.push_client().delete(client_id, code=4000).status == 200
        assert client.receive_frame().opcode == Op.CLOSE
        assert client.stream.read_to_end() == b""
        hold.release()

    def test_new_connection_does_not_wait_for_the_old_one_of_the_same_client(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        hold = Hold(Reply())
        api.on(client_id, "POST", lambda it: hold if it.text.startswith("old") else echo(it))
        old = gateway.connect(client_id)
        sent = ["old 1", "old 2", "old 3"]
        old.send_frames(*(Frame(Op.TEXT, message.encode()) for message in sent))
        api.wait_for_one(client_id, "POST")
        new = gateway.connect(client_id)
        old.assert_closed(4008, "replaced")
        new.send("new 1")
        assert new.receive() == "new 1"
        assert api.texts(client_id) == ["old 1", "new 1"], "two at the same time"
        hold.release()
        posts = api.wait_for(client_id, "POST", count=4)
        before, after = (request.generation for request in api.requests(client_id, "GET"))
        assert before < after
        of_old = [post for post in posts if post.generation == before]
        assert [(post.sequence, post.text) for post in of_old] == [*enumerate(sent, 1)]
        [of_new] = [post for post in posts if post.generation == after]
        assert of_new.sequence == 1
        new.close()
        assert api.wait_for_one(client_id, "DELETE").generation == after

    def test_replies_wait_for_a_client_that_does_not_read(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        reply = bytes(MIB // 2)
        api.on(client_id, "POST", Reply(reply, content_type=BINARY))
        slow = gateway.connect(client_id, receive_buffer_bytes=4096)
        slow.send_frames(*[Frame(Op.TEXT, b"ask")] * 200)
        bystander = gateway.connect(f"{client_id}-bystander")
        for _ in range(300):
            expect_working(bystander, api, f"{client_id}-bystander")
        assert len(api.requests(client_id, "POST")) < 100
        assert {slow.receive() for _ in range(200)} == {reply}

    def test_connections_to_the_api_are_limited(
        self, own_api: FakeApi, start_gateway: StartGateway, client_id: str
    ) -> None:
        gateway = start_gateway(api=own_api.url, api_max_connections=3)
        names = [f"{client_id}-{number}" for number in range(10)]
        clients = [gateway.connect(name) for name in names]
        hold = Hold(Reply("at last"))
        for name, client in zip(names, clients, strict=True):
            own_api.on(name, "POST", hold)
            client.send("wait")
        until(lambda: gateway.count("api_queue_length") == 7, what="a queue")
        assert sum(len(own_api.requests(name, "POST")) for name in names) == 3
        hold.release()
        assert {client.receive() for client in clients} == {"at last"}
        assert len({r.connection for name in names for r in own_api.requests(name)}) <= 3

    def test_several_in_flight_when_allowed(
        self, own_api: FakeApi, start_gateway: StartGateway, client_id: str
    ) -> None:
        gateway = start_gateway(api=own_api.url, max_in_flight=4)
        own_api.on(client_id, "POST", meet(4))
        client = gateway.connect(client_id)
        for number in range(12):
            client.send(str(number))
        received = [str(client.receive()) for _ in range(12)]
        assert sorted(received, key=int) == [str(number) for number in range(12)]
        assert own_api.most_at_once(client_id, "POST") == 4


def expect_working_after(client: WsClient) -> None:
    """Exchange the message that follows a lost one; the script must end with an echo."""
    client.send("next")
    assert client.receive() == "next"


def send_until_it_is_not_read(stream: Stream) -> int:
    """Send numbered messages until no more fit on the way; return how many.

    Thousands of messages and far more bytes than the kernel keeps for a reader that stopped.
    """
    size = 8192
    most = 64 * MIB // size
    for number in range(most):
        if not select.select([], [stream.socket], [], 1)[1]:
            return number
        stream.write(Frame(Op.BINARY, b"%08d" % number + bytes(size - 8)).encode())
    raise AssertionError("the gateway reads on without an end")


def meet(count: int) -> Handler:
    """Answer only when so many requests are there at the same time, each with itself."""
    barrier = threading.Barrier(count)

    def answer(request: Request) -> Reply:
        barrier.wait(DEADLINE_S)
        return echo(request)

    return answer
