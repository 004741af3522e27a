"""Run the real private server, and look at what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.processes import find_children
from harness.waiting import DEADLINE_S, until
from redis import Redis
from ws2api.supervisor import embedded
from ws2api.supervisor.embedded import EmbeddedServer, find_server, remove_leftovers
from ws2api.supervisor.errors import StartError

# Another test's server may run in a thread: no child here touches what a thread could hold.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@contextlib.contextmanager
def running(server: EmbeddedServer) -> Iterator[int]:
    """Start the server, wait until it answers, and end it."""
    pid = server.start()
    try:
        until(server.answers, what="the server answers")
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(find_server(), base=tmp_path)
    yield server
    server.remove()
    assert not server.folder.exists()


def test_serves_on_a_private_socket_only(server: EmbeddedServer) -> None:
    with running(server), Redis.from_url(server.url) as redis:
        assert redis.set("key", "value")
        assert redis.get("key") == b"value"
        assert redis.config_get("port")["port"] == "0"
        assert redis.config_get("save")["save"] == ""
        assert redis.config_get("appendonly")["appendonly"] == "no"
        limits = redis.config_get("client-output-buffer-limit")
        assert "pubsub 268435456 67108864 60" in limits["client-output-buffer-limit"]
    assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700


def test_socket_is_the_owners_alone(server: EmbeddedServer) -> None:
    with running(server):
        assert stat.S_IMODE(server.socket_path.stat().st_mode) == 0o700


def test_comes_back_on_the_same_socket(server: EmbeddedServer) -> None:
    url = server.url
    with running(server) as first:
        pass
    assert not server.answers()
    with running(server) as second, Redis.from_url(url) as redis:
        assert second != first
        assert redis.ping()


def test_has_a_session_of_its_own(server: EmbeddedServer) -> None:
    with running(server) as pid:
        assert os.getsid(pid) == pid


def test_says_why_it_ended(tmp_path: Path) -> None:
    broken = tmp_path / "server"
    broken.write_text("#!/bin/sh\necho no memory left\nexit 1\n")
    broken.chmod(0o755)
    server = EmbeddedServer(broken, base=tmp_path)
    _, status = os.waitpid(server.start(), 0)
    assert os.waitstatus_to_exitcode(status) == 1
    assert server.last_words() == "no memory left"
    server.remove()


def test_ends_with_a_killed_supervisor(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, signal\n"
        "from ws2api.supervisor.embedded import EmbeddedServer, find_server\n"
        "server = EmbeddedServer(find_server(), base=pathlib.Path(sys.argv[1]))\n"
        "server.start()\n"
        "signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) as supervisor:
        try:
            until(lambda: list(tmp_path.glob("*/valkey.sock")), what="the server listens")
            (process,) = find_children(supervisor.pid)
        finally:
            supervisor.kill()
            supervisor.wait(DEADLINE_S)
    until(lambda: not process.is_alive, what="the server has ended")
    (folder,) = tmp_path.iterdir()
    remove_leftovers(tmp_path)
    assert not folder.exists()


def test_folders_of_the_living_and_of_others_stay(server: EmbeddedServer) -> None:
    base = server.folder.parent
    foreign = base / "ws2api-valkey-foreign"
    foreign.mkdir()
    (foreign / "precious").touch()
    (base / "ws2api-valkey-file").touch()
    (base / "ws2api-valkey-link").symlink_to(foreign)
    EmbeddedServer(find_server(), base=base).remove()
    assert server.folder.exists()
    assert (foreign / "precious").exists()


def test_lock_tells_the_supervisors_pid(server: EmbeddedServer) -> None:
    assert (server.folder / "supervisor").read_text() == f"{os.getpid()}\n"


def test_folder_is_in_the_runtime_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    server = EmbeddedServer(find_server())
    assert server.folder.parent == tmp_path
    server.remove()


def test_unusable_runtime_directories_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    bases = [tmp_path / "missing", deep, tmp_path]
    monkeypatch.setattr(embedded, "_runtime_directories", lambda: iter(bases))
    server = EmbeddedServer(find_server())
    assert server.folder.parent == tmp_path
    server.remove()
    assert not list(deep.iterdir())


def test_no_folder_anywhere_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"^redis: no folder for the embedded server: .*No such"):
        EmbeddedServer(find_server(), base=tmp_path / "missing")


def test_takes_a_server_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_bundled_server", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StartError, match=r"^redis: no server to embed"):
        find_server()
    for name in ("redis-server", "valkey-server"):
        (tmp_path / name).touch(mode=0o755)
        assert find_server() == tmp_path / name


def test_what_is_left_anywhere_goes_also_when_no_server_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [tmp_path / name / "ws2api-valkey-x" for name in ("runtime", "tmp")]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "supervisor").touch()
    monkeypatch.setattr(
        embedded, "_runtime_directories", lambda: [folder.parent for folder in left]
    )
    embedded.remove_all_leftovers()
    assert not any(folder.exists() for folder in left)


def test_folder_whose_supervisor_died_before_it_locked_it_goes_after_a_while(
    tmp_path: Path,
) -> None:
    new, old = tmp_path / "ws2api-valkey-new", tmp_path / "ws2api-valkey-old"
    new.mkdir()
    old.mkdir()
    os.utime(old, (0, 0))
    remove_leftovers(tmp_path)
    assert new.exists()
    assert not old.exists()
