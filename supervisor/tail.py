"""Show requests to the API and pushes as they happen, to those who ask the admin port for them.

A viewer takes a place among the traces, which all processes look at ten times a second, and reads
what they write there. When it is gone, or this process is, its lease runs out and nothing is traced
any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any, Final

from aiohttp import web
from ws2api.gateway.sweeper import TICK_S
from ws2api.gateway.traces import EVERYBODY, MOST_VIEWERS, Trace, TraceRing, Traces

from .errors import RequestError

LEASE_S: Final = 2.0
KEEPALIVE_S: Final = 5.0
"""After so long without anything to show an empty line is sent."""
_POLL_S: Final = 0.1
# After this time whoever traces has seen that somebody watches.
_NOTICED_S: Final = 2.5 * TICK_S
# A viewer that does not read for so long is gone.
_WRITE_TIMEOUT_S: Final = 10.0


class Tail:
    """Serve all viewers of one admin process.

    Args:
        traces: what the processes share.
    """

    def __init__(self, traces: Traces) -> None:
        self._traces = traces
        self._free = list(range(MOST_VIEWERS))

    async def stream(self, request: web.Request, client_id: bytes) -> web.StreamResponse:
        """Send one JSON object a line, until the viewer leaves.

        The head of the answer is sent when everything that happens from then on will be shown.

        Args:
            client_id: whose requests to show; EVERYBODY for all.

        Raises:
            RequestError: if there are too many viewers.
        """
        if not self._free:
            raise RequestError(503, "too many viewers")
        viewer = self._free.pop()
        answer = web.StreamResponse(
            headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"}
        )
        try:
            with contextlib.suppress(ConnectionError):
                await self._show(request, answer, viewer, client_id)
        except TimeoutError:
            # Cut off: an orderly end would wait for all that was sent to be read.
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._traces.leave(viewer)
            self._free.append(viewer)
        return answer

    async def _show(
        self, request: web.Request, answer: web.StreamResponse, viewer: int, client_id: bytes
    ) -> None:
        reader = _Reader(self._traces, client_id)
        self._renew(viewer, client_id)
        await asyncio.sleep(_NOTICED_S)
        await answer.prepare(request)
        sent_at = time.monotonic()
        while True:
            self._renew(viewer, client_id)
            text = "".join(f"{json.dumps(line)}\n" for line in reader.read())
            if not text and time.monotonic() - sent_at >= KEEPALIVE_S:
                text = "\n"
            if text:
                async with asyncio.timeout(_WRITE_TIMEOUT_S):
                    await answer.write(text.encode())
                sent_at = time.monotonic()
            await asyncio.sleep(_POLL_S)

    def _renew(self, viewer: int, client_id: bytes) -> None:
        until_us = time.monotonic_ns() // 1000 + int(LEASE_S * 1e6)
        self._traces.watch(viewer, client_id, until_us)


class _Reader:
    """Read what is new in the rings of all processes.

    Args:
        client_id: whose requests are wanted; the rings may hold others', for other viewers.
    """

    def __init__(self, traces: Traces, client_id: bytes) -> None:
        self._client = None if client_id == EVERYBODY else client_id.decode("ascii")
        workers = [
            (w, traces.ring(w, b)) for w in range(traces.workers) for b in range(traces.banks)
        ]
        self._rings: list[tuple[int | None, TraceRing]] = [*workers, (None, traces.ring(None))]
        self._seen = [ring.last for _, ring in self._rings]

    def read(self) -> list[dict[str, Any]]:
        """Return what is new, in the order of time, and how much was lost in between."""
        found = list(self._read_all())
        found.sort(key=lambda line: line.get("time_s", 0.0))
        return found

    def _read_all(self) -> Iterator[dict[str, Any]]:
        for index, (worker, ring) in enumerate(self._rings):
            payloads, self._seen[index], lost = ring.read(self._seen[index])
            if lost:
                yield {"lost": lost, "worker": worker}
            for trace in map(Trace.decode, payloads):
                if self._client in (None, trace.client_id):
                    yield _describe(worker, trace)


def _describe(worker: int | None, trace: Trace) -> dict[str, Any]:
    return {
        "time_s": trace.time_s,
        "worker": worker,
        "kind": trace.kind,
        "method": trace.method,
        "client": trace.client_id,
        "status": trace.status or None,
        "ms": None if trace.took_us < 0 else trace.took_us / 1000,
        "request_bytes": trace.request_bytes,
        "reply_bytes": trace.reply_bytes,
        "reason": trace.reason or None,
    }
