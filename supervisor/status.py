"""Describe the whole gateway as JSON: what /status answers and what the dashboard shows.

Aggregates only: no client id is in it, so that it can be read without a token.
"""

from __future__ import annotations

import time
from importlib import metadata
from typing import Any, Final

from ws2api.gateway import counters as c
from ws2api.gateway.metric import MICRO, Histogram

from . import process_stats
from .exposition import RELOADS
from .health import Health, state_of
from .single_flight import SingleFlight

_BREAKER: Final = ("closed", "half-open", "open")
_TOTALS: Final = {
    "connections_opened": c.CONNECTIONS_OPENED,
    "connections_closed": c.CONNECTIONS_CLOSED,
    "messages_received": c.MESSAGES_RECEIVED,
    "messages_sent": c.MESSAGES_SENT,
    "bytes_received": c.BYTES_RECEIVED,
    "bytes_sent": c.BYTES_SENT,
    "requests_started": c.REQUESTS_STARTED,
    "requests_failed": c.REQUESTS_FAILED,
    "requests_succeeded": c.REQUESTS_SUCCEEDED,
}
_PER_WORKER: Final = {
    "connections_opened": c.CONNECTIONS_OPENED,
    "messages_received": c.MESSAGES_RECEIVED,
    "messages_sent": c.MESSAGES_SENT,
    "api_connections": c.API_CONNECTIONS,
    "api_queue": c.API_QUEUE,
    "paused": c.CLIENTS_PAUSED,
    "write_buffer_bytes": c.WRITE_BUFFER_BYTES,
}
_PUSHES: Final = {
    metric.labels["outcome"]: index
    for index, metric in enumerate(c.METRICS)
    if metric.name == "pushes"
}


class Status:
    """Read the shared counters for people.

    Args:
        api: base URL of the API.
        started_s: Unix time at which the supervisor started.
    """

    def __init__(self, counters: c.Counters, health: Health, api: str, started_s: float) -> None:
        self._counters = counters
        self._health = health
        self._api = api
        self._started_s = started_s
        self._version = metadata.version("ws2api")
        self._description = SingleFlight(self._describe)

    async def describe(self) -> dict[str, Any]:
        """Return the whole description."""
        return await self._description.get()

    async def _describe(self) -> dict[str, Any]:
        redis_findings = await self._health.redis_findings()
        # All else is read at once, after the last of those who share the answer has asked.
        counters, now_s = self._counters, time.time()
        findings = self._health.findings_beside(redis_findings)
        workers = range(counters.workers)
        totals = {name: counters.total(index) for name, index in _TOTALS.items()}
        return {
            "version": self._version,
            "time_s": now_s,
            "uptime_s": int(now_s - self._started_s),
            "draining": bool(counters.host[c.HOST_DRAINING]),
            "rolling": bool(counters.host[c.ROLLING]),
            "reloads": {name: counters.host[index] for name, index in RELOADS.items()},
            "ready": not findings,
            "findings": [*findings, *self._health.notes()],
            "api": self._api,
            "redis": {"up": not redis_findings},
            "totals": {"connections": sum(map(counters.connections_open, workers)), **totals},
            "workers": [self._worker(worker, now_s) for worker in workers],
            "disconnects": self._disconnects(),
            "pushes": {name: counters.total(index) for name, index in _PUSHES.items()},
            "errors": {cause: counters.total(index) for cause, index in c.ERRORS.items()},
            "closes": self._closes(),
            "api_latency": self._latencies(
                "event", c.CONNECT_LATENCY, c.MESSAGE_LATENCY, c.DISCONNECT_LATENCY
            ),
            "push_latency": self._latencies("path", c.LOCAL_PUSH_LATENCY, c.REMOTE_PUSH_LATENCY),
        }

    def _worker(self, worker: int, now_s: float) -> dict[str, Any]:
        counters = self._counters
        slot = counters.current(worker)
        lives = slot[c.STATE] != c.STATE_DOWN
        stats = process_stats.read(slot[c.PID]) if lives and slot[c.PID] else None
        return {
            "worker": worker,
            "state": state_of(slot),
            "pid": slot[c.PID] if lives else None,
            "uptime_s": max(0, int(now_s - slot[c.STARTED_S])) if lives else None,
            "restarts": counters.value(worker, c.RESTARTS),
            "connections": counters.connections_open(worker),
            "push_lag_ms": slot[c.PROBE_LAG_US] / 1000 if lives and slot[c.PROBED_US] else None,
            "pushes": sum(counters.value(worker, index) for index in _PUSHES.values()),
            "memory_bytes": stats.memory_bytes if stats else None,
            "open_files": stats.open_files if stats else None,
            "loop_lag_ms": slot[c.WORST_LAG_US] / 1000,
            "redis_up": bool(slot[c.REDIS_UP]),
            "breaker": _BREAKER[slot[c.BREAKER_STATE]],
            **{name: counters.value(worker, index) for name, index in _PER_WORKER.items()},
        }

    def _disconnects(self) -> dict[str, int]:
        reaper = self._counters.reaper
        return {
            "pending": reaper[c.DISCONNECTS_PENDING],
            "oldest_s": reaper[c.DISCONNECTS_OLDEST_S],
            "held": reaper[c.DISCONNECTS_HELD],
            "dropped": reaper[c.DISCONNECTS_DROPPED],
        }

    def _closes(self) -> list[dict[str, str | int]]:
        """List how connections have ended so far, without what has not happened."""
        counted = [(key, self._counters.total(index)) for key, index in c.CLOSES.items()]
        return [
            {"code": code, "cause": cause, "count": count}
            for (cause, code), count in counted
            if count
        ]

    def _latencies(self, label: str, *histograms: Histogram) -> dict[str, Any]:
        return {
            "bounds_s": [round(bound * MICRO, 6) for bound in histograms[0].bounds_us],
            "counts": {
                histogram.labels[label]: self._counters.buckets(histogram)
                for histogram in histograms
            },
        }
