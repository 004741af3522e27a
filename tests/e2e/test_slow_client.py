"""A client that is slow, or that floods, costs itself something and nobody else."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from harness.api import FakeApi, Hold, Reply, echo
from harness.gateway import GatewayProcess
from harness.stream import Stream
from harness.traffic import Traffic
from harness.traffic_clients import message, push
from harness.waiting import DEADLINE_S, until
from harness.ws import Frame, Op, WsClient, upgrade_request

FLOOD = 100_000
PUSH_BYTES = 8_000
BYSTANDERS = 20
DAWDLERS = 50
AFTER_IT = Frame(Op.TEXT, b"after it").encode()


@dataclass
class Scene:
    """Hold a gateway that soon loses its patience, and others who talk through it."""

    gateway: GatewayProcess
    traffic: Traffic

    def connect_slow(self, client_id: str) -> WsClient:
        """Connect a client of whose messages the kernel holds few."""
        return self.gateway.connect(client_id, receive_buffer_bytes=4096)

    def expect_others_undisturbed(self) -> None:
        goal = self.traffic.fleet.answers + 10 * BYSTANDERS
        until(lambda: self.traffic.fleet.answers >= goal, what="answers for the others")


@pytest.fixture(scope="module")
def short_patience() -> Iterator[Scene]:
    with (
        Traffic() as traffic,
        GatewayProcess(
            api=traffic.api.url, workers=2, write_timeout="2s", max_write_buffer="64KiB"
        ) as gateway,
    ):
        yield Scene(gateway, traffic)
        assert not gateway.complaints, gateway.stderr


@pytest.fixture
def scene(short_patience: Scene) -> Iterator[Scene]:
    """Let others talk, and see in the end that all went well for them."""
    traffic = short_patience.traffic
    with traffic.attach(short_patience.gateway):
        others = traffic.fleet.add(*(f"client-{number}" for number in range(BYSTANDERS)))
        traffic.fleet.talk(1, 0.005)
        yield short_patience
        short_patience.expect_others_undisturbed()
        assert all(client.is_open for client in others)
        traffic.fleet.fall_silent()
        traffic.settle()
        assert not traffic.ledger().messages.problems
    short_patience.gateway.disconnect_all()


class TestSlowReader:
    def test_slow_client(self, scene: Scene) -> None:
        slow = scene.connect_slow("slow")
        [life] = scene.traffic.api.lives_of("slow")
        delivered = self._push_until(scene, 429)
        scene.expect_others_undisturbed()
        self._push_until(scene, 404)
        for number in delivered:
            assert slow.receive() == padded(number).decode()
        slow.assert_closed(1008, "too slow")
        until(lambda: life.deletes == [(1008, "too slow")])

    def _push_until(self, scene: Scene, status: int) -> list[int]:
        """Push through every worker until this is the answer; return what was delivered."""
        delivered = []
        connections = [scene.gateway.push_client() for _ in range(4)]
        number = 0
        while True:
            number += 1
            connection = connections[number % len(connections)]
            answer = connection.push("slow", padded(number).decode()).status
            if answer == 200:
                delivered.append(number)
            elif answer == status:
                return delivered
            else:
                assert answer == 429

    def test_is_not_read_either(self, scene: Scene) -> None:
        slow = scene.connect_slow("slow")
        count = 400
        sent = [message("slow", number, PUSH_BYTES) for number in range(1, count + 1)]
        frames = b"".join(Frame(Op.TEXT, body).encode() for body in sent)
        thread = threading.Thread(target=slow.send_raw, args=(frames,))
        thread.start()
        [life] = scene.traffic.api.lives_of("slow")
        scene.expect_others_undisturbed()
        # What waits for it is bounded, so the API is not asked for more.
        assert len(life.posts) < count
        for body in sent:
            assert slow.receive() == body.decode()
        thread.join(DEADLINE_S)
        slow.close()


def padded(number: int) -> bytes:
    return push(number) + b" " * PUSH_BYTES


class TestSlowHandshake:
    def test_is_cut_off_and_holds_up_nobody(self, api: FakeApi, client_id: str) -> None:
        request = upgrade_request(f"/{client_id}-slow")
        with GatewayProcess(api=api.url, handshake_timeout="2s") as gateway:
            dawdlers = [gateway.open_stream() for _ in range(DAWDLERS)]
            for number in range(len(request) - 1):
                dawdlers = [stream for stream in dawdlers if dawdle(stream, request[number])]
                if not dawdlers:
                    break
                client = gateway.connect(f"{client_id}-{number}")
                api.on(f"{client_id}-{number}", "POST", echo)
                client.send("hello")
                assert client.receive() == "hello"
                client.close()
                threading.Event().wait(0.1)  # the pace of the slow ones
            assert not dawdlers
            assert not api.requests(f"{client_id}-slow")


def dawdle(stream: Stream, byte: int) -> bool:
    """Send one more byte; tell whether the connection is still there."""
    try:
        stream.write(bytes([byte]))
    except OSError:
        return False
    return stream.is_silent()


def exchange_until(client: WsClient, is_over: Callable[[], bool]) -> int:
    """Exchange one message after the other until the flood is over; return how many."""
    count = 0
    while not is_over():
        client.send("still served?")
        assert client.receive() == "still served?"
        count += 1
    return count


def assert_takes_turns(flood: Callable[[str], int], client_id: str) -> None:
    """See the bystander served again and again during one flood.

    A busy machine may hide it, so there are several; where a flood is worked off in one go, none of
    them leaves room for more than an exchange or two.
    """
    numbers = itertools.count()
    until(lambda: flood(f"{client_id}-{next(numbers)}") >= 20, what="others have their turn")


class TestFlood:
    """On a gateway of one worker, so that a disturbance would show at the other client."""

    @pytest.fixture
    def bystander(self, gateway: GatewayProcess, api: FakeApi, client_id: str) -> WsClient:
        api.on(f"{client_id}-other", "POST", echo)
        return gateway.connect(f"{client_id}-other")

    def test_of_pings(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, bystander: WsClient
    ) -> None:
        def flood(name: str) -> int:
            client = gateway.connect(name)
            client.send_raw(Frame(Op.PING, b"").encode() * FLOOD + AFTER_IT)
            count = exchange_until(bystander, lambda: bool(api.texts(name)))
            pong = Frame(Op.PONG, b"").encode(mask=False)
            assert client.stream.read_exactly(2 * FLOOD) == pong * FLOOD
            return count

        assert_takes_turns(flood, client_id)

    def test_of_pings_and_messages_that_wait(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, bystander: WsClient
    ) -> None:
        def flood(name: str) -> int:
            hold = Hold(Reply())
            api.on(name, "POST", hold)
            client = gateway.connect(name)
            # The messages, too, are more than are looked at in one go.
            client.send_raw(AFTER_IT * 300)
            received: list[bytes] = []
            pings = Frame(Op.PING, b"").encode() * FLOOD
            sending = threading.Thread(target=client.send_raw, args=(pings,))
            pong = Frame(Op.PONG, b"").encode(mask=False)
            receiving = threading.Thread(
                target=lambda: received.append(client.stream.read_exactly(2 * FLOOD))
            )
            sending.start()
            receiving.start()
            count = exchange_until(bystander, lambda: bool(received))
            assert received == [pong * FLOOD]
            sending.join(DEADLINE_S)
            hold.release()
            api.wait_for(name, "POST", count=300)
            return count

        assert_takes_turns(flood, client_id)

    def test_of_fragments(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, bystander: WsClient
    ) -> None:
        fragments = FLOOD // 10
        one = (
            Frame(Op.TEXT, b"a", fin=False).encode()
            + Frame(Op.CONTINUATION, b"b", fin=False).encode() * (fragments - 2)
            + Frame(Op.CONTINUATION, b"c").encode()
        )

        def flood(name: str) -> int:
            client = gateway.connect(name)
            client.send_raw(one * 10)  # most of which the kernel keeps until the gateway reads it
            count = exchange_until(bystander, lambda: len(api.texts(name)) == 10)
            assert set(api.texts(name)) == {"a" + "b" * (fragments - 2) + "c"}
            return count

        assert_takes_turns(flood, client_id)

    def test_of_fragments_of_one_message(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, bystander: WsClient
    ) -> None:
        client = gateway.connect(client_id)
        flood = Frame(Op.BINARY, b"", fin=False).encode()
        flood += Frame(Op.CONTINUATION, b"", fin=False).encode() * FLOOD
        thread = threading.Thread(target=client.send_raw, args=(flood,))
        thread.start()
        exchange_until(bystander, lambda: bool(api.requests(client_id, "DELETE")))
        thread.join(DEADLINE_S)
        client.assert_closed(1009)
        assert not api.texts(client_id)

    def test_of_packets(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, bystander: WsClient
    ) -> None:
        """A frame byte by byte, each byte a packet of its own as far as the kernel allows."""
        message = "x" * 10_000

        def flood(name: str) -> int:
            client = gateway.connect(name)
            thread = threading.Thread(target=client.send, args=(message,), kwargs={"chop": 1})
            thread.start()
            count = exchange_until(bystander, lambda: bool(api.texts(name)))
            thread.join(DEADLINE_S)
            assert api.texts(name) == [message]
            return count

        assert_takes_turns(flood, client_id)
