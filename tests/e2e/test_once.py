"""Kill real servers in the middle of a message, and let their idle connections time out."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.gateway import GatewayProcess
from harness.ports import free_port
from harness.waiting import until

from .programs import Program

CLIENTS = 20

# Both note each message when they have it, and never answer one that says "work".
NODE = """
import { appendFileSync } from "node:fs";
import { createServer } from "node:http";
const server = createServer(async (request, response) => {
  const body = (await request.setEncoding("utf8").toArray()).join("");
  if (request.method === "POST") appendFileSync(process.env.NOTES, body + "\\n");
  if (body !== "work") response.end(request.method === "GET" ? "ok" : body);
});
server.keepAliveTimeout = 1000 * process.env.KEEP_ALIVE;
server.listen(process.env.PORT, "127.0.0.1");
"""
WSGI = """
import os, time
def api(request, start):
    body = request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0)).decode()
    if request["REQUEST_METHOD"] == "POST":
        with open(os.environ["NOTES"], "a") as notes:
            notes.write(body + "\\n")
    if body == "work":
        time.sleep(3600)
    start("200 OK", [("Content-Length", str(len(body) or 2))])
    return [body.encode() or b"ok"]
"""


@dataclass
class Server:
    """Be an API that can be killed and started again."""

    run: Callable[[], AbstractContextManager[Program]]
    port: int
    notes: Path

    def times(self, message: str) -> int:
        """Count how many times a message has come."""
        return Counter(self.notes.read_text().split("\n"))[message]


def node(folder: Path, port: int, keep_alive_s: int) -> Program:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    (folder / "api.mjs").write_text(NODE)
    environment = {"PORT": str(port), "KEEP_ALIVE": str(keep_alive_s)}
    command = ["node", str(folder / "api.mjs")]
    return Program(command, port=port, NOTES=str(folder / "notes"), **environment)


def gunicorn(folder: Path, port: int, keep_alive_s: int) -> Program:
    pytest.importorskip("gunicorn")
    (folder / "wsgi_api.py").write_text(WSGI)
    command = [sys.executable, "-m", "gunicorn", "--chdir", str(folder), "wsgi_api:api"]
    command += ["--bind", f"127.0.0.1:{port}", "--worker-class", "gthread", "--threads", "8"]
    command += ["--keep-alive", str(keep_alive_s), "--graceful-timeout", "1"]
    environment = {"NOTES": str(folder / "notes"), "PYTHONDONTWRITEBYTECODE": "1"}
    return Program(command, port=port, **environment)


@pytest.fixture(params=[node, gunicorn])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Server:
    (tmp_path / "notes").touch()
    port = free_port()
    return Server(lambda: request.param(tmp_path, port, 1), port, tmp_path / "notes")


def kill(program: Program) -> None:
    """End a server and its workers at once."""
    os.killpg(program.process.pid, signal.SIGKILL)
    program.process.wait()


def test_message_under_way_when_the_api_is_killed_never_comes_twice(server: Server) -> None:
    url = f"http://127.0.0.1:{server.port}/"
    with (
        contextlib.ExitStack() as stack,
        server.run() as program,
        GatewayProcess(api=url) as gateway,
    ):
        client = gateway.connect("ann")
        for _ in range(3):
            client.send("hello")
            assert client.receive() == "hello"
        client.send("work")
        until(lambda: server.times("work") == 1)
        kill(program)
        until(lambda: gateway.count("requests_failed") == 1)
        stack.enter_context(server.run())
        client.send("next")
        assert client.receive() == "next"
        assert (server.times("work"), server.times("next")) == (1, 1)


def test_idle_connections_that_time_out_lose_and_double_nothing(server: Server) -> None:
    """Send at about the time at which the server closes what was idle, a little later each time."""
    with server.run(), GatewayProcess(api=f"http://127.0.0.1:{server.port}/") as gateway:
        clients = [gateway.connect(f"c{number}") for number in range(CLIENTS)]
        sent = []
        for burst, pause_s in enumerate((0, 0.97, 1.0, 1.02)):
            time.sleep(pause_s)
            for number, client in enumerate(clients):
                client.send(f"{burst}.{number}")
            for number, client in enumerate(clients):
                sent.append(f"{burst}.{number}")
                assert client.receive() == sent[-1]
        assert [server.times(message) for message in sent] == [1] * len(sent)
        assert gateway.count("requests_failed") == 0
