"""Be systemd: hold the socket that states and beats are sent to."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from harness.waiting import DEADLINE_S
from ws2api.supervisor.notify import Notifier


class Manager:
    """Receive what a service tells."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(DEADLINE_S)
        self.environment = {"NOTIFY_SOCKET": address, "HOME": "/"}

    def receive(self) -> list[str]:
        return self.socket.recv(4096).decode().split("\n")

    def is_left_alone(self) -> bool:
        self.socket.setblocking(False)
        try:
            self.socket.recv(1)
        except BlockingIOError:
            return True
        finally:
            self.socket.settimeout(DEADLINE_S)
        return False


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@ws2api-{os.getpid()}"
    manager = Manager(address)
    with closing(manager.socket):
        yield manager


def test_tells_every_state(manager: Manager) -> None:
    notifier = Notifier(manager.environment)
    notifier.ready("4 workers serve")
    assert manager.receive() == ["READY=1", "STATUS=4 workers serve"]
    notifier.stopping("the end")
    assert manager.receive() == ["STOPPING=1", "STATUS=the end"]
    notifier.status("half-way")
    assert manager.receive() == ["STATUS=half-way"]


def test_reload_carries_the_time_of_its_beginning(manager: Manager) -> None:
    before_us = time.monotonic_ns() // 1000
    Notifier(manager.environment).reloading("once more")
    state, when, status = manager.receive()
    assert (state, status) == ("RELOADING=1", "STATUS=once more")
    name, _, value = when.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before_us <= int(value) <= time.monotonic_ns() // 1000


def test_status_cannot_forge_a_state(manager: Manager) -> None:
    Notifier(manager.environment).status("refused:\nSTOPPING=1")
    assert manager.receive() == ["STATUS=refused: STOPPING=1"]


def test_variables_are_gone_afterwards(manager: Manager) -> None:
    environment = manager.environment | {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    Notifier(environment)
    assert environment == {"HOME": "/"}


@pytest.mark.parametrize("pid", [None, str(os.getpid())], ids=["anybody", "itself"])
def test_beats_twice_in_the_time_of_the_watchdog(manager: Manager, pid: str | None) -> None:
    environment = manager.environment | {"WATCHDOG_USEC": "30000000"}
    if pid is not None:
        environment["WATCHDOG_PID"] = pid
    notifier = Notifier(environment)
    assert notifier.beat_at <= 100.0
    notifier.beat(100.0)
    assert manager.receive() == ["WATCHDOG=1"]
    assert notifier.beat_at == 115.0
    notifier.beat(114.9)
    assert manager.is_left_alone()
    notifier.beat(115.0)
    assert manager.receive() == ["WATCHDOG=1"]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid() + 1)},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "soon"},
    ],
)
def test_does_not_beat_for_nobody(manager: Manager, variables: dict[str, str]) -> None:
    notifier = Notifier(manager.environment | variables)
    notifier.beat(1e9)
    assert notifier.beat_at == float("inf")
    assert manager.is_left_alone()


@pytest.mark.parametrize("environment", [None, {}, {"WATCHDOG_USEC": "1000"}])
def test_nobody_is_told_without_a_socket(environment: dict[str, str] | None) -> None:
    notifier = Notifier(environment)
    notifier.ready("nobody hears")
    notifier.beat(1.0)
    assert notifier.beat_at == float("inf")


def test_absent_manager_does_no_harm(tmp_path: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody"), "WATCHDOG_USEC": "1000"})
    notifier.ready("nobody hears")
    notifier.beat(1.0)


def test_manager_that_does_not_read_does_not_stop_the_service(manager: Manager) -> None:
    notifier = Notifier(manager.environment)
    manager.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as filler:
        filler.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                filler.sendto(b"x", manager.socket.getsockname())
    notifier.status("still here")
