"""Run a real supervisor over workers of the test's own, and kill what it looks after."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from harness.processes import Process, find_children
from harness.waiting import DEADLINE_S, until
from redis import Redis
from redis.exceptions import RedisError

PROGRAM = Path(__file__).with_name("tree_program.py")


class Supervisor:
    """Run tree_program.py until the context ends."""

    def __init__(self, folder: Path, behaviour: str, *options: str) -> None:
        self._stdout = folder / "stdout"
        self._stderr = folder / "stderr"
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-X", "dev", "-W", "error", str(PROGRAM), behaviour, *options],
                stdout=stdout,
                stderr=stderr,
                env=os.environ | {"XDG_RUNTIME_DIR": str(folder)},
            )

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def said(self, word: str) -> str | None:
        """Return what follows a word on stdout; None while it has not been said."""
        lines = self._stdout.read_text().split("\n")[:-1]
        return next((line[len(word) :].strip() for line in lines if line.startswith(word)), None)

    def wait_for(self, word: str) -> str:
        """Wait until a word is said, and return what follows it."""
        until(lambda: self.said(word) is not None, what=f"{word}: {self.log}")
        return self.said(word) or ""

    @property
    def log(self) -> str:
        """Everything on stderr so far."""
        return self._stderr.read_text()

    @property
    def children(self) -> list[Process]:
        """All processes that live below the supervisor."""
        return find_children(self.process.pid)

    def send(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the end and return the exit status."""
        return self.process.wait(DEADLINE_S)

    def connect(self, port: str = "clients") -> socket.socket:
        address = ("127.0.0.1", int(self.wait_for(port)))
        return socket.create_connection(address, DEADLINE_S)

    def ask(self, port: str = "clients") -> dict[str, Any]:
        """Connect, and return what the worker that accepts says about itself."""
        with self.connect(port) as connection:
            return read_answer(connection)

    def ask_each(self, count: int, known: Set[int] = frozenset()) -> dict[int, dict[str, Any]]:
        """Ask until that many slots answered with a pid that is not known."""
        answers: dict[int, dict[str, Any]] = {}

        def all_asked() -> bool:
            answer = self.ask()
            if answer["pid"] not in known:
                answers[answer["index"]] = answer
            return len(answers) == count

        until(all_asked, what=f"{count} slots answer")
        return answers


def read_answer(connection: socket.socket) -> dict[str, Any]:
    with connection.makefile("rb") as file:
        answer: dict[str, Any] = json.loads(file.readline())
    return answer


