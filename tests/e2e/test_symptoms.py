"""Provoke what docs/troubleshooting.md describes and no other test shows, and try its advice."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from os import kill
from pathlib import Path

import pytest
from harness.api import FakeApi, Reply
from harness.gateway import GatewayProcess
from harness.processes import Process
from harness.stream import Stream
from harness.waiting import until
from harness.ws import handshake, upgrade_request

StartGateway = Callable[..., GatewayProcess]

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


class OneThread(BaseHTTPRequestHandler):
    """Accept everybody, and keep the connection, as servers with HTTP/1.1 do."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Let everybody in."""
        self._answer()

    def do_DELETE(self) -> None:
        """Take note of nothing."""
        self._answer()

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_arguments: object) -> None:
        """Keep quiet."""


@contextmanager
def one_thread() -> Iterator[str]:
    """Serve with one thread: a connection at a time, for as long as it stays open."""
    with HTTPServer(("127.0.0.1", 0), OneThread) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


class TestApiWithOneThread:
    def test_answers_all_workers_when_no_connection_is_kept(
        self, start_gateway: StartGateway
    ) -> None:
        with one_thread() as url:
            gateway = start_gateway(api=url, workers=2, api_max_idle=0)
            workers = set[Process]()
            connected = 0
            while len(workers) < 2 or connected < 12:  # the kernel spreads them by a hash
                workers.add(gateway.worker_of(gateway.connect(f"c{connected}")))
                connected += 1
            gateway.disconnect_all()
            until(lambda: gateway.count("requests_succeeded") == 2 * connected, what="every DELETE")
            gateway.stop()


class TestAnswersThatAreNotQuiteOk:
    @pytest.mark.parametrize("body", [b"ok\n", b"\xef\xbb\xbfok", b'"ok"', b"OK", b""])
    def test_refuse_with_what_the_api_said(
        self, gateway: GatewayProcess, api: FakeApi, body: bytes
    ) -> None:
        client_id = f"quite-{body.hex()}"
        api.on(client_id, "GET", Reply(body))
        response = gateway.handshake(client_id)
        assert (response.status, response.body) == (403, body)

    @pytest.mark.parametrize("status", [302, 418])
    def test_with_a_status_of_another_kind_are_the_apis_fault(
        self, gateway: GatewayProcess, api: FakeApi, status: int
    ) -> None:
        client_id = f"status-{status}"
        api.on(client_id, "GET", Reply("", status, {"Location": "/login"}))
        response = gateway.handshake(client_id)
        assert (response.status, response.text) == (
            502,
            f"the API answered with status {status}\n",
        )
        line = f'connect refused client={client_id} cause=status error="status {status}"'

        def is_logged() -> bool:
            """Ask again: of the complaints of one second, some are left out."""
            gateway.handshake(client_id)
            return line in gateway.stderr

        until(is_logged, what=line)


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
@pytest.mark.parametrize(
    ("lines", "status", "text"),
    [
        ((), 400, "HTTP/1.1 is required"),
        (("proxy_http_version 1.1;",), 426, "an upgrade is required"),
        (
            (
                "proxy_http_version 1.1;",
                "proxy_set_header Upgrade $http_upgrade;",
                "proxy_set_header Connection upgrade;",
            ),
            101,
            "",
        ),
    ],
    ids=["plain", "without-upgrade", "all-three-lines"],
)
def test_nginx_needs_three_lines(
    gateway: GatewayProcess, tmp_path: Path, lines: tuple[str, ...], status: int, text: str
) -> None:
    assert NGINX
    listener = tmp_path / "nginx.sock"
    folders = "".join(
        f"{name}_temp_path {tmp_path}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    host, port = gateway.clients_address
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; events {{}}\n"
        f"http {{ access_log off; {folders}\n"
        f"server {{ listen unix:{listener};\n"
        f"location / {{ proxy_pass http://{host}:{port}; {' '.join(lines)} }} }} }}\n"
    )
    errors = tmp_path / "error.log"
    command = [NGINX, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", str(errors)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as nginx:
        try:
            until(listener.exists, what="nginx listens")
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(listener))
                response = handshake(Stream(connection), upgrade_request("/behind-nginx"))
        finally:
            nginx.terminate()
    assert response.status == status
    assert text in response.text


def test_sigusr1_logs_connections_for_a_while(start_gateway: StartGateway, api: FakeApi) -> None:
    gateway = start_gateway(api=api.url)
    gateway.connect("before").close()
    assert "client=before" not in gateway.stderr
    kill(gateway.pid, signal.SIGUSR1)
    begun = "logging more for a while least=debug seconds=300.0 worker=0"
    until(lambda: begun in gateway.stderr, what=begun)
    client = gateway.connect("after?key=hidden", {"Authorization": "Bearer hidden"})
    client.send("hidden")
    api.wait_for_one("after", "POST")
    client.close()
    until(lambda: "client disconnected client=after " in gateway.stderr, what="its end")
    assert "client connected client=after " in gateway.stderr
    assert "hidden" not in gateway.stderr
    gateway.stop()
