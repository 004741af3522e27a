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
UNBOOTABLE = 13  # as there


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
        self._until(lambda: self.said(word) is not None, word)
        return self.said(word) or ""

    @property
    def log(self) -> str:
        """Everything on stderr so far."""
        return self._stderr.read_text()

    def events(self, event: str) -> list[dict[str, Any]]:
        """Return the log lines that say this, or begin so."""
        lines = [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"].startswith(event)]

    def wait_for_event(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        """Wait until the log has so many such lines, and return them."""
        self._until(lambda: len(self.events(event)) >= count, event)
        return self.events(event)

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        try:
            until(condition, what=what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._stdout.read_text()}\n{self.log}") from None

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


# Rolling restart.


def pids_of(answers: dict[int, dict[str, Any]]) -> set[int]:
    return {answer["pid"] for answer in answers.values()}


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_hangup_replaces_every_worker_and_the_admin_process(start: Start) -> None:
    supervisor = start("serves", "--workers", "3")
    supervisor.wait_for("ready")
    old = supervisor.ask_each(3)
    admin = supervisor.ask("admin")
    assert {(answer["bank"], answer["fork_at_birth"]) for answer in old.values()} == {(0, 1)}
    supervisor.send(signal.SIGHUP)
    new = supervisor.ask_each(3, known=pids_of(old))  # and no connection is refused meanwhile
    assert {(answer["bank"], answer["fork_at_birth"]) for answer in new.values()} == {(1, 2)}
    assert {answer["incarnation"][-2:] for answer in new.values()} == {"-1"}
    supervisor.wait_for_event("all workers are replaced")
    supervisor.wait_for_event("the old workers have ended")
    for answer in supervisor.ask_each(3).values():
        assert answer["forks"] == [0, 2]
        assert (answer["opened"], answer["open"]) == (2, 1)
        assert answer["restarts"] == 0
    fresh_admin = supervisor.ask("admin")
    assert fresh_admin["pid"] != admin["pid"]
    assert fresh_admin["instance"] == admin["instance"] == new[0]["incarnation"].split("-")[0]
    assert len(supervisor.events("replaced")) == 3
    assert not supervisor.events("died")
    assert_ends_cleanly(supervisor)


def test_old_worker_serves_until_its_replacement_does(start: Start, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    supervisor = start("is-held-back", "--gate", str(gate))
    supervisor.wait_for("ready")
    old = supervisor.ask_each(2)
    supervisor.send(signal.SIGHUP)
    until(lambda: len(supervisor.children) == 4, what="a replacement boots")
    during = supervisor.ask_each(2)
    assert pids_of(during) == pids_of(old)
    assert {answer["current_pid"] for answer in during.values()} == pids_of(old)
    assert during[0]["forks"] == [1, 2]
    assert during[1]["forks"] == [1, 0]  # one after the other
    gate.touch()
    supervisor.ask_each(2, known=pids_of(old))
    assert_ends_cleanly(supervisor)


def test_old_workers_drain_all_at_the_same_time(start: Start, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    supervisor = start("drains-long", "--workers", "3", "--gate", str(gate))
    supervisor.wait_for("ready")
    old = pids_of(supervisor.ask_each(3))
    supervisor.send(signal.SIGHUP)
    new = supervisor.ask_each(3, known=old)
    for answer in new.values():
        assert answer["current_pid"] == answer["pid"]
        assert (answer["opened"], answer["open"]) == (2, 2)
        assert answer["forks"] == [1, 2]
    supervisor.wait_for_event("all workers are replaced")
    assert all(map(is_alive, old))
    assert not supervisor.events("the old workers have ended")
    gate.touch()
    supervisor.wait_for_event("the old workers have ended")
    assert not any(map(is_alive, old))
    assert {answer["open"] for answer in supervisor.ask_each(3).values()} == {1}
    assert_ends_cleanly(supervisor)


def test_old_worker_that_does_not_end_in_time_is_killed(start: Start) -> None:
    supervisor = start("is-stubborn", "--workers", "1", "--timeout", "0.1", "--drain", "0.1")
    supervisor.wait_for("ready")
    old = supervisor.ask()["pid"]
    supervisor.send(signal.SIGHUP)
    supervisor.wait_for_event("the old workers have ended")
    assert [line["pid"] for line in supervisor.events("not ended in time, killed")] == [old]
    assert supervisor.ask_each(1, known={old})[0]["restarts"] == 0
    assert_ends_cleanly(supervisor)


def test_old_workers_stay_when_replacements_do_not_boot(start: Start, tmp_path: Path) -> None:
    settings = tmp_path / "settings"
    settings.write_text("{}")
    supervisor = start("serves", "--settings", str(settings))
    supervisor.wait_for("ready")
    old = supervisor.ask_each(2)
    admin = supervisor.ask("admin")["pid"]
    settings.write_text(f'{{"max_queue": {UNBOOTABLE}}}')
    supervisor.send(signal.SIGHUP)
    (stopped,) = supervisor.wait_for_event("replacing stopped")
    assert stopped["level"] == "error"
    assert stopped["reason"] == (
        "worker 0 could not be replaced, the last one ended: exit status 3"
    )
    assert len(supervisor.events("died before it served")) == 5
    assert not supervisor.events("replaced")
    assert pids_of(supervisor.ask_each(2)) == pids_of(old)
    assert supervisor.ask("admin")["pid"] == admin
    # The former settings are in force again, so that a worker which dies can be replaced.
    os.kill(old[1]["pid"], signal.SIGKILL)
    again = supervisor.ask_each(1, known=pids_of(old))[1]
    assert again["max_queue"] == old[1]["max_queue"]
    assert not supervisor.events("the old workers have ended")
    settings.write_text('{"max_queue": 5}')
    supervisor.send(signal.SIGHUP)
    new = supervisor.ask_each(2, known=pids_of(old) | {again["pid"]})
    assert {answer["max_queue"] for answer in new.values()} == {5}
    supervisor.wait_for_event("the old workers have ended")
    assert_ends_cleanly(supervisor)


def test_replacement_takes_over_from_an_old_worker_that_dies(start: Start, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    supervisor = start("is-held-back", "--workers", "1", "--gate", str(gate))
    supervisor.wait_for("ready")
    old = supervisor.ask()["pid"]
    supervisor.send(signal.SIGHUP)
    until(lambda: len(supervisor.children) == 3, what="a replacement boots")
    os.kill(old, signal.SIGKILL)
    supervisor.wait_for_event("died, its successor boots already")
    with supervisor.connect() as connection:
        gate.touch()
        answer = read_answer(connection)
    assert answer["incarnation"].endswith("-1")
    assert answer["restarts"] == 1
    supervisor.wait_for_event("all workers are replaced")
    assert_ends_cleanly(supervisor)


def test_fresh_worker_that_dies_is_restarted_while_the_old_one_drains(
    start: Start, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    supervisor = start("drains-long", "--workers", "1", "--gate", str(gate))
    supervisor.wait_for("ready")
    old = supervisor.ask()["pid"]
    supervisor.send(signal.SIGHUP)
    new = supervisor.ask_each(1, known={old})[0]
    supervisor.wait_for_event("all workers are replaced")
    os.kill(new["pid"], signal.SIGKILL)
    newest = supervisor.ask_each(1, known={old, new["pid"]})[0]
    assert newest["forks"] == [1, 3]  # in the bank of the dead one
    assert newest["restarts"] == 1
    assert newest["opened"] == 3
    assert newest["open"] == 2
    assert is_alive(old)
    gate.touch()
    supervisor.wait_for_event("the old workers have ended")
    assert_ends_cleanly(supervisor)


def test_hangups_during_a_roll_lead_to_one_more(start: Start, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    supervisor = start("drains-long", "--gate", str(gate))
    supervisor.wait_for("ready")
    old = supervisor.ask_each(2)
    supervisor.send(signal.SIGHUP)
    new = supervisor.ask_each(2, known=pids_of(old))
    supervisor.wait_for_event("all workers are replaced")
    for _ in range(5):
        supervisor.send(signal.SIGHUP)
        supervisor.ask()
    assert all(is_alive(pid) for pid in pids_of(old) | pids_of(new))
    assert len(supervisor.events("replacing the workers")) == 1
    gate.touch()
    newest = supervisor.ask_each(2, known=pids_of(old) | pids_of(new))
    supervisor.wait_for_event("the old workers have ended", 2)
    assert {answer["incarnation"][-2:] for answer in newest.values()} == {"-2"}
    assert {answer["bank"] for answer in newest.values()} == {0}
    assert len(supervisor.events("replacing the workers")) == 2
    assert_ends_cleanly(supervisor)


@pytest.mark.parametrize("behaviour", ["drains-long", "is-held-back"])
def test_stop_ends_both_generations(start: Start, tmp_path: Path, behaviour: str) -> None:
    supervisor = start(behaviour, "--workers", "1", "--gate", str(tmp_path / "never"))
    supervisor.wait_for("ready")
    supervisor.send(signal.SIGHUP)
    until(lambda: len(supervisor.children) == 3, what="two processes of one worker")
    if behaviour == "drains-long":
        supervisor.wait_for_event("all workers are replaced")
    assert_ends_cleanly(supervisor)


# Reload.


def test_settings_that_are_wrong_change_nothing(start: Start, tmp_path: Path) -> None:
    settings = tmp_path / "settings"
    settings.write_text("{}")
    supervisor = start("serves", "--settings", str(settings))
    supervisor.wait_for("ready")
    old = supervisor.ask_each(2)
    for number, (text, reason) in enumerate(
        [
            ("no", "no JSON"),
            ('{"workers": 7, "listen": "127.0.0.1:1"}', "workers, listen: cannot change"),
        ],
        1,
    ):
        settings.write_text(text)
        supervisor.send(signal.SIGHUP)
        refused = supervisor.wait_for_event("reload refused", number)
        assert refused[-1]["level"] == "error"
        assert refused[-1]["reason"].startswith(reason)
        assert pids_of(supervisor.ask_each(2)) == pids_of(old)
    assert not supervisor.events("replacing")
    assert_ends_cleanly(supervisor)


def test_settings_that_are_right_apply_to_the_replacements(start: Start, tmp_path: Path) -> None:
    settings = tmp_path / "settings"
    settings.write_text('{"max_queue": 3}')
    supervisor = start("serves", "--settings", str(settings))
    supervisor.wait_for("ready")
    old = supervisor.ask_each(2)
    assert {answer["max_queue"] for answer in old.values()} == {3}
    settings.write_text('{"max_queue": 5, "log_level": "info"}')
    supervisor.send(signal.SIGHUP)
    new = supervisor.ask_each(2, known=pids_of(old))
    assert {answer["max_queue"] for answer in new.values()} == {5}
    supervisor.wait_for_event("the old workers have ended")
    assert supervisor.ask("admin")["max_queue"] == 5
    assert len(supervisor.events("forked")) == 3  # a line of level debug
    assert_ends_cleanly(supervisor)


# Stuck workers.


@pytest.mark.parametrize("is_forked_first", [True, False])
def test_worker_that_boots_is_told_to_log_more_when_it_serves(
    start: Start, tmp_path: Path, is_forked_first: bool
) -> None:
    """It would never log less again otherwise: its level is the one at its fork."""
    supervisor = start("is-held-back", "--gate", str(tmp_path / "gate"))
    pids = {index: answer["pid"] for index, answer in supervisor.ask_each(2).items()}
    steps = [
        lambda: (os.kill(pids[0], signal.SIGKILL), supervisor.wait_for_event("forked", 4)),
        lambda: (supervisor.send(signal.SIGUSR1), supervisor.wait_for("verbose-1-0")),
    ]
    for step in steps if is_forked_first else reversed(steps):
        step()
    assert supervisor.said("verbose-0-1") is None
    (tmp_path / "gate").touch()
    supervisor.wait_for("verbose-0-1")
    assert_ends_cleanly(supervisor)


def test_stuck_worker_shows_its_stack_and_is_replaced(start: Start) -> None:
    supervisor = start("serves", "--stuck", "2", "--look", "0.2")
    supervisor.wait_for("ready")
    old = supervisor.ask_each(2)
    os.kill(old[0]["pid"], signal.SIGUSR1)
    (stuck,) = supervisor.wait_for_event("stuck")
    assert stuck["pid"] == old[0]["pid"]
    assert stuck["silent_s"] >= 2
    assert not stuck["booting"]
    new = supervisor.ask_each(1, known=pids_of(old))
    assert new[0]["restarts"] == 1
    assert "in block_for_ever\n" in supervisor.log, supervisor.log
    assert supervisor.ask_each(2)[1]["pid"] == old[1]["pid"]
    assert_ends_cleanly(supervisor)


def test_stuck_worker_is_replaced_while_it_drains(start: Start, tmp_path: Path) -> None:
    supervisor = start(
        *("drains-long", "--workers", "1", "--stuck", "2", "--look", "0.2"),
        *("--gate", str(tmp_path / "never")),
    )
    supervisor.wait_for("ready")
    old = supervisor.ask()["pid"]
    supervisor.send(signal.SIGHUP)
    supervisor.wait_for_event("all workers are replaced")
    os.kill(old, signal.SIGUSR1)
    supervisor.wait_for_event("the old workers have ended")
    assert [line["pid"] for line in supervisor.events("stuck")] == [old]
    assert supervisor.ask()["restarts"] == 0
    assert_ends_cleanly(supervisor)


def test_worker_that_never_comes_to_serve_shows_its_stack(start: Start) -> None:
    supervisor = start("boots-for-ever", "--workers", "1", "--boot", "1", "--look", "0.2")
    stuck = supervisor.wait_for_event("stuck", 2)
    assert all(line["booting"] for line in stuck)
    supervisor.wait_for_event("died, to be restarted")
    assert "in boot\n" in supervisor.log, supervisor.log
    assert_ends_cleanly(supervisor)


# Stop.


def test_kills_a_stubborn_worker_at_the_deadline(start: Start) -> None:
    supervisor = start("is-stubborn", "--timeout", "0.1")
    supervisor.wait_for("ready")
    children = supervisor.children
    supervisor.send(signal.SIGTERM)
    assert supervisor.wait() == 1
    assert not [child for child in children if child.is_alive]
    assert supervisor.log.count("did not end cleanly") == 2


def test_second_signal_reaches_the_workers(start: Start) -> None:
    supervisor = start("waits-for-hurry", "--timeout", "3600")
    supervisor.wait_for("ready")
    supervisor.send(signal.SIGTERM)
    supervisor.wait_for("stop 0 1")
    supervisor.wait_for("stop 1 1")
    assert_ends_cleanly(supervisor)


def test_second_signal_reaches_the_workers_when_it_comes_at_once(start: Start) -> None:
    supervisor = start("waits-for-hurry", "--timeout", "3600")
    supervisor.wait_for("ready")
    supervisor.send(signal.SIGTERM)
    assert_ends_cleanly(supervisor, signal.SIGINT)


def test_second_signal_shortens_the_time(start: Start) -> None:
    supervisor = start("is-stubborn", "--timeout", "3600")
    supervisor.wait_for("ready")
    children = supervisor.children
    supervisor.send(signal.SIGTERM, signal.SIGINT)
    assert supervisor.wait() == 1
    assert not [child for child in children if child.is_alive]


def test_admin_process_that_fails_makes_the_end_unclean(start: Start) -> None:
    supervisor = start("has-an-admin-that-fails")
    supervisor.wait_for("ready")
    supervisor.ask("admin")
    supervisor.send(signal.SIGTERM)
    assert supervisor.wait() == 1
    assert [line["child"] for line in supervisor.events("did not end cleanly")] == ["admin"]


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
