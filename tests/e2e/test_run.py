"""Start everything with scripts/run, as a newcomer does."""

from __future__ import annotations

import signal
import socket
import subprocess
from urllib.request import urlopen

import pytest
from harness.ports import free_port

from .programs import ROOT, Program, listens

RUN = str(ROOT / "scripts" / "run")


def addresses() -> dict[str, int]:
    """Choose a port for each that the gateway listens on."""
    return {name: free_port() for name in ("listen", "push-listen", "admin-listen")}


def as_flags(ports: dict[str, int]) -> list[str]:
    """Spell the ports as flags, for one worker."""
    return ["--workers=1", *(f"--{name}=127.0.0.1:{port}" for name, port in ports.items())]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_starts_demo_and_gateway_and_stops_both(number: signal.Signals) -> None:
    demo_port, ports = free_port(), addresses()
    with Program([RUN, *as_flags(ports)], port=None, DEMO_PORT=str(demo_port)) as program:
        program.wait_for_output("\nready")
        assert f"http://127.0.0.1:{demo_port}/" in program.output
        with urlopen(f"http://127.0.0.1:{demo_port}/") as response:
            assert f":{ports['listen']}/".encode() in response.read()

        assert program.stop(number) == 0
        assert "Traceback" not in program.output
        for port in (demo_port, *ports.values()):
            assert not listens(port)


def test_starts_no_demo_for_an_api_of_ones_own() -> None:
    demo_port, ports = free_port(), addresses()
    command = [RUN, "--api=http://127.0.0.1:9/", *as_flags(ports)]
    with Program(command, port=None, DEMO_PORT=str(demo_port)) as program:
        program.wait_for_output("\nready")
        assert "demo" not in program.output
        assert not listens(demo_port)
        assert program.stop(signal.SIGTERM) == 0


def test_passes_a_bad_option_on_and_its_exit_status_back() -> None:
    done = subprocess.run([RUN, "--workers=none"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "workers" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_says_which_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with Program([RUN, *as_flags(addresses())], port=None, DEMO_PORT=port) as program:
            assert program.process.wait(15) == 1
            assert f"port {port}, where the demo API listens, is taken" in program.output


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_passes_questions_on(flag: str) -> None:
    done = subprocess.run([RUN, flag], capture_output=True, text=True)
    assert done.returncode == 0
    assert "ws2api" in done.stdout
