"""Report the end of each connection with one DELETE, after everything else, until it is heard."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from harness.api import Drop, FakeApi, Hold, Reply, echo
from harness.gateway import GatewayProcess
from harness.http_messages import read_response
from harness.processes import find_descendants
from harness.stream import Stream
from harness.waiting import until
from harness.ws import Op, close_payload, upgrade_request

from .conftest import StartGateway


@pytest.fixture(scope="module")
def impatient(shared_api: FakeApi) -> Iterator[GatewayProcess]:
    """Run a gateway that gives its clients little time."""
    with GatewayProcess(
        api=shared_api.url,
        ping_interval="200ms",
        ping_timeout="500ms",
        handshake_timeout="500ms",
        write_timeout="500ms",
    ) as gateway:
        yield gateway


class TestReason:
    @pytest.mark.parametrize(
        ("code", "reason"),
        [(1000, "disconnect"), (1001, ""), (3000, "größer"), (4999, "x" * 123)],
    )
    def test_close_frame_is_told(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, code: int, reason: str
    ) -> None:
        client = gateway.connect(client_id)
        client.close(code, reason)
        delete = api.wait_for_one(client_id, "DELETE")
        assert delete.target == f"/{client_id}"
        assert (delete.close_code, delete.text) == (code, reason)
        assert delete.generation == api.wait_for_one(client_id, "GET").generation

    def test_close_frame_without_a_code(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        client = gateway.connect(client_id)
        client.send_close()
        client.assert_closed(None)
        delete = api.wait_for_one(client_id, "DELETE")
        assert (delete.close_code, delete.text) == (1005, "")

    @pytest.mark.parametrize("end", ["hang_up", "abort"])
    def test_connection_that_just_ends(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, end: str
    ) -> None:
        client = gateway.connect(client_id)
        getattr(client, end)()
        delete = api.wait_for_one(client_id, "DELETE")
        assert (delete.close_code, delete.text) == (1006, "EOF")

    def test_connection_that_ends_within_a_frame(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        client = gateway.connect(client_id)
        client.send_raw(b"\x81\xfe\x01")
        client.hang_up()
        assert api.wait_for_one(client_id, "DELETE").close_code == 1006
        assert not api.requests(client_id, "POST")


class TestOrder:
    def test_comes_after_the_message_under_way(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        hold = Hold(Reply())
        api.on(client_id, "POST", hold)
        client = gateway.connect(client_id)
        client.send("under way")
        api.wait_for_one(client_id, "POST")
        client.close()
        assert not api.requests(client_id, "DELETE")
        hold.release()
        api.wait_for_one(client_id, "DELETE")

    def test_comes_after_the_messages_that_wait(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        hold = Hold(Reply())
        api.on(client_id, "POST", hold)
        client = gateway.connect(client_id)
        for number in range(10):
            client.send(str(number))
        api.wait_for_one(client_id, "POST")
        client.hang_up()
        hold.release()
        api.wait_for_one(client_id, "DELETE")
        methods = [request.method for request in api.requests(client_id)]
        assert methods == ["GET", *["POST"] * 10, "DELETE"]
        assert api.texts(client_id) == [str(number) for number in range(10)]

    def test_is_sent_once(self, gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
        for _ in range(2):
            gateway.connect(client_id).close()
        generations = [delete.generation for delete in api.wait_for(client_id, "DELETE", count=2)]
        assert len(set(generations)) == 2


class TestRetry:
    @pytest.mark.parametrize("trouble", [Reply("no", 500), Reply("no", 404), Drop(reset=True)])
    def test_is_repeated_until_it_is_heard(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str, trouble: Reply | Drop
    ) -> None:
        api.on(client_id, "DELETE", trouble, trouble, Reply(status=204))
        gateway.connect(client_id).close(1000, "bye")
        deletes = api.wait_for(client_id, "DELETE", count=3)
        assert {(delete.close_code, delete.text) for delete in deletes} == {(1000, "bye")}
        assert len({delete.generation for delete in deletes}) == 1

    def test_waits_for_an_api_that_is_away_for_long(
        self, own_api: FakeApi, start_gateway: StartGateway, client_id: str
    ) -> None:
        gateway = start_gateway(api=own_api.url, api_timeout="1s")
        client = gateway.connect(client_id)
        bystander = gateway.connect(f"{client_id}-bystander")
        own_api.close()
        client.close(1000, "bye")
        bystander.send("does not wait that long")
        until(lambda: gateway.count("requests_failed"), what="a message fails")
        own_api.open()
        assert own_api.wait_for_one(client_id, "DELETE").text == "bye"


class TestDeadlines:
    def test_client_that_does_not_answer_pings_is_closed(
        self, impatient: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        client = impatient.connect(client_id)
        assert client.receive_frame().opcode == Op.PING
        client.stream.read_to_end()
        api.wait_for_one(client_id, "DELETE")

    def test_client_that_answers_pings_stays(
        self, impatient: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        api.on(client_id, "POST", echo)
        client = impatient.connect(client_id)
        for _ in range(5):
            ping = client.receive_frame()
            assert ping.opcode == Op.PING
            client.send_frame(Op.PONG, ping.payload)
        client.send("still here")
        assert client.receive() == "still here"

    def test_client_that_does_not_read_is_closed(
        self, impatient: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        impatient.connect(client_id, receive_buffer_bytes=4096)
        pushes = impatient.push_client()
        until(lambda: pushes.push(client_id, bytes(500_000)).status in (404, 429), what="refusal")
        api.wait_for_one(client_id, "DELETE")

    def test_silent_connection_is_closed(self, impatient: GatewayProcess) -> None:
        answer = impatient.open_stream().read_to_end()
        assert not answer or answer.startswith(b"HTTP/1.1 408 ")

    def test_endless_request_is_closed(self, impatient: GatewayProcess, client_id: str) -> None:
        stream = impatient.open_stream()
        stream.write(upgrade_request(f"/{client_id}")[:-2] + b"X-Endless: ")
        until(lambda: not drips(stream), what="the end of a request that never ends")

    def test_client_that_does_not_answer_a_close_is_dropped(
        self, impatient: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        client = impatient.connect(client_id)
        assert impatient.push_client().delete(client_id).status == 200
        assert client.receive_frame().opcode == Op.CLOSE
        assert client.stream.read_to_end() == b""
        api.wait_for_one(client_id, "DELETE")

    def test_time_that_the_api_takes_does_not_count(
        self, impatient: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        hold = Hold(Reply("ok"))
        api.on(client_id, "GET", hold)
        stream = impatient.open_stream()
        stream.write(upgrade_request(f"/{client_id}"))
        api.wait_for_one(client_id, "GET")
        impatient.open_stream().read_to_end()  # one that came later has timed out
        hold.release()
        assert read_response(stream).status == 101


def drips(stream: Stream) -> bool:
    """Send one more byte; tell whether the other end still seems to want it."""
    with contextlib.suppress(OSError):
        stream.write(b"x")
        return stream.is_silent()
    return False


class TestShutdown:
    def test_says_good_bye_to_clients_and_api(
        self, api: FakeApi, start_gateway: StartGateway, client_id: str
    ) -> None:
        gateway = start_gateway(api=api.url, workers=2)
        names = [f"{client_id}-{number}" for number in range(20)]
        clients = [gateway.connect(name) for name in names]
        processes = find_descendants(gateway.pid)
        gateway.terminate()
        for client in clients:
            client.assert_closed(1001)
        gateway.await_end(processes)
        codes = {api.wait_for_one(name, "DELETE").close_code for name in names}
        assert len(codes) == 1

    def test_finishes_what_is_under_way(
        self, api: FakeApi, start_gateway: StartGateway, client_id: str
    ) -> None:
        hold = Hold(Reply("answer"))
        api.on(client_id, "POST", hold)
        gateway = start_gateway(api=api.url)
        processes = find_descendants(gateway.pid)
        client = gateway.connect(client_id)
        client.send("question")
        api.wait_for_one(client_id, "POST")
        gateway.terminate()
        until(lambda: "worker stops" in gateway.stderr, what="the signal has reached the worker")
        hold.release()
        assert client.receive() == "answer"
        client.assert_closed(1001)
        gateway.await_end(processes)
        methods = [request.method for request in api.requests(client_id)]
        assert methods == ["GET", "POST", "DELETE"]

    def test_takes_no_more_connections_meanwhile(
        self, api: FakeApi, start_gateway: StartGateway, client_id: str
    ) -> None:
        hold = Hold(Reply())
        api.on(client_id, "POST", hold)
        gateway = start_gateway(api=api.url)
        processes = find_descendants(gateway.pid)
        gateway.connect(client_id).send("question")
        api.wait_for_one(client_id, "POST")
        gateway.terminate()
        until(lambda: is_refused(gateway), what="the listeners are closed")
        assert not api.requests(client_id, "DELETE")
        hold.release()
        gateway.disconnect_all()
        gateway.await_end(processes)

    def test_gives_up_on_an_api_that_hangs(
        self, api: FakeApi, start_gateway: StartGateway, client_id: str
    ) -> None:
        gateway = start_gateway(api=api.url, api_max_connections=2, shutdown_timeout="2s")
        processes = find_descendants(gateway.pid)
        names = [f"{client_id}-{number}" for number in range(10)]
        clients = [gateway.connect(name) for name in names]
        hold = Hold(Reply())
        for name, client in zip(names, clients, strict=True):
            api.on(name, "POST", hold)
            client.send("question")
        until(lambda: gateway.count("api_queue_length") == 8, what="a queue")
        gateway.terminate()
        for client in clients:
            client.assert_closed(1001)
        until(lambda: not gateway.is_running, what="the end")
        hold.release()
        assert not gateway.complaints
        assert "SIGKILL" not in gateway.stderr
        assert not [process for process in processes if process.is_alive]

    def test_does_not_wait_for_a_client_that_is_gone_silent(
        self, api: FakeApi, start_gateway: StartGateway, client_id: str
    ) -> None:
        gateway = start_gateway(api=api.url, handshake_timeout="500ms")
        processes = find_descendants(gateway.pid)
        client = gateway.connect(client_id)
        gateway.terminate()
        gateway.await_end(processes)
        frame = client.receive_frame()
        assert (frame.opcode, frame.payload[:2]) == (Op.CLOSE, close_payload(1001))
        api.wait_for_one(client_id, "DELETE")


def is_refused(gateway: GatewayProcess) -> bool:
    """Tell whether the client port takes no more connections."""
    try:
        gateway.open_stream().close()
    except ConnectionRefusedError:
        return True
    return False
