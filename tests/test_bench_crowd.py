"""The crowd of a benchmark counts what happens to its clients, good and bad."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

import pytest
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection, serve

pytest.importorskip("rich", reason="the extra `bench`")
sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from bench_ import BenchError, board, frames
from bench_.crowd import Crowd

TIMEOUT_S = 20


@contextmanager
def serving(handler: Callable[[ServerConnection], None]) -> Iterator[int]:
    """Run a server in a thread, and give its port."""
    with _running(serve(handler, "127.0.0.1", 0, compression=None, max_size=None)) as port:
        yield port


@contextmanager
def _running(server: Server) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.socket.getsockname()[1]
    finally:
        server.shutdown()
        thread.join()


def answer(connection: ServerConnection) -> None:
    for message in connection:
        connection.send(frames.answer(len(message)).decode())


def wait_until(crowd: Crowd, word: int, count: int) -> None:
    crowd.wait_until(lambda: crowd.sum(word) >= count, f"word {word} stays below {count}", 10)


@pytest.mark.parametrize("size", [30, 200, 65_536, 300_000])
def test_every_message_is_answered_and_counted(size: int) -> None:
    with serving(answer) as port, Crowd(port, 6, message_bytes=size) as crowd:
        crowd.connect(at_once=3)
        crowd.send_in_loop(4)
        wait_until(crowd, board.DONE, 40)
        crowd.stop()
        crowd.check()
        seen = crowd.sample()
        assert seen.opened == 6
        assert seen.sent == seen.done == seen.frames >= 40
        assert sum(seen.message_ns) == seen.done
        assert sum(seen.connect_ns) == 6
        assert seen.in_flight == 0


def test_clients_take_turns() -> None:
    heard: list[str] = []

    def note(connection: ServerConnection) -> None:
        assert connection.request
        for message in connection:
            heard.append(connection.request.path)
            connection.send(frames.answer(len(message)).decode())

    with serving(note) as port, Crowd(port, 5) as crowd:
        crowd.connect()
        crowd.send_in_loop(1)
        wait_until(crowd, board.DONE, 20)
        crowd.stop()
    assert heard[:5] == heard[5:10] == heard[10:15]
    assert len(set(heard)) == 5


def test_several_processes_share_the_work() -> None:
    with serving(answer) as port, Crowd(port, 7, processes=3) as crowd:
        crowd.connect()
        crowd.send_in_loop(5)
        wait_until(crowd, board.DONE, 30)
        crowd.stop()
        crowd.close()
        seen = crowd.sample()
        assert (seen.opened, seen.closed, seen.errors) == (7, 7, 0)
        assert seen.sent == seen.done == seen.frames


def test_paced_clients_send_at_their_interval() -> None:
    times: list[float] = []

    def note(connection: ServerConnection) -> None:
        for message in connection:
            times.append(time.monotonic())
            connection.send(frames.answer(len(message)).decode())

    with serving(note) as port, Crowd(port, 10) as crowd:
        crowd.connect()
        begun_s = time.monotonic()
        crowd.send_paced(rate=200)
        wait_until(crowd, board.DONE, 60)
        crowd.stop()
        seen = crowd.sample()
        assert seen.done + seen.late >= 60
    assert times[59] - begun_s >= 59 / 200  # none is ever sent before it is due


def test_those_who_come_later_join_in() -> None:
    with serving(answer) as port, Crowd(port, 8) as crowd:
        crowd.send_paced(interval_s=0.05)
        crowd.start_connecting(rate=100)
        wait_until(crowd, board.DONE, 40)
        crowd.stop()
        crowd.check()
        assert crowd.sample().opened == 8


def test_interval_of_an_empty_crowd_does_not_hold_up_those_who_come() -> None:
    with serving(answer) as port, Crowd(port, 60) as crowd:
        crowd.send_paced(interval_s=60)
        crowd.start_connecting()
        wait_until(crowd, board.DONE, 1)
        crowd.stop()
        crowd.check()


def test_a_client_that_waits_is_late_and_does_not_send() -> None:
    may_answer = threading.Event()

    def be_slow(connection: ServerConnection) -> None:
        for message in connection:
            may_answer.wait(TIMEOUT_S)
            connection.send(frames.answer(len(message)).decode())

    with serving(be_slow) as port, Crowd(port, 1) as crowd:
        crowd.connect()
        crowd.send_paced(rate=100)
        wait_until(crowd, board.LATE, 5)
        assert crowd.sum(board.SENT) == 1
        may_answer.set()
        crowd.stop()


def test_pings_are_answered() -> None:
    answered: list[bool] = []

    def ping(connection: ServerConnection) -> None:
        answered.append(connection.ping(b"are you there").wait(TIMEOUT_S))
        connection.recv()

    with serving(ping) as port, Crowd(port, 3) as crowd:
        crowd.connect()
        wait_until(crowd, board.PINGS, 3)
        crowd.close()
        crowd.check()
        assert crowd.sample().closed == 3
    assert answered == [True] * 3


def test_the_server_hears_a_proper_close() -> None:
    codes: list[int | None] = []

    def note(connection: ServerConnection) -> None:
        assert not list(connection)
        codes.append(connection.close_code)

    with serving(note) as port, Crowd(port, 4) as crowd:
        crowd.connect()
        crowd.close(at_once=4)
        assert crowd.sample().closed == 4
    assert codes == [1000] * 4


def test_a_refused_connect_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    def refuse(connection: ServerConnection, request: Request) -> Response:
        return connection.respond(HTTPStatus.FORBIDDEN, "not you")

    server = serve(answer, "127.0.0.1", 0, process_request=refuse)
    with _running(server) as port, Crowd(port, 3) as crowd:
        with pytest.raises(BenchError, match="3 connects of 3 failed"):
            crowd.connect()
        with pytest.raises(BenchError, match="3 refused"):
            crowd.check()
    assert "403" in capfd.readouterr().err


def test_nobody_there_is_an_error() -> None:
    with serving(answer) as port:
        pass
    with Crowd(port, 2) as crowd, pytest.raises(BenchError, match="2 connects of 2 failed"):
        crowd.connect()


def test_a_wrong_answer_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    def mumble(connection: ServerConnection) -> None:
        for _ in connection:
            connection.send("what?")

    with serving(mumble) as port, Crowd(port, 1) as crowd:
        crowd.connect()
        crowd.send_in_loop(1)
        wait_until(crowd, board.UNEXPECTED, 1)
        with pytest.raises(BenchError, match="1 unexpected"):
            crowd.check()
    assert "unexpected frame: b'\\x81\\x05what?'" in capfd.readouterr().err


def test_a_frame_nobody_asked_for_is_no_answer() -> None:
    def chatter(connection: ServerConnection) -> None:
        connection.send(frames.answer(30).decode())
        answer(connection)

    with serving(chatter) as port, Crowd(port, 2) as crowd:
        crowd.connect()
        wait_until(crowd, board.FRAMES, 2)
        crowd.send_in_loop(2)
        wait_until(crowd, board.DONE, 6)
        crowd.stop()
        seen = crowd.sample()
        assert seen.frames == seen.done + 2


def test_a_lost_connection_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    def leave(connection: ServerConnection) -> None:
        connection.close(1011, "no more")

    with serving(leave) as port, Crowd(port, 2) as crowd:
        crowd.connect()
        wait_until(crowd, board.LOST, 2)
        with pytest.raises(BenchError, match="2 lost"):
            crowd.check()
    assert "no more" in capfd.readouterr().err


def test_a_generator_that_dies_is_an_error() -> None:
    with serving(answer) as port, Crowd(port, 2) as crowd:
        crowd.connect()
        crowd._processes[0].kill()
        with pytest.raises(BenchError, match="a generator died"):
            crowd.wait_until(lambda: False, "never", TIMEOUT_S)
