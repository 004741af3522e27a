"""Turn the shared counters into the text of /metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from ws2api.gateway import counters as c

PREFIX: Final = "ws2api_"

Bank = memoryview  # of 64-bit integers, see counters.py

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
        yield _gauge(
            "start_time_seconds", "Unix time at which the supervisor started.", self._started_s
        )

    def _declared(self) -> Iterator[Metric]:
        """Yield what counters.py declares; entries of one name are one family."""
        entries: dict[str, list[int]] = {}
        for index, metric in enumerate(c.METRICS):
            if metric.kind != "internal":
                entries.setdefault(metric.name, []).append(index)
        for name, indexes in entries.items():
            first = c.METRICS[indexes[0]]
            labels = ["worker", *first.labels]
            family = _FAMILIES[first.kind](PREFIX + name, first.help, labels=labels)
            for worker in range(self._counters.workers):
                for index in indexes:
                    values = [str(worker), *c.METRICS[index].labels.values()]
                    family.add_metric(values, self._counters.value(worker, index))
            yield family

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


def render(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """Write all metrics in the format that the client prefers; return the text and its type.

    Args:
        registry: what to write.
        accept: the request's Accept header, empty for none.
    """
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
