"""Run the real gateway, a supervisor with its workers, and hold it to its promises."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from .http_messages import Response
from .processes import Process, find_children, find_descendants, find_socket_owner
from .push import PushClient
from .stream import Stream
from .waiting import DEADLINE_S, until
from .ws import WsClient, handshake, upgrade_request

Option = str | int | float | bool | Iterable[str]

COMMAND: Final = (
    *(sys.executable, "-X", "dev", "-W", "error"),
    str(Path(sys.executable).with_name("ws2api-supervisor")),
)

DEFAULT_OPTIONS: Final[dict[str, Option]] = {
    "listen": "127.0.0.1:0",
    "push_listen": "127.0.0.1:0",
    "admin_listen": "127.0.0.1:0",
    "workers": 1,
    "handshake_timeout": "60s",  # longer than a test waits: nothing may depend on its end
    "shutdown_timeout": "10s",
}

_LISTENS = re.compile(r"^(clients|pushes|admin) +\w+://([\d.]+|\[::\]):(\d+)/", re.MULTILINE)
_COMPLAINT = re.compile(r"Traceback|exception|ResourceWarning|Fatal Python error|was never", re.I)


def command_line(**options: Option) -> list[str]:
    """Spell options as flags: True is a flag alone, a list repeats its flag."""
    arguments = [*COMMAND]
    for name, value in (DEFAULT_OPTIONS | options).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments += [flag] * value
        elif isinstance(value, (str, int, float)):
            arguments += [flag, str(value)]
        else:
            arguments += [part for item in value for part in (flag, item)]
    return arguments


def clean_environment(folder: Path) -> dict[str, str]:
    """Return an environment without options, whose runtime and temporary folder is `folder`."""
    kept = {name: v for name, v in os.environ.items() if not name.startswith("WS2API_")}
    return kept | {"TMPDIR": str(folder), "XDG_RUNTIME_DIR": str(folder)}


class GatewayProcess:
    """Run `ws2api-supervisor` on free loopback ports until the context ends.

    The end is a test of its own: SIGTERM leads to exit status 0, no complaint was logged, and
    neither a process nor a file stays behind.

    Args:
        options: names as in the settings; those not given have defaults that suit a test.
    """

    def __init__(self, **options: Option) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ws2api-"))
        self._runtime = self._folder / "run"
        self._runtime.mkdir(mode=0o700)
        self._stdout = self._folder / "stdout"
        self._stderr = self._folder / "stderr"
        self._clients: list[Stream] = []
        self._push_clients: list[PushClient] = []
        self._process = self._spawn(command_line(**options))
        try:
            self._addresses = self._await_ready()
        except BaseException:
            self.kill()
            raise

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=clean_environment(self._runtime),
            )

    def _await_ready(self) -> Mapping[str, tuple[str, int]]:
        def is_settled() -> bool:
            return "\nready\n" in self.stdout or self._process.poll() is not None

        until(is_settled, timeout_s=2 * DEADLINE_S, what="ready")
        assert self._process.poll() is None, f"ended at once: {self.stderr}"
        return {
            name: ("127.0.0.1" if host == "[::]" else host, int(port))
            for name, host, port in _LISTENS.findall(self.stdout)
        }

    def __enter__(self) -> GatewayProcess:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        try:
            if exc_type is None and self.is_running:
                self.disconnect_all()
                self.stop()
        finally:
            self.kill()

    @property
    def clients_address(self) -> tuple[str, int]:
        """Where WebSockets connect."""
        return self._addresses["clients"]

    @property
    def pushes_address(self) -> tuple[str, int]:
        """Where any worker takes pushes."""
        return self._addresses["pushes"]

    @property
    def admin_address(self) -> tuple[str, int]:
        """Where the metrics are."""
        return self._addresses["admin"]

    @property
    def pid(self) -> int:
        """The process id of the supervisor."""
        return self._process.pid

    @property
    def stdout(self) -> str:
        """What the supervisor printed so far."""
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        """What all its processes logged so far."""
        return self._stderr.read_text()

    @property
    def complaints(self) -> list[str]:
        """The log lines that must never appear."""
        return [line for line in self.stderr.splitlines() if _COMPLAINT.search(line)]

    @property
    def is_running(self) -> bool:
        """Whether the supervisor lives."""
        return self._process.poll() is None

    @property
    def status(self) -> int | None:
        """The exit status of the supervisor, None while it runs."""
        return self._process.poll()

    @property
    def children(self) -> list[Process]:
        """The processes that the supervisor has started and that live."""
        return find_children(self.pid)

    @property
    def runtime_files(self) -> list[Path]:
        """What the gateway keeps in its runtime folder at this moment."""
        return list(self._runtime.rglob("*"))

    def connect(
        self,
        target: str,
        headers: Mapping[str, str | None] | None = None,
        *,
        early_data: bytes = b"",
        receive_buffer_bytes: int | None = None,
    ) -> WsClient:
        """Open a WebSocket; the API must accept it."""
        stream = self.open_stream(receive_buffer_bytes=receive_buffer_bytes)
        return WsClient(stream, _as_target(target), headers, early_data=early_data)

    def handshake(self, target: str, headers: Mapping[str, str | None] | None = None) -> Response:
        """Ask for a WebSocket and return the answer, whatever it is."""
        stream = self.open_stream()
        return handshake(stream, upgrade_request(_as_target(target), headers))

    def open_stream(self, *, receive_buffer_bytes: int | None = None) -> Stream:
        """Open a TCP connection to the client port."""
        stream = Stream.open(self.clients_address, receive_buffer_bytes=receive_buffer_bytes)
        self._clients.append(stream)
        return stream

    def push_client(
        self, address: tuple[str, int] | None = None, *, token: str | None = None
    ) -> PushClient:
        """Return a new connection for pushes: to any worker, or to the one at this address."""
        client = PushClient(address or self.pushes_address, token=token)
        self._push_clients.append(client)
        return client

    def admin_get(self, path: str) -> Response:
        """Ask the admin port."""
        return self.push_client(self.admin_address).request("GET", path)

    def count(self, name: str, **labels: str) -> int:
        """Sum one counter of /metrics over all workers."""
        families = text_string_to_metric_families(self.admin_get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        names = {f"ws2api_{name}", f"ws2api_{name}_total"}
        chosen = [s for s in samples if s.name in names and labels.items() <= s.labels.items()]
        assert chosen, f"no {name} among {sorted({sample.name for sample in samples})}"
        return int(sum(sample.value for sample in chosen))

    def worker_of(self, client: WsClient) -> Process:
        """Return the process that holds the other end of a client's connection."""
        return find_socket_owner(self.children, self.clients_address[1], client.port)

    def find_admin(self) -> Process:
        """Return the process that answers on the admin port."""
        connection = self.push_client(self.admin_address)
        connection.request("GET", "/healthz")
        port: int = connection.stream.socket.getsockname()[1]
        return find_socket_owner(self.children, self.admin_address[1], port)

    def disconnect_all(self) -> None:
        """Close every connection that was opened through this object."""
        for stream in self._clients:
            stream.close()
        for push_client in self._push_clients:
            push_client.close()
        self._clients.clear()
        self._push_clients.clear()

    def terminate(self) -> None:
        """Ask the supervisor to stop, and do not wait."""
        self._process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Ask the supervisor to stop, and hold it to a clean end."""
        processes = find_descendants(self.pid)
        self.terminate()
        self.await_end(processes)

    def await_end(self, processes: list[Process]) -> None:
        """Wait for the end that a signal began; it is clean, and all the processes are gone."""
        status = self._process.wait(DEADLINE_S)
        assert status == 0, f"exit status {status}: {self.stderr}"
        assert not self.complaints, self.stderr
        assert not [process for process in processes if process.is_alive]
        assert not self.runtime_files

    def kill(self) -> None:
        """End whatever is left, by force, and remove its files."""
        self.disconnect_all()
        leftovers = find_descendants(self.pid) if self.is_running else []
        self._process.kill()
        self._process.wait(DEADLINE_S)
        for process in leftovers:
            if process.is_alive:
                os.kill(process.pid, signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)


def _as_target(target: str) -> str:
    return target if target.startswith("/") else f"/{target}"
