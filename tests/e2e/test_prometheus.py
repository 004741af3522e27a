"""Let a real Prometheus watch a real gateway, with the alerts and the dashboard that come along."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import pytest
from harness.api import Drop, FakeApi, Reply, echo
from harness.dashboards import (
    expressions,
    filled_in,
    load_dashboard,
    panels,
    rule_expressions,
    selectors,
)
from harness.gateway import GatewayProcess
from harness.prometheus import Prometheus, needs_prometheus, needs_promtool, promtool
from harness.push import PushClient
from harness.valkey import ValkeyProcess
from harness.waiting import until
from harness.workers import worker_pids
from harness.ws import Op, WsClient, close_payload
from prometheus_client.parser import text_string_to_metric_families as parse

WORKERS: Final = 2
ALL_CODES: Final = (*range(1000, 1015), *range(3000, 5000))
OF_A_BUSY_MACHINE: Final = {"Ws2apiLoopLag", "Ws2apiRedisLag", "Ws2apiApiSlow", "Ws2apiPushesSlow"}
BEGINS_ANEW: Final = "ws2api_worker_cpu_seconds_total"

GARBAGE: Final = (
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /../etc HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /someone HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx",
    b"GET /a?worker=7&code=4242 HTTP/1.1\r\nHost: x\r\nws2api_worker: 99\r\n\r\n",
    b"BREW /%00 HTTP/9.9\r\n\r\n",
    b'GET /x"}{evil="1 HTTP/1.1\r\nHost: x\r\n\r\n',
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
    b"\x00\xff\xfe\r\n\r\n",
)

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(gateway: GatewayProcess) -> Series:
    """Return every series of /metrics, over a connection of its own."""
    connection = PushClient(gateway.admin_address)
    families = parse(connection.request("GET", "/metrics").text)
    connection.close()
    samples = [sample for family in families for sample in family.samples]
    series = {(one.name, tuple(sorted(one.labels.items()))): one.value for one in samples}
    assert len(series) == len(samples), "a series is there twice"
    return series


def only_growing(series: Series) -> Series:
    """Leave out gauges, and what describes a process."""
    ends = ("_total", "_bucket", "_sum", "_count")
    return {
        key: value
        for key, value in series.items()
        if key[0].endswith(ends) and key[0] != BEGINS_ANEW
    }


def series_by_name(series: Series) -> dict[str, int]:
    names = [name for name, _ in series]
    return {name: names.count(name) for name in names}


def make_traffic(gateway: GatewayProcess, api: FakeApi) -> None:
    """Let happen what can happen to a client, a request and a push."""
    api.on("talks", "POST", echo)
    client = gateway.connect("talks")
    for message in ("one", b"two"):
        client.send(message)
        assert client.receive() == message

    def pushed(path: str) -> int:
        return gateway.count("push_duration_seconds_count", path=path)

    local, remote = pushed("local"), pushed("remote")
    while pushed("local") == local or pushed("remote") == remote:
        assert gateway.push_client().push("talks", "pushed").status == 200
        assert client.receive() == "pushed"
    push = gateway.push_client()
    assert push.push("nobody", "pushed").status == 404
    assert push.push("talks", "pushed", generation=1).status == 412
    assert push.request("POST", "/", b"x").status == 400
    assert push.delete("talks", code=4242).status == 200
    client.assert_closed(4242)

    api.on("refused", "GET", Reply("go away", status=401))
    assert gateway.handshake("refused").status == 401
    assert gateway.handshake("..").status == 400
    api.on("broken", "GET", Reply(status=500))
    assert gateway.handshake("broken").status == 502

    failed = gateway.count("errors", cause="status")
    api.on("unlucky", "POST", Reply(status=500), Drop(reset=True))
    unlucky = gateway.connect("unlucky")
    unlucky.send("met with a 500")
    until(lambda: gateway.count("errors", cause="status") > failed)
    breaker = gateway.connect("breaks-the-protocol")
    breaker.send_frame(Op.TEXT, b"\xff")
    breaker.assert_closed(1007)
    gateway.connect("hangs-up").hang_up()
    gateway.connect("says-good-bye").close(1000)
    unlucky.close(3999)
    until(lambda: not gateway.count("connections_open"))
    until(lambda: not gateway.count("disconnects_waiting"))


@pytest.fixture(scope="module")
def watched_api() -> Iterator[FakeApi]:
    with FakeApi() as api:
        yield api


@pytest.fixture(scope="module")
def watched(watched_api: FakeApi) -> Iterator[GatewayProcess]:
    """Run a gateway that has seen all kinds of traffic."""
    with GatewayProcess(api=watched_api.url, workers=WORKERS, ping_interval=0) as gateway:
        make_traffic(gateway, watched_api)
        yield gateway


@dataclass
class Trouble:
    """Hold a gateway, what it needs, and a Prometheus that complains without delay."""

    gateway: GatewayProcess
    api: FakeApi
    valkey: ValkeyProcess
    prometheus: Prometheus

    def alerts(self) -> set[str]:
        """Name the alerts that fire, but for those that tell of a busy machine."""
        return self.prometheus.firing() - OF_A_BUSY_MACHINE


@pytest.fixture(scope="module")
def trouble(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trouble]:
    folder = tmp_path_factory.mktemp("trouble")
    with (
        FakeApi() as api,
        ValkeyProcess(folder) as valkey,
        GatewayProcess(api=api.url, redis=valkey.url, workers=WORKERS) as gateway,
        Prometheus(folder, gateway.admin_address, is_hasty=True) as prometheus,
    ):
        yield Trouble(gateway, api, valkey, prometheus)
        assert not api.violations


@pytest.fixture(scope="module")
def prometheus(
    watched: GatewayProcess,
    watched_api: FakeApi,
    # Not of use here, but a Prometheus scrapes nothing in its first 5 s: so let both wait at once.
    trouble: Trouble,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Prometheus]:
    """Run a Prometheus that has seen the traffic happen."""
    folder = tmp_path_factory.mktemp("prometheus")
    with Prometheus(folder, watched.admin_address) as server:
        server.await_scrapes(2)
        make_traffic(watched, watched_api)
        server.await_scrapes(3)
        yield server


class TestMetrics:
    @needs_promtool
    def test_promtool_finds_nothing_to_complain_about(self, watched: GatewayProcess) -> None:
        assert promtool("check", "metrics", text=watched.admin_get("/metrics").text) == ""

    def test_traffic_is_told_apart(self, watched: GatewayProcess) -> None:
        """Look whether the traffic was of all kinds, for what the other tests see of it."""
        for labels in (
            {"name": "closes", "cause": "client", "code": "3xxx"},
            {"name": "closes", "cause": "api", "code": "4xxx"},
            {"name": "closes", "cause": "lost", "code": "1006"},
            {"name": "closes", "cause": "protocol", "code": "1007"},
            {"name": "handshakes_refused", "status": "401"},
            {"name": "handshakes_refused", "status": "502"},
            {"name": "errors", "cause": "status"},
            {"name": "pushes", "outcome": "ok"},
            {"name": "pushes", "outcome": "not_found"},
            {"name": "pushes", "outcome": "stale"},
            {"name": "pushes", "outcome": "bad_request"},
        ):
            assert watched.count(**labels), labels
        counted = scrape(watched)
        for name in ("connect_duration_seconds", "loop_lag_seconds"):
            assert sum(v for (n, _), v in counted.items() if n == f"ws2api_{name}_count")
        for name, label, values in (
            ("api_request_duration_seconds", "event", ("connect", "message", "disconnect")),
            ("push_duration_seconds", "path", ("local", "remote")),
        ):
            for value in values:
                found = [
                    count
                    for (series, labels), count in counted.items()
                    if series == f"ws2api_{name}_count" and (label, value) in labels
                ]
                assert len(found) == WORKERS
                assert sum(found), (name, value)


@needs_prometheus
class TestPrometheus:
    def test_scrapes_the_gateway(self, prometheus: Prometheus) -> None:
        [target] = prometheus.get("targets")["activeTargets"]
        assert (target["health"], target["lastError"]) == ("up", "")
        assert target["labels"] == {"job": "ws2api", "instance": prometheus.target}
        assert prometheus.value("up") == 1

    def test_holds_every_series_of_the_gateway(
        self, prometheus: Prometheus, watched: GatewayProcess
    ) -> None:
        there_are = set(series_by_name(scrape(watched)))
        assert there_are == {
            name for name in prometheus.get("label/__name__/values") if name.startswith("ws2api_")
        }
        scraped = prometheus.value("scrape_samples_post_metric_relabeling")
        assert scraped == len(scrape(watched))

    def test_evaluates_every_rule(self, prometheus: Prometheus) -> None:
        expected = rule_expressions().keys()
        until(lambda: all(rule["health"] != "unknown" for rule in prometheus.rules()))
        rules = prometheus.rules()
        assert {rule["name"] for rule in rules} == expected
        assert [rule for rule in rules if rule["health"] != "ok"] == []

    def test_nothing_alerts_while_all_is_well(self, prometheus: Prometheus) -> None:
        assert prometheus.firing() == set()

    def test_expressions_find_what_they_ask_for(self, prometheus: Prometheus) -> None:
        prometheus.await_scrapes(2)  # so that what is recorded from recordings is there
        for expression in [*expressions(load_dashboard()), *rule_expressions().values()]:
            for name, matchers in selectors(expression):
                assert prometheus.query(f"{name}{{{matchers}}}"), f"{name}{{{matchers}}}"

    def test_every_panel_shows_something(self, prometheus: Prometheus) -> None:
        for panel in panels(load_dashboard()):
            for target in panel["targets"]:
                result = prometheus.query(filled_in(target["expr"]))
                assert result, (panel["title"], target["expr"])
                for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                    assert all(label in one["metric"] for one in result), (panel["title"], label)
                legends = [self._legend(target["legendFormat"], one["metric"]) for one in result]
                if panel["type"] == "timeseries":
                    assert len(set(legends)) == len(legends), panel["title"]

    def _legend(self, form: str, labels: dict[str, str]) -> str:
        return re.sub(r"\{\{(\w+)\}\}", lambda match: labels[match[1]], form)

    def test_annotations_are_understood(self, prometheus: Prometheus) -> None:
        for expression in expressions(load_dashboard()):
            prometheus.query(expression)

    def test_variables_find_the_gateway(self, prometheus: Prometheus) -> None:
        for variable in load_dashboard()["templating"]["list"][1:]:
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert match
            values = prometheus.get(f"label/{match[2]}/values", **{"match[]": filled_in(match[1])})
            assert values == [{"job": "ws2api", "instance": prometheus.target}[match[2]]]


@needs_prometheus
class TestAlerts:
    def test_fire_for_a_gateway_in_trouble(self, trouble: Trouble) -> None:
        """Take one thing after the other away: the API, Redis, the gateway itself."""
        gateway, api, prometheus = trouble.gateway, trouble.api, trouble.prometheus
        until(lambda: gateway.admin_get("/readyz").status == 200)
        prometheus.await_scrapes(3)
        assert trouble.alerts() == set()

        client = gateway.connect("client")
        api.close()
        client.send("in vain")
        until(lambda: trouble.alerts() == {"Ws2apiBreakerOpen"})
        api.open()
        api.wait_for_one("client", "POST")
        until(lambda: trouble.alerts() == set())

        trouble.valkey.stop()
        until(lambda: trouble.alerts() == {"Ws2apiRedisAway"})
        trouble.valkey.start()
        until(lambda: trouble.alerts() == set())
        client.close()
        api.wait_for_one("client", "DELETE")

        gateway.stop()
        until(lambda: trouble.alerts() == {"Ws2apiDown"})


class TestRestarts:
    """No counter of a worker may ever fall, whatever becomes of its process."""

    @pytest.fixture
    def restless(self, own_api: FakeApi) -> Iterator[GatewayProcess]:
        with GatewayProcess(api=own_api.url, workers=WORKERS, drain_seconds="1s") as gateway:
            make_traffic(gateway, own_api)
            yield gateway

    def test_counters_survive_a_kill(self, restless: GatewayProcess) -> None:
        for _ in range(WORKERS):
            restless.connect(f"stays-{_}")

        def kill_each() -> None:
            for number in range(WORKERS):
                old = worker_pids(restless)[number]
                os.kill(old, signal.SIGKILL)
                until(lambda number=number, old=old: self._is_back(restless, number, old))

        before, after = self._watch(restless, kill_each)
        name = "ws2api_worker_restarts_total"
        assert self._of_workers(before, name) == [0] * WORKERS
        assert self._of_workers(after, name) == [1] * WORKERS

    def test_counters_survive_a_rolling_restart(self, restless: GatewayProcess) -> None:
        old = worker_pids(restless)
        client = restless.connect("moves")

        def roll() -> None:
            os.kill(restless.pid, signal.SIGHUP)
            client.assert_closed(1012)
            until(lambda: "the old workers have ended" in restless.stderr)

        before, after = self._watch(restless, roll)
        assert not set(worker_pids(restless)) & set(old)
        assert sum(self._of_workers(after, "ws2api_worker_restarts_total")) == 0
        name = "ws2api_connections_opened_total"
        assert self._of_workers(before, name) == self._of_workers(after, name)
        assert sum(self._of_workers(after, name)) > 0

    def _is_back(self, gateway: GatewayProcess, number: int, old: int) -> bool:
        return (
            worker_pids(gateway)[number] not in (None, old)
            and gateway.count("workers_serving") == WORKERS
        )

    def _watch(self, gateway: GatewayProcess, act: Callable[[], None]) -> tuple[Series, Series]:
        """Scrape without pause while something happens; return the first and the last scrape."""
        is_over = threading.Event()
        falls: list[object] = []
        scrapes = [only_growing(scrape(gateway))]

        def watch() -> None:
            while not is_over.is_set():
                scrapes.append(only_growing(scrape(gateway)))
                earlier, later = scrapes[-2:]
                falls.extend(key for key in earlier if later.get(key, -1) < earlier[key])

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            act()
        finally:
            is_over.set()
            watcher.join()
        assert len(scrapes) > 2
        assert falls == []
        last = only_growing(scrape(gateway))
        assert all(last[key] >= value for key, value in scrapes[-1].items())
        return scrapes[0], last

    def _of_workers(self, series: Series, name: str) -> list[float]:
        return [value for (found, _), value in sorted(series.items()) if found == name]


class TestCardinality:
    @pytest.fixture(scope="class")
    @classmethod
    def busy(cls, watched_api: FakeApi) -> Iterator[GatewayProcess]:
        with GatewayProcess(api=watched_api.url, workers=WORKERS) as gateway:
            yield gateway

    @pytest.fixture
    def unchanged(self, busy: GatewayProcess) -> Iterator[GatewayProcess]:
        """Find the same series after a test as before it."""
        before = scrape(busy).keys()
        yield busy
        busy.disconnect_all()
        until(lambda: not busy.count("connections_open"))
        assert scrape(busy).keys() == before

    def test_does_not_grow_with_clients(
        self, unchanged: GatewayProcess, watched_api: FakeApi
    ) -> None:
        for number in range(300):
            unchanged.connect(f"client-{number}-%C3%A9-{'x' * (number % 200)}")
        assert unchanged.count("connections_open") == 300

    def test_does_not_grow_with_close_codes(self, unchanged: GatewayProcess) -> None:
        counted = unchanged.count("closes")
        for code in ALL_CODES:
            self._leave(unchanged, code)
        until(lambda: unchanged.count("closes") == counted + len(ALL_CODES))
        assert unchanged.count("closes", code="3xxx", cause="client") == 1000
        assert unchanged.count("closes", code="4xxx", cause="client") == 1000

    def _leave(self, gateway: GatewayProcess, code: int) -> None:
        client = WsClient(gateway.open_stream(), "/leaves")
        client.send_frame(Op.CLOSE, close_payload(code))
        client.stream.read_to_end()
        client.stream.close()

    def test_does_not_grow_with_garbage(self, unchanged: GatewayProcess) -> None:
        for garbage in GARBAGE:
            for address in (unchanged.clients_address, unchanged.pushes_address):
                stream = unchanged.push_client(address).stream
                stream.write(garbage)
                stream.socket.shutdown(1)
                stream.read_to_end()
        for number in range(50):
            unchanged.admin_get(f"/metrics?name[]=x{number}")
            unchanged.admin_get(f"/nowhere/{number}")
            unchanged.push_client().push(f"nobody-{number}", "?")

    def test_does_not_grow_with_what_the_api_answers(
        self, unchanged: GatewayProcess, watched_api: FakeApi
    ) -> None:
        for status in [each.value for each in HTTPStatus if each >= 400]:
            watched_api.on(f"gets-{status}", "GET", Reply("no", status=status))
            unchanged.handshake(f"gets-{status}")
