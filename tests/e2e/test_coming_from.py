"""Run the examples of docs/coming-from behind the real gateway."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness.gateway import GatewayProcess, Option
from harness.ports import free_port
from harness.waiting import until

from .programs import ROOT, Program

EXAMPLES = ROOT / "docs" / "examples"
TOKEN = "s3cret"


@dataclass(frozen=True)
class Setup:
    """Hold an example and the gateway in front of it."""

    gateway: GatewayProcess
    api: Program
    push_address: str


def run(name: str, folder: Path, base: str = "", **options: Option) -> Iterator[Setup]:
    """Run an example behind a gateway of two workers."""
    port = free_port()
    command = [sys.executable, str(EXAMPLES / name)]
    if name.endswith(".php"):
        if shutil.which("php") is None:
            pytest.skip("php is not installed")
        command = ["php", "-S", f"127.0.0.1:{port}", str(EXAMPLES / name)]
    options = {"workers": 2, "push_token": TOKEN} | options
    with GatewayProcess(api=f"http://127.0.0.1:{port}/{base}", **options) as gateway:
        is_shared = options.get("single_port", False)
        address = gateway.clients_address if is_shared else gateway.pushes_address
        environment = {
            "PORT": str(port),
            "PUSH": "{}:{}".format(*address),
            "PUSH_TOKEN": TOKEN,
            "DATABASE": str(folder / "channels.sqlite"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        with Program(command, port=port, **environment) as api:
            yield Setup(gateway, api, environment["PUSH"])
            gateway.disconnect_all()
            gateway.stop()  # while its last requests still find the API


class TestAwsApiGateway:
    """Run a Lambda handler with the shim."""

    @pytest.fixture
    def setup(self, tmp_path: Path) -> Iterator[Setup]:
        """Run the handler."""
        yield from run("lambda_api.py", tmp_path)

    def call(self, setup: Setup, code: str) -> Any:
        """Run code that has the shim's client, and return what it printed as JSON."""
        program = (
            "import json; from boto_shim import client\n"
            "c = client('apigatewaymanagementapi', endpoint_url='https://nowhere.example')\n" + code
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ
            | {"PUSH": setup.push_address, "PUSH_TOKEN": TOKEN, "PYTHONPATH": str(EXAMPLES)}
            | {"PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return json.loads(done.stdout)

    def test_handler_works_as_it_did(self, setup: Setup) -> None:
        assert setup.gateway.handshake("ann?token=wrong").status == 401
        ann = setup.gateway.connect("ann?token=secret")
        bob = setup.gateway.connect("bob?token=secret")

        ann.send("hello")
        assert ann.receive() == "you said: hello"
        ann.send('{"action": "dance"}')
        assert ann.receive() == 'you said: {"action": "dance"}'

        ann.send('{"action": "send", "to": "bob", "text": "lunch?"}')
        assert bob.receive() == "lunch?"
        ann.send('{"action": "send", "to": "carol", "text": "lunch?"}')
        assert ann.receive() == "carol is gone"

        bob.close(1000, "bye")
        setup.api.wait_for_output("bob left with 1000")

    def test_shim_does_what_the_management_api_does(self, setup: Setup) -> None:
        ann = setup.gateway.connect("ann?token=secret")
        known = self.call(
            setup,
            "c.post_to_connection(ConnectionId='ann', Data=b'hi')\n"
            "known = c.get_connection(ConnectionId='ann')\n"
            "print(json.dumps([known['Identity']['SourceIp'], known['ConnectedAt'].year]))",
        )
        assert known[0] == "127.0.0.1"
        assert known[1] >= 2025
        assert ann.receive() == "hi"
        status = self.call(
            setup,
            "c.delete_connection(ConnectionId='ann')\n"
            "try:\n    c.post_to_connection(ConnectionId='bob', Data='hi')\n"
            "except c.exceptions.GoneException as e:\n"
            "    print(e.response['ResponseMetadata']['HTTPStatusCode'])",
        )
        assert status == 410
        ann.assert_closed(1000)


class TestPushpin:
    """Run channels on top of pushes."""

    @pytest.fixture
    def setup(self, tmp_path: Path) -> Iterator[Setup]:
        """Run the API that keeps channels."""
        yield from run("channels.py", tmp_path)

    def test_publish_reaches_those_who_subscribe(self, setup: Setup) -> None:
        ann, bob, carol = (setup.gateway.connect(name) for name in ("ann", "bob", "carol"))
        for client in (ann, bob):
            client.send('{"join": "news"}')
            assert client.receive() == "welcome to news"

        carol.send('{"to": "news", "text": "it rains"}')
        assert carol.receive() == "reached 2"
        assert ann.receive() == bob.receive() == "it rains"

        bob.close()
        again = setup.gateway.connect("bob")  # without a subscription

        def reaches_one() -> bool:
            carol.send('{"to": "news", "text": "and snows"}')
            return carol.receive() == "reached 1"

        until(reaches_one)
        assert ann.receive() == "and snows"
        again.send('{"join": "sports"}')
        assert again.receive() == "welcome to sports"


class TestWs2api:
    """Run an API of the Go program, unchanged."""

    @pytest.fixture
    def setup(self, tmp_path: Path) -> Iterator[Setup]:
        """Run it with the options of the page."""
        yield from run("wsoverhttp.php", tmp_path, "wsoverhttp/", single_port=True)

    def test_api_made_for_the_go_program_works_unchanged(self, setup: Setup) -> None:
        ann, bob = setup.gateway.connect("ann"), setup.gateway.connect("bob")
        ann.send('[2, "1", "echo", {"a": 1}]')
        assert ann.receive() == '[3,"1",{"a":1}]'
        ann.send('[2, "2", "tell", {"to": "bob", "text": "lunch?"}]')
        told = bob.receive()
        assert json.loads(told) == [2, "2", "told", {"to": "bob", "text": "lunch?"}]
        assert ann.receive() == '[3,"2",true]'

    def test_counters_are_where_they_were(self, setup: Setup) -> None:
        setup.gateway.connect("ann")
        response = setup.gateway.push_client(setup.gateway.clients_address, token=TOKEN).request(
            "GET", "/"
        )
        lines = dict(line.split(" ") for line in response.text.splitlines())
        assert lines["connections_opened"] == "1"
        assert set(lines) == {
            "connections_opened",
            "connections_closed",
            "requests_started",
            "requests_failed",
            "requests_succeeded",
        }
