"""Run HAProxy with the shipped haproxy.cfg in front of the gateway."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness.api import FakeApi, echo
from harness.certificates import Certificate, make_certificate
from harness.fault_proxy import FaultProxy
from harness.gateway import GatewayProcess
from harness.proxies import (
    CONFIGURATIONS,
    HaproxyProcess,
    bundle,
    find_program,
    haproxy_file,
)
from harness.push import PushClient
from harness.valkey import ValkeyProcess
from harness.waiting import DEADLINE_S, until
from harness.workers import worker_pids
from ws2api.gateway.settings import Settings

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

need("haproxy", "openssl")

FILE = (CONFIGURATIONS / "haproxy.cfg").read_text()
DOCUMENTATION = CONFIGURATIONS.parent / "docs"


def setting(name: str) -> str:
    """Return the default of a setting at the top of the file."""
    (value,) = re.findall(rf"^    presetenv {name} +(\S+)", FILE, re.MULTILINE)
    return str(value)


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
) -> Iterator[HaproxyProcess]:
    folder = tmp_path_factory.mktemp("haproxy")
    with HaproxyProcess([shared_gateway], folder=folder, certificate=certificate) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: HaproxyProcess) -> Iterator[HaproxyProcess]:
    yield shared_proxy
    shared_proxy.disconnect_all()
    assert shared_proxy.is_running
    assert "ALERT" not in shared_proxy.output


@pytest.fixture(scope="module", autouse=True)
def idle(
    shared_api: FakeApi, certificate: Certificate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Future[None]]:
    """Begin what takes long at once, so that it passes while the other tests run."""
    with (
        GatewayProcess(api=shared_api.url, **PINGS_IN_FAST_MOTION) as gateway,
        HaproxyProcess(
            [gateway],
            folder=tmp_path_factory.mktemp("idle"),
            certificate=certificate,
            PROXY_TUNNEL_TIMEOUT=TUNNEL_TIMEOUT,
        ) as proxy,
        idling(shared_api, proxy) as idle,
    ):
        yield idle


class StartHaproxy:
    """Start HAProxy in front of these gateways."""

    def __init__(self, running: ExitStack, folder: Path, certificate: Certificate) -> None:
        self._running = running
        self._folder = folder
        self._certificate = certificate

    def __call__(
        self, *gateways: GatewayProcess, changes: Mapping[str, str] | None = None, **settings: str
    ) -> HaproxyProcess:
        return self._running.enter_context(
            HaproxyProcess(
                gateways,
                folder=self._folder,
                certificate=self._certificate,
                changes=changes,
                **settings,
            )
        )


@pytest.fixture
def start_haproxy(certificate: Certificate, tmp_path: Path) -> Iterator[StartHaproxy]:
    with ExitStack() as running:
        yield StartHaproxy(running, tmp_path, certificate)


class TestContract(ProxyContract):
    """What holds behind every proxy."""


class TestFile:
    @pytest.mark.parametrize("hosts", [1, 2])
    def test_is_valid(
        self, gateway: GatewayProcess, certificate: Certificate, tmp_path: Path, hosts: int
    ) -> None:
        file = haproxy_file(tmp_path, [gateway] * hosts, {})
        done = subprocess.run(
            [find_program("haproxy") or "", "-c", "-f", str(file)],
            env=os.environ | {"PROXY_CERTIFICATE": str(bundle(certificate))},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done
        assert "WARNING" not in done.stdout + done.stderr
        assert "ALERT" not in done.stdout + done.stderr

    def test_opens_no_port_to_others_but_that_of_the_clients(self) -> None:
        binds = re.findall(r"^    bind (\S+)", FILE, re.MULTILINE)
        assert binds == ['"${PROXY_BIND}"', '"${PROXY_STATUS}"']
        assert setting("PROXY_STATUS").startswith("127.0.0.1:")

    def test_waits_longer_than_the_gateway(self) -> None:
        gateway = Settings()
        silence_s = int(setting("PROXY_TUNNEL_TIMEOUT").removesuffix("m")) * 60
        assert silence_s > gateway.ping_interval + gateway.ping_timeout
        for side in ("client", "server"):
            (timeout,) = re.findall(rf"timeout {side} +(\d+)s", FILE)
            assert int(timeout) > gateway.api_timeout
        assert setting("GATEWAY") == f"127.0.0.1:{gateway.listen.port}"
        assert setting("GATEWAY_ADMIN_PORT") == str(gateway.admin_listen.port)

    def test_pages_say_what_the_file_says(self) -> None:
        page = (DOCUMENTATION / "haproxy.md").read_text()
        assert f"more than {setting('PROXY_RATE')} connects in 10 seconds" in page
        assert f"| one with more than {setting('PROXY_RATE_TLS')} |" in page
        (shown,) = re.findall(
            r"```haproxy\n(.*?)```", (DOCUMENTATION / "several-hosts.md").read_text(), re.DOTALL
        )
        assert "".join(f"    # {line.strip()}\n" for line in shown.splitlines()) in FILE


def test_subdomains_may_be_let_in(
    gateway: GatewayProcess, start_haproxy: StartHaproxy, client_id: str
) -> None:
    proxy = start_haproxy(gateway, changes={"# acl own_page": "acl own_page"})
    assert_lets_subdomains_in(proxy, client_id)


class TestRate:
    def test_an_address_that_connects_too_often_gets_429(
        self, gateway: GatewayProcess, start_haproxy: StartHaproxy, api: FakeApi, client_id: str
    ) -> None:
        proxy = start_haproxy(gateway, PROXY_RATE="10")
        first = proxy.connect(f"{client_id}-first", source="127.0.0.21")
        answers = [proxy.handshake(client_id, source="127.0.0.21") for _ in range(14)]
        assert [answer.status for answer in answers] == [101] * 9 + [429] * 5
        assert answers[-1].headers["Retry-After"] == "10"
        assert answers[-1].text == "too many connects, try again later\n"
        assert len(api.wait_for(client_id, "GET", count=9)) == 9
        # Nobody else is kept out, nobody is thrown out, and it can be forgiven by hand.
        proxy.connect(f"{client_id}-other", source="127.0.0.22").close()
        assert "key=::ffff:127.0.0.21 " in proxy.command("show table clients")
        proxy.command("set table clients key ::ffff:127.0.0.21 data.http_req_rate 0")
        proxy.connect(f"{client_id}-forgiven", source="127.0.0.21").close()
        first.close()

    def test_refused_requests_count(
        self, gateway: GatewayProcess, start_haproxy: StartHaproxy, client_id: str
    ) -> None:
        proxy = start_haproxy(gateway, PROXY_RATE="10")
        statuses = [proxy.handshake(client_id, {"Origin": "x"}).status for _ in range(15)]
        assert statuses[0] == 403
        assert statuses[-1] == 429

    def test_an_office_may_be_named(
        self, gateway: GatewayProcess, start_haproxy: StartHaproxy, client_id: str
    ) -> None:
        office = {"acl unlimited src 192.0.2.0/24": "acl unlimited src 127.0.0.24/30"}
        proxy = start_haproxy(gateway, changes=office, PROXY_RATE="3", PROXY_RATE_TLS="5")
        statuses = [proxy.handshake(client_id, source="127.0.0.26").status for _ in range(10)]
        assert statuses == [101] * 10

    def test_far_beyond_it_there_is_not_even_tls(
        self, gateway: GatewayProcess, start_haproxy: StartHaproxy
    ) -> None:
        proxy = start_haproxy(gateway, PROXY_RATE_TLS="5")
        for _ in range(5):
            proxy.open_stream("127.0.0.23")
        with pytest.raises((OSError, EOFError)):
            proxy.open_stream("127.0.0.23")
        proxy.open_stream("127.0.0.22")


class TestSeveralHosts:
    @pytest.fixture
    def link(self, valkey: ValkeyProcess) -> Iterator[FaultProxy]:
        """Stand between the first host and Redis."""
        with FaultProxy(Path(valkey.url.removeprefix("unix://"))) as link:
            yield link

    @pytest.fixture
    def hosts(
        self, link: FaultProxy, valkey: ValkeyProcess, start_gateway: StartGateway, api: FakeApi
    ) -> list[GatewayProcess]:
        return [
            start_gateway(api=api.url, redis=redis)
            for redis in (f"redis://127.0.0.1:{link.port}/0", valkey.url)
        ]

    def test_clients_spread_and_pushes_reach_them_from_any_host(
        self,
        hosts: list[GatewayProcess],
        start_haproxy: StartHaproxy,
        client_id: str,
    ) -> None:
        proxy = start_haproxy(*hosts)
        names = [f"{client_id}-{number}" for number in range(8)]
        clients = {name: proxy.connect(name) for name in names}
        assert [host.count("connections_open") for host in hosts] == [4, 4]
        for host in hosts:
            for name, client in clients.items():
                assert host.push_client().push(name, f"for {name}").status == 200
                assert client.receive() == f"for {name}"

    def test_a_red_host_drains_and_all_red_still_serve(
        self,
        hosts: list[GatewayProcess],
        link: FaultProxy,
        valkey: ValkeyProcess,
        start_haproxy: StartHaproxy,
        api: FakeApi,
        client_id: str,
    ) -> None:
        proxy = start_haproxy(*hosts)
        old = [f"{client_id}-old-{number}" for number in range(4)]
        for name in old:
            api.on(name, "POST", echo)
        clients = {name: proxy.connect(name) for name in old}
        assert hosts[0].count("connections_open") == 2

        link.refuse()
        link.reset()
        proxy.await_status("host1", "DOWN")
        assert hosts[0].admin_get("/readyz").status == 503
        assert "no connection to redis" in proxy.output  # what /readyz said is in the log
        for number in range(6):
            proxy.connect(f"{client_id}-new-{number}")
        assert [host.count("connections_open") for host in hosts] == [2, 2 + 6]
        for name, client in clients.items():
            client.send("still here")
            assert client.receive() == "still here", name

        valkey.stop()
        proxy.await_status("host2", "DOWN")
        for number in range(4):
            name = f"{client_id}-late-{number}"
            api.on(name, "POST", echo)
            late = proxy.connect(name)
            late.send("served")
            assert late.receive() == "served"

        valkey.start()
        link.restore()
        for server in ("host1", "host2"):
            proxy.await_status(server, "UP")

    def test_a_host_that_dies_costs_no_connect(
        self, hosts: list[GatewayProcess], start_haproxy: StartHaproxy, client_id: str
    ) -> None:
        proxy = start_haproxy(*hosts)
        survivor = proxy.connect(f"{client_id}-before"), proxy.connect(f"{client_id}-before-2")
        hosts[0].kill()
        assert proxy.status_of("host1") == "UP", "it is not known yet"
        for number in range(10):
            proxy.connect(f"{client_id}-{number}")
        assert hosts[1].count("connections_open") == 1 + 10
        assert survivor

    def test_a_host_that_is_drained_and_stopped_costs_no_connect(
        self, hosts: list[GatewayProcess], start_haproxy: StartHaproxy, client_id: str
    ) -> None:
        proxy = start_haproxy(*hosts, PROXY_RATE_TLS="100000")
        clients = [proxy.connect(f"{client_id}-{number}") for number in range(2)]
        with connecting_all_the_time(proxy, client_id) as report:

            def see_connects() -> None:
                count = report.count
                until(lambda: report.count > count + 10, what="connects")

            see_connects()
            proxy.command("set server gateway/host1 state drain")
            see_connects()
            hosts[0].stop()
            see_connects()
        assert report.failures == []
        clients[0].assert_closed(1001)
        clients[1].close()

    def test_a_host_is_taken_out_and_back_by_hand(
        self, hosts: list[GatewayProcess], start_haproxy: StartHaproxy, client_id: str
    ) -> None:
        proxy = start_haproxy(*hosts)
        clients = [proxy.connect(f"{client_id}-{number}") for number in range(2)]
        proxy.command("set server gateway/host1 state drain")
        proxy.await_status("host1", "DRAIN")
        clients += [proxy.connect(f"{client_id}-new-{number}") for number in range(4)]
        assert [host.count("connections_open") for host in hosts] == [1, 5]
        proxy.command("set server gateway/host1 state ready")
        clients += [proxy.connect(f"{client_id}-back-{number}") for number in range(4)]
        assert [host.count("connections_open") for host in hosts] == [5, 5]
        for client in clients:
            client.close()


class TestRestarts:
    def test_rolling_restart_under_traffic_fails_no_connect(
        self,
        start_gateway: StartGateway,
        start_haproxy: StartHaproxy,
        api: FakeApi,
        client_id: str,
    ) -> None:
        gateway = start_gateway(api=api.url, workers=2, drain_seconds="1s")
        proxy = start_haproxy(gateway, PROXY_RATE_TLS="100000")
        over = "the old workers have ended"
        clients = [proxy.connect(f"{client_id}-stays-{number}") for number in range(10)]
        with connecting_all_the_time(proxy, client_id) as report:
            for count in (1, 2):
                os.kill(gateway.pid, signal.SIGHUP)
                until(
                    lambda count=count: gateway.stderr.count(over) >= count,  # type: ignore[misc]
                    timeout_s=2 * DEADLINE_S,
                    what=over,
                )
        assert report.failures == []
        assert report.count > 0
        for client in clients:
            client.assert_closed(1012)

    def test_a_killed_worker_costs_no_connect(
        self,
        start_gateway: StartGateway,
        start_haproxy: StartHaproxy,
        api: FakeApi,
        client_id: str,
    ) -> None:
        gateway = start_gateway(api=api.url, workers=2)
        proxy = start_haproxy(gateway, PROXY_RATE_TLS="100000")
        with connecting_all_the_time(proxy, client_id) as report:
            until(lambda: report.count > 10, what="connects before")
            killed = worker_pids(gateway)[0]
            os.kill(killed, signal.SIGKILL)
            until(lambda: worker_pids(gateway)[0] not in (killed, None), what="a new worker")
        assert report.failures == []

    def test_reload_of_haproxy_under_traffic_fails_no_connect_and_cuts_nobody(
        self, gateway: GatewayProcess, start_haproxy: StartHaproxy, api: FakeApi, client_id: str
    ) -> None:
        proxy = start_haproxy(gateway, PROXY_RATE_TLS="100000")
        name = f"{client_id}-stays"
        api.on(name, "POST", echo)
        client = proxy.connect(name)
        with connecting_all_the_time(proxy, client_id) as report:
            # A signal in its very first moments is lost on HAProxy.
            until(lambda: report.count > 10, what="connects through the old process")
            loaded = proxy.output.count("Loading success")
            proxy.signal(signal.SIGUSR2)
            until(lambda: proxy.output.count("Loading success") > loaded, what="the new process")
            count = report.count
            until(lambda: report.count > count + 10, what="connects through the new process")
        assert report.failures == []
        client.send("still here")
        assert client.receive() == "still here"


class TestStatus:
    def test_page_and_metrics(self, proxy: HaproxyProcess) -> None:
        page = PushClient(proxy.status_address)
        assert "host1" in page.request("GET", "/").text
        assert "haproxy_server_status" in page.request("GET", "/metrics").text
        # What the head of the file cuts out of the table.
        names = page.request("GET", "/;csv").text.partition("\n")[0].split(",")
        cut = [names[number - 1] for number in (1, 2, 5, 18, 57)]
        assert cut == ["# pxname", "svname", "scur", "status", "last_chk"]
        page.close()


class TestIdle:
    def test_without_pings_it_is_cut(
        self,
        start_gateway: StartGateway,
        start_haproxy: StartHaproxy,
        api: FakeApi,
        client_id: str,
    ) -> None:
        gateway = start_gateway(api=api.url, ping_interval=0)
        proxy = start_haproxy(gateway, PROXY_TUNNEL_TIMEOUT="200ms")
        assert_is_cut_while_idle(proxy.connect(client_id))
        told = api.wait_for_one(client_id, "DELETE")
        assert (told.close_code, told.text) == (1006, "EOF")
        # As the comment in the file says.
        until(lambda: " cD-- " in proxy.output or " sD-- " in proxy.output, what="the two letters")

    def test_pings_keep_it_up_for_ten_minutes_in_fast_motion(self, idle: Future[None]) -> None:
        idle.result(4 * DEADLINE_S)
