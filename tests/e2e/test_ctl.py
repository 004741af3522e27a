"""Look after the real gateway with ws2api-ctl."""

from __future__ import annotations

import json
import os
import pstats
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.api import FakeApi, Reply, echo
from harness.gateway import GatewayProcess, clean_environment
from harness.ports import free_port
from harness.waiting import DEADLINE_S, until

from .conftest import StartGateway

ADMIN_TOKEN = "open-sesame"
COMMAND = (
    *(sys.executable, "-X", "dev", "-W", "error"),
    str(Path(sys.executable).with_name("ws2api-ctl")),
)


class Ctl:
    """Run commands against one gateway.

    Args:
        gateway: the one; its ports are passed as flags; None passes none.
        environment: variables, as for tokens.
    """

    def __init__(self, gateway: GatewayProcess | None, folder: Path, **environment: str) -> None:
        self._urls = []
        if gateway is not None:
            self._urls += ["--admin", url(gateway.admin_address)]
            self._urls += ["--push", url(gateway.pushes_address)]
        self._environment = clean_environment(folder) | environment

    def run(
        self, *arguments: str, message: bytes = b"", status: int = 0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command, and expect its exit status."""
        process = self.run_any(*arguments, message=message)
        assert process.returncode == status, process
        return process

    def run_any(self, *arguments: str, message: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run a command, whatever comes of it."""
        return subprocess.run(
            [*COMMAND, *self._urls, *arguments],
            input=message,
            capture_output=True,
            env=self._environment,
            timeout=4 * DEADLINE_S,
            check=False,
        )

    def json(self, *arguments: str, status: int = 0) -> Any:
        """Run a command with --json; return its document."""
        return json.loads(self.run(*arguments, "--json", status=status).stdout)


def url(address: tuple[str, int]) -> str:
    return "http://{}:{}".format(*address)


@pytest.fixture
def ctl(gateway: GatewayProcess, tmp_path: Path) -> Ctl:
    """Use the shared gateway, which has no tokens."""
    return Ctl(gateway, tmp_path)


class TestPushPort:
    def test_shows_a_client(
        self, ctl: Ctl, gateway: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        api.on(client_id, "POST", echo)
        client = gateway.connect(client_id)
        client.send("hello")
        assert client.receive() == "hello"
        generation = api.wait_for_one(client_id, "GET").generation
        told = ctl.json("client", client_id)
        assert (told["id"], told["connected"], told["last_close"]) == (client_id, True, None)
        assert told["connection"]["generation"] == generation
        shown = ctl.run("client", client_id).stdout.decode()
        assert f"{client_id} is connected\n" in shown
        since = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(generation / 1e6))
        assert re.search(rf"^since +{since}$", shown, re.MULTILINE)

        client.close()
        api.wait_for_one(client_id, "DELETE")
        assert ctl.run("client", client_id, status=1).stdout.decode() == (
            f"{client_id} is not connected\n"
        )

    def test_pushes(self, ctl: Ctl, gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
        client = gateway.connect(client_id)
        assert ctl.run("push", client_id, "grüße").stdout == b"delivered\n"
        assert client.receive() == "grüße"
        ctl.run("push", client_id, "-", "--binary", message=b"\x00\xff\r\n")
        assert client.receive() == b"\x00\xff\r\n"

        generation = api.wait_for_one(client_id, "GET").generation
        ctl.run("push", client_id, "this one", f"--generation={generation}")
        assert client.receive() == "this one"
        stale = ctl.run("push", client_id, "x", f"--generation={generation - 1}", status=1)
        assert stale.stderr == b"ws2api-ctl: the client has reconnected since\n"
        text = ctl.run("push", client_id, "-", message=b"\xff", status=1)
        assert text.stderr == b"ws2api-ctl: a text message must be UTF-8\n"
        gone = ctl.run("push", f"{client_id}-other", "x", status=1)
        assert gone.stderr == b"ws2api-ctl: no such client\n"

    def test_pushes_a_file(
        self, ctl: Ctl, gateway: GatewayProcess, client_id: str, tmp_path: Path
    ) -> None:
        client = gateway.connect(client_id)
        file = tmp_path / "message"
        file.write_bytes(b"x" * (1 << 20))
        ctl.run("push", client_id, "--file", str(file))
        assert client.receive() == "x" * (1 << 20)
        file.write_bytes(b"x" * (1 << 25))
        refused = ctl.run("push", client_id, "--file", str(file), status=1)
        assert refused.stderr == b"ws2api-ctl: the message exceeds the limit\n"

    def test_closes(self, ctl: Ctl, gateway: GatewayProcess, client_id: str) -> None:
        first, second = gateway.connect(client_id), gateway.connect(f"{client_id}-2")
        assert ctl.run("close", client_id).stdout == b"closed\n"
        first.assert_closed(1000, "")
        ctl.run("close", f"{client_id}-2", "--code=4000", "--reason=bye & 漢")
        second.assert_closed(4000, "bye & 漢")
        bad = ctl.run("close", client_id, "--code=1005", status=1)
        assert bad.stderr == b"ws2api-ctl: this close code may not be sent\n"

    def test_an_encoded_id(self, ctl: Ctl, gateway: GatewayProcess, client_id: str) -> None:
        client = gateway.connect(f"{client_id}%2Fb%C3%B6b")
        ctl.run("push", f"{client_id}%2Fb%C3%B6b", "x")
        assert client.receive() == "x"

    def test_with_a_token(
        self, start_gateway: StartGateway, api: FakeApi, client_id: str, tmp_path: Path
    ) -> None:
        gateway = start_gateway(api=api.url, push_token="pssst")
        client = gateway.connect(client_id)
        without = Ctl(gateway, tmp_path).run("push", client_id, "x", status=1)
        assert b"give it with --push-token, WS2API_PUSH_TOKEN or --config FILE" in without.stderr
        wrong = Ctl(gateway, tmp_path, WS2API_PUSH_TOKEN="hush").run(
            "push", client_id, "x", status=1
        )
        assert b"does not accept the token of WS2API_PUSH_TOKEN" in wrong.stderr
        Ctl(gateway, tmp_path, WS2API_PUSH_TOKEN="pssst").run("push", client_id, "right")
        assert client.receive() == "right"
        client.close()


@pytest.fixture(scope="module")
def operated(shared_api: FakeApi) -> Iterator[GatewayProcess]:
    """Run two workers behind an admin port that takes orders, and a push port with a token."""
    with GatewayProcess(
        api=shared_api.url,
        workers=2,
        admin_token=ADMIN_TOKEN,
        push_token="for-pushes",
        drain_seconds="100ms",
    ) as gateway:
        yield gateway


@pytest.fixture
def operator(operated: GatewayProcess, tmp_path: Path) -> Iterator[Ctl]:
    yield Ctl(operated, tmp_path, WS2API_ADMIN_TOKEN=ADMIN_TOKEN)
    operated.disconnect_all()


class TestAdminPort:
    def test_lists_clients(self, operator: Ctl, operated: GatewayProcess, client_id: str) -> None:
        names = {f"{client_id}-{i}" for i in range(30)}
        for name in names:
            operated.connect(name)
        everybody = operator.json("clients", "--all")
        assert everybody["cursor"] is None
        assert {client["id"] for client in everybody["clients"]} >= names

        paged, cursor = [], None
        while cursor is not None or not paged:
            page = operator.json("clients", "--limit=7", *(["--cursor", cursor] if cursor else []))
            assert len(page["clients"]) <= 7
            paged += page["clients"]
            cursor = page["cursor"]
        assert {client["id"] for client in paged} >= names

        by_worker = [
            {client["id"] for client in operator.json("clients", "--worker", n)["clients"]} & names
            for n in ("0", "1")
        ]
        assert by_worker[0] | by_worker[1] == names
        assert not by_worker[0] & by_worker[1]
        shown = operator.run("clients").stdout.decode()
        assert re.search(rf"^{client_id}-0 +\d{{4}}-\d\d-\d\d [\d:]+Z +\w+-[01]-\d+$", shown, re.M)

    def test_shows_a_client_and_its_last_close(
        self, operator: Ctl, operated: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        client = operated.connect(client_id)
        told = operator.json("client", client_id)
        assert told["connected"] is True
        assert told["connection"]["id"] == client_id
        client.close(4321, "bye \x1b[2J")
        api.wait_for_one(client_id, "DELETE")
        until(lambda: operator.run_any("client", client_id).returncode == 1)
        last = operator.json("client", client_id, status=1)["last_close"]
        assert (last["code"], last["cause"], last["reason"]) == (4321, "client", "bye \x1b[2J")
        shown = operator.run("client", client_id, status=1).stdout.decode()
        assert re.search(r"^reason +bye \\x1b\[2J$", shown, re.MULTILINE)

    def test_closes(self, operator: Ctl, operated: GatewayProcess, client_id: str) -> None:
        name = f"{client_id}%2Fb%C3%B6b~"
        client = operated.connect(name)
        operator.run("close", name, "--code=4000", "--reason=bye & 漢")
        client.assert_closed(4000, "bye & 漢")
        gone = operator.run("close", f"{client_id}-other", status=1)
        assert gone.stderr == b"ws2api-ctl: no such client\n"
        bad = operator.run("close", name, "--code=1005", status=1)
        assert bad.stderr == b"ws2api-ctl: this close code may not be sent\n"

    def test_drains_the_host(self, operator: Ctl, operated: GatewayProcess) -> None:
        assert operator.json("drain") == {"draining": True}
        assert operated.admin_get("/readyz").status == 503
        assert b"draining" in operator.run("status").stdout.splitlines()[0]
        assert operator.json("drain", "--off") == {"draining": False}
        until(lambda: operated.admin_get("/readyz").status == 200)

    def test_replaces_workers(
        self, operator: Ctl, operated: GatewayProcess, client_id: str
    ) -> None:
        def pids() -> list[int]:
            return [worker["pid"] for worker in operator.json("status")["workers"]]

        def await_calm() -> None:
            until(lambda: not operator.json("status")["rolling"], timeout_s=2 * DEADLINE_S)

        client = operated.connect(client_id)
        worker_id = operator.json("client", client_id)["connection"]["worker"]
        number = int(worker_id.split("-")[1])
        before = pids()
        assert operator.json("drain", "--worker", str(number), "--wait") == {
            "worker": number,
            "replaced": True,
        }
        client.assert_closed(1012)
        after = pids()
        assert after[number] != before[number]
        assert after[1 - number] == before[1 - number]
        await_calm()

        assert operator.json("reload", "--wait") == {"replaced": True}
        assert not set(pids()) & {*before, *after}
        await_calm()
        missing = operator.run("drain", "--worker=2", status=1)
        assert missing.stderr == b"ws2api-ctl: no such worker\n"

    def test_profiles(self, operator: Ctl, tmp_path: Path) -> None:
        cpu, memory = tmp_path / "cpu", tmp_path / "memory"
        options = ("profile", "--worker=0", "--seconds=1", "--output")
        told = operator.json(*options, str(cpu))
        assert told["bytes"] == cpu.stat().st_size
        assert pstats.Stats(str(cpu)).get_stats_profile().func_profiles
        operator.run(*options, str(memory), "--kind=memory")
        assert tracemalloc.Snapshot.load(str(memory)).traces is not None
        assert set(tmp_path.iterdir()) == {cpu, memory}

    def test_lists_errors(
        self, operator: Ctl, operated: GatewayProcess, api: FakeApi, client_id: str
    ) -> None:
        api.on(client_id, "POST", Reply(b"oops", 500))
        operated.connect(client_id).send("hello")
        api.wait_for_one(client_id, "POST")
        until(lambda: client_id in operator.run("errors").stdout.decode())
        (error,) = [e for e in operator.json("errors")["errors"] if e["client"] == client_id]
        assert error["cause"]
        assert error["text"]

    def test_needs_the_token(self, operated: GatewayProcess, ctl: Ctl, tmp_path: Path) -> None:
        for arguments in (("errors",), ("clients",), ("reload",), ("drain",)):
            without = Ctl(operated, tmp_path).run(*arguments, status=1)
            assert b"give it with --admin-token, WS2API_ADMIN_TOKEN" in without.stderr
        wrong = Ctl(operated, tmp_path, WS2API_ADMIN_TOKEN="hush").run("errors", status=1)
        assert b"does not accept the token of WS2API_ADMIN_TOKEN" in wrong.stderr
        other = ctl.run("errors", "--admin-token=x", status=1)
        assert other.stderr == b"ws2api-ctl: the gateway was started without --admin-token\n"


def test_needs_nothing_but_the_gateways_file(
    start_gateway: StartGateway, api: FakeApi, client_id: str, tmp_path: Path
) -> None:
    file = tmp_path / "ws2api.toml"
    file.write_text(
        f"""
        api = "{api.url}"
        admin-listen = "0.0.0.0:{free_port()}"
        push-listen = "127.0.0.1:{free_port()}"
        admin-token = "{ADMIN_TOKEN}"
        push-token = "of-the-file"
        """
    )
    gateway = start_gateway(config=str(file), admin_listen=False, push_listen=False)
    client = gateway.connect(client_id)
    ctl = Ctl(None, tmp_path)
    ctl.run("push", client_id, "hello", "--config", str(file))
    assert client.receive() == "hello"
    ctl = Ctl(None, tmp_path, WS2API_CONFIG=str(file))
    assert client_id in ctl.run("clients").stdout.decode()
    client.close()


def test_status(ctl: Ctl, gateway: GatewayProcess, client_id: str) -> None:
    gateway.connect(client_id)
    shown = ctl.run("status").stdout.decode()
    assert shown.startswith("ws2api")
    assert re.search(r"^ +0  serving +\d+ ", shown, re.MULTILINE)
    (worker,) = ctl.json("status")["workers"]
    assert worker["state"] == "serving"
    assert os.path.exists(f"/proc/{worker['pid']}")
