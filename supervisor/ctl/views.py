"""Turn what the admin port tells into lines and tables for people: pure.

A gateway of another version may tell less: what is missing is left out, or shown as a dash.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final

from .tables import BAD, GOOD, WARN, Cell, Column, Part, Table, Word

Object = Mapping[str, Any]

_NONE: Final = "-"
_STATE_TONES: Final = {"serving": GOOD, "down": BAD}
_BREAKER_TONES: Final = {"half-open": WARN, "open": BAD}
_PAIR: Final = (Column("name"), Column("value"))


class Rates:
    """Say by how much the totals grew per second.

    Args:
        before: an earlier /status; None if there is none.
        now: the present one.
        elapsed_s: between the two.
    """

    def __init__(self, before: Object | None, now: Object, elapsed_s: float) -> None:
        self._before: Object = (before or {}).get("totals", {})
        self._now: Object = now.get("totals", {})
        self._elapsed_s = elapsed_s
        self.are_known = before is not None and elapsed_s > 0

    def per_second(self, name: str) -> str:
        """Return `12/s`; a dash for the number where that is not known."""
        if not self.are_known or name not in self._now or name not in self._before:
            return f"{_NONE}/s"
        return f"{max(0, self._now[name] - self._before[name]) / self._elapsed_s:,.0f}/s"


def show_status(status: Object, rates: Rates) -> list[Part]:
    """Show the whole of /status."""
    parts: list[Part] = [_headline(status)]
    tone = WARN if status.get("ready") else BAD
    parts += [Word(f"  {line}", tone) for line in status.get("findings", [])]
    facts: list[Sequence[Cell]] = [(name, value) for name, value in _facts(status, rates) if value]
    parts += ["", Table(_PAIR, facts, has_head=False), "", _show_workers(status)]
    if latencies := _latencies(status):
        parts += ["", latencies]
    return parts


def show_status_line(status: Object, rates: Rates) -> str:
    """Show the gist of /status in one line, for a log of a line each second."""
    state = "ready" if status.get("ready") else "not ready"
    figures = (
        f"{status.get('totals', {}).get('connections', _NONE)} clients",
        f"{rates.per_second('messages_received')} in",
        f"{rates.per_second('messages_sent')} out",
        f"{rates.per_second('requests_failed')} failed",
    )
    return f"{time.strftime('%H:%M:%SZ', time.gmtime())}  {state}  {'  '.join(figures)}"


def show_clients(clients: Sequence[Object]) -> Table:
    """Show a page of clients."""
    columns = (Column("client"), Column("connected since"), Column("worker"))
    return Table(
        columns,
        [
            (_plain(c.get("id")), _since(c.get("generation")), _plain(c.get("worker")))
            for c in clients
        ],
    )


def show_client(client: Object) -> list[Part]:
    """Show one client, connected or not."""
    connection, last_close = client.get("connection"), client.get("last_close")
    if connection:
        parts: list[Part] = [Word(f"{client.get('id')} is connected", GOOD)]
        parts.append(Table(_PAIR, _describe_connection(connection), has_head=False))
    else:
        parts = [Word(f"{client.get('id')} is not connected", WARN)]
    if last_close:
        parts += ["", "last close:", Table(_PAIR, _describe_close(last_close), has_head=False)]
    return parts


def show_trace(trace: Object) -> str:
    """Show one request to the API, one push or one refused connect in a line."""
    worker = "admin" if trace.get("worker") is None else f"worker {trace['worker']}"
    if "lost" in trace:
        return f"{trace['lost']} lines of {worker} were lost: more happens than can be shown"
    sizes = "  ".join(
        f"{trace[name]:,} B {way}"
        for name, way in (("request_bytes", "in"), ("reply_bytes", "out"))
        if trace.get(name)
    )
    words = (
        _moment(trace.get("time_s")),
        f"{worker:<8}",
        f"{_plain(trace.get('kind')):<7}",
        f"{_plain(trace.get('method')):<6}",
        _plain(trace.get("client")),
        _plain(trace.get("status")),
        _milliseconds(trace.get("ms")),
        sizes,
        trace.get("reason") or "",
    )
    return "  ".join(word for word in words if word)


def show_errors(errors: Sequence[Object]) -> list[Part]:
    """Show the latest errors."""
    columns = (
        Column("time"),
        Column("worker", right=True),
        Column("cause"),
        Column("client"),
        Column("what"),
    )
    names = ("worker", "cause", "client", "text")
    rows = [(_clock(e.get("time_s")), *(_plain(e.get(name)) for name in names)) for e in errors]
    return [Table(columns, list(rows))] if rows else ["no errors"]


def _headline(status: Object) -> Word:
    version = f" {status['version']}" if "version" in status else ""
    start = f"ws2api{version}, up {_duration(status.get('uptime_s'))}"
    if status.get("rolling"):
        start += ", workers are being replaced"
    if status.get("draining"):
        return Word(f"{start}: draining, load balancers send nobody new", WARN)
    if "ready" not in status:
        return Word(start)
    return Word(f"{start}: ready", GOOD) if status["ready"] else Word(f"{start}: not ready", BAD)


def _facts(status: Object, rates: Rates) -> list[tuple[str, str]]:
    totals = status.get("totals", {})
    redis = status.get("redis", {}).get("up")
    closes = {f"{c.get('code')} {c.get('cause')}": c.get("count") for c in status.get("closes", [])}
    speeds = ""
    if rates.are_known:
        speeds = ", ".join(
            f"{rates.per_second(f'messages_{end}')} {way}"
            for end, way in (("received", "in"), ("sent", "out"))
        )
    return [
        ("clients", _join(totals, _count, connections="", connections_opened="opened")),
        ("messages", _join(totals, _count, messages_received="in", messages_sent="out")),
        ("messages now", speeds),
        ("bytes", _join(totals, _size, bytes_received="in", bytes_sent="out")),
        (
            "requests",
            _join(totals, _count, requests_succeeded="succeeded", requests_failed="failed"),
        ),
        ("pushes", _list_nonzero(status.get("pushes", {}))),
        ("closes", _list_nonzero(closes)),
        ("errors", _list_nonzero(status.get("errors", {}))),
        ("disconnects", _describe_disconnects(status.get("disconnects", {}))),
        ("api", str(status.get("api", ""))),
        ("redis", "" if redis is None else "up" if redis else "away"),
    ]


def _describe_disconnects(disconnects: Object) -> str:
    """Say how many DELETEs wait for the API; nothing if all is well."""
    words = [
        f"{disconnects[n]:,} {n}" for n in ("pending", "held", "dropped") if disconnects.get(n)
    ]
    if disconnects.get("oldest_s"):
        words.insert(1, f"the oldest for {_duration(disconnects['oldest_s'])}")
    return ", ".join(words)


def _join(values: Object, form: Callable[[Any], str], **words: str) -> str:
    return ", ".join(
        f"{form(values[name])} {word}".rstrip() for name, word in words.items() if name in values
    )


def _list_nonzero(values: Object) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items() if value)


def _show_workers(status: Object) -> Table:
    columns = (
        Column("worker", right=True),
        Column("state"),
        Column("pid", right=True),
        Column("up", right=True),
        Column("restarts", right=True),
        Column("clients", right=True),
        Column("in", right=True),
        Column("out", right=True),
        Column("push lag", right=True),
        Column("breaker"),
        Column("loop lag", right=True, wide=True),
        Column("memory", right=True, wide=True),
        Column("files", right=True, wide=True),
        Column("queue", right=True, wide=True),
        Column("paused", right=True, wide=True),
    )
    return Table(columns, [_describe_worker(worker) for worker in status.get("workers", [])])


def _describe_worker(worker: Object) -> list[Cell]:
    state, breaker = _plain(worker.get("state")), _plain(worker.get("breaker"))
    return [
        _plain(worker.get("worker")),
        Word(state, _STATE_TONES.get(state, WARN)),
        _plain(worker.get("pid")),
        _duration(worker.get("uptime_s")),
        _plain(worker.get("restarts")),
        _count(worker.get("connections")),
        _count(worker.get("messages_received")),
        _count(worker.get("messages_sent")),
        _milliseconds(worker.get("push_lag_ms")),
        Word(breaker, _BREAKER_TONES.get(breaker, "")),
        _milliseconds(worker.get("loop_lag_ms")),
        _size(worker.get("memory_bytes")),
        _count(worker.get("open_files")),
        _count(worker.get("api_queue")),
        _count(worker.get("paused")),
    ]


def _latencies(status: Object) -> Table | None:
    """Show what half and what nearly all took, by the buckets of the histograms."""
    rows: list[Sequence[Cell]] = []
    for key, title in (("api_latency", "API"), ("push_latency", "push")):
        histogram = status.get(key, {})
        for name, counts in histogram.get("counts", {}).items():
            if sum(counts):
                bounds = histogram.get("bounds_s", [])
                shares = [_quantile(bounds, counts, share) for share in (0.5, 0.99)]
                rows.append((f"{title} {name}", _count(sum(counts)), *shares))
    columns = (
        Column("latency"),
        Column("count", right=True),
        Column("half within", right=True),
        Column("99 % within", right=True),
    )
    return Table(columns, rows) if rows else None


def _quantile(bounds_s: Sequence[float], counts: Sequence[int], share: float) -> str:
    """Return the bound of the bucket that the quantile is in; the last bucket has none."""
    wanted = math.ceil(sum(counts) * share)
    for bound_s, reached in zip(bounds_s, accumulate(counts), strict=False):
        if reached >= wanted:
            return _milliseconds(bound_s * 1000)
    return f"> {_milliseconds(bounds_s[-1] * 1000)}" if bounds_s else _NONE


def _describe_connection(connection: Object) -> list[Sequence[Cell]]:
    generation = connection.get("generation")
    return [
        ("since", _since(generation)),
        ("generation", _plain(generation)),
        ("worker", _plain(connection.get("worker"))),
        ("remote", _plain(connection.get("remote"))),
        ("subprotocol", _plain(connection.get("subprotocol"))),
        ("messages", _join(connection, _count, messages_received="in", messages_sent="out")),
        ("waiting", _join(connection, _count, in_flight="at the API", queued="queued")),
        ("reads", "yes" if connection.get("writable", True) else "too slowly"),
    ]


def _describe_close(close: Object) -> list[Sequence[Cell]]:
    return [
        ("at", _clock(close.get("time_s"))),
        ("code", _plain(close.get("code"))),
        ("cause", _plain(close.get("cause"))),
        ("reason", _plain(close.get("reason"))),
        ("after", _duration(close.get("duration_s"))),
        ("messages", _join(close, _count, messages_received="in", messages_sent="out")),
        ("worker", _plain(close.get("worker"))),
        ("generation", _plain(close.get("generation"))),
    ]


def _plain(value: object) -> str:
    return _NONE if value is None or value == "" else str(value)


def _count(value: int | None) -> str:
    return _NONE if value is None else f"{value:,}"


def _milliseconds(value: float | None) -> str:
    return _NONE if value is None else f"{value:,.3g} ms" if value < 1000 else f"{value / 1000:g} s"


def _size(size_bytes: int | None) -> str:
    """Write a size in the unit that leaves one to three digits before the point."""
    if size_bytes is None:
        return _NONE
    value, units = float(size_bytes), ["B", "KB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}" if value < 1000 else f"{value:,.0f} {units[0]}"


def _duration(seconds: float | None) -> str:
    """Write a time in its two largest units."""
    if seconds is None:
        return _NONE
    minutes, rest_s = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {rest_s:.0f} s"
    return f"{rest_s:.3g} s"


def _clock(time_s: float | None) -> str:
    """Write a moment in UTC, as the log does."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(time_s)) if time_s else _NONE
    except (OverflowError, OSError, ValueError):  # no year of any calendar
        return str(time_s)


def _moment(time_s: float | None) -> str:
    """Write the time of a moment of today in UTC, to the millisecond."""
    if time_s is None:
        return _NONE
    clock = time.strftime("%H:%M:%S", time.gmtime(time_s))
    return f"{clock}.{int(time_s * 1000) % 1000:03}Z"


def _since(generation: int | None) -> str:
    return _clock(generation / 1e6 if generation else None)
