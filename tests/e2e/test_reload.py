"""Send SIGHUP to the gateway: it reads its file again and replaces its workers under traffic."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from harness.api import FakeApi, Hold, Reply, echo
from harness.gateway import GatewayProcess
from harness.processes import Process
from harness.waiting import DEADLINE_S, until
from harness.ws import WsClient

from .conftest import StartGateway

WORKERS: Final = 2
REPLACED: Final = "all workers are replaced"
OVER: Final = "the old workers have ended"


class ConfiguredGateway:
    """Run a gateway whose options stand in a file that the test can change."""

    def __init__(self, start_gateway: StartGateway, folder: Path, api: FakeApi, text: str) -> None:
        self.file = folder / "ws2api.toml"
        self.common = f"listen = '127.0.0.1:0'\napi = '{api.url}'\n"
        self.write(text)
        # A flag would win over the file, so that the address of the clients stands only there.
        self.gateway: GatewayProcess = start_gateway(
            config=str(self.file), listen=False, workers=WORKERS
        )

    def write(self, text: str) -> None:
        self.file.write_text(self.common + text)

    def workers(self) -> set[Process]:
        """Return the processes that are workers; a helper has another name, or the admin port."""
        admin = self.gateway.find_admin()
        children = self.gateway.children
        return {one for one in children if one != admin and one.command != "valkey-server"}

    def hang_up(self) -> None:
        os.kill(self.gateway.pid, signal.SIGHUP)

    def log_line(self, text: str, count: int = 1) -> str:
        """Wait for a line of the log, and return the last one of its kind."""
        until(lambda: self.gateway.stderr.count(text) >= count, timeout_s=2 * DEADLINE_S, what=text)
        return next(line for line in self.gateway.stderr.splitlines()[::-1] if text in line)

    def refusal(self) -> str:
        """Ask for a reload, and return the line that tells why it is refused."""
        self.hang_up()
        line = self.log_line("reload refused")
        assert " error " in line
        return line


Configure = Callable[[str], ConfiguredGateway]


@pytest.fixture
def configure(start_gateway: StartGateway, tmp_path: Path, api: FakeApi) -> Configure:
    return lambda text: ConfiguredGateway(start_gateway, tmp_path, api, text)


def assert_serves(gateway: GatewayProcess, api: FakeApi, client: WsClient, client_id: str) -> None:
    api.on(client_id, "POST", echo)
    client.send("still here")
    assert client.receive() == "still here"
    assert gateway.push_client().push(client_id, "you too").status == 200
    assert client.receive() == "you too"


class TestRefused:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("max_queue = 'many'", "max-queue: must be a whole number, got many"),
            ("no_such_option = 1", "no option 'no_such_option'"),
            ("max_queue = ", "is no TOML"),
            ("api_ca = '/no/such/file.pem'", "api-ca: cannot read /no/such/file.pem"),
        ],
        ids=["value", "name", "syntax", "authorities"],
    )
    def test_wrong_file_changes_nothing(
        self, configure: Configure, api: FakeApi, client_id: str, text: str, reason: str
    ) -> None:
        running = configure("drain_seconds = '1s'")
        children = set(running.gateway.children)
        client = running.gateway.connect(client_id)
        running.write(text)
        assert reason in running.refusal()
        assert set(running.gateway.children) == children
        assert_serves(running.gateway, api, client, client_id)
        # And it is not asked too much to mend it.
        running.write("")
        running.hang_up()
        running.log_line(REPLACED)
        client.assert_closed(1012)
        until(lambda: running.gateway.count("reloads", outcome="done") == 1)
        assert running.gateway.count("reloads", outcome="refused") == 1
        assert running.gateway.count("reloads", outcome="failed") == 0

    def test_what_needs_a_restart_is_named(
        self, configure: Configure, api: FakeApi, client_id: str
    ) -> None:
        running = configure("")
        children = set(running.gateway.children)
        client = running.gateway.connect(client_id)
        running.common = running.common.replace("listen = '127.0.0.1:0'", "listen = '127.0.0.1:1'")
        running.write("redis_prefix = 'other:'")
        assert "listen, redis-prefix: cannot change without a restart" in running.refusal()
        assert set(running.gateway.children) == children
        assert_serves(running.gateway, api, client, client_id)


class TestAccepted:
    def test_new_limits_apply_to_new_connections(
        self, configure: Configure, api: FakeApi, client_id: str
    ) -> None:
        running = configure("max_message_size = '1KiB'\ndrain_seconds = '10m'")
        gateway = running.gateway
        text = "x" * 2000
        gateway.connect(f"{client_id}-before").send(text)
        before = gateway.connect(client_id)
        before.send(text)
        before.assert_closed(1009)
        running.write("max_message_size = '64KiB'\ndrain_seconds = '10m'")
        running.hang_up()
        running.log_line(REPLACED)
        after = gateway.connect(f"{client_id}-after")
        api.on(f"{client_id}-after", "POST", echo)
        after.send(text)
        assert after.receive() == text

    def test_new_timeout_applies_to_new_connections(
        self, configure: Configure, api: FakeApi, client_id: str
    ) -> None:
        running = configure("api_timeout = '60s'\ndrain_seconds = '1s'")
        running.write("api_timeout = '200ms'\ndrain_seconds = '1s'")
        running.hang_up()
        running.log_line(REPLACED)
        hold = Hold(Reply("ok"))
        api.on(client_id, "GET", hold)
        assert running.gateway.handshake(client_id).status == 504
        hold.release()


class TestRoll:
    def test_moves_each_client_once_and_keeps_the_totals(
        self, configure: Configure, api: FakeApi, client_id: str
    ) -> None:
        running = configure("drain_seconds = '2s'")
        gateway = running.gateway
        names = [f"{client_id}-{number}" for number in range(40)]
        clients = {name: gateway.connect(name) for name in names}
        old = running.workers()
        assert len(old) == WORKERS
        assert gateway.count("connections_opened") == len(names)
        running.hang_up()
        running.log_line("replacing the workers one by one")
        for name, client in clients.items():
            client.assert_closed(1012)
            clients[name] = gateway.connect(name)
        running.log_line(REPLACED)
        running.log_line(OVER)
        new = running.workers()
        assert len(new) == WORKERS
        assert not old & new
        assert not [process for process in old if process.is_alive]
        assert {gateway.worker_of(client) for client in clients.values()} <= new
        for name, client in clients.items():
            assert_serves(gateway, api, client, name)
        assert gateway.count("connections_opened") == 2 * len(names)
        assert gateway.count("connections_closed") == len(names)
        assert gateway.count("connections_open") == len(names)
        assert gateway.count("worker_restarts") == 0
        assert gateway.admin_get("/readyz").status == 200

    def test_refuses_no_connect(self, configure: Configure, client_id: str) -> None:
        running = configure("drain_seconds = '1s'")
        with connecting_all_the_time(running.gateway, client_id) as report:
            for number in range(1, 4):
                running.hang_up()
                running.log_line(OVER, number)
        assert report.failures == []
        assert report.count > 0

    def test_totals_never_fall(self, configure: Configure, client_id: str) -> None:
        running = configure("drain_seconds = '1s'")
        gateway = running.gateway
        totals = [gateway.count("connections_opened")]
        with connecting_all_the_time(gateway, client_id):
            running.hang_up()
            while OVER not in gateway.stderr:
                totals.append(read_total(gateway))
        assert totals == sorted(totals)

    def test_stop_meanwhile_is_clean(self, configure: Configure, client_id: str) -> None:
        running = configure("drain_seconds = '10m'")
        clients = [running.gateway.connect(f"{client_id}-{number}") for number in range(20)]
        running.hang_up()
        running.log_line(REPLACED)
        fresh = running.gateway.connect(f"{client_id}-fresh")
        running.gateway.terminate()
        fresh.assert_closed(1001)
        for client in clients:
            frame = client.receive_frame()
            assert int.from_bytes(frame.payload[:2], "big") in (1001, 1012)
            client.hang_up()


class Report:
    """Say how a thread that connects all the time has fared."""

    def __init__(self) -> None:
        self.count = 0
        self.failures: list[str] = []
        self.is_over = threading.Event()


@contextmanager
def connecting_all_the_time(gateway: GatewayProcess, client_id: str) -> Iterator[Report]:
    """Open a WebSocket, leave, and so on, in three threads."""
    report = Report()

    def connect(thread: int) -> None:
        number = 0
        while not report.is_over.is_set():
            number += 1
            try:
                gateway.connect(f"{client_id}-{thread}-{number}").hang_up()
                report.count += 1
            except (OSError, EOFError, AssertionError) as error:
                report.failures.append(repr(error))

    threads = [threading.Thread(target=connect, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield report
    finally:
        report.is_over.set()
        for thread in threads:
            thread.join(2 * DEADLINE_S)


def read_total(gateway: GatewayProcess) -> int:
    while True:
        try:
            return gateway.count("connections_opened")
        except (EOFError, ConnectionError):  # the process that accepted has just ended
            continue
