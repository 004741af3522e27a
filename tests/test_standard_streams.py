"""Start the programs with their standard streams closed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.gateway import clean_environment, command_line
from harness.processes import Process, find_children
from harness.waiting import DEADLINE_S, until

CLOSED = ("sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh")
CTL = str(Path(sys.executable).with_name("ws2api-ctl"))


@contextlib.contextmanager
def notified(folder: Path) -> Iterator[socket.socket]:
    """Give the socket to which the gateway says that it is ready, for want of a standard output."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications:
        notifications.bind(str(folder / "notify"))
        notifications.settimeout(DEADLINE_S)
        yield notifications


def streams_of(process: Process) -> set[str]:
    return {os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)}


def test_gateway_serves_and_ends_without_standard_streams(tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    with (
        notified(tmp_path) as notifications,
        subprocess.Popen(
            [*CLOSED, *command_line()],
            env=clean_environment(runtime) | {"NOTIFY_SOCKET": str(tmp_path / "notify")},
        ) as gateway,
    ):
        try:
            while b"READY=1" not in notifications.recv(4096):
                pass
            children = find_children(gateway.pid)
            ours = [child for child in children if "valkey" not in child.command]
            assert len(ours) == 2
            for process in ours:
                assert streams_of(process) == {os.devnull}
            gateway.send_signal(signal.SIGTERM)
            assert gateway.wait(DEADLINE_S) == 0
        finally:
            gateway.kill()
    until(lambda: not [child for child in children if child.is_alive], what="all have ended")
    assert not list(runtime.iterdir())


@pytest.mark.parametrize(
    "arguments", [("status", "--admin=http://127.0.0.1:1"), ("status", "--no")]
)
def test_ctl_ends_as_ever_without_standard_streams(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-X", "dev", "-W", "error", CTL, *arguments]
    status = subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode
    assert subprocess.run([*CLOSED, *command], check=False).returncode == status != 1
