"""Let a real Prometheus watch a real gateway, with the alerts and the dashboard that come along."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pytest
from harness.api import FakeApi
from harness.dashboards import (
    expressions,
    filled_in,
    load_dashboard,
    panels,
    rule_expressions,
    selectors,
)
from harness.every_traffic import make_traffic, scrape
from harness.gateway import GatewayProcess
from harness.prometheus import Prometheus, needs_prometheus
from harness.valkey import ValkeyProcess
from harness.waiting import until

WORKERS: Final = 2
OF_A_BUSY_MACHINE: Final = {"Ws2apiLoopLag", "Ws2apiRedisLag", "Ws2apiApiSlow", "Ws2apiPushesSlow"}


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
        there_are = scrape(watched).keys()
        assert {name for name, _ in there_are} == {
            name for name in prometheus.get("label/__name__/values") if name.startswith("ws2api_")
        }
        scraped = prometheus.value("scrape_samples_post_metric_relabeling")
        assert scraped == len(there_are)

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
