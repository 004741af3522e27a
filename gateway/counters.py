"""Keep every worker's figures in one anonymous mapping that all processes share.

A worker owns one bank of 64-bit integers and is the only writer of it; incrementing one is a
plain item assignment, so the hot path pays neither a lock nor a call. The admin process reads all
banks. A slot has two banks, because two processes of it live at once while one replaces the other.
A bank outlives its process, so totals stay monotonic when a worker is replaced.
"""

from __future__ import annotations

import mmap
from typing import Final

from . import causes
from .metric import MICRO, Declarations, Histogram

WORD_BYTES: Final = 8


METRICS: Final = Declarations()
"""What a bank holds."""
REAPER_METRICS: Final = Declarations()
"""What the row of the reaper holds; there is one for all workers."""

_counter, _gauge, _gauge_of_one = METRICS.counter, METRICS.gauge, METRICS.gauge_of_one
_internal, _histogram = METRICS.internal, METRICS.histogram
_reaper_counter, _reaper_gauge = REAPER_METRICS.counter, REAPER_METRICS.gauge

# The process itself. The admin process and the supervisor judge a worker by these.
STATE: Final = _internal("state", "One of the STATE_… values.")
HEARTBEAT_US: Final = _internal("heartbeat", "Monotonic time of the last beat of the loop, in µs.")
PID: Final = _internal("pid", "Process id of the worker that writes this bank.")
STARTED_S: Final = _internal("started", "Unix time at which the worker started, in seconds.")
STARTED_US: Final = _internal(
    "started_monotonic", "The same by the clock of the heartbeats, which nobody sets, in µs."
)
FORK: Final = _internal(
    "fork",
    "Number of the fork, plus 1, whose process uses this bank; 0 for none (by the supervisor).",
)
# By the supervisor, in bank 0.
RESTARTS: Final = _counter("worker_restarts", "Workers that replaced a dead one in this slot.")

STATE_DOWN: Final = 0
STATE_STARTING: Final = 1
STATE_SERVING: Final = 2
STATE_DRAINING: Final = 3

# The five names of ws2api.
CONNECTIONS_OPENED: Final = _counter("connections_opened", "WebSockets accepted with a 101.")
CONNECTIONS_CLOSED: Final = _counter("connections_closed", "Accepted WebSockets that have ended.")
REQUESTS_STARTED: Final = _counter(
    "requests_started", "Requests to the API; one that is sent again counts once."
)
REQUESTS_FAILED: Final = _counter(
    "requests_failed",
    "Requests that ended in an error, or with another status than one that says done; so a connect"
    " that the API answered with 401 is among them.",
)
REQUESTS_SUCCEEDED: Final = _counter(
    "requests_succeeded",
    "Requests that the API answered with 200, a message also with 204, a disconnect with any 2xx.",
)

CLOSES: Final = {
    (cause, code): _counter(
        "closes",
        "WebSockets that have ended, by close code and by what ended them.",
        code=code,
        cause=cause,
    )
    for cause, codes in causes.CODES.items()
    for code in (*codes, causes.OTHER_CODE)
}
ERRORS: Final = {
    cause: _counter(
        "errors",
        "Connects and messages that the API has failed, by what went wrong; that it refuses a"
        " client is no error.",
        cause=cause,
    )
    for cause in causes.OF_REQUESTS
}

_API_BOUNDS_S: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
_API_HELP: Final = (
    "Time from a request being sent to the API to its answer, or to the end of the gateway's"
    " patience, by event."
)
CONNECT_LATENCY: Final = _histogram(
    "api_request_duration_seconds", _API_HELP, _API_BOUNDS_S, event="connect"
)
MESSAGE_LATENCY: Final = _histogram(
    "api_request_duration_seconds", _API_HELP, _API_BOUNDS_S, event="message"
)
DISCONNECT_LATENCY: Final = _histogram(
    "api_request_duration_seconds", _API_HELP, _API_BOUNDS_S, event="disconnect"
)
OPENING_TIME: Final = _histogram(
    "connect_duration_seconds",
    "Time from a connection being accepted to its 101, of those that got one.",
    _API_BOUNDS_S,
)
_PUSH_BOUNDS_S: Final = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
)
_PUSH_TIME_HELP: Final = (
    "Time from a push being read to its answer; local when its client was found in this worker,"
    " remote when it went through Redis."
)
LOCAL_PUSH_LATENCY: Final = _histogram(
    "push_duration_seconds", _PUSH_TIME_HELP, _PUSH_BOUNDS_S, path="local"
)
REMOTE_PUSH_LATENCY: Final = _histogram(
    "push_duration_seconds", _PUSH_TIME_HELP, _PUSH_BOUNDS_S, path="remote"
)
LOOP_LAG: Final = _histogram(
    "loop_lag_seconds",
    "Time by which a tick of the worker's event loop was late; there are ten a second.",
    (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
)
WORST_LAG_US: Final = _gauge_of_one(
    "loop_lag_worst_seconds", "Longest delay of a tick within the last seconds.", MICRO
)

MOST_CLIENTS: Final = _gauge_of_one(
    "connections_max", "WebSockets that the worker takes, by its limit of open files."
)
MESSAGES_QUEUED: Final = _gauge(
    "messages_queued", "Messages of clients that wait for those before them."
)
CLIENTS_PAUSED: Final = _gauge(
    "clients_paused",
    "Clients from whom no message is taken, because theirs wait or they do not read.",
)
CLIENTS_SLOW: Final = _gauge("clients_slow", "Clients whose write buffer is full.")
WRITE_BUFFER_BYTES: Final = _gauge(
    "write_buffer_bytes", "Bytes that wait for the clients whose write buffer is full."
)

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

HANDSHAKES_REFUSED: Final = {
    status: _counter(
        "handshakes_refused",
        "Connections to the client port that were answered with an error, by HTTP status.",
        status=status,
    )
    for status in (
        *("400", "401", "403", "404", "409", "426", "429", "431", "502", "503", "504"),
        "other",
    )
}
CONNECTIONS_LIMITED: Final = _counter(
    "connections_limited", "Connections refused because their address had too many."
)
MESSAGES_RECEIVED: Final = _counter("messages_received", "Messages from clients.")
MESSAGES_SENT: Final = _counter("messages_sent", "Messages to clients, replies and pushes.")
BYTES_RECEIVED: Final = _counter("received_bytes", "Payload bytes of messages from clients.")
BYTES_SENT: Final = _counter("sent_bytes", "Payload bytes of messages to clients.")
PROTOCOL_ERRORS: Final = _counter(
    "protocol_errors", "Connections that were failed because the client broke RFC 6455 or a limit."
)

_PUSH_HELP: Final = (
    "Pushes by outcome, also those that were refused before they could be read; each counts once,"
    " where it was received. Looking a client up and closing one are none."
)
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
API_AWAY: Final = _internal("api_away", "1 while the API is away, as far as the worker knows.")
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
    "redis_lag_seconds",
    "Time that the last probe took through Redis back to this worker, as a push does.",
    MICRO,
)
PROBED_US: Final = _internal("probed", "Monotonic time of the last probe that came back, in µs.")

