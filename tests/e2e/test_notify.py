"""Be the systemd that the gateway reports to."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from harness.api import FakeApi
from harness.gateway import GatewayProcess
from harness.waiting import DEADLINE_S

from .conftest import StartGateway


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """Give the gateway a socket to report to."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@ws2api-e2e-{os.getpid()}"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager:
        manager.bind("\0" + address[1:] if address.startswith("@") else address)
        manager.settimeout(DEADLINE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        yield manager


def receive(manager: socket.socket, state: str) -> dict[str, str]:
    """Skip what else is told, beats above all, up to this state."""
    while True:
        told = dict(line.split("=", 1) for line in manager.recv(4096).decode().split("\n"))
        if state in told:
            return told


def test_tells_its_whole_life(
    manager: socket.socket, api: FakeApi, start_gateway: StartGateway, tmp_path: Path
) -> None:
    file = tmp_path / "ws2api.toml"
    file.write_text("")
    gateway: GatewayProcess = start_gateway(
        api=api.url, workers=2, config=str(file), drain_seconds="1s"
    )
    assert receive(manager, "READY") == {"READY": "1", "STATUS": "2 workers serve"}

    before_us = time.monotonic_ns() // 1000
    os.kill(gateway.pid, signal.SIGHUP)
    reloading = receive(manager, "RELOADING")
    assert reloading["RELOADING"] == "1"
    assert before_us <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    assert receive(manager, "READY")["READY"] == "1"

    file.write_text("nonsense")
    os.kill(gateway.pid, signal.SIGHUP)
    receive(manager, "RELOADING")
    assert receive(manager, "READY")["STATUS"].startswith("reload refused: config: ")

    gateway.terminate()
    assert receive(manager, "STOPPING")["STOPPING"] == "1"


def test_feeds_the_watchdog(
    manager: socket.socket,
    api: FakeApi,
    start_gateway: StartGateway,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    start_gateway(api=api.url)
    receive(manager, "READY")
    for _ in range(5):
        assert receive(manager, "WATCHDOG") == {"WATCHDOG": "1"}


def test_children_do_not_know_of_it(
    manager: socket.socket, api: FakeApi, start_gateway: StartGateway
) -> None:
    gateway = start_gateway(api=api.url)
    receive(manager, "READY")
    server = next(child for child in gateway.children if child.command == "valkey-server")
    assert b"NOTIFY_SOCKET" not in Path(f"/proc/{server.pid}/environ").read_bytes()
