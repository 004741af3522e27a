"""Turn the shared counters into the text of /metrics."""

from __future__ import annotations

import asyncio
import platform
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from ws2api.gateway import counters as c
from ws2api.gateway.metric import MICRO, Histogram

from . import process_stats
from .single_flight import SingleFlight

PREFIX: Final = "ws2api_"

Bank = memoryview  # of 64-bit integers, see counters.py

_BUILD: Final = {
    "version": metadata.version("ws2api"),
    "python": platform.python_version(),
    "uvloop": metadata.version("uvloop"),
}

RELOADS: Final = {
    "done": c.RELOADS_DONE,
    "refused": c.RELOADS_REFUSED,
    "failed": c.RELOADS_FAILED,
}

_FAMILIES: Final = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}


class CountersCollector(Collector):
    """Read every worker's banks, and the reaper's row, when Prometheus asks.

    Args:
        counters: the shared mapping.
        started_s: Unix time at which the supervisor started.
    """

    def __init__(self, counters: c.Counters, started_s: float) -> None:
        self._counters = counters
        self._started_s = started_s

    def collect(self) -> Iterator[Metric]:
        """Yield the families, those of workers with a sample per worker."""
        counters = self._counters
        yield from self._declared()
        yield from self._histograms()
        yield from self._processes()
        yield self._probe_ages()
        yield from self._reaper()
        yield self._per_worker(
            "connections_open", "WebSockets that are open.", counters.connections_open
        )
        yield self._per_worker(
            "worker_start_time_seconds",
            "Unix time at which the worker started; 0 before its first start.",
            lambda worker: counters.current(worker)[c.STARTED_S],
        )
        serving = sum(serves(counters.current(worker)) for worker in range(counters.workers))
        yield _gauge("workers_serving", "Workers that accept connections.", serving)
        yield _gauge("workers", "Workers that there should be.", counters.workers)
        draining = counters.host[c.HOST_DRAINING]
        yield _gauge("draining", "1 while /readyz says no because it was told to.", draining)
        reloads = CounterMetricFamily(
            PREFIX + "reloads",
            "Reloads by outcome: done, refused for their settings, failed to replace a worker.",
            labels=["outcome"],
        )
        for outcome, index in RELOADS.items():
            reloads.add_metric([outcome], counters.host[index])
        yield reloads
        info = GaugeMetricFamily(
            PREFIX + "build_info", "1; what runs stands in the labels.", labels=list(_BUILD)
        )
        info.add_metric(list(_BUILD.values()), 1)
        yield info
        yield _gauge(
            "start_time_seconds", "Unix time at which the supervisor started.", self._started_s
        )

    def _declared(self) -> Iterator[Metric]:
        """Yield what counters.py declares; entries of one name are one family."""
        entries: dict[str, list[int]] = {}
        for index, metric in enumerate(c.METRICS):
            if metric.kind in _FAMILIES:
                entries.setdefault(metric.name, []).append(index)
        for name, indexes in entries.items():
            first = c.METRICS[indexes[0]]
            labels = ["worker", *first.labels]
            family = _FAMILIES[first.kind](PREFIX + name, first.help, labels=labels)
            for worker in range(self._counters.workers):
                for index in indexes:
                    values = [str(worker), *c.METRICS[index].labels.values()]
                    value = self._counters.value(worker, index) * c.METRICS[index].scale
                    family.add_metric(values, value)
            yield family

    def _histograms(self) -> Iterator[Metric]:
        """Yield the durations; histograms of one name are one family."""
        families: dict[str, HistogramMetricFamily] = {}
        for histogram in c.METRICS.histograms:
            name = PREFIX + histogram.name
            labels = ["worker", *histogram.labels]
            family = families.setdefault(
                name, HistogramMetricFamily(name, histogram.help, labels=labels)
            )
            for worker in range(self._counters.workers):
                values = [str(worker), *histogram.labels.values()]
                family.add_metric(values, *self._buckets(worker, histogram))
        yield from families.values()

    def _buckets(self, worker: int, histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
        """Return upper bound and count of each bucket, smaller ones included, and the sum."""
        # OpenMetrics asks for 1.0 rather than 1, and so does every other exporter: recordings over
        # several of them have to agree.
        bounds = [*(str(bound / 1e6) for bound in histogram.bounds_us), "+Inf"]
        counts = [
            self._counters.value(worker, histogram.first + number) for number in range(len(bounds))
        ]
        total = self._counters.value(worker, histogram.sum_index) * MICRO
        return list(zip(bounds, map(float, accumulate(counts)), strict=True)), total

    def _processes(self) -> Iterator[Metric]:
        """Yield what the workers' processes use, where the system tells."""
        memory = GaugeMetricFamily(
            PREFIX + "worker_resident_memory_bytes",
            "Memory of the worker's process, pages that are shared with others among it.",
            labels=["worker"],
        )
        files = GaugeMetricFamily(
            PREFIX + "worker_open_files", "Files that the worker has open.", labels=["worker"]
        )
        cpu = CounterMetricFamily(
            PREFIX + "worker_cpu_seconds",
            "CPU time of the worker's process; begins anew with a new process.",
            labels=["worker"],
        )
        for worker in range(self._counters.workers):
            slot = self._counters.current(worker)
            stats = process_stats.read(slot[c.PID]) if slot[c.PID] else None
            if stats is not None:
                memory.add_metric([str(worker)], stats.memory_bytes)
                files.add_metric([str(worker)], stats.open_files)
                cpu.add_metric([str(worker)], stats.cpu_s)
        yield from (memory, files, cpu)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        yield _gauge("worker_max_open_files", "Files that a worker may have open.", limit)

    def _probe_ages(self) -> Metric:
        """Yield what tells that the lag is of old: nothing comes back from Redis any more."""
        family = GaugeMetricFamily(
            PREFIX + "redis_probe_age_seconds",
            "Time since a probe through Redis came back to this worker; there is one every 2 s.",
            labels=["worker"],
        )
        now_s = time.monotonic()
        for worker in range(self._counters.workers):
            slot = self._counters.current(worker)
            if serves(slot):
                # A worker that has never heard from itself counts from its start.
                last_s = (slot[c.PROBED_US] or slot[c.STARTED_US]) * MICRO
                family.add_metric([str(worker)], max(0.0, now_s - last_s))
        return family

    def _reaper(self) -> Iterator[Metric]:
        """Yield what the admin process counts; there is one of it, so no label."""
        for metric, value in zip(c.REAPER_METRICS, self._counters.reaper, strict=True):
            yield _FAMILIES[metric.kind](PREFIX + metric.name, metric.help, value=value)

    def _per_worker(self, name: str, help: str, value: Callable[[int], int]) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, help, labels=["worker"])
        for worker in range(self._counters.workers):
            family.add_metric([str(worker)], value(worker))
        return family


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, help, value=value)


