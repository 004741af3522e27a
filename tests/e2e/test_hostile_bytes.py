"""Send hostile bytes to every side of a worker: it answers or closes, and nobody else notices.

An example is a few attacks at the same time. Some end with half a close, some with a reset; some
just wait, and it is for the gateway to end them when its timeouts say so, all together at the end.
The examples are the same in each run; `scripts/fuzz` looks for others.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Final

import pytest
from harness.api import Answer, FakeApi, Raw, Reply, echo
from harness.gateway import GatewayProcess, Option
from harness.http_messages import read_response
from harness.stream import Stream
from harness.waiting import until
from harness.ws import Op, WsClient, upgrade_request
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .hostile_wires import (
    BAD_REPLIES,
    FRAMES,
    HANDSHAKES,
    MAX_MESSAGE_BYTES,
    PUSHES,
    Attack,
    BadReply,
    Ending,
    attacks,
)

OPTIONS: Final[dict[str, Option]] = {
    "workers": 1,  # so that a disturbance by one client would show at any other
    "max_message_size": MAX_MESSAGE_BYTES,
    "handshake_timeout": "4s",  # who is let in must be so within that, also on a busy machine
    "api_timeout": "4s",
    "ping_interval": 0,  # the bystander reads now and then only
}

CLOSE_CODES: Final = {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}
"""What a server may send: its own, or the client's back to it."""
PUSH_STATUSES: Final = {200, 400, 401, 404, 405, 412, 413, 429, 431}
ANY_STATUSES: Final = range(101, 600)

REPLIES_AT_ONCE: Final = 2
"""Few enough, between two good ones, for the API not to count as away."""