REDIS_UP: Final = _gauge_of_one("redis_up", "1 while this worker's connections to Redis are up.")
RESTORING: Final = _internal(
    "restoring", "1 while Redis has yet to learn again whom this worker holds."
)
REDIS_RECONNECTS: Final = _counter("redis_reconnects", "Times Redis was lost and came back.")

# What the admin process asks for.
PROFILE_WANTED: Final = _internal(
    "profile_wanted", "Number of the profile to be made, 0 for none (by admin)."
)
PROFILE_KIND: Final = _internal("profile_kind", "What to profile, see profiling.py (by admin).")
PROFILE_MS: Final = _internal(
    "profile_ms",
    "How long, in ms; 0 when nobody waits, or it cannot be done (by admin and worker).",
)

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

# One row for the whole gateway.
HOST_DRAINING: Final = 0
"""1 while /readyz is to say no, so that load balancers send nobody (by the admin process)."""
ROLLING: Final = 1
"""1 while workers are being replaced (by the supervisor)."""
RELOADS_DONE: Final = 2
"""Reloads whose workers were all replaced (by the supervisor)."""
RELOADS_REFUSED: Final = 3
"""Reloads whose settings were wrong."""
RELOADS_FAILED: Final = 4
"""Reloads that were given up because a replacement did not come to serve."""
REPLACE_WANTED: Final = 5
"""From here on a word for each worker: how often it was to be replaced (by the admin process)."""

BANKS: Final = 2


class Counters:
    """Hold the banks of all workers in a mapping that children inherit by fork.

    Args:
        workers: number of slots.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._reaper_start = workers * BANKS * SLOT_LENGTH
        self._host_start = self._reaper_start + REAPER_LENGTH
        self._mapping = mmap.mmap(-1, (self._host_start + REPLACE_WANTED + workers) * WORD_BYTES)
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
        return self._words[self._reaper_start : self._host_start]

    @property
    def host(self) -> memoryview:
        """Return the integers of the whole gateway, from HOST_DRAINING on."""
        return self._words[self._host_start :]

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

    def buckets(self, histogram: Histogram) -> list[int]:
        """Sum a histogram's buckets over all workers."""
        first = histogram.first
        return [self.total(first + i) for i in range(len(histogram.bounds_us) + 1)]

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
        lost = words[CONNECTIONS_OPENED] - words[CONNECTIONS_CLOSED]
        words[CLOSES[causes.WORKER_LOST, "1006"]] += lost
        words[CONNECTIONS_CLOSED] += lost
        failed = words[REQUESTS_STARTED] - words[REQUESTS_SUCCEEDED]
        words[ERRORS[causes.ABANDONED]] += failed - words[REQUESTS_FAILED]
        words[REQUESTS_FAILED] = failed
        for index, metric in enumerate(METRICS):
            if metric.kind in ("gauge", "internal") and index != STARTED_S:
                words[index] = 0  # of the state: STATE_DOWN


def of_status(response: bytes) -> int:
    """Return the index that counts a refused handshake, given the answer to it."""
    return HANDSHAKES_REFUSED.get(response[9:12].decode("ascii"), HANDSHAKES_REFUSED["other"])


def of_close(code: int, cause: str) -> int:
    """Return the index that counts a connection which ended like this."""
    return CLOSES[cause, causes.label_of(code, cause)]


def _claim_to_serve(bank: memoryview) -> tuple[bool, int, int]:
    """Rank the banks of one slot: who serves first, then the younger."""
    return bank[STATE] == STATE_SERVING, bank[FORK], bank[STARTED_S]
