"""Run many workers as one gateway, and survive the loss of any process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final

import pytest
from harness.api import FakeApi, echo
from harness.gateway import GatewayProcess, Option, clean_environment, command_line
from harness.processes import Process, find_descendants
from harness.push import PushClient
from harness.waiting import DEADLINE_S, until
from harness.ws import WsClient
from ws2api.supervisor import embedded, profiles_folder

from .conftest import StartGateway

WORKERS: Final = 4
CLIENTS: Final = 400
PUSHES: Final = 10

NO_OPTIONS: Final[Mapping[str, Option]] = MappingProxyType({})


@pytest.fixture(scope="module")
def shared_gateway(shared_api: FakeApi) -> Iterator[GatewayProcess]:
    """Run four workers."""
    with GatewayProcess(api=shared_api.url, workers=WORKERS) as gateway:
        yield gateway


def connect_to_another_worker(
    gateway: GatewayProcess, client_id: str, other_than: Process
) -> WsClient:
    """Connect until the kernel has chosen another worker; each connection replaces the last."""
    for _ in range(100):
        client = gateway.connect(client_id)
        if gateway.worker_of(client) != other_than:
            return client
    raise AssertionError("all the connections are on one worker")


def connections_to_every_worker(gateway: GatewayProcess, api: FakeApi) -> list[PushClient]:
    """Open a push connection to each worker, at the address that it tells the API."""
    addresses: set[tuple[str, int]] = set()
    for number in range(200):
        gateway.connect(f"scout-{number}").hang_up()
        addresses.add(api.requests(f"scout-{number}", "GET")[-1].worker_address)
        if len(addresses) == WORKERS:
            return [gateway.push_client(address) for address in sorted(addresses)]
    raise AssertionError(f"only {addresses}")


class TestManyClients:
    def test_each_push_arrives_once_and_in_order(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        names = [f"{client_id}-{number}" for number in range(CLIENTS)]
        clients = {name: gateway.connect(name) for name in names}
        connections = [gateway.push_client() for _ in range(16)]
        for push in range(PUSHES):
            for number, name in enumerate(names):
                connection = connections[(push + number) % len(connections)]
                assert connection.push(name, f"{push} for {name}").status == 200
        for name, client in clients.items():
            expected = [f"{push} for {name}" for push in range(PUSHES)]
            assert [client.receive() for _ in expected] == expected
            assert client.stream.is_silent()
        assert len({gateway.worker_of(client) for client in list(clients.values())[:40]}) > 1
        assert gateway.count("pushes_forwarded") > 0
        for connection in connections:
            assert connection.push(f"{client_id}-nobody", "anyone?").status == 404

    def test_counters_add_up(self, gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
        opened = gateway.count("connections_opened")
        received = gateway.count("messages_received")
        for number in range(20):
            client = gateway.connect(f"{client_id}-{number}")
            client.send("counted")
            client.close()
        until(lambda: gateway.count("messages_received") == received + 20)
        assert gateway.count("connections_opened") == opened + 20

    def test_admin_port_tells_that_all_is_well(self, gateway: GatewayProcess) -> None:
        assert gateway.admin_get("/healthz").status == 200
        assert gateway.admin_get("/readyz").status == 200


class TestReconnect:
    def test_to_another_worker(self, gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
        first = gateway.connect(client_id)
        pushes = connections_to_every_worker(gateway, api)
        second = connect_to_another_worker(gateway, client_id, gateway.worker_of(first))
        for connection in pushes:
            assert connection.push(client_id, "to the newest").status == 200
            assert second.receive() == "to the newest"
        first.assert_closed(4008, "replaced")
        self._expect_one_delete(second, api, client_id)

    def test_to_the_same_worker(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        first = gateway.connect(client_id)
        home = gateway.worker_of(first)
        for _ in range(100):
            second = gateway.connect(client_id)
            first.assert_closed(4008, "replaced")
            if gateway.worker_of(second) == home:
                break
            first = second
            home = gateway.worker_of(first)
        assert gateway.push_client().push(client_id, "to the newest").status == 200
        assert second.receive() == "to the newest"
        self._expect_one_delete(second, api, client_id)

    def test_again_and_again(self, gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
        clients = [gateway.connect(client_id) for _ in range(30)]
        for client in clients[:-1]:
            client.assert_closed(4008, "replaced")
        assert gateway.push_client().push(client_id, "to the newest").status == 200
        assert clients[-1].receive() == "to the newest"
        self._expect_one_delete(clients[-1], api, client_id)

    def test_all_at_once(self, gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
        with ThreadPoolExecutor(8) as threads:
            clients = list(threads.map(lambda _: gateway.connect(client_id), range(24)))

        def list_open() -> list[WsClient]:
            return [client for client in clients if client.stream.is_silent()]

        until(lambda: len(list_open()) == 1, what="one is left")
        [survivor] = list_open()
        assert gateway.push_client().push(client_id, "to the only one").status == 200
        assert survivor.receive() == "to the only one"
        for client in clients:
            if client is not survivor:
                client.assert_closed(4008, "replaced")
        survivor.close()
        api.wait_for_one(client_id, "DELETE")
        assert len(api.requests(client_id, "DELETE")) == 1

    def _expect_one_delete(self, last: WsClient, api: FakeApi, client_id: str) -> None:
        """See that only the last generation's end is reported: the client was always there."""
        last.close(1000, "bye")
        generation = api.requests(client_id, "GET")[-1].generation
        api.wait_for_one(client_id, "DELETE")
        deletes = api.requests(client_id, "DELETE")
        assert [delete.generation for delete in deletes] == [generation]


