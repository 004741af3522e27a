"""The proxy that loses, delays and cuts on command, before a server in the test's hands."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.fault_proxy import Direction, FaultProxy
from harness.stream import Stream
from harness.waiting import DEADLINE_S, until

DELAY_S = 0.2
MANY = 2_000
CONNECT = Callable[[], tuple[Stream, Stream]]


class Server:
    """Accept connections on loopback, and hand each to the test."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.listener.settimeout(DEADLINE_S)

    @property
    def address(self) -> tuple[str, int]:
        address: tuple[str, int] = self.listener.getsockname()
        return address

    def accept(self) -> Stream:
        return Stream(self.listener.accept()[0])


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.listener.close()


@pytest.fixture
def proxy(server: Server) -> Iterator[FaultProxy]:
    with FaultProxy(server.address) as proxy:
        yield proxy
    assert not proxy.connections_open


@pytest.fixture
def connect(server: Server, proxy: FaultProxy) -> Iterator[CONNECT]:
    """Open a connection through the proxy; return the client's end and the server's."""
    opened: list[Stream] = []

    def open_both() -> tuple[Stream, Stream]:
        pair = Stream.open(proxy.address), server.accept()
        opened.extend(pair)
        return pair

    yield open_both
    for stream in opened:
        stream.close()


def expect_reset(stream: Stream) -> None:
    with pytest.raises(ConnectionResetError):
        stream.read_exactly(1)


def expect_reset_at_once(proxy: FaultProxy) -> None:
    """Connect; already that may notice."""
    with pytest.raises(ConnectionResetError), socket.create_connection(proxy.address) as client:
        client.recv(1)


def expect_passing(client: Stream, server: Stream) -> None:
    """See bytes go both ways."""
    client.write(b"ask")
    assert server.read_exactly(3) == b"ask"
    server.write(b"answer")
    assert client.read_exactly(6) == b"answer"


class TestWithoutAFault:
    def test_passes_bytes_both_ways_and_counts_them(
        self, connect: CONNECT, proxy: FaultProxy
    ) -> None:
        expect_passing(*connect())
        assert (proxy.connections_accepted, proxy.connections_open) == (1, 1)
        assert (proxy.bytes_to_upstream, proxy.bytes_to_client) == (3, 6)

    def test_passes_much_to_a_slow_reader(self, connect: CONNECT) -> None:
        client, server = connect()
        sent = bytes(range(256)) * 40_000
        thread = threading.Thread(target=client.write, args=(sent,))
        thread.start()
        assert server.read_exactly(len(sent)) == sent
        thread.join(DEADLINE_S)

    def test_passes_an_end_and_what_still_comes_after_it(
        self, connect: CONNECT, proxy: FaultProxy
    ) -> None:
        client, server = connect()
        client.write(b"last")
        client.socket.shutdown(socket.SHUT_WR)
        assert server.read_exactly(4) == b"last"
        with pytest.raises(EOFError):
            server.read_exactly(1)
        server.write(b"late answer")
        server.close()
        assert client.read_to_end() == b"late answer"
        until(lambda: not proxy.connections_open)

    def test_passes_a_reset(self, connect: CONNECT, proxy: FaultProxy) -> None:
        client, server = connect()
        client.reset()
        expect_reset(server)
        client, server = connect()
        server.reset()
        expect_reset(client)
        until(lambda: not proxy.connections_open)

    def test_resets_when_the_upstream_is_away(self, server: Server, proxy: FaultProxy) -> None:
        server.listener.close()
        expect_reset_at_once(proxy)
        until(lambda: not proxy.connections_open)

    def test_reaches_a_unix_socket(self, tmp_path: Path) -> None:
        path = tmp_path / "upstream.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            with FaultProxy(path) as proxy:
                client = Stream.open(proxy.address)
                server = Stream(listener.accept()[0])
                expect_passing(client, server)
                proxy.reset()
                expect_reset(client)
                with pytest.raises(EOFError):
                    server.read_exactly(1)
                client.close()
                server.close()