Start = Callable[..., Supervisor]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start supervisors; each is killed after the test, if it still runs."""
    with ExitStack() as running:

        def start(behaviour: str = "serves", *options: str) -> Supervisor:
            return running.enter_context(Supervisor(tmp_path, behaviour, *options))

        yield start


def assert_ends_cleanly(supervisor: Supervisor, number: signal.Signals = signal.SIGTERM) -> None:
    children = supervisor.children
    supervisor.send(number)
    assert supervisor.wait() == 0, supervisor.log
    assert not [child for child in children if child.is_alive]
    assert "Traceback" not in supervisor.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_with_every_slot_and_stops(start: Start, number: signal.Signals) -> None:
    supervisor = start("serves", "--workers", "3")
    supervisor.wait_for("ready")
    answers = supervisor.ask_each(3)
    assert len({answer["pid"] for answer in answers.values()}) == 3
    assert {answer["handles_of_others"] for answer in answers.values()} == {0}
    assert {answer["restarts"] for answer in answers.values()} == {0}
    instances = {answer["incarnation"].split("-")[0] for answer in answers.values()}
    assert len(instances) == 1
    assert_ends_cleanly(supervisor, number)


def test_replaces_a_killed_worker_and_no_other(start: Start) -> None:
    supervisor = start()
    supervisor.wait_for("ready")
    before = supervisor.ask_each(2)
    os.kill(before[0]["pid"], signal.SIGKILL)
    replaced = supervisor.ask_each(1, known={answer["pid"] for answer in before.values()})
    assert replaced[0]["restarts"] == 1
    assert replaced[0]["incarnation"] == before[0]["incarnation"][:-1] + "1"
    assert replaced[0]["open"] == 1  # the dead worker's connection was settled
    assert supervisor.ask_each(2)[1]["pid"] == before[1]["pid"]
    assert "killed by SIGKILL" in supervisor.log
    assert_ends_cleanly(supervisor)


def test_connection_waits_while_its_worker_is_replaced(start: Start, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    supervisor = start("is-held-back", "--workers", "1", "--gate", str(gate))
    supervisor.wait_for("ready")
    old = supervisor.ask()["pid"]
    os.kill(old, signal.SIGKILL)
    with supervisor.connect() as connection:
        gate.touch()
        answer = read_answer(connection)
    assert answer["pid"] != old
    assert answer["restarts"] == 1
    assert_ends_cleanly(supervisor)


def test_is_not_ready_before_every_worker_serves(start: Start) -> None:
    supervisor = start("boots-for-ever")
    supervisor.wait_for("admin")
    supervisor.ask("admin")  # forked last
    assert supervisor.said("ready") is None
    assert_ends_cleanly(supervisor)


def test_replaces_workers_one_by_one_on_hangup(start: Start) -> None:
    supervisor = start("serves", "--workers", "3")
    supervisor.wait_for("ready")
    old = {answer["pid"] for answer in supervisor.ask_each(3).values()}
    supervisor.send(signal.SIGHUP)
    new = supervisor.ask_each(3, known=old)  # and no connection is refused meanwhile
    assert {answer["restarts"] for answer in new.values()} == {1}
    until(lambda: supervisor.log.count('"event": "replaced"') == 3)
    assert "died" not in supervisor.log
    assert_ends_cleanly(supervisor)


def test_kills_a_stubborn_worker_on_hangup(start: Start) -> None:
    supervisor = start("is-stubborn", "--workers", "1", "--timeout", "0.1")
    supervisor.wait_for("ready")
    old = supervisor.ask()["pid"]
    supervisor.send(signal.SIGHUP)
    assert supervisor.ask_each(1, known={old})[0]["restarts"] == 1
    assert_ends_cleanly(supervisor)


def test_kills_a_stubborn_worker_at_the_deadline(start: Start) -> None:
    supervisor = start("is-stubborn", "--timeout", "0.1")
    supervisor.wait_for("ready")
    children = supervisor.children
    supervisor.send(signal.SIGTERM)
    assert supervisor.wait() == 1
    assert not [child for child in children if child.is_alive]
    assert supervisor.log.count("did not end cleanly") == 2


def test_second_signal_hurries(start: Start) -> None:
    supervisor = start("is-stubborn", "--timeout", "3600")
    supervisor.wait_for("ready")
    children = supervisor.children
    supervisor.send(signal.SIGTERM, signal.SIGINT)
    assert supervisor.wait() == 1
    assert not [child for child in children if child.is_alive]


def test_signals_of_a_terminal_do_not_reach_workers(start: Start) -> None:
    supervisor = start("serves", "--workers", "1")
    supervisor.wait_for("ready")
    pid = supervisor.ask()["pid"]
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGHUP)
    assert supervisor.ask()["pid"] == pid
    assert_ends_cleanly(supervisor)


@pytest.mark.parametrize(
    ("behaviour", "end"),
    [("boot-fails", "exit status 3"), ("raises", "exit status 3"), ("fails-late", "exit status 1")],
)
def test_gives_up_on_workers_that_cannot_start(start: Start, behaviour: str, end: str) -> None:
    supervisor = start(behaviour, "--workers", "4")
    assert supervisor.wait() == 3
    assert end in supervisor.wait_for("gave-up")
    assert ("RuntimeError" in supervisor.log) == (behaviour != "boot-fails")


def test_restarts_the_admin_process(start: Start) -> None:
    supervisor = start()
    first = supervisor.ask("admin")["pid"]
    os.kill(first, signal.SIGKILL)
    assert supervisor.ask("admin")["pid"] != first
    supervisor.wait_for("ready")
    assert_ends_cleanly(supervisor)


def test_restarts_the_embedded_server_and_cleans_up(start: Start, tmp_path: Path) -> None:
    supervisor = start("serves", "--embedded")
    supervisor.wait_for("ready")
    with Redis.from_url(supervisor.wait_for("redis")) as redis:
        pid = redis.info("server")["process_id"]
        os.kill(pid, signal.SIGKILL)

        def is_back() -> bool:
            try:
                return bool(redis.info("server")["process_id"] != pid)
            except RedisError:
                return False

        until(is_back, what="the server is back")
    assert_ends_cleanly(supervisor)
    assert not list(tmp_path.glob("ws2api-*"))


def test_children_end_with_a_killed_supervisor(start: Start) -> None:
    supervisor = start("serves", "--embedded")
    supervisor.wait_for("ready")
    children = supervisor.children
    assert len(children) == 4
    supervisor.send(signal.SIGKILL)
    supervisor.wait()
    until(lambda: not [child for child in children if child.is_alive], what="all have ended")


def test_stops_while_a_dead_worker_waits_for_its_restart(start: Start) -> None:
    supervisor = start("serves", "--workers", "1")
    supervisor.wait_for("ready")
    for deaths in range(1, 5):  # each lengthens the pause before the next restart
        os.kill(supervisor.ask()["pid"], signal.SIGKILL)
        until(lambda deaths=deaths: supervisor.log.count("died") == deaths, what="reaped")
    assert_ends_cleanly(supervisor)