class TestLossOfAWorker:
    def test_disturbs_nobody_else(
        self, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        names = [f"{client_id}-{number}" for number in range(40)]
        clients = {name: gateway.connect(name) for name in names}
        workers = {name: gateway.worker_of(client) for name, client in clients.items()}
        victim = workers[names[0]]
        lost = [name for name in names if workers[name] == victim]
        kept = [name for name in names if workers[name] != victim]
        children = gateway.children
        os.kill(victim.pid, signal.SIGKILL)

        for name in lost:
            assert clients[name].stream.read_to_end() == b""
        for name in kept:
            api.on(name, "POST", echo)
            clients[name].send("undisturbed")
            assert clients[name].receive() == "undisturbed"
        returned = {name: gateway.connect(name) for name in lost}
        for name, client in (returned | {name: clients[name] for name in kept}).items():
            assert gateway.push_client().push(name, "as before").status == 200
            assert client.receive() == "as before"
        until(lambda: len(gateway.children) == len(children), what="a replacement")
        until(lambda: gateway.admin_get("/readyz").status == 200, what="readiness")
        assert not victim.is_alive


class TestLossOfAHelper:
    @pytest.fixture
    def running(
        self, api: FakeApi, start_gateway: StartGateway, client_id: str
    ) -> tuple[GatewayProcess, WsClient]:
        """Run a gateway of two workers with one client."""
        gateway = start_gateway(api=api.url, workers=2)
        return gateway, gateway.connect(client_id)

    def test_private_server_comes_back(
        self, running: tuple[GatewayProcess, WsClient], client_id: str
    ) -> None:
        gateway, client = running
        server = next(child for child in gateway.children if child.command == "valkey-server")
        os.kill(server.pid, signal.SIGKILL)
        until(lambda: not server.is_alive)
        far_id = f"{client_id}-far"
        far = connect_to_another_worker(gateway, far_id, gateway.worker_of(client))
        pushes = [gateway.push_client() for _ in range(10)]

        def reaches_everybody(connection: PushClient) -> bool:
            names = (client_id, far_id)
            return {connection.push(name, "as before").status for name in names} == {200}

        for connection in pushes:
            until(partial(reaches_everybody, connection), what="every worker is back")
        assert client.receive() == far.receive() == "as before"

    def test_admin_comes_back(
        self, running: tuple[GatewayProcess, WsClient], client_id: str
    ) -> None:
        gateway, client = running
        admin = gateway.find_admin()
        os.kill(admin.pid, signal.SIGKILL)
        until(lambda: not admin.is_alive)
        assert gateway.admin_get("/healthz").status == 200
        assert gateway.count("connections_opened") == 1
        assert gateway.push_client().push(client_id, "as before").status == 200
        assert client.receive() == "as before"


class TestLossOfTheSupervisor:
    def test_ends_every_process(self, api: FakeApi, client_id: str) -> None:
        with GatewayProcess(api=api.url, workers=2) as gateway:
            client = gateway.connect(client_id)
            processes = find_descendants(gateway.pid)
            assert len(processes) >= 4
            os.kill(gateway.pid, signal.SIGKILL)
            until(lambda: not [p for p in processes if p.is_alive], what="no process left")
            client.stream.read_to_end()
            until(lambda: not gateway.is_running)
            folders = [path for path in gateway.runtime_files if path.parent.name == "run"]
            assert len(folders) == 2
            # As the next start does.
            for remove_leftovers in (embedded.remove_leftovers, profiles_folder.remove_leftovers):
                remove_leftovers(folders[0].parent)
            assert not gateway.runtime_files


class TestStop:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_leaves_no_process_and_no_file(self, api: FakeApi, number: signal.Signals) -> None:
        with GatewayProcess(api=api.url, workers=2) as gateway:
            processes = find_descendants(gateway.pid)
            assert "valkey-server" in {process.command for process in processes}
            assert gateway.runtime_files
            os.kill(gateway.pid, number)
            gateway.await_end(processes)

    def test_private_server_is_private(self, gateway: GatewayProcess) -> None:
        sockets = [path for path in gateway.runtime_files if path.is_socket()]
        assert sockets
        for path in sockets:
            assert path.parent.stat().st_mode & 0o077 == 0


class TestWrongStart:
    """One line on stderr that says what to change, and exit status 2."""

    @pytest.mark.parametrize(
        ("option", "named"),
        [
            ({"workers": 0}, "workers"),
            ({"api": "ftp://files.example/"}, "api"),
            ({"listen": "nowhere"}, "listen"),
            ({"redis": "memcached://127.0.0.1"}, "redis"),
            ({"ping_interval": "soon"}, "ping-interval"),
            ({"no_such_option": "1"}, "no-such-option"),
            ({"config": "/no/such/file.toml"}, "/no/such/file.toml"),
        ],
        ids=lambda value: None if isinstance(value, dict) else value,
    )
    def test_bad_option(self, tmp_path: Path, option: dict[str, Option], named: str) -> None:
        assert named in fail_to_start(tmp_path, option)

    def test_bad_environment_variable(self, tmp_path: Path) -> None:
        line = fail_to_start(tmp_path, WS2API_MAX_QUEUE="many")
        assert "max-queue" in line or "WS2API_MAX_QUEUE" in line

    @pytest.mark.parametrize("option", ["listen", "push_listen", "admin_listen"])
    def test_port_in_use(self, tmp_path: Path, option: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            assert address in fail_to_start(tmp_path, {option: address})

    def test_unreachable_redis(self, tmp_path: Path) -> None:
        with socket.socket() as reserved:  # bound, but nobody listens
            reserved.bind(("127.0.0.1", 0))
            url = f"redis://127.0.0.1:{reserved.getsockname()[1]}/0"
            assert "redis" in fail_to_start(tmp_path, {"redis": url}).lower()

    def test_unreachable_redis_socket(self, tmp_path: Path) -> None:
        assert "redis" in fail_to_start(tmp_path, {"redis": f"unix://{tmp_path}/none.sock"}).lower()


class TestWorkersThatCannotStart:
    def test_are_given_up_with_the_reason(self, tmp_path: Path) -> None:
        faults, runtime = tmp_path / "faults", tmp_path / "run"
        faults.mkdir()
        runtime.mkdir()
        # Python imports this at its start, and so puts the fault into the real program.
        (faults / "sitecustomize.py").write_text(
            "from ws2api.gateway import worker\n"
            "def run(settings, assignment):\n"
            "    raise RuntimeError('this worker cannot boot')\n"
            "worker.run = run\n"
        )
        ended = run_to_its_end(
            runtime, {"workers": 8, "log_format": "json"}, PYTHONPATH=str(faults)
        )
        assert ended.returncode == 3, ended
        assert "ready" not in ended.stdout.splitlines()
        *_, last = ended.stderr.splitlines()
        assert last.startswith("ws2api-supervisor: the workers cannot start; worker ")
        assert last.endswith(" ended last: exit status 3")
        assert "RuntimeError: this worker cannot boot" in ended.stderr
        assert not list(runtime.iterdir())


class TestCheck:
    def test_finds_nothing_wrong_and_serves_nothing(
        self, tmp_path: Path, shared_api: FakeApi
    ) -> None:
        ended = run_to_its_end(tmp_path, {"check": True, "api": shared_api.url})
        assert (ended.returncode, ended.stderr) == (0, "")
        assert "ready" not in ended.stdout.splitlines()
        assert not list(tmp_path.iterdir())

    def test_finds_what_is_wrong(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            assert address in fail_to_start(tmp_path, {"check": True, "listen": address})


def fail_to_start(
    folder: Path, options: Mapping[str, Option] = NO_OPTIONS, **environment: str
) -> str:
    """Start the supervisor in vain, see that it fails as promised, and return what it says."""
    ended = run_to_its_end(folder, options, **environment)
    assert ended.returncode == 2, ended
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    assert not list(folder.iterdir())
    return lines[0]


def run_to_its_end(
    folder: Path, options: Mapping[str, Option], **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the supervisor with options that let it end by itself."""
    return subprocess.run(
        command_line(**options),
        env=clean_environment(folder) | environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
