"""The unit under a real systemd: it starts, reloads, survives and ends, in its sandbox."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from harness.api import FakeApi
from harness.push import PushClient
from harness.stream import Stream
from harness.systemd import Machine, NotPossible, show_python
from harness.waiting import until
from harness.ws import WsClient

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "scripts" / "services" / "ws2api.service"
OPTIONS = """\
workers = 2
listen = "127.0.0.1:0"
push-listen = "127.0.0.1:0"
admin-listen = "127.0.0.1:0"
drain-seconds = "1s"
"""
DROP_IN = f"""\
[Service]
ExecStart=
ExecStart=/opt/python/bin/python{sys.version_info.major}.{sys.version_info.minor} \
    -m ws2api.supervisor.cli --config /etc/ws2api.toml
RestartSec=100ms
"""


@pytest.fixture(scope="module")
def machine(shared_api: FakeApi, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Boot a machine that has the gateway installed, not yet started."""
    packages = {f"ws2api/{name}": ROOT / name for name in ("gateway", "supervisor")}
    binds, environment = show_python(packages)
    files = {
        "/etc/systemd/system/ws2api.service": UNIT.read_text(),
        "/etc/systemd/system/ws2api.service.d/test.conf": f"{DROP_IN}{environment}\n",
        "/etc/ws2api.toml": f'api = "{shared_api.url}"\n{OPTIONS}',
    }
    try:
        booted = Machine(tmp_path_factory.mktemp("machine"), files, binds)
    except NotPossible as error:
        pytest.skip(str(error))
    with booted as machine:
        yield machine


class Service:
    """Talk to the gateway in the machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        machine.systemctl("restart", "ws2api")
        until(lambda: "\nready" in self.log, what="the journal knows")
        found = re.findall(r"^(clients|pushes|admin) \w+://([\d.]+):(\d+)/", self.log, re.M)
        self.addresses = {name: (host, int(port)) for name, host, port in found}

    @property
    def log(self) -> str:
        return self.machine.journal("ws2api")

    @property
    def status(self) -> str:
        return self.machine.show("ws2api", "StatusText")

    def connect(self, client_id: str) -> WsClient:
        return WsClient(Stream.open(self.addresses["clients"]), f"/{client_id}")


@pytest.fixture
def service(machine: Machine) -> Iterator[Service]:
    """Start the service anew."""
    yield Service(machine)
    machine.systemctl("stop", "ws2api")
    assert machine.show("ws2api", "Result") == "success"


def test_serves_in_its_sandbox(service: Service, api: FakeApi, client_id: str) -> None:
    assert service.status == "2 workers serve"
    client = service.connect(client_id)
    client.send("hello")
    assert api.wait_for_one(client_id, "POST").text == "hello"
    for number in range(20):  # each on a connection that any of the workers may have
        with closing(PushClient(service.addresses["pushes"])) as pushes:
            assert pushes.push(client_id, f"{number}").status == 200
    with closing(PushClient(service.addresses["admin"])) as admin:
        until(lambda: admin.request("GET", "/readyz").status == 200, what="ready")
    client.hang_up()
    about = service.machine.run("cat", f"/proc/{service.machine.show('ws2api', 'MainPID')}/status")
    assert re.search(r"^CapEff:\s+0+$", about, re.M)
    assert re.search(r"^CapBnd:\s+0+$", about, re.M)
    assert re.search(r"^NoNewPrivs:\s+1$", about, re.M)
    assert re.search(r"^Seccomp:\s+2$", about, re.M)
    assert not re.search(r"^Uid:\s+0\b", about, re.M)
    assert "Traceback" not in service.log


def test_reloads(service: Service, api: FakeApi, client_id: str) -> None:
    client = service.connect(client_id)
    service.machine.systemctl("reload", "ws2api")
    client.assert_closed(1012)
    until(lambda: service.status == "2 workers serve", what="the old workers have ended")
    service.connect(client_id).close()
    until(lambda: "the old workers have ended" in service.log, what="the journal knows")


def test_stays_as_it_is_when_the_new_options_are_wrong(service: Service) -> None:
    service.machine.run("sh", "-c", "echo 'nonsense = 1' >>/etc/ws2api.toml")
    try:
        service.machine.systemctl("reload", "ws2api")
        until(lambda: service.status.startswith("reload refused: config: "), what="a refusal")
        assert service.machine.show("ws2api", "ActiveState") == "active"
    finally:
        service.machine.run("sed", "-i", "/nonsense/d", "/etc/ws2api.toml")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT], ids=["killed", "watchdog"])
def test_loses_no_client_with_the_supervisor(
    service: Service, api: FakeApi, client_id: str, number: signal.Signals
) -> None:
    client = service.connect(client_id)
    service.machine.systemctl("kill", "--kill-who=main", f"--signal={number.name}", "ws2api")
    client.assert_closed(1001)
    assert api.wait_for_one(client_id, "DELETE").close_code == 1001
    until(lambda: service.machine.show("ws2api", "NRestarts") == "1", what="a restart")
    until(lambda: service.status == "2 workers serve", what="a new supervisor")


def test_ends_in_good_order(service: Service, api: FakeApi, client_id: str) -> None:
    client = service.connect(client_id)
    service.machine.systemctl("stop", "--no-block", "ws2api")
    client.assert_closed(1001)
    assert api.wait_for_one(client_id, "DELETE").close_code == 1001
    until(lambda: service.machine.show("ws2api", "ActiveState") == "inactive", what="the end")
    assert service.machine.run("find", "/run", "-name", "ws2api-valkey-*") == ""
