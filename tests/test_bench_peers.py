"""The peers of the benchmark do the gateway's work, and are started as they want to be."""

from __future__ import annotations

import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the extra `bench`")
sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from bench_ import BenchError, peers, systems
from bench_.crowd import Crowd
from bench_.systems import System, SystemOptions, free_port

CLIENTS = 10
WITH_FLAGS = """#!{python}
# An old build of ws2api: its flags, and the work of the naive design.
import os, sys
if sys.argv[1:] == ["-h"]:
    for flag in ("cpuprofile", "listen", "url", "metrics"):
        print(f"  -{{flag}} string", "    \\tsomething", sep="\\n", file=sys.stderr)
else:
    flags = dict(word.removeprefix("-").split("=", 1) for word in sys.argv[1:])
    port = flags["listen"].rpartition(":")[2]
    os.execv("{python}", ["{python}", "{naive}", port, flags["url"], "3600"])
"""
WITHOUT_FLAGS = """#!{python}
# A new build: fixed ports.
import os, sys
if sys.argv[1:] == ["-h"]:
    print("  -cpuprofile string", file=sys.stderr)
else:
    api = "http://localhost:{api}/wsoverhttp/"
    os.execv("{python}", ["{python}", "{naive}", "{port}", api, "3600"])
"""

needs_nginx = pytest.mark.skipif(not shutil.which("nginx"), reason="nginx plays the API")
needs_pushpin = pytest.mark.skipif(
    not all(map(shutil.which, ("pushpin", "condure", "zurl"))), reason="the package pushpin"
)


@pytest.fixture
def api() -> Iterator[System]:
    with peers.run_api() as system:
        yield system


def write_program(path: Path, text: str, **values: object) -> Path:
    text = text.format(python=sys.executable, naive=peers.NAIVE, **values)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def assert_answers_each_message(api: System, run: peers.Runner) -> None:
    with (
        run(api.port, SystemOptions(clients=CLIENTS)) as system,
        Crowd(system.port, CLIENTS) as crowd,
    ):
        crowd.connect()
        before = systems.requests_seen(api)
        crowd.send_in_loop(5)
        crowd.wait_until(lambda: crowd.sample().done >= 50, "no answers", 20)
        crowd.stop()
        crowd.check()
        seen = crowd.sample()
        assert seen.done == seen.frames == systems.requests_seen(api) - before


@needs_nginx
def test_naive_design_answers_each_message(api: System) -> None:
    assert_answers_each_message(api, peers.run_naive)


@needs_nginx
@needs_pushpin
def test_pushpin_answers_each_message(api: System) -> None:
    assert_answers_each_message(api, peers.run_pushpin)


@needs_nginx
def test_build_of_ws2api_with_flags_is_told_its_ports(api: System, tmp_path: Path) -> None:
    binary = write_program(tmp_path / "wsproxy", WITH_FLAGS)
    assert_answers_each_message(api, partial(peers.run_ws2api, binary))


def test_flags_that_a_build_of_ws2api_does_not_know_are_left_out(tmp_path: Path) -> None:
    binary = write_program(tmp_path / "wsproxy", WITH_FLAGS)
    command, port = peers.ws2api_command(binary, 8123)
    assert command[:3] == [
        str(binary),
        f"-listen=127.0.0.1:{port}",
        "-url=http://127.0.0.1:8123/",
    ]
    assert [word.partition("=")[0] for word in command[3:]] == ["-metrics"]


@needs_nginx
def test_build_of_ws2api_without_flags_finds_its_ports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "WS2API_PORT", free_port())
    monkeypatch.setattr(peers, "WS2API_API_PORT", free_port())
    ports = {"api": peers.WS2API_API_PORT, "port": peers.WS2API_PORT}
    binary = write_program(tmp_path / "wsproxy", WITHOUT_FLAGS, **ports)
    assert peers.ws2api_command(binary, 8123) == ([str(binary)], peers.WS2API_PORT)
    with peers.run_api(for_ws2api=True) as api:
        assert_answers_each_message(api, partial(peers.run_ws2api, binary))


def test_build_of_ws2api_without_flags_says_which_api_it_misses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "WS2API_PORT", free_port())
    monkeypatch.setattr(peers, "WS2API_API_PORT", free_port())
    binary = write_program(tmp_path / "wsproxy", WITHOUT_FLAGS, api=1, port=1)
    with (
        pytest.raises(BenchError, match=f"its API at port {peers.WS2API_API_PORT}"),
        peers.run_ws2api(binary, 8123, SystemOptions()),
    ):
        pass


def test_port_of_another_is_not_taken_for_ws2api(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setattr(peers, "WS2API_API_PORT", other.getsockname()[1])
        with pytest.raises(BenchError, match="something else"):
            peers.run_api(for_ws2api=True)


def test_registers_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "REGISTRY", {})
    monkeypatch.setattr(shutil, "which", lambda name: None)
    missing = peers.register(write_program(tmp_path / "wsproxy", WITH_FLAGS))
    assert set(systems.REGISTRY) == {"naive", "ws2api"}
    assert "pushpin: apt-get install pushpin" in missing


def test_refuses_a_binary_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "REGISTRY", dict(systems.REGISTRY))
    with pytest.raises(BenchError, match="no program"):
        peers.register(tmp_path / "nothing")
