"""Run the commands of ws2api-ctl against ports that answer as scripted."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from harness.fake_port import FakePort
from harness.ports import free_port
from harness.terminal import Terminal
from harness.waiting import DEADLINE_S, until
from ws2api.supervisor.ctl import cli as ctl
from ws2api.supervisor.ctl.arguments import parse
from ws2api.supervisor.ctl.tables import clean

COMMAND = str(Path(sys.executable).with_name("ws2api-ctl"))
# Where the suite runs in the background of a shell, SIGINT is ignored, and that is inherited.
INTERRUPTIBLE = ("env", "--default-signal=INT", COMMAND)

STATUS: dict[str, Any] = {
    "version": "0.1.0",
    "uptime_s": 90061,
    "draining": False,
    "ready": True,
    "findings": [],
    "api": "http://127.0.0.1:8000",
    "redis": {"up": True},
    "totals": {
        "connections": 3,
        "connections_opened": 5,
        "connections_closed": 2,
        "messages_received": 1900,
        "messages_sent": 9,
        "bytes_received": 1234567,
        "bytes_sent": 12,
        "requests_started": 20,
        "requests_failed": 1,
        "requests_succeeded": 19,
    },
    "workers": [
        {
            "worker": 0,
            "state": "serving",
            "pid": 4711,
            "uptime_s": 12,
            "restarts": 2,
            "connections": 3,
            "push_lag_ms": 0.4,
            "connections_opened": 5,
            "messages_received": 1900,
            "messages_sent": 9,
            "pushes": 5,
            "memory_bytes": 45_000_000,
            "open_files": 17,
            "loop_lag_ms": 1.5,
            "redis_up": True,
            "breaker": "closed",
            "api_connections": 1,
            "api_queue": 0,
            "paused": 0,
            "write_buffer_bytes": 0,
        },
        {
            "worker": 1,
            "state": "down",
            "pid": None,
            "uptime_s": None,
            "restarts": 7,
            "connections": 0,
            "push_lag_ms": None,
            "memory_bytes": None,
            "open_files": None,
            "breaker": "open",
        },
    ],
    "disconnects": {"pending": 70, "oldest_s": 8, "held": 0, "dropped": 1},
    "pushes": {"ok": 4, "not_found": 1, "stale": 0},
    "errors": {"timeout": 2, "refused": 0},
    "closes": [{"code": "1000", "cause": "client", "count": 2}],
    "api_latency": {
        "bounds_s": [0.001, 0.01, 1.0],
        "counts": {"connect": [0, 5, 0, 0], "message": [90, 8, 1, 1], "disconnect": [0, 0, 0, 0]},
    },
    "push_latency": {"bounds_s": [0.001], "counts": {"local": [0, 3]}},
}
CONNECTION = {
    "id": "ann",
    "generation": 1763870000000000,
    "worker": "4f1c2a3b-0-0",
    "remote": "127.0.0.1",
    "subprotocol": None,
    "messages_received": 5,
    "messages_sent": 6,
    "in_flight": 0,
    "queued": 0,
    "writable": True,
}
LAST_CLOSE = {
    "time_s": 1763870000.5,
    "worker": 0,
    "generation": 1763870000000000,
    "code": 1000,
    "cause": "client",
    "reason": "bye",
    "duration_s": 3.2,
    "messages_received": 5,
    "messages_sent": 6,
}
ERROR = {"time_s": 1763870000.1, "worker": 0, "cause": "timeout", "client": "c1", "text": "no"}
ENDLESS = "x" * 100


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("WS2API_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TZ", "EAST-5:30")  # times are shown in UTC, wherever one sits


@pytest.fixture
def admin() -> Iterator[FakePort]:
    with FakePort() as port:
        yield port


@pytest.fixture
def push() -> Iterator[FakePort]:
    with FakePort() as port:
        yield port


class Run:
    """Run a command in this process; hold what came of it."""

    def __init__(self, capsys: pytest.CaptureFixture[str], urls: list[str]) -> None:
        self._capsys = capsys
        self._urls = urls
        self.status = -1
        self.out = self.err = ""

    def __call__(self, *arguments: str, ports: bool = True) -> Run:
        self.status = ctl.main([*(self._urls if ports else []), *arguments])
        self.out, self.err = self._capsys.readouterr()
        return self

    @property
    def document(self) -> Any:
        """The one JSON document that was printed, on one line."""
        assert self.out.count("\n") == 1
        return json.loads(self.out)

    def assert_failed(self, status: int, *texts: str) -> None:
        """Expect this exit status and one line that holds the texts."""
        assert self.status == status, self
        assert self.out == ""
        assert self.err.startswith("ws2api-ctl: ")
        assert self.err.count("\n") == 1
        assert self.err.endswith("\n")
        for text in texts:
            assert text in self.err

    def __repr__(self) -> str:
        return f"{self.status}\n{self.out}\n{self.err}"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], admin: FakePort, push: FakePort) -> Run:
    """Run commands against the two ports."""
    return Run(capsys, ["--admin", admin.url, "--push", push.url])


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def provide(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return provide


@pytest.fixture
def say() -> Iterator[Callable[[bytes], str]]:
    """Serve one connection: read a little, send the bytes, end; return the URL."""
    threads: list[threading.Thread] = []

    def serve(server: socket.socket, data: bytes) -> None:
        with server, server.accept()[0] as connection:
            connection.recv(1 << 16)
            connection.sendall(data)
            if data.endswith(ENDLESS.encode()):  # and go on saying nothing
                connection.recv(1)

    def start(data: bytes) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        threads.append(threading.Thread(target=serve, args=(server, data)))
        threads[-1].start()
        return "http://{}:{}".format(*server.getsockname())

    yield start
    for thread in threads:
        thread.join(DEADLINE_S)


def cells(text: str) -> list[list[str]]:
    """Split columns, which have two spaces or more between them."""
    return [re.split(r"  +", line.strip()) for line in text.splitlines()]


class TestStatus:
    def test_shows_what_there_is(self, run: Run, admin: FakePort) -> None:
        admin.answer("GET /status", STATUS)
        assert run("status").status == 0
        rows = cells(run.out)
        assert rows[0] == ["ws2api 0.1.0, up 1 d 1 h: ready"]
        assert ["clients", "3, 5 opened"] in rows
        assert ["bytes", "1.23 MB in, 12 B out"] in rows
        assert ["pushes", "ok 4, not found 1"] in rows
        assert ["closes", "1000 client 2"] in rows
        assert ["errors", "timeout 2"] in rows
        assert ["disconnects", "70 pending, the oldest for 8 s, 1 dropped"] in rows
        assert ["redis", "up"] in rows
        serving = next(row for row in rows if row[:2] == ["0", "serving"])
        assert serving[2:10] == ["4711", "12 s", "2", "3", "1,900", "9", "0.4 ms", "closed"]
        assert next(r for r in rows if "down" in r)[:6] == ["1", "down", "-", "-", "7", "0"]
        assert ["API message", "100", "1 ms", "1 s"] in rows
        assert ["push local", "3", "> 1 ms", "> 1 ms"] in rows
        assert not any("disconnect" in row[0] and "API" in row[0] for row in rows)

    def test_tells_what_is_amiss(self, run: Run, admin: FakePort) -> None:
        admin.answer("GET /status", STATUS | {"ready": False, "findings": ["worker 1 is down"]})
        assert run("status").status == 0
        assert "0.1.0, up 1 d 1 h: not ready\n  worker 1 is down\n" in run.out

    def test_tells_that_the_api_is_away(self, run: Run, admin: FakePort) -> None:
        away = "API away: Connection refused, since 12:03 UTC"
        admin.answer("GET /status", STATUS | {"findings": [away]})
        assert run("status").status == 0
        assert f"0.1.0, up 1 d 1 h: ready\n  {away}\n" in run.out

    def test_tells_that_it_drains(self, run: Run, admin: FakePort) -> None:
        admin.answer("GET /status", STATUS | {"ready": False, "draining": True})
        assert "draining" in run("status").out.splitlines()[0]

    def test_tells_that_workers_are_replaced(self, run: Run, admin: FakePort) -> None:
        admin.answer("GET /status", STATUS | {"rolling": True})
        assert run("status").out.startswith(
            "ws2api 0.1.0, up 1 d 1 h, workers are being replaced: ready\n"
        )

    def test_bears_an_older_gateway(self, run: Run, admin: FakePort) -> None:
        worker = {"worker": 0, "state": "serving", "pid": 1, "uptime_s": 4, "connections": 2}
        admin.answer("GET /status", {"uptime_s": 3, "workers": [worker], "disconnects": {}})
        assert run("status").status == 0
        assert run.out.startswith("ws2api, up 3 s\n")

    def test_json_is_what_the_gateway_tells(self, run: Run, admin: FakePort) -> None:
        admin.answer("GET /status", STATUS)
        assert run("status", "--json").document == STATUS
        assert run("--json", "status").document == STATUS

    def test_needs_and_sends_no_token_unless_there_is_one(self, run: Run, admin: FakePort) -> None:
        admin.answer("GET /status", STATUS)
        run("status")
        run("status", "--admin-token", "secret")
        fields = [received.headers.get("Authorization") for received in admin.received]
        assert fields == [None, "Bearer secret"]


class TestWatch:
    def watch(self, url: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*INTERRUPTIBLE, "status", "--watch", "0.05", "--admin", url, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def test_prints_a_line_each_time(self, admin: FakePort) -> None:
        admin.answer("GET /status", STATUS)
        more = STATUS["totals"] | {"messages_received": 10**9}
        admin.answer("GET /status", STATUS | {"totals": more})
        with self.watch(admin.url) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(3)]
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE_S) == 0
        assert re.fullmatch(
            r"\d\d:\d\d:\d\dZ  ready  3 clients  -/s in  -/s out  -/s failed\n", lines[0]
        )
        assert re.search(r"  [\d,]{9,}/s in  0/s out  0/s failed\n", lines[1])
        assert "  0/s in  0/s out" in lines[2]

    def test_prints_a_document_each_time(self, admin: FakePort) -> None:
        admin.answer("GET /status", STATUS)
        with self.watch(admin.url, "--json") as process:
            assert process.stdout is not None
            assert [json.loads(process.stdout.readline()) for _ in range(2)] == [STATUS, STATUS]
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE_S) == 0

    def test_goes_on_while_the_gateway_is_away(self) -> None:
        with FakePort() as port:
            port.answer("GET /status", STATUS)
            process = self.watch(port.url)
            assert process.stdout is not None
            assert "  ready  " in process.stdout.readline()
        with process:
            until(lambda: "  not ready  " in process.stdout.readline())
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE_S) == 0

    def test_ends_where_no_gateway_ever_was(self, run: Run) -> None:
        run("status", "--watch", "--admin", f"http://127.0.0.1:{free_port()}")
        run.assert_failed(3, "cannot reach the admin port")


class TestClients:
    PAGE = (
        {"id": "ann", "generation": 1763870000000000, "worker": "4f1c2a3b-0-0"},
        {"id": "bob", "generation": 1763870001000000, "worker": "77aa0011-12-3"},
    )

    def test_lists_a_page(self, run: Run, admin: FakePort) -> None:
        admin.answer("GET /clients?limit=100", {"clients": self.PAGE, "cursor": None})
        assert run("clients").status == 0
        assert cells(run.out) == [
            ["client", "connected since", "worker"],
            ["ann", "2025-11-23 03:53:20Z", "4f1c2a3b-0-0"],
            ["bob", "2025-11-23 03:53:21Z", "77aa0011-12-3"],
        ]
        assert run.err == ""

    def test_says_how_to_go_on(self, run: Run, admin: FakePort) -> None:
        admin.answer("GET /clients?limit=2&cursor=a%26b", {"clients": self.PAGE, "cursor": "7\x1b"})
        assert run("clients", "--limit=2", "--cursor=a&b").status == 0
        assert run.err == "there may be more: --cursor 7\\x1b, or --all\n"

    def test_goes_on_where_pages_are_short(self, run: Run, admin: FakePort) -> None:
        admin.answer("GET /clients?limit=2", {"clients": [], "cursor": "1"})
        admin.answer("GET /clients?limit=2&cursor=1", {"clients": self.PAGE[:1], "cursor": "2"})
        admin.answer("GET /clients?limit=1&cursor=2", {"clients": self.PAGE[1:], "cursor": "3"})
        run("clients", "--limit=2", "--json")
        assert run.document == {"clients": list(self.PAGE), "cursor": "3"}

    def test_all_pages_are_one_table(self, run: Run, admin: FakePort) -> None:
        long = {"id": "x" * 60, "generation": 1, "worker": "w-1-2"}
        admin.answer("GET /clients?limit=1000", {"clients": self.PAGE[:1], "cursor": "1"})
        admin.answer("GET /clients?limit=1000&cursor=1", {"clients": [long], "cursor": "2"})
        admin.answer("GET /clients?limit=1000&cursor=2", {"clients": self.PAGE[1:], "cursor": None})
        assert run("clients", "--all").status == 0
        assert [row[0] for row in cells(run.out)] == ["client", "ann", "x" * 60, "bob"]
        assert run.err == ""

    def test_all_pages_are_one_document(self, run: Run, admin: FakePort) -> None:
        admin.answer("GET /clients?limit=1000", {"clients": self.PAGE[:1], "cursor": "1"})
        admin.answer("GET /clients?limit=1000&cursor=1", {"clients": self.PAGE[1:], "cursor": None})
        run("clients", "--all", "--json")
        assert run.document == {"clients": list(self.PAGE), "cursor": None}

    def test_nothing_is_printed_of_a_list_that_breaks_off(self, run: Run, admin: FakePort) -> None:
        admin.answer("GET /clients?limit=1000", {"clients": self.PAGE[:1], "cursor": "1"})
        admin.answer("GET /clients?limit=1000&cursor=1", {"error": "redis is away"}, 503)
        assert run("clients", "--all", "--json").status == 1
        assert run.document == {"error": "redis is away", "status": 503}

    @pytest.mark.parametrize("worker", ["12", "77aa0011-12-3"])
    def test_of_one_worker(self, run: Run, admin: FakePort, worker: str) -> None:
        target = f"GET /clients?limit=100&worker={worker}"
        admin.answer(target, {"clients": self.PAGE, "cursor": None})
        run("clients", "--worker", worker, "--json")
        assert [client["id"] for client in run.document["clients"]] == ["bob"]

    def test_none(self, run: Run, admin: FakePort) -> None:
        admin.answer("GET /clients?limit=100", {"clients": [], "cursor": None})
        assert run("clients").out == "no clients\n"


class TestClient:
    def test_by_the_admin_port(self, run: Run, admin: FakePort, push: FakePort) -> None:
        client = {
            "id": "ann",
            "connected": True,
            "connection": CONNECTION,
            "last_close": LAST_CLOSE,
        }
        admin.answer("GET /clients/ann", client)
        assert run("client", "ann", "--admin-token=t").status == 0
        rows = cells(run.out)
        assert rows[0] == ["ann is connected"]
        assert ["since", "2025-11-23 03:53:20Z"] in rows
        assert ["remote", "127.0.0.1"] in rows
        assert ["messages", "5 in, 6 out"] in rows
        assert rows.index(["last close:"]) < rows.index(["reason", "bye"])
        assert run("client", "ann", "--admin-token=t", "--json").document == client
        assert not push.received

    def test_by_the_push_port(self, run: Run, admin: FakePort, push: FakePort) -> None:
        push.answer("GET /ann", CONNECTION)
        run("client", "ann", "--json")
        assert run.document == {
            "id": "ann",
            "connected": True,
            "connection": CONNECTION,
            "last_close": None,
        }
        assert run("client", "ann").out.startswith("ann is connected\n")
        assert not admin.received

    def test_that_is_not_there(self, run: Run, admin: FakePort, push: FakePort) -> None:
        push.answer("GET /ann", "no such client\n", 404)
        away = {"id": "ann", "connected": False, "connection": None, "last_close": None}
        assert run("client", "ann").status == 1
        assert run.out == "ann is not connected\n"
        run("client", "ann", "--json")
        assert (run.status, run.document) == (1, away)

        known = away | {"last_close": LAST_CLOSE}
        admin.answer("GET /clients/ann", known)
        run("client", "ann", "--json", "--admin-token=t")
        assert (run.status, run.document) == (1, known)
        assert ["cause", "client"] in cells(run("client", "ann", "--admin-token=t").out)

    @pytest.mark.parametrize(
        "name", ["a b", "a//b", "a/", "a/../b", "..", "", "@x", "ä", "a\r\nX: y", "%zz", "a?b"]
    )
    @pytest.mark.parametrize("command", [("client",), ("push", "--file=/dev/null"), ("close",)])
    def test_an_id_that_no_client_has(
        self, run: Run, admin: FakePort, push: FakePort, command: tuple[str, ...], name: str
    ) -> None:
        run(*command, "--", name).assert_failed(2, "client id")
        assert not admin.received
        assert not push.received

    def test_an_encoded_id_is_sent_in_one_spelling(self, run: Run, push: FakePort) -> None:
        run("client", "%62%c3%B6b~1*:")
        assert push.requests == ["GET /b%C3%B6b~1*:"]


class TestPush:
    @pytest.fixture(autouse=True)
    def _takes_it(self, push: FakePort) -> None:
        push.answer("POST /ann", "ok")

    def assert_sent(self, push: FakePort, body: bytes, **headers: str) -> None:
        (received,) = push.received
        assert received.body == body
        expected = {"Content-Type": "text/plain; charset=utf-8"} | headers
        assert expected.items() <= received.headers.items()

    def test_text(self, run: Run, push: FakePort) -> None:
        assert run("push", "ann", "grüße").out == "delivered\n"
        assert run.status == 0
        self.assert_sent(push, "grüße".encode())
        assert "Ws2api-Generation" not in push.received[0].headers

    def test_json(self, run: Run) -> None:
        assert run("push", "ann", "x", "--json").document == {"id": "ann", "delivered": True}

    def test_an_empty_one(self, run: Run, push: FakePort) -> None:
        assert run("push", "ann", "").status == 0
        self.assert_sent(push, b"")

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--", "ann", "--json"),
            ("ann", "--", "--json"),
            ("ann", "--timeout=5", "--", "--json"),
            ("--timeout=5", "ann", "--", "--json"),
        ],
    )
    def test_a_dash_in_front(self, run: Run, push: FakePort, arguments: tuple[str, ...]) -> None:
        assert run("push", *arguments).status == 0
        self.assert_sent(push, b"--json")

    @pytest.mark.parametrize(
        "arguments", [("ann", "x", "--binary"), ("ann", "--binary", "x"), ("--binary", "ann", "x")]
    )
    def test_options_in_any_place(
        self, run: Run, push: FakePort, arguments: tuple[str, ...]
    ) -> None:
        assert run("push", *arguments).status == 0
        self.assert_sent(push, b"x", **{"Content-Type": "application/octet-stream"})

    def test_misspelt_options_are_no_message(self, run: Run) -> None:
        run("push", "ann", "--binry").assert_failed(2, "no such option: --binry")
        run("push", "ann", "--binry", "x").assert_failed(2, "no such option: --binry")

    def test_standard_input(self, run: Run, push: FakePort, stdin: Callable[[bytes], None]) -> None:
        stdin(b"\x00\xff\r\n")
        assert run("push", "ann", "--binary", "-").status == 0
        self.assert_sent(push, b"\x00\xff\r\n", **{"Content-Type": "application/octet-stream"})

    def test_file(self, run: Run, push: FakePort, tmp_path: Path) -> None:
        (tmp_path / "message").write_bytes(b"x" * 3_000_000)
        assert run("push", "ann", "--file", str(tmp_path / "message")).status == 0
        self.assert_sent(push, b"x" * 3_000_000)

    def test_file_that_is_not_there(self, run: Run, push: FakePort, tmp_path: Path) -> None:
        run("push", "ann", "--file", str(tmp_path / "nothing"))
        run.assert_failed(2, "--file: cannot read", "No such file or directory")
        assert not push.received

    def test_generation(self, run: Run, push: FakePort) -> None:
        assert run("push", "ann", "x", "--generation=17").status == 0
        self.assert_sent(push, b"x", **{"Ws2api-Generation": "17"})

    @pytest.mark.parametrize("extra", [(), ("x", "--file=y")])
    def test_needs_one_message(self, run: Run, push: FakePort, extra: tuple[str, ...]) -> None:
        run("push", "ann", *extra).assert_failed(2, "MESSAGE", "--file")
        assert not push.received

    @pytest.mark.parametrize(
        ("status", "text"),
        [(404, "no such client"), (412, "the client has reconnected since"), (503, "out of reach")],
    )
    def test_passes_on_a_no(self, run: Run, push: FakePort, status: int, text: str) -> None:
        push.answer("POST /bob", f"{text}\n", status)
        run("push", "bob", "x").assert_failed(1, text)
        assert run("push", "bob", "x", "--json").status == 1
        assert run.document == {"error": text, "status": status}

    def test_uses_the_push_token_alone(self, run: Run, push: FakePort) -> None:
        run("push", "ann", "x", "--admin-token=admin", "--push-token=push")
        assert push.received[0].headers["Authorization"] == "Bearer push"


class TestClose:
    def test_by_the_push_port(self, run: Run, push: FakePort) -> None:
        push.answer("DELETE /ann?code=1000", "ok")
        assert run("close", "ann").out == "closed\n"
        push.answer("DELETE /ann?code=4000&reason=bye+%26+so+on", "ok")
        run("close", "ann", "--code=4000", "--reason=bye & so on", "--json")
        assert run.document == {"id": "ann", "closed": True}

    def test_by_the_admin_port(self, run: Run, admin: FakePort) -> None:
        admin.answer("DELETE /clients/ann?code=1000", {"closed": True})
        assert run("close", "ann", "--admin-token=t").out == "closed\n"
        admin.answer("DELETE /clients/bob?code=1000", {"error": "no such client"}, 404)
        run("close", "bob", "--admin-token=t").assert_failed(1, "ws2api-ctl: no such client\n")


class TestDrain:
    def test_of_the_host(self, run: Run, admin: FakePort) -> None:
        admin.answer("POST /drain", {"draining": True})
        assert run("drain").out.startswith("draining")
        assert run("drain", "--json").document == {"draining": True}
        admin.answer("DELETE /drain", {"draining": False})
        assert run("drain", "--off").out == "not draining\n"

    def test_of_a_worker(self, run: Run, admin: FakePort) -> None:
        admin.answer("POST /workers/3/drain", {"worker": 3}, 202)
        assert run("drain", "--worker=3").out == "replacing worker 3\n"
        assert run("drain", "--worker=3", "--json").document == {"worker": 3, "replaced": False}

    def test_of_a_worker_until_it_is_replaced(self, run: Run, admin: FakePort) -> None:
        admin.answer("POST /workers/0/drain", {"worker": 0}, 202)
        for pid, state in ((10, "serving"), (11, "starting"), (11, "serving")):
            other = {"worker": 1, "pid": 20, "state": "serving"}
            admin.answer(
                "GET /status", {"workers": [{"worker": 0, "pid": pid, "state": state}, other]}
            )
        assert run("drain", "--worker=0", "--wait").out == "replaced worker 0\n"
        assert admin.requests == ["GET /status", "POST /workers/0/drain", *["GET /status"] * 2]

    def test_a_worker_while_others_are_replaced(self, run: Run, admin: FakePort) -> None:
        admin.answer("POST /workers/3/drain", {"error": "a restart is under way"}, 409)
        run("drain", "--worker=3").assert_failed(1, "a restart is under way")

    def test_wait_is_for_a_worker(self, run: Run, admin: FakePort) -> None:
        run("drain", "--wait").assert_failed(2, "--worker")
        run("drain", "--off", "--worker=1").assert_failed(2, "not allowed with")
        assert not admin.received


class TestReload:
    def workers(self, *pids: int | None, state: str = "serving") -> dict[str, Any]:
        return {
            "workers": [{"worker": i, "pid": pid, "state": state} for i, pid in enumerate(pids)]
        }

    def test_returns_at_once(self, run: Run, admin: FakePort) -> None:
        admin.answer("POST /reload", {}, 202)
        assert run("reload").out == "replacing all workers\n"
        assert run("reload", "--json").document == {"replaced": False}
        assert set(admin.requests) == {"POST /reload"}

    def test_waits_until_all_workers_are_new(self, run: Run, admin: FakePort) -> None:
        admin.answer("POST /reload", {}, 202)
        for pids in ((1, 2), (3, 2), (3, None), (3, 4)):
            admin.answer("GET /status", self.workers(*pids))
        run("reload", "--wait", "--json")
        assert (run.status, run.document) == (0, {"replaced": True})
        assert len(admin.requests) == 5

    def test_gives_up(self, run: Run, admin: FakePort) -> None:
        admin.answer("POST /reload", {}, 202)
        admin.answer("GET /status", self.workers(1))
        run("reload", "--wait=0.3").assert_failed(1, "after 0.3 s", "log")

    def test_does_not_wait_for_what_was_given_up(self, run: Run, admin: FakePort) -> None:
        admin.answer("POST /reload", {}, 202)
        for is_rolling in (False, False, True, True, False):
            admin.answer("GET /status", self.workers(1) | {"rolling": is_rolling})
        run("reload", "--wait").assert_failed(1, "given up", "log")

    def test_does_not_wait_for_what_was_refused(self, run: Run, admin: FakePort) -> None:
        admin.answer("POST /reload", {}, 202)
        for refused in (2, 2, 3):
            admin.answer("GET /status", self.workers(1) | {"reloads": {"refused": refused}})
        run("reload", "--wait").assert_failed(1, "refuses its new settings", "log")

    def test_bears_that_the_admin_port_is_replaced_too(self, run: Run, admin: FakePort) -> None:
        admin.answer("POST /reload", {}, 202)
        admin.answer("GET /status", self.workers(1))
        admin.answer("GET /status", b"cut off", headers={"Content-Encoding": "x"})
        admin.answer("GET /status", self.workers(2))
        assert run("reload", "--wait").status == 0


class TestProfile:
    def test_is_written_to_a_file(self, run: Run, admin: FakePort, tmp_path: Path) -> None:
        admin.answer("POST /workers/0/profile?kind=cpu&seconds=1", bytes(range(256)) * 1000)
        path = tmp_path / "profile"
        path.write_text("of yesterday")
        assert run("profile", "--worker=0", "--seconds=1", "--output", str(path)).status == 0
        assert "pstats" in run.out
        assert path.read_bytes() == bytes(range(256)) * 1000
        assert list(tmp_path.iterdir()) == [path]

    def test_json(self, run: Run, admin: FakePort, tmp_path: Path) -> None:
        admin.answer("POST /workers/2/profile?kind=memory&seconds=300", b"xyz")
        file = str(tmp_path / "profile")
        run("profile", "--worker=2", "--kind=memory", "--seconds=300", "--output", file, "--json")
        assert run.document == {
            "worker": 2,
            "kind": "memory",
            "seconds": 300,
            "file": file,
            "bytes": 3,
        }

    def test_leaves_the_file_alone_when_there_is_none(
        self, run: Run, admin: FakePort, tmp_path: Path
    ) -> None:
        admin.answer("POST /workers/9/profile?kind=cpu&seconds=10", {"error": "no worker 9"}, 404)
        path = tmp_path / "profile"
        path.write_text("of yesterday")
        run("profile", "--worker=9", "--output", str(path)).assert_failed(1, "no worker 9")
        assert path.read_text() == "of yesterday"
        assert list(tmp_path.iterdir()) == [path]

    def test_is_whole_or_not_there(
        self, run: Run, say: Callable[[bytes], str], tmp_path: Path
    ) -> None:
        url = say(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        run("profile", "--worker=0", "--output", str(tmp_path / "profile"), "--admin", url)
        run.assert_failed(3)
        assert not list(tmp_path.iterdir())

    def test_finds_out_first_that_it_cannot_write(
        self, run: Run, admin: FakePort, tmp_path: Path
    ) -> None:
        run("profile", "--worker=0", "--output", str(tmp_path / "none" / "x"))
        run.assert_failed(2, "--output: cannot write", "No such file or directory")
        assert not admin.received

    def test_goes_to_a_pipe(self, admin: FakePort) -> None:
        admin.answer("POST /workers/0/profile?kind=cpu&seconds=10", b"\x00\xff")
        command = [COMMAND, "--admin", admin.url, "profile", "--worker=0", "--output=-"]
        assert subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout == b"\x00\xff"

    def test_is_not_mixed_with_text(self, run: Run) -> None:
        run("profile", "--worker=0", "--output=-", "--json").assert_failed(2, "--output -")


class TestTail:
    LINES = (
        {
            "time_s": 1763870000.25,
            "worker": 1,
            "kind": "request",
            "method": "POST",
            "client": "ann",
            "status": 200,
            "ms": 1.25,
            "request_bytes": 5,
            "reply_bytes": 1024,
            "reason": None,
        },
        {"lost": 3, "worker": 0},
        {
            "time_s": 1763870001.0,
            "worker": None,
            "kind": "request",
            "method": "DELETE",
            "client": "bob",
            "status": None,
            "ms": None,
            "request_bytes": 0,
            "reply_bytes": 0,
            "reason": "no\x1banswer",
        },
    )
    STREAM = "\n" + "".join(f"{json.dumps(line)}\n\n" for line in LINES)

    def test_shows_a_line_each(self, run: Run, admin: FakePort) -> None:
        admin.answer("GET /tail", self.STREAM)
        assert run("tail").status == 3  # the stream has ended: the gateway is gone
        assert "has ended" in run.err
        first, lost, last = run.out.splitlines()
        assert " ".join(first.split()) == (
            "03:53:20.250Z worker 1 request POST ann 200 1.25 ms 5 B in 1,024 B out"
        )
        assert lost.startswith("3 lines of worker 0 were lost")
        assert " ".join(last.split()) == (
            "03:53:21.000Z admin request DELETE bob - - no\\x1banswer"
        )

    def test_of_one_client(self, run: Run, admin: FakePort) -> None:
        admin.answer("GET /tail/b%C3%B6b", self.STREAM)
        run("tail", "b%c3%b6b", "--json")
        *lines, end = map(json.loads, run.out.splitlines())
        assert lines == list(self.LINES)
        assert "has ended" in end["error"]

    def test_says_so_when_the_gateway_is_killed(
        self, run: Run, say: Callable[[bytes], str]
    ) -> None:
        url = say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n\n\r\n")
        run("tail", "--admin", url).assert_failed(3, "has ended")

    def test_needs_the_admin_token(self, run: Run, admin: FakePort) -> None:
        admin.answer("GET /tail", {"error": "a bearer token is required"}, 401)
        run("tail").assert_failed(1, "--admin-token")

    def test_ends_with_ctrl_c(self) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n\r\n"
        with socket.create_server(("127.0.0.1", 0)) as server:
            url = "http://{}:{}".format(*server.getsockname())
            with subprocess.Popen(
                [*INTERRUPTIBLE, "tail", "--admin", url],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            ) as process:
                connection, _ = server.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(head + json.dumps(self.LINES[0]).encode() + b"\n")
                    assert process.stdout is not None
                    assert b"ann" in process.stdout.readline()  # not kept until there is more
                    process.send_signal(signal.SIGINT)
                    _, errors = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, errors) == (0, b"")


class TestErrors:
    def test_are_listed(self, run: Run, admin: FakePort) -> None:
        other = ERROR | {"client": None}
        admin.answer("GET /errors", {"errors": [ERROR, other]})
        assert run("errors").status == 0
        assert cells(run.out) == [
            ["time", "worker", "cause", "client", "what"],
            ["2025-11-23 03:53:20Z", "0", "timeout", "c1", "no"],
            ["2025-11-23 03:53:20Z", "0", "timeout", "-", "no"],
        ]
        assert run("errors", "--json").document == {"errors": [ERROR, other]}

    def test_none(self, run: Run, admin: FakePort) -> None:
        admin.answer("GET /errors", {"errors": []})
        assert run("errors").out == "no errors\n"


class TestTokens:
    SECRET = "s3cret-t0ken"

    def test_one_that_is_wanted(self, run: Run, admin: FakePort, push: FakePort) -> None:
        admin.answer("GET /errors", {"error": "a bearer token is required"}, 401)
        run("errors").assert_failed(1, "--admin-token", "WS2API_ADMIN_TOKEN", "--config")
        push.answer("POST /ann", "a bearer token is required\n", 401)
        run("push", "ann", "x").assert_failed(1, "--push-token", "WS2API_PUSH_TOKEN", "--config")

    def test_one_that_is_wrong(
        self, run: Run, admin: FakePort, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        admin.answer("GET /errors", {"error": "a bearer token is required"}, 401)
        run("errors", "--admin-token", self.SECRET)
        run.assert_failed(1, "does not accept the token of --admin-token")
        monkeypatch.setenv("WS2API_ADMIN_TOKEN", self.SECRET)
        run("errors").assert_failed(1, "does not accept the token of WS2API_ADMIN_TOKEN")
        assert self.SECRET not in run.err

    def test_a_gateway_without(self, run: Run, admin: FakePort) -> None:
        text = "the gateway was started without --admin-token"
        admin.answer("POST /reload", {"error": text}, 403)
        run("reload", "--admin-token=t").assert_failed(1, text)

    def test_flag_then_variable(
        self, run: Run, admin: FakePort, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WS2API_ADMIN_TOKEN", "variable")
        run("errors", "--admin-token=flag")
        run("errors")
        monkeypatch.setenv("WS2API_ADMIN_TOKEN", "")
        run("errors")
        fields = [received.headers.get("Authorization") for received in admin.received]
        assert fields == ["Bearer flag", "Bearer variable", None]

    @pytest.mark.parametrize("character", [" ", "\n", "\r\nX: y", "ü", "\udcff"])
    def test_one_that_no_header_can_hold(self, run: Run, admin: FakePort, character: str) -> None:
        run("errors", "--admin-token", self.SECRET + character)
        run.assert_failed(2, "the token of --admin-token")
        assert self.SECRET not in run.err
        assert not admin.received

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--admin-tokn", SECRET, "status"),
            ("--admin-token", SECRET, "--nothing"),
            ("status", SECRET),
            ("status", f"--token={SECRET}"),
            ("status", "--admin", f"http://me:{SECRET}@127.0.0.1"),
            ("status", "--admin", f"http://127.0.0.1:{SECRET}"),
            ("status", "--admin", f"ftp://{SECRET}"),
        ],
    )
    def test_are_not_repeated(self, run: Run, arguments: tuple[str, ...]) -> None:
        run(*arguments, ports=False)
        assert run.status == 2
        assert self.SECRET not in run.out + run.err

    def test_stay_out_of_what_python_prints_of_objects(self) -> None:
        options = parse(["status", "--admin-token", self.SECRET])
        assert self.SECRET not in repr(ctl.Session(options).admin.access)


class TestConfiguration:
    def write(self, path: Path, *lines: str) -> str:
        file = path / "ws2api.toml"
        file.write_text("\n".join(lines))
        return str(file)

    def find(self, *arguments: str) -> tuple[str, str | None, str, str | None]:
        """Return what the session would use: admin URL and token, push URL and token."""
        session = ctl.Session(parse(["status", *arguments]))
        admin, push = session.admin.access, session.push.access
        return admin.url, admin.token, push.url, push.token

    def test_without_any(self) -> None:
        assert self.find() == ("http://127.0.0.1:7003", None, "http://127.0.0.1:7002", None)

    def test_of_the_gateway(self, tmp_path: Path) -> None:
        config = self.write(
            tmp_path,
            'admin-listen = "0.0.0.0:9003"',
            'push-listen = "[::]:9002"',
            'push-token = "of-pushes"',
            'admin-token = "of-the-admin"',
        )
        assert self.find("--config", config) == (
            "http://127.0.0.1:9003",
            "of-the-admin",
            "http://[::1]:9002",
            "of-pushes",
        )

    def test_of_its_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As in a container, whose commands get what the gateway gets."""
        monkeypatch.setenv("WS2API_CONFIG", self.write(tmp_path, 'admin-listen = "[fd00::1]:9003"'))
        monkeypatch.setenv("WS2API_PUSH_LISTEN", "10.0.0.7:9002")
        assert self.find() == ("http://[fd00::1]:9003", None, "http://10.0.0.7:9002", None)

    def test_flags_win(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = self.write(tmp_path, 'push-token = "of-the-file"')
        flags = ("--admin=example:1", "--push=https://example/pushes/", "--push-token=of-the-flag")
        assert self.find("--config", config, *flags) == (
            "http://example:1",
            None,
            "https://example/pushes",
            "of-the-flag",
        )
        monkeypatch.setenv("WS2API_PUSH_TOKEN", "of-the-variable")
        assert self.find("--config", config)[3] == "of-the-variable"

    def test_that_cannot_be_read(self, run: Run, tmp_path: Path) -> None:
        run("status", "--config", str(tmp_path / "nothing")).assert_failed(2, "cannot read")

    def test_that_is_wrong(self, run: Run, tmp_path: Path) -> None:
        config = self.write(tmp_path, "workers = 0")
        run("status", "--config", config).assert_failed(2, "workers: must be at least 1")

    @pytest.mark.parametrize("line", ['admin-token = "{} {}"', 'admin-token = ["{}{}"]'])
    def test_does_not_repeat_a_token(self, run: Run, tmp_path: Path, line: str) -> None:
        config = self.write(tmp_path, line.format(TestTokens.SECRET, "x"))
        run("status", "--config", config).assert_failed(2, "admin-token")
        assert TestTokens.SECRET not in run.err

    def test_that_leaves_the_port_open(self, run: Run, tmp_path: Path) -> None:
        config = self.write(tmp_path, 'admin-listen = "127.0.0.1:0"')
        run("status", "--config", config, ports=False).assert_failed(2, "--admin")

    def test_a_path_in_front(self, run: Run, admin: FakePort) -> None:
        admin.answer("GET /behind/proxy/status", STATUS)
        assert run("status", "--admin", f"{admin.url}/behind/proxy/", ports=False).status == 0


class TestStrangePorts:
    def test_nobody_there(self, run: Run) -> None:
        url = f"http://127.0.0.1:{free_port()}"
        run("status", "--admin", url).assert_failed(3, url, "Connection refused", "--admin URL")
        run("push", "ann", "x", "--push", url).assert_failed(3, "push port", "--push URL")
        assert run("status", "--admin", url, "--json").status == 3
        assert run.document["status"] is None

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\n{",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xff",
            b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200,
        ],
    )
    def test_that_are_no_gateway(
        self, run: Run, say: Callable[[bytes], str], answer: bytes
    ) -> None:
        run("status", "--admin", say(answer)).assert_failed(3)

    @pytest.mark.parametrize(
        "answer",
        [
            ENDLESS.encode(),
            b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + ENDLESS.encode(),
        ],
    )
    def test_that_do_not_finish(self, run: Run, say: Callable[[bytes], str], answer: bytes) -> None:
        run("status", "--timeout=0.2", "--admin", say(answer)).assert_failed(3, "0.2 s")

    @pytest.mark.parametrize(
        "piece", [b"H", b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n", b"A: b\r\n"]
    )
    def test_that_trickle(self, run: Run, piece: bytes) -> None:
        def trickle(server: socket.socket) -> None:
            with contextlib.suppress(OSError), server.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\n" if piece.startswith(b"A") else b"")
                while not ended.wait(0.02):
                    connection.sendall(piece)

        ended = threading.Event()
        with closing(socket.create_server(("127.0.0.1", 0))) as server:
            thread = threading.Thread(target=trickle, args=(server,))
            thread.start()
            url = "http://{}:{}".format(*server.getsockname())
            run("status", "--timeout=0.3", "--admin", url).assert_failed(3, "within 0.3 s")
            ended.set()
            thread.join(DEADLINE_S)

    def test_a_host_that_no_name_server_knows(self, run: Run) -> None:
        run("status", "--admin", "http://a..b").assert_failed(3, "cannot reach")

    def test_that_redirect(self, run: Run, admin: FakePort) -> None:
        admin.answer("GET /status", "", 302, {"Location": "http://elsewhere.example/"})
        run("status").assert_failed(1, "Found")

    def test_an_admin_port_that_knows_less(self, run: Run) -> None:
        run("errors", "--admin-token=t").assert_failed(1, "knows no GET /errors")

    def test_a_refusal_half_way(self, run: Run, push: FakePort, tmp_path: Path) -> None:
        push.answer("POST /ann", "the message exceeds the limit\n", 413)
        (tmp_path / "large").write_bytes(bytes(1 << 24))
        run("push", "ann", "--binary", "--file", str(tmp_path / "large"))
        run.assert_failed(1, "the message exceeds the limit")


HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\u202egnp.\u2028\r\n[red]\x7f:smile:"


class TestTerminal:
    def on_terminal(self, *arguments: str, **environment: str) -> str:
        """Run the command on a terminal; return all that it writes."""
        with Terminal([COMMAND, *arguments], **environment) as terminal:
            assert terminal.read_to_end() in (0, 1), terminal.shown
            return terminal.shown

    def test_has_colours(self, admin: FakePort) -> None:
        admin.answer("GET /status", STATUS)
        output = self.on_terminal("status", "--admin", admin.url)
        assert "\x1b[32mserving\x1b[0m" in output

    def test_has_none_with_no_color(self, admin: FakePort) -> None:
        admin.answer("GET /status", STATUS)
        output = self.on_terminal("status", "--admin", admin.url, NO_COLOR="1")
        assert "serving" in output
        assert not re.search(r"\x1b\[[\d;]*3\dm", output)

    @pytest.mark.parametrize("term", ["dumb", "xterm"])
    def test_wide_columns_only_where_there_is_room(self, admin: FakePort, term: str) -> None:
        admin.answer("GET /status", STATUS)
        output = self.on_terminal("status", "--admin", admin.url, COLUMNS="80", TERM=term)
        assert ("45 MB" in output) == (term == "dumb")
        assert "serving" in output

    def test_does_not_obey_what_clients_say(self, admin: FakePort) -> None:
        close = LAST_CLOSE | {"reason": HOSTILE}
        client = {"id": "ann", "connected": False, "connection": None, "last_close": close}
        admin.answer("GET /clients/ann", client)
        error = ERROR | {"text": HOSTILE, "client": HOSTILE, "cause": HOSTILE}
        admin.answer("GET /errors", {"errors": [error]})
        admin.answer("POST /reload", {"error": HOSTILE}, 500)
        for arguments in (("client", "ann"), ("errors",), ("reload",)):
            for extra in ((), ("--json",)):
                output = self.on_terminal(
                    *arguments, *extra, "--admin", admin.url, "--admin-token=t", NO_COLOR="1"
                )
                text = re.sub(r"\x1b\[[\d;]*m", "", output)  # rich's own
                assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e\u2028]", text)
                assert "[red]" in text
                assert ":smile:" in text

    @pytest.mark.parametrize("columns", [40, 80, 200])
    def test_nothing_is_cut_off(self, admin: FakePort, columns: int) -> None:
        admin.answer("GET /errors", {"errors": [ERROR | {"text": "§" * 150}]})
        output = self.on_terminal("errors", "--admin", admin.url, COLUMNS=str(columns))
        assert output.count("§") == 150

    def test_redraws_while_it_watches(self, admin: FakePort) -> None:
        admin.answer("GET /status", STATUS)
        command = [*INTERRUPTIBLE, "status", "--watch=0.05", "--admin", admin.url]
        with Terminal(command, COLUMNS="100") as terminal:
            terminal.read_until(r"(?s)(messages now.*){3}")
            terminal.process.send_signal(signal.SIGINT)
            assert terminal.read_to_end() == 0
            assert "\x1b[?1049h" in terminal.shown  # to the other screen, and back
            assert "\x1b[?1049l" in terminal.shown


