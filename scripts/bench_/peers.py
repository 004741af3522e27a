"""Run the peers: Pushpin, the naive Python design, and ws2api's Go binary where there is one.

They do the work of the gateway: a request to the API for a connect, one for each message, the
answer back as a frame. What differs is said where each is started. Importing this module does
nothing; `register` puts those that this machine has among the systems under test.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Final

from bench_ import BenchError, frames, machine, systems
from bench_.systems import System, SystemOptions, accepts, free_port

NAIVE: Final = Path(__file__).parents[1] / "baseline_naive.py"
PUSHPIN_INTERNALS: Final = Path("/usr/lib/pushpin/internal.conf")
PUSHPIN_CLIENTS: Final = 50_000
"""The package's default; with some hundred, it answers ten times slower."""
WS2API_PORT: Final = 7001
WS2API_API_PORT: Final = 8000
"""Newer builds of ws2api know no other ports; older ones have flags for both."""

# Speaks to all peers. Pushpin wants the answer as events, of the content type of its request: OPEN
# to an OPEN, which is 6 bytes long, and a text to a text. A constant will do for both.
API: Final = """
    server {{
        listen 127.0.0.1:{port} backlog=4096;{also}
        default_type text/plain;
        set $unit "{unit}";
        location = /@status {{ stub_status; }}
        location / {{
            if ($http_content_type = application/websocket-events) {{ rewrite ^ /@events last; }}
            if ($request_method = POST) {{ return 200 "{answer}"; }}
            return 200 ok;
        }}
        location = /@events {{
            internal;
            default_type application/websocket-events;
            if ($http_content_length = 6) {{ return 200 "OPEN\\r\\n"; }}
            return 200 "TEXT {size:x}\\r\\n{answer}\\r\\n";
        }}
    }}
"""
# Pushpin's four processes, and zurl for its requests, which the package runs as a service. The log
# level is the one below `info`: on that, zurl writes two lines for each message.
PUSHPIN: Final = """
[global]
include={internals}
rundir={folder}
ipc_prefix=bench-
[runner]
services=condure,zurl,pushpin-proxy,pushpin-handler
http_port=127.0.0.1:{port}
logdir={folder}
log_level=1
client_maxconn={clients}
[proxy]
routesfile={folder}/routes
zurl_out_specs=ipc://{{rundir}}/{{ipc_prefix}}zurl-in
zurl_out_stream_specs=ipc://{{rundir}}/{{ipc_prefix}}zurl-in-stream
zurl_in_specs=ipc://{{rundir}}/{{ipc_prefix}}zurl-out
updates_check=off
"""

Runner = Callable[[int, SystemOptions], AbstractContextManager[System]]


def register(ws2api: Path | None = None) -> list[str]:
    """Add the peers that this machine has to the systems under test.

    Args:
        ws2api: the Go binary; None for none.

    Returns:
        What is missing and how to get it, a line each.
    """
    missing = []
    if shutil.which("pushpin") and shutil.which("condure") and shutil.which("zurl"):
        systems.REGISTRY["pushpin"] = run_pushpin
    else:
        missing.append("pushpin: apt-get install pushpin")
    if importlib.util.find_spec("aiohttp") and importlib.util.find_spec("websockets"):
        systems.REGISTRY["naive"] = run_naive
    if ws2api:
        if not os.access(ws2api, os.X_OK):
            raise BenchError(f"{ws2api} is no program that could be run")
        systems.REGISTRY["ws2api"] = partial(run_ws2api, ws2api.absolute())
    else:
        missing.append("ws2api: build it with Go and give --ws2api PATH")
    if not systems.NCHAN_MODULE.exists():
        systems.REGISTRY.pop("nchan", None)
        missing.append("nchan: apt-get install libnginx-mod-nchan")
    return missing


