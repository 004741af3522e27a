"""Keep dashboards/ and docs/metrics.md true to the metrics that there are."""

from __future__ import annotations

import itertools
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from harness.dashboards import (
    FOLDER,
    expressions,
    grouping_labels,
    load_dashboard,
    matched_labels,
    panels,
    rule_expressions,
    selectors,
)
from harness.prometheus import needs_promtool, promtool

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "metrics.md").read_text()
ALERTS = (FOLDER / "alerts.yml").read_text()

OF_TARGETS = {"job", "instance"}
"""Labels that Prometheus adds."""

WANTED = {
    "connections by worker": "ws2api_connections_open",
    "API latency by event": "ws2api_api_request_duration_seconds_bucket",
    "push latency by path": "ws2api_push_duration_seconds_bucket",
    "connect time": "ws2api_connect_duration_seconds_bucket",
    "closes by code and cause": "ws2api_closes_total",
    "queue of messages": "ws2api_messages_queued",
    "queue for the API": "ws2api_api_queue_length",
    "queue of connects": "ws2api_connects_waiting",
    "paused clients": "ws2api_clients_paused",
    "write-buffer bytes": "ws2api_write_buffer_bytes",
    "retries": "ws2api_requests_retried_total",
    "breaker state": "ws2api_breaker_state",
    "Redis lag": "ws2api_redis_lag_seconds",
    "reaper backlog": "ws2api_disconnects_pending",
    "loop lag": "ws2api_loop_lag_seconds_bucket",
    "memory": "ws2api_worker_resident_memory_bytes",
    "open files": "ws2api_worker_open_files",
    "build info": "ws2api_build_info",
}
"""What an operator was promised to see."""


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return load_dashboard()


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    """Load the script that makes the tables of docs/metrics.md."""
    return runpy.run_path(str(ROOT / "scripts" / "metrics_table.py"))


@pytest.fixture(scope="module")
def labels(table: dict[str, Any]) -> dict[str, set[str]]:
    """Name the labels of every series of /metrics."""
    found: dict[str, set[str]] = {}
    for family in table["families"](2):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture(scope="module")
def asked(dashboard: dict[str, Any]) -> list[str]:
    """Return all expressions of the dashboard and of the rules."""
    return [*expressions(dashboard), *rule_expressions().values()]