def test_cleans_all_that_is_not_printable() -> None:
    assert clean("a ü 漢 \\ [b]") == "a ü 漢 \\ [b]"
    assert clean("\x1b[0m\n\x9b\u202e\U000e0001\udcff") == r"\x1b[0m\n\x9b\u202e\U000e0001\udcff"


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ((), "COMMAND"),
            (("nothing",), "COMMAND: choose from"),
            (("status", "--no"), "no such option: --no"),
            (("status", "--tiemout", "5"), "no such option: --tiemout; did you mean --timeout?"),
            (("push", "ann", "--binry"), "no such option: --binry; did you mean --binary?"),
            (("status", "--adm", "x"), "no such option: --adm"),
            (("push", "ann", "hello", "world"), "needs quotes"),
            (("clients", "--limit", "0"), "--limit: expected a number, 1 to 1000"),
            (("clients", "--limit", "1001"), "1 to 1000"),
            (("clients", "--limit", "9" * 5000), "1 to 1000"),
            (("status", "--timeout", "nan"), "--timeout: expected a number of seconds"),
            (("status", "--watch", "0"), "more than 0"),
            (("close", "ann", "--code", "1"), "--code: expected a number, 1000 to 4999"),
            (("push", "ann", "x", "--generation", "-1"), "--generation"),
            (("profile", "--output", "x"), "--worker"),
            (("profile", "--worker", "0"), "--output"),
            (
                ("profile", "--worker", "0", "--kind", "disk", "--output", "x"),
                "--kind: choose from",
            ),
            (("profile", "--worker", "0", "--seconds", "301", "--output", "x"), "1 to 300"),
            (("status", "--admin", ""), "--admin: expected a URL"),
            (("status", "--admin", "http://"), "--admin: expected a URL"),
            (("status", "--admin", "http://h/?x=1"), "--admin: no user, query"),
            (("status", "--push", "http://h:99999"), "--push: expected a URL"),
            (("status", "--push", "http://h/a b"), "--push: expected a URL"),
            (("status", "--admin", "http://[::1"), "--admin: expected a URL"),
        ],
    )
    def test_is_explained(self, run: Run, arguments: tuple[str, ...], text: str) -> None:
        run(*arguments, ports=False).assert_failed(2, text)

    @pytest.mark.parametrize("arguments", [["--help"], ["push", "--help"], ["--version"]])
    def test_help(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit_info:
            ctl.main(arguments)
        assert exit_info.value.code == 0
        assert "ws2api-ctl" in capsys.readouterr().out


class TestProcess:
    def test_loads_little(self) -> None:
        """A command that waits for its imports longer than for the gateway is a nuisance."""
        heavy = ("asyncio", "aiohttp", "importlib.metadata", "pydantic", "rich", "structlog")
        code = (
            "import sys; from ws2api.supervisor.ctl import cli; "
            "cli.main(['status', '--timeout=1']); "
            f"print([name for name in {heavy} if name in sys.modules])"
        )
        process = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert process.stdout.splitlines()[-1] == "[]"

    def test_ends_when_nobody_reads_on(self, admin: FakePort) -> None:
        admin.answer("GET /status", STATUS)
        reader, writer = os.pipe()
        os.close(reader)
        process = subprocess.run(
            [COMMAND, "status", "--admin", admin.url],
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
        )
        os.close(writer)
        assert (process.returncode, process.stderr) == (141, b"")

    def test_prints_what_the_encoding_lacks(self, admin: FakePort) -> None:
        admin.answer("GET /errors", {"errors": [ERROR | {"text": "grüße 漢"}]})
        process = subprocess.run(
            [COMMAND, "errors", "--admin", admin.url],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONIOENCODING": "latin-1"},
            check=True,
        )
        assert "grüße \\u6f22".encode("latin-1") in process.stdout