def run_api(
    answer_bytes: int = 30, workers: int = 1, *, for_ws2api: bool = False
) -> AbstractContextManager[System]:
    """Run an API that all peers understand.

    Args:
        answer_bytes: size of the answer to a message.
        workers: nginx processes.
        for_ws2api: listen where ws2api's newer builds look for their API as well.
    """
    if for_ws2api and accepts(WS2API_API_PORT):
        raise BenchError(f"ws2api needs its API at port {WS2API_API_PORT}, where something else is")
    also = f" listen 127.0.0.1:{WS2API_API_PORT} backlog=4096;" if for_ws2api else ""
    return systems.run_api(answer_bytes, workers, API, also=also, size=answer_bytes)


@contextlib.contextmanager
def run_pushpin(api_port: int, options: SystemOptions) -> Iterator[System]:
    """Run Pushpin with its requests to the API as WebSocket-over-HTTP.

    A connect costs one request, and there is nothing like a claim in Redis. It has no choice of
    workers, pings nobody, and holds as many clients as one process may have files. Its proxy passes
    requests on through a short queue; what does not fit is dropped, together with the client, so it
    cannot bear more than some hundred messages or connects that come at once.
    """
    with _folder() as folder:
        port = free_port()
        text = PUSHPIN.format(
            internals=PUSHPIN_INTERNALS,
            folder=folder,
            port=port,
            clients=min(PUSHPIN_CLIENTS, machine.survey().files - 500),
        )
        (folder / "pushpin.conf").write_text(text)
        (folder / "routes").write_text(f"* 127.0.0.1:{api_port},over_http\n")
        command = ["pushpin", f"--config={folder}/pushpin.conf", "--merge-output"]
        with _run("pushpin", command, folder, port) as system:
            system.wait_until(lambda: _takes_websockets(port))
            yield system


@contextlib.contextmanager
def run_naive(api_port: int, options: SystemOptions) -> Iterator[System]:
    """Run the obvious Python: one process, a task for each client, aiohttp for each message."""
    port = free_port()
    command = [sys.executable, str(NAIVE), str(port), f"http://127.0.0.1:{api_port}/"]
    command.append(str(options.ping_interval_s))
    with _folder() as folder, _run("naive", command, folder, port) as system:
        yield system


@contextlib.contextmanager
def run_ws2api(binary: Path, api_port: int, options: SystemOptions) -> Iterator[System]:
    """Run ws2api, one process of up to 8 threads.

    It does not keep the order of one client's messages, and has nothing like a claim. Builds that
    know no flags for them need the ports 7001 and 8000.
    """
    command, port = ws2api_command(binary, api_port)
    if accepts(port):
        raise BenchError(f"ws2api needs port {port}, where something else is")
    if port == WS2API_PORT and not accepts(WS2API_API_PORT):
        raise BenchError(f"this build of ws2api wants its API at port {WS2API_API_PORT}")
    with _folder() as folder, _run("ws2api", command, folder, port) as system:
        yield system


def ws2api_command(binary: Path, api_port: int) -> tuple[list[str], int]:
    """Return how to start a build of ws2api, and the port at which it will listen."""
    usage = subprocess.run([binary, "-h"], capture_output=True, text=True, timeout=10, check=False)
    flags = set(re.findall(r"^  -(\w+)", usage.stderr + usage.stdout, re.M))
    if not {"listen", "url"} <= flags:
        return [str(binary)], WS2API_PORT
    port = free_port()
    command = [str(binary), f"-listen=127.0.0.1:{port}", f"-url=http://127.0.0.1:{api_port}/"]
    command += [
        f"-{name}=127.0.0.1:{free_port()}" for name in ("metrics", "binary") if name in flags
    ]
    return command, port


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ws2api-bench-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def _run(name: str, command: list[str], folder: Path, port: int) -> Iterator[System]:
    """Run a command, wait until its port takes connections, and stop it in the end."""
    system = System(name, command, folder)
    system.port = port
    try:
        system.wait_until(lambda: accepts(port))
        yield system
    finally:
        system.stop()


def _takes_websockets(port: int) -> bool:
    """Tell whether a handshake is answered: all the processes behind the port have started."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as probe, _no_answer():
        probe.sendall(frames.upgrade("/probe"))
        return probe.recv(64).startswith(b"HTTP/1.1 101 ")
    return False


def _no_answer() -> AbstractContextManager[None]:
    return contextlib.suppress(TimeoutError, ConnectionError)
