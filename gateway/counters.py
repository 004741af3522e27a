"""Keep every worker's figures in one anonymous mapping that all processes share.

A worker owns one bank of 64-bit integers and is the only writer of it; incrementing one is a
plain item assignment, so the hot path pays neither a lock nor a call. The admin process reads all
banks. A slot has two banks, because two processes of it live at once while one replaces the other.
A bank outlives its process, so totals stay monotonic when a worker is replaced.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from typing import Final, Literal

WORD_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Metric:
    """Describe one integer of a bank: what /metrics calls it and what it counts.

    Attributes:
        is_summed: whether a slot's value is the sum of its banks; False for a gauge that is true
            of one process only, and is read from the one that is to serve.
    """

    name: str
    help: str
    kind: Literal["counter", "gauge", "internal"]
    labels: dict[str, str] = field(default_factory=dict)
    is_summed: bool = True


METRICS: list[Metric] = []
"""What a bank holds."""
REAPER_METRICS: list[Metric] = []
"""What the row of the reaper holds; there is one for all workers."""


def _counter(name: str, help: str, **labels: str) -> int:
    METRICS.append(Metric(name, help, "counter", labels))
    return len(METRICS) - 1


def _gauge(name: str, help: str, **labels: str) -> int:
    METRICS.append(Metric(name, help, "gauge", labels))
    return len(METRICS) - 1


def _gauge_of_one(name: str, help: str) -> int:
    METRICS.append(Metric(name, help, "gauge", is_summed=False))
    return len(METRICS) - 1


def _internal(name: str, help: str) -> int:
    METRICS.append(Metric(name, help, "internal", is_summed=False))
    return len(METRICS) - 1


def _reaper_counter(name: str, help: str) -> int:
    REAPER_METRICS.append(Metric(name, help, "counter"))
    return len(REAPER_METRICS) - 1


def _reaper_gauge(name: str, help: str) -> int:
    REAPER_METRICS.append(Metric(name, help, "gauge"))
    return len(REAPER_METRICS) - 1


# The process itself. The admin process and the supervisor judge a worker by these.
STATE: Final = _internal("state", "One of the STATE_… values.")
HEARTBEAT_US: Final = _internal("heartbeat", "Monotonic time of the last beat of the loop, in µs.")
PID: Final = _internal("pid", "Process id of the worker that writes this bank.")
STARTED_S: Final = _internal("started", "Unix time at which the worker started, in seconds.")
FORK: Final = _internal(
    "fork",
    "Number of the fork, plus 1, whose process uses this bank; 0 for none (by the supervisor).",
)
RESTARTS: Final = _counter(
    "worker_restarts",
    "Workers that replaced a dead one in this slot (by the supervisor, in bank 0).",
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

REQUESTS_RETRIED: Final = _counter(
    "requests_retried",
    "Times that a request which had been sent was put back to be sent again: its connection was"
    " lost, a message got a 503, a disconnect anything but 2xx.",
)
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

BREAKER_STATE: Final = _gauge_of_one(
    "breaker_state", "Whether the API is asked: 0 yes, 1 for trial, 2 not at the moment."
)
BREAKER_OPENED: Final = _counter(
    "breaker_opened", "Times that the API failed so often that it was not asked for a while."
)
DISCONNECTS_WAITING: Final = _gauge(
    "disconnects_waiting", "Disconnects of which this worker has yet to tell the API."
)
DISCONNECTS_PARKED: Final = _counter(
    "disconnects_parked",
    "Disconnects that were left to Redis, from which others send them; failed requests, too.",
)
DISCONNECTS_LOST: Final = _counter(
    "disconnects_lost",
    "Disconnects that were given up because too many waited while Redis was away as well.",
)

CONNECTS_WAITING: Final = _gauge(
    "connects_waiting", "Handshakes that wait until the API can be asked about them."
)
CONNECTS_OVERFLOWED: Final = _counter(
    "connects_overflowed", "Handshakes refused with 503 because they would have waited too long."
)

PROBE_LAG_US: Final = _gauge_of_one(
    "push_lag_microseconds", "Time that the last probe took through Redis back to this worker."
)
PROBED_US: Final = _internal("probed", "Monotonic time of the last probe that came back, in µs.")

REDIS_UP: Final = _gauge_of_one("redis_up", "1 while this worker's connections to Redis are up.")
REDIS_RECONNECTS: Final = _counter("redis_reconnects", "Times Redis was lost and came back.")

SLOT_LENGTH: Final = len(METRICS)
"""Words of one bank."""

# The reaper, which lives in the admin process.
REAPER_TAKEN_OVER: Final = _reaper_counter(
    "reaper_taken_over", "Connections of lost workers whose end was entered for delivery."
)
REAPER_DELIVERED: Final = _reaper_counter(
    "reaper_delivered", "Disconnects that the API took from the reaper."
)
REAPER_SUPPRESSED: Final = _reaper_counter(
    "reaper_suppressed", "Disconnects that were dropped because the client had reconnected."
)
REAPER_FAILURES: Final = _reaper_counter(
    "reaper_failures", "Attempts of the reaper that the API did not take."
)
DISCONNECTS_DROPPED: Final = _reaper_counter(
    "disconnects_dropped", "Disconnects that were given up because too many waited for the API."
)
DISCONNECTS_PENDING: Final = _reaper_gauge(
    "disconnects_pending", "Disconnects that wait in Redis for the API."
)
DISCONNECTS_OLDEST_S: Final = _reaper_gauge(
    "disconnects_oldest_seconds", "Age of the oldest disconnect that waits for the API."
)
DISCONNECTS_HELD: Final = _reaper_gauge(
    "disconnects_held", "Waiting disconnects that this reaper holds at the moment."
)

REAPER_LENGTH: Final = len(REAPER_METRICS)

BANKS: Final = 2


class Counters:
    """Hold the banks of all workers in a mapping that children inherit by fork.

    Args:
        workers: number of slots.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._reaper_start = workers * BANKS * SLOT_LENGTH
        self._mapping = mmap.mmap(-1, (self._reaper_start + REAPER_LENGTH) * WORD_BYTES)
        self._words = memoryview(self._mapping).cast("q")

    def bank(self, worker: int, which: int) -> memoryview:
        """Return the integers of one process, indexed by this module's constants.

        Args:
            worker: number of the slot.
            which: below BANKS; the supervisor tells a worker its own.
        """
        start = (worker * BANKS + which) * SLOT_LENGTH
        return self._words[start : start + SLOT_LENGTH]

    @property
    def reaper(self) -> memoryview:
        """Return the integers of the reaper, indexed as REAPER_METRICS."""
        return self._words[self._reaper_start :]

    def current(self, worker: int) -> memoryview:
        """Return the bank of the process that is to serve: STATE, PID and the like are its.

        While one process replaces another that is the old one until the new one serves. When
        none lives, it is the bank of the last one.
        """
        banks = [self.bank(worker, which) for which in range(BANKS)]
        return max(banks, key=_claim_to_serve)

    def value(self, worker: int, index: int) -> int:
        """Return one integer of a slot, over both banks where that has a meaning."""
        if METRICS[index].is_summed:
            return sum(self.bank(worker, which)[index] for which in range(BANKS))
        return self.current(worker)[index]

    def total(self, index: int) -> int:
        """Sum one integer over all workers."""
        return sum(self.value(worker, index) for worker in range(self.workers))

    def connections_open(self, worker: int) -> int:
        """Count the open connections of a slot."""
        # In this order, because workers go on counting meanwhile: read the other way round, a
        # connection could have closed that had not been seen to open.
        closed = self.value(worker, CONNECTIONS_CLOSED)
        return self.value(worker, CONNECTIONS_OPENED) - closed

    def settle(self, worker: int, bank: int) -> None:
        """Close the books of a process that has ended, and free its bank for another.

        What it had open is gone with it: its connections count as closed, its requests under way
        as failed, its gauges and what else described it return to zero. When it started stays.
        """
        words = self.bank(worker, bank)
        words[CONNECTIONS_CLOSED] = words[CONNECTIONS_OPENED]
        words[REQUESTS_FAILED] = words[REQUESTS_STARTED] - words[REQUESTS_SUCCEEDED]
        for index, metric in enumerate(METRICS):
            if metric.kind != "counter" and index != STARTED_S:
                words[index] = 0  # of the state: STATE_DOWN


def _claim_to_serve(bank: memoryview) -> tuple[bool, int, int]:
    """Rank the banks of one slot: who serves first, then the younger."""
    return bank[STATE] == STATE_SERVING, bank[FORK], bank[STARTED_S]
