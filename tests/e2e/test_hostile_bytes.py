"""Send hostile bytes to every side of a worker: it answers or closes, and nobody else notices.

An example is a few attacks at the same time. Some end with half a close, some with a reset; some
just wait, and it is for the gateway to end them when its timeouts say so, all together at the end.
The examples are the same in each run.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Final

import pytest
from harness.api import Answer, FakeApi, Raw, Reply, echo
from harness.gateway import GatewayProcess, Option
from harness.http_messages import read_response
from harness.stream import Stream
from harness.waiting import until
from harness.ws import KEY, Frame, Op, WsClient, close_payload, upgrade_request
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

MAX_MESSAGE_BYTES: Final = 8192
OPTIONS: Final[dict[str, Option]] = {
    "workers": 1,  # so that a disturbance by one client would show at any other
    "max_message_size": MAX_MESSAGE_BYTES,
    "handshake_timeout": "2s",
    "api_timeout": "4s",
}

# Error codes that the gateway may send, and those of a client that it may return.
SENT_CODES: Final = {1002, 1007, 1009}
RETURNED_CODES: Final = {1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)}
PUSH_STATUSES: Final = {200, 400, 401, 404, 405, 412, 413, 429, 431}
ANY_STATUSES: Final = range(101, 600)


def examples(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run so many examples, always the same."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        # What took a timeout to fail would take a hundred of them to shrink.
        phases=(Phase.explicit, Phase.generate),
        # The fixture looks back on all examples together.
        suppress_health_check=(HealthCheck.function_scoped_fixture, HealthCheck.too_slow),
    )


# Attacks.


class Ending(Enum):
    """Say what an attacker does when everything is sent."""

    HALF_CLOSE = "half-close"
    RESET = "reset"
    WAIT = "wait"


@dataclass(frozen=True)
class Attack:
    """Hold what one connection sends.

    Attributes:
        cuts: where it is cut into pieces, modulo its length.
    """

    wire: bytes
    cuts: tuple[int, ...] = ()
    ending: Ending = Ending.HALF_CLOSE

    def pieces(self, client_id: str) -> Iterator[bytes]:
        """Yield what is sent by this client."""
        wire = self.wire.replace(b"/me", b"/" + client_id.encode())
        places = sorted({0, len(wire), *(cut % (len(wire) + 1) for cut in self.cuts)})
        return (wire[start:end] for start, end in pairwise(places))


def attacks(wires: st.SearchStrategy[bytes], *endings: Ending) -> st.SearchStrategy[list[Attack]]:
    """Make examples of bytes."""
    return st.lists(
        st.builds(
            Attack,
            wires,
            st.lists(st.integers(0, 5000), max_size=3).map(tuple),
            st.sampled_from(endings or tuple(Ending)),
        ),
        min_size=4,
        max_size=10,
    )


@st.composite
def mutated(
    draw: st.DrawFn, originals: st.SearchStrategy[bytes], tokens: tuple[bytes, ...]
) -> bytes:
    """Damage something sound in a few places."""
    data = draw(originals)
    for _ in range(draw(st.integers(1, 3))):
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
        how = draw(st.sampled_from(("cut", "insert", "insert", "flip", "drop", "repeat")))
        if how == "cut":
            data = data[:end]
        elif how == "insert":
            data = data[:start] + draw(st.sampled_from(tokens)) + data[start:]
        elif how == "flip":
            data = (
                data[:start] + bytes(b ^ 0x80 for b in data[start : start + 1]) + data[start + 1 :]
            )
        elif how == "drop":
            data = data[:start] + data[end:]
        else:
            data = data[:end] + data[start:end] + data[end:]
    return data


HTTP_TOKENS: Final = (
    *(b"\r", b"\n", b"\0", b"\r\n", b"\r\n\r\n", b"\r\n ", b"\r\n\t", b" ", b":", b"\x7f", b"\xff"),
    *(b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Content-Length: 5 \r\n"),
    *(
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"5\r\nhello\r\n0\r\n\r\n",
    ),
    *(b"Connection: close\r\n", b"Upgrade: h2c\r\n", b"Expect: 100-continue\r\n", b"HTTP/1.1"),
    *(
        b"GET /me HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0",
    ),
)

HOSTILE_LINES: Final = (
    *(b"Content-Length: 0", b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 0x5"),
    *(
        b"Content-Length: " + b"9" * 30,
        b"Content-Length: " + b"0" * 30 + b"2",
        b"Content-Length: 2 ",
    ),
    *(b"Content-Length: 2, 2", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked"),
    *(b"Transfer-Encoding: chunked, gzip", b"Transfer-Encoding:\tchunked ", b"Trailer: X"),
    *(b" folded", b"\tfolded", b"Name : value", b"no colon", b": no name", b"", b"X: a\0b"),
    *(b"X: a\rb", b"X: a\nY: b", b"X\0: a", b"\xc3\xbc: a", b"X: \xc3\xbc", b"X: \x01", b"X:"),
    *(b"Big: " + b"x" * 9000, b"\r\n".join([b"Many: x"] * 150), b"N" * 9000 + b": x"),
    *(b"Host: another", b"Host:", b"Upgrade: h2c", b"Connection: close", b"Connection: keep-alive"),
    *(b"Sec-WebSocket-Version: 8", b"Sec-WebSocket-Key: short", b"Sec-WebSocket-Protocol: a b"),
    *(b"Sec-WebSocket-Extensions: permessage-deflate", b"Origin: null", b"Expect: 100-continue"),
    *(b"Cookie: " + b"c" * 3000, b"Authorization: Basic \xff", b"Ws2api-Generation: -1"),
    *(b"Ws2api-Generation: 99999999999999999999", b"X-Forwarded-For: \t, ,"),
)

UPGRADE_LINES: Final = (
    *(b"Host: x", b"Upgrade: websocket", b"Connection: Upgrade"),
    *(b"Sec-WebSocket-Key: " + KEY.encode(), b"Sec-WebSocket-Version: 13"),
)


@st.composite
def requests(
    draw: st.DrawFn,
    methods: tuple[bytes, ...],
    targets: tuple[bytes, ...],
    lines: tuple[bytes, ...],
    bodies: tuple[bytes, ...],
) -> bytes:
    """Write a request with a few lines too many, wherever they fall."""
    head = list(lines)
    for line in draw(st.lists(st.sampled_from(HOSTILE_LINES), max_size=2)):
        head.insert(draw(st.integers(0, len(head))), line)
    if draw(st.integers(0, 4)) == 0 and head:
        head.pop(draw(st.integers(0, len(head) - 1)))
    # The first of each is the sound one, which half of the examples shall have.
    version = draw(
        st.sampled_from((b"HTTP/1.1",) * 6 + (b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.1 x", b""))
    )
    method = draw(st.sampled_from((methods[0],) * len(methods) + methods))
    target = draw(st.sampled_from((targets[0],) * len(targets) + targets))
    body = draw(st.sampled_from(bodies))
    return b"\r\n".join([b"%b %b %b" % (method, target, version), *head, b"", body])


TARGETS: Final = (
    *(
        b"/me",
        b"/me?a=b",
        b"/me?\xff",
        b"http://x/me",
        b"//me",
        b"/",
        b"",
        b"*",
        b"x:1",
        b"/..",
        b"/a b",
    ),
    *(
        b"/%zz",
        b"/@me",
        b"/me#x",
        b"/\0",
        b"/" + b"m" * 256,
        b"/" + b"m" * 9000,
        b"/me?" + b"q" * 5000,
    ),
)

UPGRADES: Final = requests(
    (b"GET", b"POST", b"get", b"CONNECT", b"PRI", b"G" * 300),
    TARGETS,
    UPGRADE_LINES,
    (b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"\x81\x82\0\0\0\0hi", b"\xff" * 500),
)
HANDSHAKES: Final = st.one_of(
    mutated(st.just(upgrade_request("/me")), HTTP_TOKENS),
    UPGRADES,
    mutated(UPGRADES, HTTP_TOKENS),
    st.binary(max_size=200),
)

PUSHES: Final = requests(
    (b"POST", b"GET", b"DELETE", b"PUT", b"CONNECT"),
    (
        b"/victim",
        b"/nobody",
        b"/victim?code=4000&reason=%C3%BC",
        b"/victim?code=1&reason=%ff",
        *TARGETS,
    ),
    (b"Host: x", b"Content-Length: 2"),
    (b"hi", b"", b"\xff\xff", b"hello and more", b"h" * (MAX_MESSAGE_BYTES + 1)),
)
CHUNKED_PUSHES: Final = requests(
    (b"POST",),
    (b"/victim", b"/nobody"),
    (b"Host: x", b"Transfer-Encoding: chunked"),
    (
        *(
            b"2\r\nhi\r\n0\r\n\r\n",
            b"2;a=b\r\nhi\r\n0\r\nX: y\r\n\r\n",
            b"0\r\n\r\n",
            b"-1\r\n",
            b"2\r\nhello",
        ),
        *(
            b"fffffffffffffffff\r\n",
            b"2\nhi\n0\n\n",
            b"2000\r\n" + b"h" * 0x2000 + b"\r\n1\r\nh\r\n",
        ),
        *(b"0\r\nX: " + b"x" * 40_000, b"2;" + b"x" * 40_000, b"0\r\n" + b"X: y\r\n" * 200),
    ),
)
UPGRADING_PUSHES: Final = requests(
    (b"POST",),
    (b"/victim",),
    (
        b"Connection: Upgrade, HTTP2-Settings",
        b"Upgrade: h2c",
        b"HTTP2-Settings: A",
        b"Content-Length: 2",
    ),
    (b"hi", b"", b"hi" + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
)
ANY_PUSHES: Final = st.lists(
    st.one_of(PUSHES, CHUNKED_PUSHES, UPGRADING_PUSHES), min_size=1, max_size=4
).map(b"".join)
PUSH_WIRES: Final = st.one_of(ANY_PUSHES, mutated(ANY_PUSHES, HTTP_TOKENS), st.binary(max_size=200))

PAYLOADS: Final = (
    *(
        b"",
        b"hi",
        b"gr\xc3\xbcn",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xf0\x9f\x98",
        b"x" * 125,
        b"x" * 126,
    ),
    *(b"x" * 5000, b"x" * (MAX_MESSAGE_BYTES + 1)),
    *(
        close_payload(code, "bye")
        for code in (0, 999, 1000, 1004, 1005, 1006, 1015, 2999, 4999, 65535)
    ),
    *(b"\x03", close_payload(1000, b"\xff"), close_payload(4000, b"r" * 124)),
)
FRAMES: Final = st.builds(
    lambda frame, is_masked: frame.encode(mask=is_masked),
    st.builds(
        Frame,
        st.sampled_from((0, 1, 1, 1, 2, 8, 9, 10, 3, 7, 11, 15)),
        st.sampled_from(PAYLOADS),
        st.sampled_from((True, True, True, False)),
        st.sampled_from((0,) * 12 + (1, 2, 4, 7)),
    ),
    st.sampled_from((True,) * 12 + (False,)),
)
FRAGMENTS: Final = st.lists(
    st.builds(
        Frame, st.sampled_from((0, 0, 0, 9, 10)), st.sampled_from(PAYLOADS[:6]), st.booleans()
    ),
    max_size=6,
).map(lambda frames: b"".join(f.encode() for f in [Frame(Op.TEXT, b"gr\xc3", fin=False), *frames]))
FRAME_TOKENS: Final = (
    *(
        b"\x81",
        b"\x88\x80\0\0\0\0",
        b"\x89\xfe\x01\0",
        b"\x81\xff" + b"\xff" * 8,
        b"\x82\xfe\0\x02",
    ),
    *(b"\0\x80\0\0\0\0" * 50, b"\x8a\x80\0\0\0\0" * 50, b"\xc1\x80", b"\0", b"\xff" * 16),
)
FRAME_WIRES: Final = st.one_of(
    st.lists(FRAMES, min_size=1, max_size=5).map(b"".join),
    FRAGMENTS,
    mutated(st.lists(FRAMES, min_size=1, max_size=5).map(b"".join), FRAME_TOKENS),
    st.binary(min_size=1, max_size=100),
)

OK_REPLY: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"
REPLIES: Final = (
    OK_REPLY,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nok\r\n0\r\nX: y\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nContent-Type: application/octet-stream\r\n\r\nok",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 204 No Content\r\nSec-WebSocket-Protocol: never-offered\r\n\r\n",
    b"HTTP/1.1 403 Forbidden\r\nWWW-Authenticate: Basic\r\nContent-Length: 2\r\n\r\nno",
    b"HTTP/1.1 503 Busy\r\nRetry-After: soon\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
)
HOSTILE_REPLIES: Final = (
    *(
        b"",
        b"\r\n",
        b"\0",
        b"ok",
        b"HTTP/1.1",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 000 x\r\n\r\nok",
    ),
    *(
        b"HTTP/1.1 099 x\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 999 x\r\nContent-Length: 0\r\n\r\n",
    ),
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n\x81\x02hi",
    b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
    b"HTTP/1.1 200 OK\r\n" + b"X: " + b"x" * 70_000,
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"x" * 200_000,
    b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n" + b"x" * 9000,
    b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n\xff",
    b"HTTP/1.1 200 OK\r\nSet-Cookie: a\rInjected: b\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 403 x\r\nContent-Type: a\nInjected: b\r\nContent-Length: 0\r\n\r\n",
    OK_REPLY + OK_REPLY,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"<html>200 OK</html>",
)
REPLY_WIRES: Final = st.one_of(
    mutated(st.sampled_from(REPLIES), HTTP_TOKENS),
    st.sampled_from(HOSTILE_REPLIES),
    st.binary(max_size=100),
)


@dataclass(frozen=True)
class BadReply:
    """Hold what the API answers to one request of one client."""

    method: str
    wire: bytes
    then_close: bool


BAD_REPLIES: Final = st.lists(
    st.builds(
        BadReply,
        st.sampled_from(("GET", "POST", "DELETE")),
        REPLY_WIRES,
        st.sampled_from((True, True, True, False)),
    ),
    min_size=1,
    max_size=2,  # few enough, between two good answers, for the API not to count as away
)


# What comes of them.


class Attacker(Stream):
    """Be the attacker's end of a connection."""

    was_reset = False
    """Whether the end was one that may have cut something off."""

    def has_ended(self) -> bool:
        """Wait for the next byte; tell whether the connection ended instead.

        Raises:
            TimeoutError: if neither comes; nobody may be left hanging.
        """
        try:
            self._received or self._receive()
        except (EOFError, ConnectionError):
            return True
        return False

    def half_close(self) -> None:
        """Tell that nothing more will come."""
        with contextlib.suppress(OSError):  # the gateway has closed already
            self.socket.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        try:
            super()._receive()
        except ConnectionError:
            self.was_reset = True
            raise