class TestDelay:
    @pytest.mark.parametrize("direction", [Direction.TO_UPSTREAM, Direction.TO_CLIENT])
    def test_holds_bytes_of_one_direction(
        self, connect: CONNECT, proxy: FaultProxy, direction: Direction
    ) -> None:
        sender, receiver = connect()
        if direction is Direction.TO_CLIENT:
            sender, receiver = receiver, sender
        proxy.delay(DELAY_S, direction)
        began = time.monotonic()
        sender.write(b"held")
        receiver.write(b"not held")
        assert sender.read_exactly(8) == b"not held"
        assert receiver.read_exactly(4) == b"held"
        assert time.monotonic() - began >= DELAY_S

    def test_keeps_the_order_when_it_ends(self, connect: CONNECT, proxy: FaultProxy) -> None:
        client, server = connect()
        proxy.delay(DELAY_S)
        client.write(b"first")
        until(lambda: not proxy.bytes_to_upstream)
        proxy.delay(0)
        client.write(b"second")
        client.close()
        assert server.read_to_end() == b"firstsecond"


class TestDrop:
    def test_swallows_and_resets_afterwards(self, connect: CONNECT, proxy: FaultProxy) -> None:
        client, server = connect()
        untouched, its_server = connect()
        proxy.drop()
        client.write(b"lost")
        assert client.is_silent() and server.is_silent()
        until(lambda: proxy.swallowed_links == 1)
        proxy.restore()
        expect_reset(client)
        expect_reset(server)
        expect_passing(untouched, its_server)

    def test_accepts_for_an_upstream_that_hears_nothing(
        self, server: Server, proxy: FaultProxy
    ) -> None:
        proxy.drop()
        client = Stream.open(proxy.address)
        client.write(b"is anybody there?")
        until(lambda: proxy.swallowed_links == 1)
        server.listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.listener.accept()
        client.close()
        until(lambda: not proxy.connections_open)

    def test_of_one_direction(self, connect: CONNECT, proxy: FaultProxy) -> None:
        client, server = connect()
        proxy.drop(Direction.TO_CLIENT)
        client.write(b"ask")
        assert server.read_exactly(3) == b"ask"
        server.write(b"answer")
        until(lambda: proxy.swallowed_links == 1)
        assert client.is_silent()


class TestCut:
    @pytest.mark.parametrize("size", [0, 1, 6])
    def test_truncates_the_next_answer(
        self, connect: CONNECT, proxy: FaultProxy, size: int
    ) -> None:
        client, server = connect()
        expect_passing(client, server)
        proxy.truncate(size)
        client.write(b"ask")
        assert server.read_exactly(3) == b"ask"
        server.write(b"answer")
        assert client.read_to_end() == b"answer"[:size]
        expect_reset(server)
        until(lambda: not proxy.connections_open)
        expect_passing(*connect())

    def test_truncates_an_answer_that_comes_in_pieces(
        self, connect: CONNECT, proxy: FaultProxy
    ) -> None:
        client, server = connect()
        proxy.truncate(5)
        server.write(b"abc")
        assert client.read_exactly(3) == b"abc"
        server.write(b"def")
        assert client.read_to_end() == b"de"

    def test_truncates_all_until_restored(self, connect: CONNECT, proxy: FaultProxy) -> None:
        proxy.truncate(1, count=None)
        for _ in range(3):
            client, server = connect()
            server.write(b"answer")
            assert client.read_to_end() == b"a"
        client, server = connect()
        proxy.restore()
        expect_passing(client, server)

    def test_resets_after_so_many_bytes_of_the_answer(
        self, connect: CONNECT, proxy: FaultProxy
    ) -> None:
        client, server = connect()
        proxy.reset_after(3)
        client.write(b"ask")
        assert server.read_exactly(3) == b"ask"
        server.write(b"answer")
        assert client.read_exactly(3) == b"ans"
        expect_reset(client)
        expect_reset(server)

    def test_resets_before_a_byte_of_the_request_arrives(
        self, connect: CONNECT, proxy: FaultProxy
    ) -> None:
        client, server = connect()
        proxy.reset_after(0, Direction.TO_UPSTREAM)
        client.write(b"ask")
        expect_reset(client)
        expect_reset(server)

    def test_resets_at_accept(self, connect: CONNECT, proxy: FaultProxy, server: Server) -> None:
        proxy.reset_next(2)
        for _ in range(2):
            expect_reset_at_once(proxy)
        expect_passing(*connect())
        assert proxy.connections_accepted == 3

    def test_resets_all_now(self, connect: CONNECT, proxy: FaultProxy) -> None:
        pairs = [connect() for _ in range(3)]
        proxy.reset()
        for pair in pairs:
            for stream in pair:
                expect_reset(stream)
        expect_passing(*connect())


