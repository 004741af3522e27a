"""Run the gateway, Nchan and the API, and read from /proc what each of them uses."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from cost_ import ANSWER, CostError

SUPERVISOR: Final = Path(sys.executable).with_name("ws2api-supervisor")
NCHAN_MODULE: Final = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")

NGINX: Final = """
daemon off; worker_processes 1; pid nginx.pid; error_log stderr error; {user}
events {{ worker_connections {files}; }}
http {{
    access_log off; keepalive_requests 1000000000; keepalive_timeout 1h; tcp_nodelay on;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi;
{http}
}}
"""
API: Final = """
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        default_type text/plain;
        location = /@status {{ stub_status; }}
        location / {{
            if ($request_method = POST) {{ return 200 "{answer}"; }}
            return 200 ok;
        }}
    }}
"""
# Nchan does the same work per message: one frame in, one POST to the API over keep-alive, the API's
# 30 bytes back as one frame. It publishes the answer to a channel of which the client is the only
# subscriber. It neither keeps one client's messages in order nor retries. A connect costs one GET,
# as with the gateway, but no claim in Redis. A buffer of one message is its cheapest choice: with
# none, version 1.3.6 leaks 257 bytes of shared memory a message and halts when 128 MB are full.
NCHAN: Final = """
    nchan_message_buffer_length 1;
    upstream api {{
        server 127.0.0.1:{api};
        keepalive 1024; keepalive_requests 1000000000; keepalive_timeout 1h;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header X-Channel-Id $nchan_channel_id;
        location / {{
            nchan_pubsub websocket;
            nchan_channel_id $uri;
            nchan_authorize_request /@connect;
            nchan_publisher_upstream_request /@message;
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
                raise CostError(f"{self.name} did not start: {self.errors()}")
            time.sleep(0.02)

    def cpu_us(self) -> float:
        """Sum user and system time of the tree; a child that ended counts with its parent."""
        return sum(self._tree().values()) * 1e6 / os.sysconf("SC_CLK_TCK")

    def memory_kb(self) -> int:
        """Sum the proportional set sizes of the tree: a shared page counts once in all.

        Pages of files are left out: they do not grow with connections, and how they are shared
        out changes with whatever else runs the same Python.
        """
        rollups = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in self._tree())
        sizes = (re.findall(r"^Pss_(?:Anon|Shmem): +(\d+)", text, re.M) for text in rollups)
        return sum(int(kb) for pair in sizes for kb in pair)

    def stop(self) -> None:
        """End the tree, gently at first."""
        if self._process.poll() is not None:
            return
        tree = self._tree()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            for pid in tree:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()

    def _tree(self) -> dict[int, int]:
        """Return the process ids of the tree, and for each its clock ticks of CPU."""
        ticks: dict[int, int] = {}
        children = defaultdict(list)
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                pid = int(path.name)
                parent, ticks[pid] = _stat(pid)
                children[parent].append(pid)
        tree = [self._process.pid]
        for pid in tree:  # grows while it is walked
            tree += children[pid]
        return {pid: ticks[pid] for pid in tree}


def _stat(pid: int) -> tuple[int, int]:
    """Return the parent of a process and its clock ticks, those of children waited for included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1]), sum(map(int, fields[11:15]))


@contextlib.contextmanager
def run_nginx(name: str, block: str, modules: str = "", **values: object) -> Iterator[System]:
    """Run an nginx of one worker with these lines in its http block."""
    with tempfile.TemporaryDirectory(prefix="ws2api-cost-") as folder:
        port = _free_port()
        user = "user root;" if os.geteuid() == 0 else ""
        block = block.format(port=port, **values)
        text = modules + NGINX.format(user=user, files=_file_limit() - 100, http=block)
        Path(folder, "nginx.conf").write_text(text)
        command = ["nginx", "-p", folder, "-e", "stderr", "-c", "nginx.conf"]
        system = System(name, command, Path(folder))
        system.port = port
        try:
            system.wait_until(lambda: _accepts(port))
            yield system
        finally:
            system.stop()


@contextlib.contextmanager
def run_gateway(api_port: int, workers: int) -> Iterator[System]:
    """Run the supervisor with its embedded Valkey.

    Pings are off the table as they are in Nchan: none is due while a figure is taken.
    """
    if not SUPERVISOR.exists():
        raise CostError(f"{SUPERVISOR} is missing: install the package, then use its python")
    command = [str(SUPERVISOR), f"--workers={workers}", f"--api=http://127.0.0.1:{api_port}/"]
    command += [f"--{name}listen=127.0.0.1:0" for name in ("", "push-", "admin-")]
    command += ["--ping-interval=1h", "--log-level=warning"]
    with tempfile.TemporaryDirectory(prefix="ws2api-cost-") as folder:
        system = System("gateway", command, Path(folder))
        try:
            system.wait_until(lambda: "ready" in system.output().split())
            port = re.search(r"^clients ws://127\.0\.0\.1:(\d+)/", system.output(), re.M)
            assert port, system.output()
            system.port = int(port[1])
            yield system
        except CostError as error:
            raise CostError(f"{error}\n{system.errors()}".strip()) from None
        finally:
            system.stop()


def run_api() -> contextlib.AbstractContextManager[System]:
    """Run the API: a constant for a message, ok for everything else."""
    return run_nginx("api", API, answer=ANSWER.decode())


def run_nchan(api_port: int) -> contextlib.AbstractContextManager[System]:
    """Run Nchan in front of the API."""
    return run_nginx("nchan", NCHAN, f"load_module {NCHAN_MODULE};", api=api_port)


def requests_seen(api: System) -> int:
    """Ask the API's nginx how many requests it has had, this one included."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", api.port)) as connection:
        connection.request("GET", "/@status")
        return int(connection.getresponse().read().split()[9])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _file_limit() -> int:
    return min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 1 << 20)