Judge = Callable[[], None]


@dataclass(frozen=True)
class Attempt:
    """Hold a connection that is attacked, and how to tell that it got what it deserves."""

    stream: Attacker
    judge: Judge

    def finish(self) -> None:
        """See the connection to its end."""
        try:
            self.judge()
        except (EOFError, ConnectionError) as error:
            assert self.stream.was_reset, f"cut off: {error}"
        finally:
            self.stream.close()


def assert_refused_or_let_in(stream: Attacker) -> None:
    """See one error, or just an end; one that is let in leaves."""
    if stream.has_ended():
        return
    answer = read_response(stream)
    if answer.status == 101:
        stream.half_close()
        stream.read_to_end()
        return
    assert 400 <= answer.status <= 599, answer
    assert not answer.keeps_connection, answer
    assert stream.has_ended(), "bytes after the last answer"


def assert_frames(client: WsClient, stream: Attacker) -> None:
    """See whole frames of a server, and an end after a close frame."""
    while not stream.has_ended():
        frame = client.receive_frame()
        assert frame.fin, frame
        if frame.opcode == Op.CLOSE:
            code = int.from_bytes(frame.payload[:2], "big") if frame.payload else 1000
            assert code in SENT_CODES | RETURNED_CODES, frame
            frame.payload[2:].decode()
            assert stream.has_ended(), "bytes after the close frame"
        else:
            assert frame.opcode in (Op.TEXT, Op.BINARY, Op.PONG), frame