class TestFreeze:
    def test_holds_everything_until_thawed(
        self, connect: CONNECT, proxy: FaultProxy, server: Server
    ) -> None:
        client, its_server = connect()
        proxy.freeze()
        client.write(b"ask")
        its_server.write(b"answer")
        late = Stream.open(proxy.address)
        late.write(b"late")
        its_late_server = server.accept()
        until(lambda: proxy.connections_accepted == 2)
        assert not proxy.bytes_to_upstream and not proxy.bytes_to_client
        assert client.is_silent() and its_server.is_silent() and its_late_server.is_silent()
        proxy.thaw()
        assert client.read_exactly(6) == b"answer"
        assert its_server.read_exactly(3) == b"ask"
        assert its_late_server.read_exactly(4) == b"late"
        late.close()
        its_late_server.close()

    def test_keeps_the_other_end_open(self, connect: CONNECT, proxy: FaultProxy) -> None:
        client, server = connect()
        proxy.freeze()
        server.write(b"last words")
        server.close()
        assert client.is_silent()
        proxy.thaw()
        assert client.read_to_end() == b"last words"

    def test_of_one_direction(self, connect: CONNECT, proxy: FaultProxy) -> None:
        client, server = connect()
        proxy.freeze(Direction.TO_CLIENT)
        client.write(b"ask")
        assert server.read_exactly(3) == b"ask"
        server.write(b"answer")
        assert client.is_silent()
        proxy.restore()
        assert client.read_exactly(6) == b"answer"

    def test_does_not_take_what_it_cannot_pass_on(
        self, connect: CONNECT, proxy: FaultProxy
    ) -> None:
        client, server = connect()
        proxy.freeze()
        client.socket.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += client.socket.send(bytes(1 << 16))
        client.socket.settimeout(DEADLINE_S)
        proxy.thaw()
        assert server.read_exactly(sent) == bytes(sent)


class TestRefuse:
    def test_refuses_and_accepts_again_at_the_same_port(
        self, connect: CONNECT, proxy: FaultProxy
    ) -> None:
        client, server = connect()
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            Stream.open(proxy.address)
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(proxy.address)
        expect_passing(client, server)
        proxy.restore()
        expect_passing(*connect())


class TestManyConnections:
    def test_are_all_served_and_all_end(self, connect: CONNECT, proxy: FaultProxy) -> None:
        pairs = [connect() for _ in range(MANY)]
        for number, (client, _) in enumerate(pairs):
            client.write(b"%4d" % number)
        for number, (_, server) in enumerate(pairs):
            assert server.read_exactly(4) == b"%4d" % number
        assert proxy.connections_open == MANY
        for client, server in pairs[MANY // 2 :]:
            client.close()
            server.close()
        until(lambda: proxy.connections_open == MANY // 2)

    def test_leave_no_thread(self, server: Server) -> None:
        before = threading.active_count()
        with FaultProxy(server.address) as proxy:
            clients = [Stream.open(proxy.address) for _ in range(10)]
        for client in clients:
            assert client.read_to_end() == b""
            client.close()
        assert threading.active_count() == before
