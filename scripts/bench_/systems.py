"""Run the systems under test and the API behind them, and read what each of them uses."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench_ import BenchError, frames, machine, proc

SUPERVISOR: Final = Path(sys.executable).with_name("ws2api-supervisor")
NCHAN_MODULE: Final = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")

REDIS_NAMES: Final = ("valkey-server", "redis-server")
PING_TIMEOUT_S: Final = 20
"""The gateway's default."""

NGINX: Final = """
daemon off; worker_processes {workers}; pid nginx.pid; error_log stderr error; {user}
events {{ worker_connections {files}; }}
http {{
    access_log off; keepalive_requests 1000000000; keepalive_timeout 1h; tcp_nodelay on;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi; client_max_body_size 0;
{http}
}}
"""
API: Final = """
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        default_type text/plain;
        location = /@status {{ stub_status; }}
        location / {{
            set $unit "{unit}";
            if ($request_method = POST) {{ return 200 "{answer}"; }}
            return 200 ok;
        }}
    }}
"""
# Nchan does the same work per message: one frame in, one POST to the API over keep-alive, the API's
# answer back as one frame. It publishes the answer to a channel of which the client is the only
# subscriber. It neither keeps one client's messages in order nor retries. A connect costs one GET,
# as with the gateway, but no claim in Redis. A buffer of one message is its cheapest choice: with
# none, version 1.3.6 leaks 257 bytes of shared memory a message and halts when 128 MB are full.
NCHAN: Final = """
    nchan_message_buffer_length 1; nchan_shared_memory_size {shared_mb}m; {buffers}
    upstream api {{
        server 127.0.0.1:{api};
        keepalive 1024; keepalive_requests 1000000000; keepalive_timeout 1h;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096{reuseport};
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header X-Channel-Id $nchan_channel_id;
        location / {{
            nchan_pubsub websocket;
            nchan_channel_id $uri;
            nchan_authorize_request /@connect;
            nchan_publisher_upstream_request /@message;
            nchan_websocket_ping_interval {ping_s};
        }}
        location = /@connect {{
            internal;
            proxy_pass_request_body off;
            proxy_set_header Connection "";
            proxy_set_header Content-Length "";
            proxy_set_header X-Channel-Id $nchan_channel_id;
            proxy_pass http://api;
        }}
        location = /@message {{ internal; proxy_pass http://api; }}
    }}
"""


@dataclass(frozen=True, slots=True)
class SystemOptions:
    """Say how a system under test is to run.

    Attributes:
        workers: processes that hold clients, where a system has such a choice.
        ping_interval_s: when silent clients are pinged; pings are off the table by default, as none
            is due while a figure is taken.
        clients: how many there will be at most, for systems that must know.
        message_bytes: size of the API's answers, likewise.
        arguments: more of them for the gateway's command line.
    """

    workers: int = 1
    ping_interval_s: int = 3_600
    clients: int = 20_000
    message_bytes: int = 30
    arguments: tuple[str, ...] = ()