def assert_answered(stream: Attacker, statuses: Container[int]) -> None:
    """See nothing but whole answers, of which the last may say that it is the last."""
    while not stream.has_ended():
        answer = read_response(stream)
        assert answer.status in statuses, answer
        if answer.status == 101:
            stream.read_to_end()
        assert answer.keeps_connection or stream.has_ended(), "bytes after the last answer"


class Siege:
    """Attack one worker, and see that it minds its business.

    Args:
        gateway: with one worker and without clients.
        api: what it asks.
    """

    def __init__(self, gateway: GatewayProcess, api: FakeApi) -> None:
        self.gateway = gateway
        self.api = api
        self._numbers = itertools.count()
        self._waiting: list[Attempt] = []
        self._rounds = 0
        api.on("bystander", "POST", echo)
        self._bystander = gateway.connect("bystander")
        self._pusher = gateway.push_client()
        self.assert_undisturbed()
        self._processes = set(gateway.children)
        self._worker = gateway.worker_of(self._bystander)
        self._descriptors = self._count_descriptors()

    def new_id(self) -> str:
        """Name a client that nobody has seen."""
        return f"a{next(self._numbers)}"

    def knock(self) -> Attempt:
        """Connect to the client port."""
        stream = Attacker.open(self.gateway.clients_address)
        return Attempt(stream, lambda: assert_refused_or_let_in(stream))

    def enter(self) -> Attempt:
        """Open a WebSocket whose messages come back."""
        client_id = self.new_id()
        self.api.on(client_id, "POST", echo)
        stream = Attacker.open(self.gateway.clients_address)
        client = WsClient(stream, f"/{client_id}")
        return Attempt(stream, lambda: assert_frames(client, stream))

    def push(self) -> Attempt:
        """Connect to the push port."""
        stream = Attacker.open(self.gateway.pushes_address)
        return Attempt(stream, lambda: assert_answered(stream, PUSH_STATUSES))

    def knock_or_push(self) -> Attempt:
        """Connect to the client port where it takes pushes, too."""
        stream = Attacker.open(self.gateway.clients_address)
        return Attempt(stream, lambda: assert_answered(stream, ANY_STATUSES))

    def attack(self, example: list[Attack], begin: Callable[[], Attempt]) -> None:
        """Let all the attacks go on at once, and judge what comes back."""
        attempts = [(attack, begin()) for attack in example]
        for attack, attempt in attempts:
            with contextlib.suppress(ConnectionError):  # closed already, which is an answer, too
                for piece in attack.pieces(self.new_id()):
                    attempt.stream.write(piece)
        for attack, attempt in attempts:
            if attack.ending is Ending.WAIT:
                self.finish_later(attempt)
            elif attack.ending is Ending.RESET:
                attempt.stream.reset()
            else:
                attempt.stream.half_close()
                attempt.finish()
        self.assert_undisturbed()

    def finish_later(self, attempt: Attempt) -> None:
        """Judge what comes back when all examples are through."""
        self._waiting.append(attempt)

    def assert_undisturbed(self) -> None:
        """See that messages and pushes arrive, and that nobody complains."""
        self._rounds += 1
        message, push = f"message {self._rounds}", f"push {self._rounds}"
        self._bystander.send(message)
        assert self._bystander.receive() == message
        assert self._pusher.push("bystander", push).status == 200
        assert self._bystander.receive() == push
        assert not self.gateway.complaints, self.gateway.complaints
        assert not self.api.violations, self.api.violations

    def assert_recovered(self) -> None:
        """See that whoever waits gets what is due, that nobody stays, and nothing is owed."""
        for attempt in self._waiting:
            attempt.finish()
        self._waiting.clear()
        until(lambda: self._count_open() == 1, what="nobody but the bystander is connected")
        until(lambda: not self._count_owed(), what="the API has heard of every end")
        until(
            lambda: self._count_descriptors() <= self._descriptors,
            what=f"no more than {self._descriptors} file descriptors",
        )
        self.assert_undisturbed()
        assert set(self.gateway.children) == self._processes, self.gateway.stderr

    def assert_ends_reported(self) -> None:
        """See that the API heard once of each end, but for those whom a newer one replaced."""
        for client_id in (f"a{number}" for number in range(next(self._numbers))):
            opened = [request.generation for request in self.api.requests(client_id, "GET")]
            ended = [request.generation for request in self.api.requests(client_id, "DELETE")]
            assert len(set(ended)) == len(ended), client_id
            assert set(ended) <= set(opened), client_id
            assert not opened or max(opened) in ended, client_id

    def _count_open(self) -> int:
        gateway = self.gateway
        return gateway.count("connections_opened") - gateway.count("connections_closed")

    def _count_owed(self) -> int:
        return sum(map(self.gateway.count, ("disconnects_waiting", "disconnects_pending")))

    def _count_descriptors(self) -> int:
        """Count the worker's files, without those for the API, of which some are kept idle."""
        everything = len(os.listdir(f"/proc/{self._worker.pid}/fd"))
        return everything - self.gateway.count("api_connections")


