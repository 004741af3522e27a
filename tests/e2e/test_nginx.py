"""Run nginx with the shipped nginx.conf in front of the gateway."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness.api import FakeApi, echo
from harness.certificates import Certificate, make_certificate
from harness.gateway import GatewayProcess
from harness.proxies import NginxProcess, join_address
from harness.push import PushClient
from harness.valkey import ValkeyProcess
from harness.waiting import DEADLINE_S, until

from .conftest import StartGateway
from .proxy_contract import (
    PINGS_IN_FAST_MOTION,
    TUNNEL_TIMEOUT,
    ProxyContract,
    assert_is_cut_while_idle,
    assert_lets_subdomains_in,
    connecting_all_the_time,
    idling,
    need,
    start_single_port_gateway,
)

need("nginx", "openssl")

UNLIMITED = {"rate=10r/s": "rate=10000r/s"}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("certificate"), "front")


@pytest.fixture(scope="module")
def shared_gateway(shared_api: FakeApi) -> Iterator[GatewayProcess]:
    with start_single_port_gateway(shared_api) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def shared_proxy(
    shared_gateway: GatewayProcess,
    certificate: Certificate,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[NginxProcess]:
    folder = tmp_path_factory.mktemp("nginx")
    with NginxProcess(
        [shared_gateway], folder=folder, certificate=certificate, changes=UNLIMITED
    ) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: NginxProcess) -> Iterator[NginxProcess]:
    yield shared_proxy
    shared_proxy.disconnect_all()
    assert shared_proxy.is_running
    assert "[emerg]" not in shared_proxy.output


def timeouts(value: str) -> dict[str, str]:
    """Change what the file says about silent connections."""
    return {f"proxy_{way}_timeout 2m": f"proxy_{way}_timeout {value}" for way in ("read", "send")}


@pytest.fixture(scope="module", autouse=True)
def idle(
    shared_api: FakeApi, certificate: Certificate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Future[None]]:
    """Begin what takes long at once, so that it passes while the other tests run."""
    with (
        GatewayProcess(api=shared_api.url, **PINGS_IN_FAST_MOTION) as gateway,
        NginxProcess(
            [gateway],
            folder=tmp_path_factory.mktemp("idle"),
            certificate=certificate,
            changes=timeouts(TUNNEL_TIMEOUT),
        ) as proxy,
        idling(shared_api, proxy) as idle,
    ):
        yield idle


class StartNginx:
    """Start nginx in front of these gateways."""

    def __init__(self, running: ExitStack, folder: Path, certificate: Certificate) -> None:
        self._running = running
        self._folder = folder
        self._certificate = certificate

    def __call__(
        self, *gateways: GatewayProcess, changes: Mapping[str, str] = UNLIMITED
    ) -> NginxProcess:
        return self._running.enter_context(
            NginxProcess(
                gateways, folder=self._folder, certificate=self._certificate, changes=changes
            )
        )


@pytest.fixture
def start_nginx(certificate: Certificate, tmp_path: Path) -> Iterator[StartNginx]:
    with ExitStack() as running:
        yield StartNginx(running, tmp_path, certificate)


class TestContract(ProxyContract):
    """What holds behind every proxy."""


def test_file_is_valid(proxy: NginxProcess) -> None:
    done = subprocess.run([*proxy.command, "-t"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert "[warn]" not in done.stderr


def test_subdomains_may_be_let_in(
    gateway: GatewayProcess, start_nginx: StartNginx, client_id: str
) -> None:
    proxy = start_nginx(gateway, changes={"# ~^https": "~^https"})
    assert_lets_subdomains_in(proxy, client_id)


def test_an_address_that_connects_too_often_gets_429(
    gateway: GatewayProcess, start_nginx: StartNginx, api: FakeApi, client_id: str
) -> None:
    changes = {"rate=10r/s": "rate=1r/m", "burst=100 ": "burst=4 "}
    proxy = start_nginx(gateway, changes=changes)
    first = proxy.connect(f"{client_id}-first", source="127.0.0.21")
    answers = [proxy.handshake(client_id, source="127.0.0.21") for _ in range(7)]
    assert [answer.status for answer in answers] == [101] * 4 + [429] * 3
    assert answers[-1].headers["Retry-After"] == "10"
    assert len(api.wait_for(client_id, "GET", count=4)) == 4
    proxy.connect(f"{client_id}-other", source="127.0.0.22").close()
    first.close()


def test_an_office_may_be_named(
    gateway: GatewayProcess, start_nginx: StartNginx, client_id: str
) -> None:
    changes = {"rate=10r/s": "rate=1r/m", "burst=100 ": "", "192.0.2.0/24": "127.0.0.24/30"}
    proxy = start_nginx(gateway, changes=changes)
    statuses = [proxy.handshake(client_id, source="127.0.0.26").status for _ in range(5)]
    assert statuses == [101] * 5


class TestSeveralHosts:
    @pytest.fixture
    def hosts(
        self, valkey: ValkeyProcess, start_gateway: StartGateway, api: FakeApi
    ) -> list[GatewayProcess]:
        return [start_gateway(api=api.url, redis=valkey.url) for _ in range(2)]

    def test_clients_spread_and_pushes_reach_them_from_any_host(
        self, hosts: list[GatewayProcess], start_nginx: StartNginx, client_id: str
    ) -> None:
        proxy = start_nginx(*hosts)
        names = [f"{client_id}-{number}" for number in range(8)]
        clients = {name: proxy.connect(name) for name in names}
        assert [host.count("connections_open") for host in hosts] == [4, 4]
        for host in hosts:
            for name, client in clients.items():
                assert host.push_client().push(name, f"for {name}").status == 200
                assert client.receive() == f"for {name}"

    def test_a_host_is_taken_out_by_hand(
        self, hosts: list[GatewayProcess], start_nginx: StartNginx, api: FakeApi, client_id: str
    ) -> None:
        proxy = start_nginx(*hosts)
        clients = {}
        for name in (f"{client_id}-{number}" for number in range(2)):
            api.on(name, "POST", echo)
            clients[name] = proxy.connect(name)
        line = f"server {join_address(hosts[0].clients_address)} max_fails=2 fail_timeout=10s"
        proxy.reload({f"{line};": f"{line} down;"})
        for number in range(4):
            proxy.connect(f"{client_id}-new-{number}")
        assert [host.count("connections_open") for host in hosts] == [1, 5]
        for name, client in clients.items():
            client.send("still here")
            assert client.receive() == "still here", name

    def test_a_host_that_dies_costs_no_connect(
        self, hosts: list[GatewayProcess], start_nginx: StartNginx, client_id: str
    ) -> None:
        proxy = start_nginx(*hosts)
        hosts[0].kill()
        for number in range(10):
            proxy.connect(f"{client_id}-{number}")
        assert hosts[1].count("connections_open") == 10


class TestRestarts:
    def test_rolling_restart_under_traffic_fails_no_connect(
        self, start_gateway: StartGateway, start_nginx: StartNginx, api: FakeApi, client_id: str
    ) -> None:
        gateway = start_gateway(api=api.url, workers=2, drain_seconds="1s")
        proxy = start_nginx(gateway)
        over = "the old workers have ended"
        client = proxy.connect(f"{client_id}-stays")
        with connecting_all_the_time(proxy, client_id) as report:
            os.kill(gateway.pid, signal.SIGHUP)
            until(lambda: over in gateway.stderr, timeout_s=2 * DEADLINE_S, what=over)
        assert report.failures == []
        assert report.count > 0
        client.assert_closed(1012)

    def test_reload_of_nginx_under_traffic_fails_no_connect_and_cuts_nobody(
        self, gateway: GatewayProcess, start_nginx: StartNginx, api: FakeApi, client_id: str
    ) -> None:
        proxy = start_nginx(gateway)
        name = f"{client_id}-stays"
        api.on(name, "POST", echo)
        client = proxy.connect(name)
        with connecting_all_the_time(proxy, client_id) as report:
            proxy.reload({})
            count = report.count
            until(lambda: report.count > count + 10, what="connects through the new processes")
        assert report.failures == []
        client.send("still here")
        assert client.receive() == "still here"


def test_status(proxy: NginxProcess) -> None:
    page = PushClient(proxy.status_address)
    assert "Active connections: " in page.request("GET", "/").text
    page.close()


class TestIdle:
    def test_without_pings_it_is_cut(
        self, start_gateway: StartGateway, start_nginx: StartNginx, api: FakeApi, client_id: str
    ) -> None:
        gateway = start_gateway(api=api.url, ping_interval=0)
        proxy = start_nginx(gateway, changes=timeouts("200ms"))
        assert_is_cut_while_idle(proxy.connect(client_id))
        assert api.wait_for_one(client_id, "DELETE").close_code == 1006

    def test_pings_keep_it_up_for_ten_minutes_in_fast_motion(self, idle: Future[None]) -> None:
        idle.result(4 * DEADLINE_S)
