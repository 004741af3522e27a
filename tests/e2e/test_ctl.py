"""Look after the real gateway with ws2api-ctl."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness.api import FakeApi, echo
from harness.gateway import GatewayProcess, clean_environment
from harness.waiting import DEADLINE_S

from .conftest import StartGateway

COMMAND = (
    *(sys.executable, "-X", "dev", "-W", "error"),
    str(Path(sys.executable).with_name("ws2api-ctl")),
)


class Ctl:
    """Run commands against one gateway.

    Args:
        gateway: the one; its ports are passed as flags.
        environment: variables, as for tokens.
    """

    def __init__(self, gateway: GatewayProcess, folder: Path, **environment: str) -> None:
        self._urls = ["--admin", url(gateway.admin_address), "--push", url(gateway.pushes_address)]
        self._environment = clean_environment(folder) | environment

    def run(
        self, *arguments: str, message: bytes = b"", status: int = 0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command, and expect its exit status."""
        process = subprocess.run(
            [*COMMAND, *self._urls, *arguments],
            input=message,
            capture_output=True,
            env=self._environment,
            timeout=4 * DEADLINE_S,
            check=False,
        )
        assert process.returncode == status, process
        return process

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
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(generation / 1e6))
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


def test_status(ctl: Ctl, gateway: GatewayProcess, client_id: str) -> None:
    gateway.connect(client_id)
    shown = ctl.run("status").stdout.decode()
    assert shown.startswith("ws2api")
    assert re.search(r"^ +0  serving +\d+ ", shown, re.MULTILINE)
    (worker,) = ctl.json("status")["workers"]
    assert worker["state"] == "serving"
    assert os.path.exists(f"/proc/{worker['pid']}")