class System:
    """Run a command with its children in a folder of its own, and read what they use.

    Args:
        name: what the tables call it.
        command: the command and its arguments.
        folder: holds `stdout` and `stderr` of the command.
    """

    def __init__(self, name: str, command: list[str], folder: Path) -> None:
        self.name = name
        self.port = 0
        """Where clients connect; 0 until known."""
        self.admin_port = 0
        """Where /metrics and /status are; 0 when there is no such thing."""
        self.push_ports: list[int] = []
        """Where pushes to any client are taken."""
        self.asked = 0
        """How often `requests_seen` has asked it."""
        self.patience_s = 10.0
        """How long its end may take: it tells the API of each client that it has."""
        self._folder = folder
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as errors:
            self._process = subprocess.Popen(command, stdout=out, stderr=errors, cwd=folder)

    def errors(self) -> str:
        """Return the end of what it has printed on stderr."""
        return (self._folder / "stderr").read_text(errors="replace")[-2_000:].strip()

    def output(self) -> str:
        """Return what it has printed so far."""
        return (self._folder / "stdout").read_text()

    def wait_until(self, ready: Callable[[], bool], timeout_s: float = 20) -> None:
        """Wait until it is ready, and say what it said on stderr if it is not."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{self.name} did not start: {self.errors()}")
            time.sleep(0.02)

    def cpu(self) -> tuple[float, float]:
        """Sum user and system time of the tree in µs; a child that ended counts with its parent."""
        times = proc.tree(self._process.pid).values()
        return sum(user for user, _ in times), sum(system for _, system in times)

    def redis_us(self) -> float:
        """Return the part of it that the Redis or Valkey of the tree has used."""
        tree = proc.tree(self._process.pid)
        return sum(sum(times) for pid, times in tree.items() if proc.name(pid) in REDIS_NAMES)

    def pss_kb(self) -> int:
        """Sum the proportional set sizes of the tree: a shared page counts once in all."""
        return sum(proc.pss_kb(pid) for pid in proc.tree(self._process.pid))

    def stop(self) -> None:
        """End the tree, gently at first."""
        if self._process.poll() is not None:
            return
        tree = proc.tree(self._process.pid)
        self._process.terminate()
        try:
            self._process.wait(self.patience_s)
        except subprocess.TimeoutExpired:
            for pid in tree:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()


@contextlib.contextmanager
def run_nginx(
    name: str, block: str, modules: str = "", workers: int = 1, **values: object
) -> Iterator[System]:
    """Run an nginx with these lines in its http block."""
    with tempfile.TemporaryDirectory(prefix="ws2api-bench-") as folder:
        port = free_port()
        user = "user root;" if os.geteuid() == 0 else ""
        files = machine.survey().files - 100
        http = block.format(port=port, **values)
        text = modules + NGINX.format(user=user, workers=workers, files=files, http=http)
        Path(folder, "nginx.conf").write_text(text)
        command = ["nginx", "-p", folder, "-e", "stderr", "-c", "nginx.conf"]
        system = System(name, command, Path(folder))
        system.port = port
        try:
            system.wait_until(lambda: accepts(port))
            yield system
        finally:
            system.stop()


@contextlib.contextmanager
def run_gateway(api_port: int, options: SystemOptions) -> Iterator[System]:
    """Run the supervisor with its embedded Valkey."""
    if not SUPERVISOR.exists():
        raise BenchError(f"{SUPERVISOR} is missing: install the package, then use its python")
    command = [str(SUPERVISOR), f"--workers={options.workers}"]
    command += [f"--api=http://127.0.0.1:{api_port}/", "--log-level=warning"]
    command += [f"--{name}listen=127.0.0.1:0" for name in ("", "push-", "admin-")]
    command += [f"--ping-interval={options.ping_interval_s}s", *options.arguments]
    if (
        options.ping_interval_s < PING_TIMEOUT_S
    ):  # the next ping waits for the judgement of the last
        command.append(f"--ping-timeout={options.ping_interval_s}s")
    with tempfile.TemporaryDirectory(prefix="ws2api-bench-") as folder:
        system = System("gateway", command, Path(folder))
        system.patience_s += options.clients / 2_000
        try:
            system.wait_until(lambda: "ready" in system.output().split(), 60)
            printed = dict(re.findall(r"^(\w+) \w+://127\.0\.0\.1:(\d+)/", system.output(), re.M))
            system.port = int(printed["clients"])
            system.push_ports = [int(printed["pushes"])]
            system.admin_port = int(printed["admin"])
            yield system
        except BenchError as error:
            raise BenchError(f"{error}\n{system.errors()}".strip()) from None
        finally:
            system.stop()


def run_nchan(api_port: int, options: SystemOptions) -> AbstractContextManager[System]:
    """Run Nchan in front of the API."""
    if not NCHAN_MODULE.exists():
        raise BenchError("there is no Nchan here: apt-get install libnginx-mod-nchan")
    return run_nginx(
        "nchan",
        NCHAN,
        f"load_module {NCHAN_MODULE};",
        options.workers,
        api=api_port,
        reuseport=" reuseport" if options.workers > 1 else "",
        ping_s=options.ping_interval_s,
        buffers=_nchan_buffers(options.message_bytes),
        shared_mb=max(128, options.clients * 8 // 1024),
    )


def _nchan_buffers(message_bytes: int) -> str:
    """Make room for an answer that does not fit into a page; else it would come out empty."""
    if message_bytes < 3_000:
        return ""
    kb = message_bytes // 1024 + 4
    return f"proxy_buffer_size {kb}k; proxy_buffers 8 {kb}k; subrequest_output_buffer_size {kb}k;"


REGISTRY: dict[str, Callable[[int, SystemOptions], AbstractContextManager[System]]] = {
    "gateway": run_gateway,
    "nchan": run_nchan,
}
"""By name: a function that runs a system in front of the API at that port."""


def run_api(
    answer_bytes: int = 30, workers: int = 1, block: str = API, **values: object
) -> AbstractContextManager[System]:
    """Run the API: a constant for a message, ok for everything else.

    nginx takes words of 4 KB at most in its configuration, so a large answer is put together from
    many times the same variable.

    Args:
        answer_bytes: size of the answer to a message.
        workers: nginx processes.
        block: what its http block has.
        values: for what the block names beyond port, unit and answer.
    """
    units, rest = divmod(answer_bytes, frames.UNIT)
    unit = frames.answer_unit().decode()
    answer = "$unit" * units + unit[:rest]
    return run_nginx("api", block, workers=workers, unit=unit, answer=answer, **values)


def requests_seen(api: System) -> int:
    """Ask the API's nginx how many requests it has had, without those that ask this."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", api.port)) as connection:
        connection.request("GET", "/@status")
        seen = int(connection.getresponse().read().split()[9])
    api.asked += 1
    return seen - api.asked


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accepts(port: int) -> bool:
    """Tell whether somebody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
