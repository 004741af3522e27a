"""Run Caddy with the shipped Caddyfile in front of the gateway."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.api import FakeApi, echo
from harness.certificates import Certificate, make_certificate
from harness.fault_proxy import FaultProxy
from harness.gateway import GatewayProcess
from harness.ports import free_port
from harness.proxies import CONFIGURATIONS, CaddyProcess, find_program
from harness.valkey import ValkeyProcess
from harness.waiting import until

from .conftest import StartGateway
from .proxy_contract import ProxyContract, need, start_single_port_gateway

need("caddy", "openssl")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("certificate"), "front")


@pytest.fixture(scope="module")
def shared_gateway(shared_api: FakeApi) -> Iterator[GatewayProcess]:
    with start_single_port_gateway(shared_api) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def shared_proxy(
    shared_gateway: GatewayProcess,
    certificate: Certificate,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[CaddyProcess]:
    folder = tmp_path_factory.mktemp("caddy")
    with CaddyProcess([shared_gateway], folder=folder, certificate=certificate) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: CaddyProcess) -> Iterator[CaddyProcess]:
    yield shared_proxy
    shared_proxy.disconnect_all()
    assert shared_proxy.is_running


class TestContract(ProxyContract):
    """What holds behind every proxy."""


def test_file_is_valid(tmp_path: Path) -> None:
    file = str(CONFIGURATIONS / "Caddyfile")
    program = find_program("caddy") or "caddy"
    for command in (
        [program, "validate", "--adapter", "caddyfile", "--config", file],
        [program, "fmt", file],
    ):
        done = subprocess.run(
            command,
            env=os.environ | {"HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done
    assert done.stdout == Path(file).read_text(), "caddy fmt"


def test_a_red_host_drains(
    valkey: ValkeyProcess,
    start_gateway: StartGateway,
    certificate: Certificate,
    api: FakeApi,
    client_id: str,
    tmp_path: Path,
) -> None:
    with FaultProxy(Path(valkey.url.removeprefix("unix://"))) as link:
        urls = {"127.0.0.2": f"redis://127.0.0.1:{link.port}/0", "127.0.0.3": valkey.url}
        port = free_port(*urls)
        hosts = [
            start_gateway(api=api.url, redis=url, listen=f"{host}:0", admin_listen=f"{host}:{port}")
            for host, url in urls.items()
        ]
        with CaddyProcess(hosts, folder=tmp_path, certificate=certificate) as proxy:
            old = [f"{client_id}-old-{number}" for number in range(4)]
            for name in old:
                api.on(name, "POST", echo)
            clients = {name: proxy.connect(name) for name in old}
            assert [host.count("connections_open") for host in hosts] == [2, 2]
            link.refuse()
            link.reset()
            until(lambda: "unexpected status code" in proxy.output, what="Caddy sees the red host")
            for number in range(4):
                proxy.connect(f"{client_id}-new-{number}")
            assert [host.count("connections_open") for host in hosts] == [2, 2 + 4]
            for name, client in clients.items():
                client.send("still here")
                assert client.receive() == "still here", name