def serves(bank: Bank) -> bool:
    """Tell whether a worker accepts connections, by its own account."""
    return bank[c.STATE] == c.STATE_SERVING


def create_registry(counters: c.Counters, started_s: float) -> CollectorRegistry:
    """Create a registry that holds the gateway's metrics and nothing else."""
    registry = CollectorRegistry()
    registry.register(CountersCollector(counters, started_s))
    return registry


class Exposition:
    """Write the gateway's metrics for Prometheus.

    Args:
        counters: the shared mapping.
        started_s: Unix time at which the supervisor started.
    """

    def __init__(self, counters: c.Counters, started_s: float) -> None:
        self._registry = create_registry(counters, started_s)
        # By content type, of which there are a few.
        self._flights: dict[str, SingleFlight[bytes]] = {}

    async def render(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics in the format that the client prefers, and its type.

        Args:
            accept: the request's Accept header, empty for none.
        """
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # what it makes of a version that is no number
            encode, content_type = choose_encoder("")
        flight = self._flights.get(content_type)
        if flight is None:
            flight = self._flights[content_type] = SingleFlight(partial(self._encode, encode))
        return await flight.get(), content_type

    async def _encode(self, encode: Callable[[CollectorRegistry], bytes]) -> bytes:
        await asyncio.sleep(0)  # for all who have asked by now
        return encode(self._registry)