def examples(count: int) -> settings:
    """Run so many examples, always the same."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        # What took a timeout to fail would take a hundred of them to shrink.
        phases=(Phase.explicit, Phase.generate),
        # The fixtures look back on all examples together.
        suppress_health_check=(HealthCheck.function_scoped_fixture, HealthCheck.too_slow),
    )


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
            if not self._received:
                self._receive()
        except (EOFError, ConnectionError):
            return True
        return False

    def skip(self, prefix: bytes) -> bool:
        """Pass over these bytes if they come next."""
        while len(self._received) < len(prefix) and prefix.startswith(self._received):
            self._receive()
        return self._received.startswith(prefix) and bool(self._take(len(prefix)))

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


@dataclass(frozen=True)
class Attempt:
    """Hold a connection that is attacked, and how to tell that it got what it deserves."""

    stream: Attacker
    judge: Callable[[], None]

    def finish(self) -> None:
        """See the connection to its end."""
        try:
            self.judge()
        except (EOFError, ConnectionError) as error:
            if not self.stream.was_reset:
                raise AssertionError("what came was cut off") from error
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
            assert not frame.payload or int.from_bytes(frame.payload[:2], "big") in CLOSE_CODES
            frame.payload[2:].decode()
            assert stream.has_ended(), "bytes after the close frame"
        else:
            assert frame.opcode in (Op.TEXT, Op.BINARY, Op.PONG), frame


def assert_answered(stream: Attacker, statuses: Container[int]) -> None:
    """See nothing but whole answers, of which the last may say that it is the last."""
    while not stream.has_ended():
        if stream.skip(b"HTTP/1.1 100 Continue\r\n\r\n"):
            continue
        answer = read_response(stream)
        assert answer.status in statuses, answer
        if answer.status == 101:
            stream.read_to_end()
        assert answer.keeps_connection or stream.has_ended(), "bytes after the last answer"


def assert_answered_after_all(client: WsClient) -> None:
    """See that the answer to one message does no harm to the next."""
    while client.receive() != "answered well":
        pass
    client.close()


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
        self._ids: list[str] = []
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
        """Name a client that nobody has seen, and that the API will let in."""
        self._ids.append(f"a{next(self._numbers)}")
        return self._ids[-1]

    def connect(self, client_id: str) -> WsClient:
        """Open a WebSocket, as somebody who has no part in this."""
        return WsClient(Stream.open(self.gateway.clients_address), f"/{client_id}")

    def knock(self) -> Attempt:
        """Connect to the client port."""
        stream = Attacker.open(self.gateway.clients_address)
        return Attempt(stream, lambda: assert_refused_or_let_in(stream))

    def enter(self) -> Attempt:
        """Open a WebSocket whose messages come back."""
        client_id = self.new_id()
        self.api.on(client_id, "POST", echo)
        stream = Attacker.open(self.gateway.clients_address)
        try:
            client = WsClient(stream, f"/{client_id}")
        except BaseException:
            stream.close()
            raise
        return Attempt(stream, lambda: assert_frames(client, stream))

    def push(self) -> Attempt:
        """Connect to the push port."""
        stream = Attacker.open(self.gateway.pushes_address)
        return Attempt(stream, lambda: assert_answered(stream, PUSH_STATUSES))

    def knock_or_push(self) -> Attempt:
        """Connect to a client port that takes pushes, too."""
        stream = Attacker.open(self.gateway.clients_address)
        return Attempt(stream, lambda: assert_answered(stream, ANY_STATUSES))

    def ask_for(self, bad: BadReply) -> Attempt:
        """Let a client of its own cause the reply."""
        client_id = self.new_id() if bad.method != "GET" else f"refused-{next(self._numbers)}"
        answer: Answer = Raw(bad.wire, then_close=bad.then_close)
        stream = Attacker.open(self.gateway.clients_address)
        if bad.method == "GET":
            self.api.on(client_id, "GET", answer)
            stream.write(upgrade_request(f"/{client_id}"))
            return Attempt(stream, lambda: assert_refused_or_let_in(stream))
        self.api.on(client_id, bad.method, answer, echo if bad.method == "POST" else Reply("ok"))
        client = WsClient(stream, f"/{client_id}")
        if bad.method == "DELETE":
            client.close()
            return Attempt(stream, lambda: None)
        client.send("answered badly")
        client.send("answered well")
        return Attempt(stream, lambda: assert_answered_after_all(client))

    def attack(self, example: list[Attack], begin: Callable[[], Attempt]) -> None:
        """Let all the attacks go on at once, and judge what comes back."""
        with ExitStack() as streams:
            attempts = []
            for attack in example:
                attempts.append((attack, begin()))
                streams.callback(attempts[-1][1].stream.close)
            for attack, attempt in attempts:
                with contextlib.suppress(ConnectionError):  # closed already, an answer as well
                    for piece in attack.pieces(self.new_id()):
                        attempt.stream.write(piece)
            for attack, attempt in attempts:
                if attack.ending is Ending.RESET:
                    attempt.stream.reset()
                elif attack.ending is Ending.HALF_CLOSE:
                    attempt.stream.half_close()
                    attempt.finish()
            streams.pop_all()
        self._waiting += [a for attack, a in attempts if attack.ending is Ending.WAIT]
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
        until(lambda: not self._unreported(), what="the API has heard of every end")
        until(
            lambda: self._count_descriptors() <= self._descriptors,
            what=f"no more than {self._descriptors} file descriptors",
        )
        self.assert_undisturbed()
        assert set(self.gateway.children) == self._processes, self.gateway.stderr

    def _count_open(self) -> int:
        gateway = self.gateway
        return gateway.count("connections_opened") - gateway.count("connections_closed")

    def _unreported(self) -> list[str]:
        """Return the clients that have left since, and of whose last end the API has not heard."""
        self._ids = [client_id for client_id in self._ids if not self._is_reported(client_id)]
        return self._ids

    def _is_reported(self, client_id: str) -> bool:
        opened = [request.generation for request in self.api.requests(client_id, "GET")]
        ended = [request.generation for request in self.api.requests(client_id, "DELETE")]
        assert set(ended) <= set(opened), client_id
        return not opened or max(opened) in ended

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


@examples(100)
@given(attacks(HANDSHAKES))
def test_before_the_handshake(siege: Siege, example: list[Attack]) -> None:
    siege.attack(example, siege.knock)


@examples(100)
@given(attacks(FRAMES, Ending.HALF_CLOSE, Ending.RESET))
def test_on_an_open_websocket(siege: Siege, example: list[Attack]) -> None:
    siege.attack(example, siege.enter)


@examples(100)
@given(attacks(PUSHES, Ending.HALF_CLOSE, Ending.RESET))
def test_on_the_push_port(siege: Siege, example: list[Attack]) -> None:
    with closing(siege.connect("victim").stream):
        siege.attack(example, siege.push)


@examples(60)
@given(attacks(st.one_of(HANDSHAKES, PUSHES), Ending.HALF_CLOSE, Ending.RESET))
def test_on_a_single_port(single_port_siege: Siege, example: list[Attack]) -> None:
    single_port_siege.attack(example, single_port_siege.knock_or_push)


@examples(100)
@given(st.lists(BAD_REPLIES, min_size=1, max_size=REPLIES_AT_ONCE))
def test_in_the_replies_of_the_api(siege: Siege, example: list[BadReply]) -> None:
    for bad in example:
        siege.finish_later(siege.ask_for(bad))
    siege.assert_undisturbed()