@contextmanager
def besieged(**options: Option) -> Iterator[Siege]:
    with FakeApi() as api, GatewayProcess(api=api.url, **(OPTIONS | options)) as gateway:
        yield Siege(gateway, api)


@pytest.fixture(scope="module")
def fortress() -> Iterator[Siege]:
    with besieged() as siege:
        yield siege


@pytest.fixture
def siege(fortress: Siege) -> Iterator[Siege]:
    """Use the gateway of most of these tests, and leave it as it was."""
    yield fortress
    fortress.assert_recovered()


@pytest.fixture
def single_port_siege() -> Iterator[Siege]:
    """Use a gateway whose client port takes pushes, too."""
    with besieged(single_port=True) as siege:
        yield siege
        siege.assert_recovered()


@examples(25)
@given(attacks(HANDSHAKES))
def test_before_the_handshake(siege: Siege, example: list[Attack]) -> None:
    siege.attack(example, siege.knock)


@examples(25)
@given(attacks(FRAME_WIRES, Ending.HALF_CLOSE, Ending.RESET))
def test_on_an_open_websocket(siege: Siege, example: list[Attack]) -> None:
    siege.attack(example, siege.enter)


@examples(25)
@given(attacks(PUSH_WIRES, Ending.HALF_CLOSE, Ending.RESET))
def test_on_the_push_port(siege: Siege, example: list[Attack]) -> None:
    victim = siege.gateway.connect("victim")
    siege.attack(example, siege.push)
    victim.hang_up()


