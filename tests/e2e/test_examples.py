"""Run each example of the README behind the real gateway."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from harness.gateway import GatewayProcess, Option
from harness.ports import free_port

from .programs import ROOT, Program


@dataclass(frozen=True)
class Example:
    """Tell how to start one example; `{port}` stands for the port that it is to listen on."""

    file: str
    command: tuple[str, ...]


EXAMPLES = (
    Example("api.php", ("php", "-S", "127.0.0.1:{port}")),
    Example("api.mjs", ("node",)),
    Example("api.py", (sys.executable,)),
)


@dataclass(frozen=True)
class Setup:
    """Hold one example and the gateway in front of it."""

    gateway: GatewayProcess
    api: Program


@pytest.fixture(scope="module", params=["", "s3cret"], ids=["", "token"])
def token(request: pytest.FixtureRequest) -> str:
    """Say which token the gateway wants for pushes, if any."""
    return str(request.param)


@pytest.fixture(scope="module", params=EXAMPLES, ids=lambda example: example.file)
def setup(request: pytest.FixtureRequest, token: str) -> Iterator[Setup]:
    """Run an example behind a gateway of two workers."""
    example: Example = request.param
    if shutil.which(example.command[0]) is None:
        pytest.skip(f"{example.command[0]} is not installed")
    port = free_port()
    command = [part.format(port=port) for part in example.command]
    command.append(str(ROOT / "docs" / "examples" / example.file))
    options: dict[str, Option] = {"push_token": token} if token else {}
    with GatewayProcess(workers=2, api=f"http://127.0.0.1:{port}/", **options) as gateway:
        environment = {"PORT": str(port), "PUSH": "{}:{}".format(*gateway.pushes_address)}
        environment |= {"PUSH_TOKEN": token} if token else {}
        with Program(command, port=port, **environment) as api:
            yield Setup(gateway, api)
            gateway.stop()  # while its last requests still find the API


def test_example_keeps_the_contract(setup: Setup) -> None:
    ann = setup.gateway.connect("ann")
    bob = setup.gateway.connect("bob")

    ann.send("hello, wörld")
    assert ann.receive() == "you said: hello, wörld"

    ann.send("@bob lunch at\nnoon?")
    assert bob.receive() == "ann: lunch at\nnoon?"
    assert ann.receive() == "delivered"

    ann.send("@carol are you there?")
    assert ann.receive() == "carol is not here"

    bob.close(1000, "bye")
    setup.api.wait_for_output("bob left: bye")
    ann.hang_up()
    setup.api.wait_for_output("ann left: EOF")


def test_example_refuses_an_id(setup: Setup) -> None:
    response = setup.gateway.handshake("R2-D2")
    assert response.status == 403
    assert response.text.strip() == "an id has letters a to z"
