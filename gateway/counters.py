"""Keep every worker's figures in one anonymous mapping that all processes share.

A worker owns one slot of 64-bit integers and is the only writer of it; incrementing one is a
plain item assignment, so the hot path pays neither a lock nor a call. The admin process reads all
slots. A slot outlives its worker, so totals stay monotonic when the worker is replaced.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from typing import Final, Literal

WORD_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Metric:
    """Describe one integer of a slot: what /metrics calls it and what it counts."""

    name: str
    help: str
    kind: Literal["counter", "gauge", "internal"]
    labels: dict[str, str] = field(default_factory=dict)


METRICS: list[Metric] = []


def _counter(name: str, help: str, **labels: str) -> int:
    METRICS.append(Metric(name, help, "counter", labels))
    return len(METRICS) - 1


def _gauge(name: str, help: str, **labels: str) -> int:
    METRICS.append(Metric(name, help, "gauge", labels))
    return len(METRICS) - 1


def _internal(name: str, help: str) -> int:
    METRICS.append(Metric(name, help, "internal"))
    return len(METRICS) - 1


# The process itself. The admin process and the supervisor judge a worker by these.
STATE: Final = _internal("state", "One of the STATE_… values.")
HEARTBEAT_US: Final = _internal("heartbeat", "Monotonic time of the last beat of the loop, in µs.")
PID: Final = _internal("pid", "Process id of the worker that writes this slot.")
STARTED_S: Final = _internal("started", "Unix time at which the worker started, in seconds.")
RESTARTS: Final = _counter(
    "worker_restarts", "Workers that replaced a dead one in this slot (written by the supervisor)."
)

STATE_DOWN: Final = 0
STATE_STARTING: Final = 1
STATE_SERVING: Final = 2
STATE_DRAINING: Final = 3

# The five names of ws2api.
CONNECTIONS_OPENED: Final = _counter("connections_opened", "WebSockets accepted with a 101.")
CONNECTIONS_CLOSED: Final = _counter("connections_closed", "Accepted WebSockets that have ended.")
REQUESTS_STARTED: Final = _counter("requests_started", "Requests to the API, by event not attempt.")
REQUESTS_FAILED: Final = _counter(
    "requests_failed", "Requests that ended without a usable answer of the API."
)
REQUESTS_SUCCEEDED: Final = _counter("requests_succeeded", "Requests that the API answered well.")

REQUESTS_RETRIED: Final = _counter("requests_retried", "Attempts beyond the first of a request.")
API_REPLIES_INVALID: Final = _counter(
    "api_replies_invalid", "Replies of the API that were no HTTP or exceeded a limit."
)
API_CONNECTIONS: Final = _gauge("api_connections", "TCP connections to the API, busy and idle.")
API_QUEUE: Final = _gauge("api_queue_length", "Requests that wait for a connection to the API.")

HANDSHAKES_REFUSED: Final = _counter(
    "handshakes_refused", "Connections to the client port that were answered with an error."
)
MESSAGES_RECEIVED: Final = _counter("messages_received", "Messages from clients.")
MESSAGES_SENT: Final = _counter("messages_sent", "Messages to clients, replies and pushes.")
BYTES_RECEIVED: Final = _counter("bytes_received", "Payload bytes of messages from clients.")
BYTES_SENT: Final = _counter("bytes_sent", "Payload bytes of messages to clients.")
PROTOCOL_ERRORS: Final = _counter(
    "protocol_errors", "Connections that were failed because the client broke RFC 6455 or a limit."
)

_PUSH_HELP: Final = "Requests on the push port by outcome; each counts once, where it was received."
PUSHES_OK: Final = _counter("pushes", _PUSH_HELP, outcome="ok")
PUSHES_BAD_REQUEST: Final = _counter("pushes", _PUSH_HELP, outcome="bad_request")
PUSHES_UNAUTHORIZED: Final = _counter("pushes", _PUSH_HELP, outcome="unauthorized")
PUSHES_NOT_FOUND: Final = _counter("pushes", _PUSH_HELP, outcome="not_found")
PUSHES_STALE: Final = _counter("pushes", _PUSH_HELP, outcome="stale")
PUSHES_TOO_LARGE: Final = _counter("pushes", _PUSH_HELP, outcome="too_large")
PUSHES_TOO_SLOW: Final = _counter("pushes", _PUSH_HELP, outcome="too_slow")
PUSHES_UNAVAILABLE: Final = _counter("pushes", _PUSH_HELP, outcome="unavailable")
PUSHES_TIMEOUT: Final = _counter("pushes", _PUSH_HELP, outcome="timeout")
PUSHES_FORWARDED: Final = _counter("pushes_forwarded", "Pushes handed to another worker.")

REDIS_UP: Final = _gauge("redis_up", "1 while this worker's connections to Redis are up.")
REDIS_RECONNECTS: Final = _counter("redis_reconnects", "Times Redis was lost and came back.")

SLOT_LENGTH: Final = len(METRICS)


class Counters:
    """Hold the slots of all workers in a mapping that children inherit by fork.

    Args:
        workers: number of slots.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._mapping = mmap.mmap(-1, max(1, workers * SLOT_LENGTH * WORD_BYTES))
        self._words = memoryview(self._mapping).cast("q")

    def slot(self, worker: int) -> memoryview:
        """Return the integers of one worker, indexed by this module's constants."""
        start = worker * SLOT_LENGTH
        return self._words[start : start + SLOT_LENGTH]

    def total(self, index: int) -> int:
        """Sum one integer over all workers."""
        return sum(self._words[index + w * SLOT_LENGTH] for w in range(self.workers))

    def settle(self, worker: int) -> None:
        """Close the books of a worker that died.

        What it had open is gone with it: its connections count as closed, its requests under way
        as failed, and its gauges return to zero.
        """
        slot = self.slot(worker)
        slot[CONNECTIONS_CLOSED] = slot[CONNECTIONS_OPENED]
        slot[REQUESTS_FAILED] = slot[REQUESTS_STARTED] - slot[REQUESTS_SUCCEEDED]
        for index, metric in enumerate(METRICS):
            if metric.kind == "gauge":
                slot[index] = 0
        slot[STATE] = STATE_DOWN
        slot[HEARTBEAT_US] = 0
        slot[PID] = 0