def anchors(page: str) -> set[str]:
    """Return what a link to a heading of this page may name."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


class TestPage:
    def test_holds_the_tables_that_the_declarations_make(self, table: dict[str, Any]) -> None:
        assert table["replace_tables"](PAGE) == PAGE, "run scripts/metrics_table.py --write"

    def test_tells_of_every_metric(self, labels: dict[str, set[str]]) -> None:
        for name in labels:
            assert f"| `{re.sub('_(bucket|count|sum)$', '', name)}` |" in PAGE

    def test_tells_of_every_alert(self) -> None:
        names = re.findall(r"^ +- alert: (\w+)", ALERTS, re.MULTILINE)
        assert re.findall(r"^\| `(Ws2api\w+)` \|", PAGE, re.MULTILINE) == names

    def test_uses_only_metrics_that_exist(self, labels: dict[str, set[str]]) -> None:
        known = {re.sub("_(bucket|count|sum)$", "", name) for name in labels}
        recorded = {name for name in rule_expressions() if ":" in name}
        used = {name for name, _ in selectors(PAGE)} - labels.keys() - recorded
        assert used <= known | {"up"}

    def test_links_only_to_what_exists(self) -> None:
        for path, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", PAGE):
            if not path.startswith("http"):
                assert not path or (ROOT / "docs" / path).exists(), path
                assert not anchor or path or anchor in anchors(PAGE), anchor


class TestCardinality:
    def test_is_what_the_page_says(self, table: dict[str, Any]) -> None:
        said = re.search(r"Each worker has (\d+) series and the gateway (\d+) more", PAGE)
        assert said
        of_worker, of_gateway = int(said[1]), int(said[2])
        for workers in (1, 2, 5):
            assert table["series"](workers) == workers * of_worker + of_gateway

    def test_is_bounded(self, table: dict[str, Any]) -> None:
        assert table["series"](2) - table["series"](1) < 300, "a label has too many values"


class TestAlerts:
    @needs_promtool
    def test_promtool_accepts_the_rules(self) -> None:
        assert "SUCCESS" in promtool("check", "rules", FOLDER / "alerts.yml")

    @needs_promtool
    def test_promtool_accepts_the_scrape_example(self) -> None:
        assert "SUCCESS" in promtool("check", "config", FOLDER / "prometheus.yml")

    @needs_promtool
    def test_each_fires_when_it_should(self) -> None:
        assert "SUCCESS" in promtool("test", "rules", FOLDER / "alerts_test.yml")

    def test_each_has_a_scene_in_which_it_fires(self) -> None:
        declared = re.findall(r"^ +- alert: (\w+)", ALERTS, re.MULTILINE)
        tests = (FOLDER / "alerts_test.yml").read_text()
        assert len(set(declared)) == len(declared)
        assert set(re.findall(r'alertname="(\w+)"', tests)) == set(declared)

    def test_all_is_well_with_figures_of_every_alert(self) -> None:
        """Look whether the scene in which nothing fires could have let each one fire."""
        tests = (FOLDER / "alerts_test.yml").read_text()
        well = tests.partition("name: all is well")[2].partition("  - name:")[0]
        played = set(re.findall(r"series: '(\w+)", well))
        for name, expression in rule_expressions().items():
            used = {metric for metric, _ in selectors(expression) if ":" not in metric}
            assert used <= played, name

    @pytest.mark.parametrize("name", [name for name in rule_expressions() if ":" not in name])
    def test_each_says_what_to_do(self, name: str) -> None:
        rule = ALERTS.partition(f"- alert: {name}\n")[2].partition("      - alert:")[0]
        assert re.search(r"^ +labels: \{severity: (critical|warning)\}$", rule, re.MULTILINE)
        assert re.search(r"^ +summary: .{10,}", rule, re.MULTILINE)
        assert re.search(r"^ +description: .", rule, re.MULTILINE)
        link = re.search(r"^ +runbook_url: docs/troubleshooting\.md#(\S+)$", rule, re.MULTILINE)
        assert link
        assert link[1] == name.lower()


class TestExpressions:
    def test_use_metrics_and_labels_that_exist(
        self, asked: list[str], labels: dict[str, set[str]]
    ) -> None:
        recorded = {name for name in rule_expressions() if ":" in name}
        for expression in asked:
            for metric, matchers in selectors(expression):
                if metric == "up" or metric in recorded:
                    continue
                assert metric in labels, expression
                assert matched_labels(matchers) <= labels[metric] | OF_TARGETS, expression

    def test_group_by_labels_that_exist(
        self, asked: list[str], labels: dict[str, set[str]]
    ) -> None:
        recordings = rule_expressions()
        for expression in asked:
            metrics = {metric for metric, _ in selectors(expression)}
            for metric in [m for m in metrics if ":" in m]:
                metrics |= {name for name, _ in selectors(recordings[metric])}
            known = set().union(*(labels.get(metric, set()) for metric in metrics))
            assert grouping_labels(expression) <= known | OF_TARGETS, expression

    def test_find_what_was_recorded_before(self) -> None:
        """A name that is used is recorded, and a recording is used."""
        rules = rule_expressions()
        recorded = {name for name in rules if ":" in name}
        used = {name for rule in rules.values() for name, _ in selectors(rule) if ":" in name}
        assert recorded == used


class TestGrafana:
    def test_knows_itself(self, dashboard: dict[str, Any]) -> None:
        assert dashboard["uid"] == "ws2api"
        assert dashboard["id"] is None, "an id is of one Grafana only"
        assert dashboard["schemaVersion"] == 39
        assert dashboard["title"] and dashboard["tags"] and dashboard["time"]["from"]

    def test_asks_for_the_source_of_its_data(self, dashboard: dict[str, Any]) -> None:
        source, *others = dashboard["templating"]["list"]
        assert (source["name"], source["type"], source["query"]) == (
            "datasource",
            "datasource",
            "prometheus",
        )
        chosen = {"type": "prometheus", "uid": "${datasource}"}
        assert [variable["name"] for variable in others] == ["job", "instance"]
        assert all(variable["datasource"] == chosen for variable in others)
        for panel in panels(dashboard):
            assert panel["datasource"] == chosen
            assert all(target["datasource"] == chosen for target in panel["targets"])

    def test_every_panel_explains_itself(self, dashboard: dict[str, Any]) -> None:
        titles = []
        for panel in panels(dashboard):
            assert panel["type"] in ("timeseries", "stat", "table"), panel["title"]
            assert len(panel["description"]) > 20, panel["title"]
            assert panel["description"].endswith("."), panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            titles.append(panel["title"])
        assert all(titles)
        assert len(set(titles)) == len(titles)

    def test_every_question_has_a_name_of_its_own(self, dashboard: dict[str, Any]) -> None:
        for panel in panels(dashboard):
            targets = panel["targets"]
            assert targets
            assert len({target["refId"] for target in targets}) == len(targets)
            legends = [target["legendFormat"] for target in targets]
            assert len(set(legends)) == len(legends), panel["title"]

    def test_panels_lie_side_by_side(self, dashboard: dict[str, Any]) -> None:
        all_panels = dashboard["panels"]
        assert len({panel["id"] for panel in all_panels}) == len(all_panels)
        places = [panel["gridPos"] for panel in all_panels]
        assert all(place["x"] + place["w"] <= 24 for place in places)
        for one, other in itertools.combinations(places, 2):
            apart = (
                one["x"] + one["w"] <= other["x"]
                or other["x"] + other["w"] <= one["x"]
                or one["y"] + one["h"] <= other["y"]
                or other["y"] + other["h"] <= one["y"]
            )
            assert apart, (one, other)

    @pytest.mark.parametrize("metric", WANTED.values(), ids=WANTED.keys())
    def test_shows_what_was_promised(self, dashboard: dict[str, Any], metric: str) -> None:
        shown = [name for expr in expressions(dashboard) for name, _ in selectors(expr)]
        assert metric in shown

    def test_shows_every_metric(
        self, dashboard: dict[str, Any], labels: dict[str, set[str]]
    ) -> None:
        shown = {
            re.sub("_(bucket|count|sum)$", "", name)
            for expression in expressions(dashboard)
            for name, _ in selectors(expression)
        }
        there_are = {re.sub("_(bucket|count|sum)$", "", name) for name in labels}
        assert there_are - shown == set()
