"""Profile the workers of real gateways, and open the files as their viewers do."""

from __future__ import annotations

import marshal
import os
import pstats
import signal
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import ws2api.gateway
from harness.api import FakeApi, echo
from harness.gateway import GatewayProcess
from harness.push import PushClient
from harness.waiting import DEADLINE_S, until

from .conftest import StartGateway

WORKERS = 2
TOKEN = "only-for-operators"
GATEWAY = str(Path(ws2api.gateway.__file__).parent)


def functions_of(path: Path) -> set[str]:
    """Name the functions of the gateway in a file of cProfile."""
    stats = pstats.Stats(str(path)).stats  # type: ignore[attr-defined]
    return {name for file, _, name in stats if file.startswith(GATEWAY)}


def files_of(path: Path) -> set[str]:
    """Name the files of the gateway whose allocations are in a snapshot of tracemalloc."""
    statistics = tracemalloc.Snapshot.load(str(path)).statistics("filename")
    frames = [statistic.traceback[0].filename for statistic in statistics if statistic.size]
    return {Path(name).name for name in frames if name.startswith(GATEWAY)}


def exchange_with_every_worker(gateway: GatewayProcess, api: FakeApi, client_id: str) -> None:
    """Send messages until each worker has passed some on."""
    served = set()
    for number in range(200):
        name = f"{client_id}-{number}"
        api.on(name, "POST", echo)
        client = gateway.connect(name)
        served.add(gateway.worker_of(client))
        client.send("hello")
        assert client.receive() == "hello"
        assert gateway.push_client().push(name, "you too").status == 200
        assert client.receive() == "you too"
        client.close()
        if len(served) == WORKERS:
            return
    raise AssertionError(f"the kernel has left workers out: {served}")


def test_profiles_from_start_to_end(api: FakeApi, client_id: str, tmp_path: Path) -> None:
    cpu, memory = tmp_path / "cpu.out", tmp_path / "memory.out"
    options = {"cpuprofile": str(cpu), "memprofile": str(memory)}
    with GatewayProcess(api=api.url, workers=WORKERS, **options) as gateway:
        exchange_with_every_worker(gateway, api, client_id)
        assert not list(tmp_path.iterdir())
        # A worker that is replaced has come to its end, too.
        os.kill(gateway.pid, signal.SIGHUP)
        until(lambda: "the old workers have ended" in gateway.stderr, timeout_s=2 * DEADLINE_S)
        assert_profiles(cpu, memory)
        first = {path: path.read_bytes() for path in tmp_path.iterdir()}
        exchange_with_every_worker(gateway, api, client_id)
    assert_profiles(cpu, memory)
    assert all(path.read_bytes() != content for path, content in first.items())


def assert_profiles(cpu: Path, memory: Path) -> None:
    names = {f"{path.name}.{worker}" for path in (cpu, memory) for worker in range(WORKERS)}
    assert {path.name for path in cpu.parent.iterdir()} == names
    for worker in range(WORKERS):
        functions = functions_of(cpu.with_name(f"{cpu.name}.{worker}"))
        assert {"connection_made", "data_received", "on_message", "on_reply"} <= functions
        assert {"sweeper.py", "counters.py"} & files_of(memory.with_name(f"{memory.name}.{worker}"))


@pytest.mark.parametrize("option", ["cpuprofile", "memprofile"])
def test_file_that_cannot_be_written_is_told_and_harms_nobody(
    api: FakeApi, client_id: str, tmp_path: Path, option: str
) -> None:
    path = tmp_path / "no-such-folder" / "out"
    with GatewayProcess(api=api.url, workers=1, **{option: str(path)}) as gateway:
        os.kill(gateway.pid, signal.SIGHUP)
        until(lambda: "profile not written" in gateway.stderr, timeout_s=2 * DEADLINE_S)
        (line,) = (line for line in gateway.stderr.splitlines() if "profile not written" in line)
        assert f" error    profile not written path={path}.0 " in line
        assert ' reason="No such file or directory" worker=0' in line
        until(lambda: "the old workers have ended" in gateway.stderr, timeout_s=2 * DEADLINE_S)
        client = gateway.connect(client_id)
        api.on(client_id, "POST", echo)
        client.send("still here")
        assert client.receive() == "still here"
        client.close()
    # Its end, with exit status 0, has been seen to.
    assert not list(tmp_path.iterdir())


# On request.


@pytest.fixture(scope="module")
def profiled(shared_api: FakeApi) -> Iterator[GatewayProcess]:
    with GatewayProcess(api=shared_api.url, workers=1, admin_token=TOKEN) as gateway:
        yield gateway
        assert not gateway.complaints


class Request:
    """Ask for a profile while something else goes on."""

    def __init__(self, gateway: GatewayProcess, kind: str, seconds: float) -> None:
        self._client = PushClient(gateway.admin_address, token=TOKEN)
        self._target = f"/workers/0/profile?kind={kind}&seconds={seconds}"
        self._thread = threading.Thread(target=self._ask)
        self._answer: object = None
        self._thread.start()

    def _ask(self) -> None:
        self._answer = self._client.request("POST", self._target, b"")

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def save(self, path: Path) -> Path:
        """Wait for the answer, and keep its body as a file."""
        self._thread.join(2 * DEADLINE_S)
        self._client.close()
        assert self._answer is not None
        assert self._answer.status == 200, self._answer  # type: ignore[attr-defined]
        path.write_bytes(self._answer.body)  # type: ignore[attr-defined]
        return path


@pytest.mark.parametrize("kind", ["cpu", "memory"])
def test_profile_of_a_second_in_which_the_traffic_goes_on(
    profiled: GatewayProcess, api: FakeApi, client_id: str, tmp_path: Path, kind: str
) -> None:
    api.on(client_id, "POST", echo)
    client = profiled.connect(client_id)
    request = Request(profiled, kind, 1)
    exchanges = 0
    while not request.is_done:
        client.send("hello")
        assert client.receive() == "hello"
        exchanges += 1
    path = request.save(tmp_path / "profile")
    assert exchanges > 0
    if kind == "cpu":
        assert {"data_received", "on_message", "on_reply"} <= functions_of(path)
        assert isinstance(marshal.loads(path.read_bytes()), dict)
    else:
        assert tracemalloc.Snapshot.load(str(path)).traces
    client.close()
    # Nothing of it stays with the gateway.
    assert not [p for p in profiled.runtime_files if p.is_file() and p.suffix == ".part"]
    folders = [p for p in profiled.runtime_files if p.name.startswith("ws2api-profiles-")]
    assert len(folders) == 1
    assert not list(folders[0].iterdir())


def test_worker_that_ends_meanwhile_leaves_what_it_has(
    start_gateway: StartGateway, api: FakeApi, tmp_path: Path
) -> None:
    gateway = start_gateway(api=api.url, workers=1, admin_token=TOKEN)
    request = Request(gateway, "cpu", 60)
    until(lambda: " profiling " in gateway.stderr)
    answer = gateway.push_client(gateway.admin_address, token=TOKEN).request(
        "POST", "/workers/0/drain", b""
    )
    assert answer.status < 300, answer
    assert "on_tick" in functions_of(request.save(tmp_path / "profile"))