@examples(25)
@given(attacks(st.one_of(HANDSHAKES, PUSH_WIRES), Ending.HALF_CLOSE, Ending.RESET))
def test_on_a_single_port(single_port_siege: Siege, example: list[Attack]) -> None:
    single_port_siege.attack(example, single_port_siege.knock_or_push)


@examples(60)
@given(BAD_REPLIES)
def test_in_the_replies_of_the_api(siege: Siege, example: list[BadReply]) -> None:
    for attempt in [ask_for(siege, bad) for bad in example]:
        siege.finish_later(attempt)
    siege.assert_undisturbed()


def ask_for(siege: Siege, bad: BadReply) -> Attempt:
    """Let a client of its own ask for the reply."""
    client_id = siege.new_id()
    answer: Answer = Raw(bad.wire, then_close=bad.then_close)
    if bad.method == "GET":
        siege.api.on(client_id, "GET", answer)
        attempt = siege.knock()
        attempt.stream.write(upgrade_request(f"/{client_id}"))
        return attempt
    siege.api.on(client_id, bad.method, answer, echo if bad.method == "POST" else Reply("ok"))
    stream = Attacker.open(siege.gateway.clients_address)
    client = WsClient(stream, f"/{client_id}")
    if bad.method == "DELETE":
        client.close()
        siege.api.wait_for_one(client_id, "DELETE")
        return Attempt(stream, lambda: None)
    client.send("answered badly")
    client.send("answered well")
    return Attempt(stream, lambda: assert_answered_after_all(client))


def assert_answered_after_all(client: WsClient) -> None:
    """See that the answer to one message does no harm to the next."""
    while client.receive() != "answered well":
        pass
    client.close()
