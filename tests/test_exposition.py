"""Read /metrics the way Prometheus does."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text
from ws2api.gateway import counters as c
from ws2api.supervisor.exposition import CountersCollector, Exposition

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"


@pytest.fixture
def counters() -> c.Counters:
    return c.Counters(2)


def render(counters: c.Counters, accept: str) -> tuple[bytes, str]:
    return asyncio.run(Exposition(counters, 1000.5).render(accept))


def scrape(counters: c.Counters) -> dict[str, Metric]:
    body, _ = render(counters, "")
    return {family.name: family for family in parse_text(body.decode())}


def value(counters: c.Counters, name: str, **labels: str) -> float:
    samples = [sample for family in scrape(counters).values() for sample in family.samples]
    (sample,) = [s for s in samples if s.name == f"ws2api_{name}" and s.labels == labels]
    return sample.value


def test_counters_of_each_worker(counters: c.Counters) -> None:
    counters.bank(0, 0)[c.MESSAGES_RECEIVED] = 5
    counters.bank(1, 0)[c.MESSAGES_RECEIVED] = 1 << 60
    assert value(counters, "messages_received_total", worker="0") == 5
    assert value(counters, "messages_received_total", worker="1") == 1 << 60


def test_labels_of_a_counter(counters: c.Counters) -> None:
    counters.bank(1, 0)[c.PUSHES_NOT_FOUND] = 3
    assert value(counters, "pushes_total", worker="1", outcome="not_found") == 3
    assert value(counters, "pushes_total", worker="1", outcome="ok") == 0


def test_gauges(counters: c.Counters) -> None:
    counters.bank(0, 0)[c.API_CONNECTIONS] = 7
    assert value(counters, "api_connections", worker="0") == 7
    assert scrape(counters)["ws2api_api_connections"].type == "gauge"


def test_open_connections_are_those_not_closed(counters: c.Counters) -> None:
    slot = counters.bank(1, 0)
    slot[c.CONNECTIONS_OPENED], slot[c.CONNECTIONS_CLOSED] = 10, 4
    assert value(counters, "connections_open", worker="1") == 6
    assert value(counters, "connections_open", worker="0") == 0
    counters.settle(1, 0)
    assert value(counters, "connections_open", worker="1") == 0


def test_both_processes_of_a_worker_are_one_sample(counters: c.Counters) -> None:
    for which, opened in enumerate((10, 3)):
        bank = counters.bank(1, which)
        bank[c.CONNECTIONS_OPENED], bank[c.CONNECTIONS_CLOSED] = opened, 1
        bank[c.FORK], bank[c.STATE], bank[c.REDIS_UP] = which + 1, c.STATE_SERVING, 1
    assert value(counters, "connections_opened_total", worker="1") == 13
    assert value(counters, "connections_open", worker="1") == 11
    assert value(counters, "redis_up", worker="1") == 1
    assert value(counters, "workers_serving") == 1


def test_reaper_has_no_worker(counters: c.Counters) -> None:
    for index in range(c.REAPER_LENGTH):
        counters.reaper[index] = 7 + index
    for index, metric in enumerate(c.REAPER_METRICS):
        suffix = "_total" if metric.kind == "counter" else ""
        assert value(counters, metric.name + suffix) == 7 + index
        assert scrape(counters)[f"ws2api_{metric.name}"].type == metric.kind


def test_processes(counters: c.Counters) -> None:
    slot = counters.bank(1, 0)
    slot[c.STATE], slot[c.STARTED_S], slot[c.RESTARTS] = c.STATE_SERVING, 1234, 2
    assert value(counters, "workers") == 2
    assert value(counters, "workers_serving") == 1
    assert value(counters, "worker_start_time_seconds", worker="1") == 1234
    assert value(counters, "worker_restarts_total", worker="1") == 2
    assert value(counters, "start_time_seconds") == 1000.5


def test_every_declared_metric_is_there_once_per_worker(counters: c.Counters) -> None:
    families = scrape(counters)
    for metric in c.METRICS:
        if metric.kind == "bucket":
            continue
        family = families.get(f"ws2api_{metric.name}")
        if metric.kind == "internal":
            assert family is None
            continue
        assert family is not None
        assert family.type == metric.kind
        labels = [sample.labels for sample in family.samples]
        for worker in ("0", "1"):
            assert labels.count({"worker": worker, **metric.labels}) == 1


def test_histograms(counters: c.Counters) -> None:
    slot = counters.bank(0, 1)
    for us in (99, 100, 101, 10_000_000):
        c.LOCAL_PUSH_LATENCY.observe(slot, us)
    family = scrape(counters)["ws2api_push_duration_seconds"]
    assert family.type == "histogram"
    labels = {"worker": "0", "path": "local"}

    def below(bound: str) -> float:
        return value(counters, "push_duration_seconds_bucket", **labels, le=bound)

    assert [below("0.0001"), below("0.00025"), below("5.0"), below("+Inf")] == [2, 3, 3, 4]
    assert value(counters, "push_duration_seconds_count", **labels) == 4
    assert value(counters, "push_duration_seconds_sum", **labels) == pytest.approx(10.0003)
    counters.settle(0, 1)
    assert below("+Inf") == 4  # it survives its process


def test_units_are_those_of_the_names(counters: c.Counters) -> None:
    slot = counters.bank(0, 0)
    slot[c.PROBE_LAG_US], slot[c.WORST_LAG_US] = 1500, 2_000_000
    assert value(counters, "redis_lag_seconds", worker="0") == pytest.approx(0.0015)
    assert value(counters, "loop_lag_worst_seconds", worker="0") == 2


def test_processes_that_live(counters: c.Counters) -> None:
    counters.bank(1, 0)[c.PID] = os.getpid()
    assert value(counters, "worker_resident_memory_bytes", worker="1") > 1 << 20
    assert value(counters, "worker_open_files", worker="1") >= 3
    assert value(counters, "worker_cpu_seconds_total", worker="1") > 0
    workers = [s.labels["worker"] for s in scrape(counters)["ws2api_worker_open_files"].samples]
    assert workers == ["1"]


def test_age_of_the_last_probe(counters: c.Counters) -> None:
    for worker, (state, probed_s_ago) in enumerate([(c.STATE_SERVING, 30), (c.STATE_DOWN, 0)]):
        slot = counters.bank(worker, 0)
        slot[c.STATE] = state
        slot[c.PROBED_US] = int((time.monotonic() - probed_s_ago) * 1e6)
    assert value(counters, "redis_probe_age_seconds", worker="0") >= 30
    assert len(scrape(counters)["ws2api_redis_probe_age_seconds"].samples) == 1


def test_age_of_a_probe_that_never_came_back(counters: c.Counters) -> None:
    slot = counters.bank(0, 0)
    slot[c.STATE], slot[c.STARTED_US] = c.STATE_SERVING, int((time.monotonic() - 60) * 1e6)
    assert value(counters, "redis_probe_age_seconds", worker="0") >= 59


@pytest.mark.parametrize("name", ["connections_opened", "requests_started", "requests_failed"])
def test_stems_that_are_known_from_ws2api(counters: c.Counters, name: str) -> None:
    assert value(counters, f"{name}_total", worker="0") == 0


def test_format_is_the_one_asked_for(counters: c.Counters) -> None:
    body, content_type = render(counters, OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert {"ws2api_pushes"} <= {family.name for family in parse_openmetrics(body.decode())}
    body, content_type = render(counters, "")
    assert content_type.startswith("text/plain; version=0.0.4")
    assert body.endswith(b"\n")


@pytest.mark.parametrize("version", ["x", "1.x", ""])
def test_format_of_a_version_that_is_none(counters: c.Counters, version: str) -> None:
    _, content_type = render(counters, f"application/openmetrics-text;version={version}")
    assert "version=" in content_type


def test_those_who_ask_at_once_share_a_rendering(
    counters: c.Counters, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected = []
    collect = CountersCollector.collect

    def count(self: CountersCollector) -> Iterator[Metric]:
        collected.append(self)
        return collect(self)

    exposition = Exposition(counters, 1000.5)
    monkeypatch.setattr(CountersCollector, "collect", count)

    async def ask() -> list[tuple[bytes, str]]:
        first = await asyncio.gather(*(exposition.render("") for _ in range(100)))
        counters.bank(0, 0)[c.MESSAGES_RECEIVED] = 5
        return [*first, await exposition.render("")]

    *first, late = asyncio.run(ask())
    assert len(set(first)) == 1
    assert late not in first
    assert len(collected) == 2
