"""Serve the dashboard, and make up what the admin port tells it, so that a test can say what."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any, Final

from aiohttp import web
from ws2api.supervisor import dashboard

from .loop_thread import LoopThread

TOKEN: Final = "open-sesame"
BOUNDS_S: Final = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
PUSH_BOUNDS_S: Final = [0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 1.0]
START_S: Final = 1_700_000_000.0

Json = dict[str, Any]


class Scene:
    """Make up a gateway under way; each step is one second of it.

    Args:
        workers: how many there are.
        clients: how many they have together.
        seed: the same one gives the same figures.
    """

    def __init__(self, workers: int = 16, clients: int = 20_000, seed: int = 5) -> None:
        self._random = random.Random(seed)
        self._clients = clients
        self._seconds = 0
        self.status: Json = {
            "time_s": START_S,
            "version": "0.1.0",
            "uptime_s": 273_600,
            "draining": False,
            "ready": True,
            "findings": [],
            "api": "http://127.0.0.1:8000/",
            "redis": {"up": True},
            "totals": dict.fromkeys(_TOTALS, 0),
            "workers": [self._worker(number, workers) for number in range(workers)],
            "disconnects": {"pending": 3, "oldest_s": 2, "held": 3, "dropped": 0},
            "pushes": dict.fromkeys(_PUSHES, 0),
            "errors": {"timeout": 41, "unreachable": 7, "status": 0, "client_protocol": 12},
            "closes": [
                {"code": "1000", "cause": "client", "count": 81_220},
                {"code": "1006", "cause": "lost", "count": 5_031},
                {"code": "1011", "cause": "ping timeout", "count": 412},
                {"code": "4008", "cause": "replaced", "count": 96},
            ],
            "api_latency": {
                "bounds_s": BOUNDS_S,
                "counts": {
                    event: [0] * (len(BOUNDS_S) + 1)
                    for event in ("connect", "message", "disconnect")
                },
            },
            "push_latency": {
                "bounds_s": PUSH_BOUNDS_S,
                "counts": {path: [0] * (len(PUSH_BOUNDS_S) + 1) for path in ("local", "remote")},
            },
        }
        self.status["totals"]["connections_opened"] = 107_000

    def _worker(self, number: int, workers: int) -> Json:
        mean = self._clients / workers
        return {
            "worker": number,
            "state": "serving",
            "pid": 4100 + number,
            "uptime_s": 273_600,
            "restarts": 0,
            "connections": round(self._random.gauss(mean, math.sqrt(mean))),
            "push_lag_ms": 0.4,
            "connections_opened": 0,
            "messages_received": 0,
            "messages_sent": 0,
            "pushes": 0,
            "memory_bytes": 61_000_000 + self._random.randrange(4_000_000),
            "open_files": round(mean) + 90,
            "loop_lag_ms": 0.2,
            "redis_up": True,
            "breaker": "closed",
            "api_connections": 24,
            "api_queue": 0,
            "paused": 0,
            "write_buffer_bytes": 0,
        }

    def step(self) -> None:
        """Let a second pass."""
        status, chance = self.status, self._random
        self._seconds += 1
        status["time_s"] += 1
        status["uptime_s"] += 1
        swell = 1 + 0.25 * math.sin(self._seconds / 40) + chance.uniform(-0.05, 0.05)
        totals = status["totals"]
        for worker in status["workers"]:
            if worker["state"] == "down":
                continue
            opened, closed = chance.randrange(4), chance.randrange(4)
            received = round(worker["connections"] * 0.1 * swell * chance.uniform(0.9, 1.1))
            pushed = chance.randrange(12)
            worker["connections"] = max(0, worker["connections"] + opened - closed)
            worker["connections_opened"] += opened
            worker["messages_received"] += received
            worker["messages_sent"] += received + pushed
            worker["pushes"] += pushed
            worker["uptime_s"] += 1
            worker["loop_lag_ms"] = round(chance.uniform(0.1, 0.9), 2)
            worker["push_lag_ms"] = round(chance.uniform(0.3, 0.8), 2)
            worker["open_files"] = worker["connections"] + 90
            worker["write_buffer_bytes"] = chance.choice([0, 0, 0, 4096])
            totals["connections_opened"] += opened
            totals["connections_closed"] += closed
            totals["messages_received"] += received
            totals["messages_sent"] += received + pushed
            totals["bytes_received"] += received * 120
            totals["bytes_sent"] += (received + pushed) * 90
            totals["requests_started"] += received + opened + closed
            totals["requests_succeeded"] += received + opened + closed
            status["pushes"]["ok"] += pushed
            self._answer("api_latency", "connect", opened, 0.012)
            self._answer("api_latency", "message", received // 8, 0.006 * swell)
            self._answer("api_latency", "disconnect", closed, 0.004)
            self._answer("push_latency", "local", pushed // 2, 0.00015)
            self._answer("push_latency", "remote", pushed - pushed // 2, 0.0007)
        totals["connections"] = sum(worker["connections"] for worker in status["workers"])
        status["pushes"]["not_found"] += chance.randrange(3)
        status["pushes"]["too_slow"] += self._seconds % 17 == 0
        if self._seconds % 11 == 0:
            status["errors"]["timeout"] += 1
            totals["requests_failed"] += 1
        status["closes"][0]["count"] += chance.randrange(12)
        status["closes"][1]["count"] += chance.randrange(2)

    def _answer(self, histogram: str, name: str, times: int, median_s: float) -> None:
        bounds = self.status[histogram]["bounds_s"]
        counts = self.status[histogram]["counts"][name]
        for _ in range(times):
            seconds = self._random.lognormvariate(math.log(median_s), 0.7)
            counts[sum(bound < seconds for bound in bounds)] += 1


class FakeAdmin:
    """Serve the dashboard and a scene in a thread, until the context ends.

    Args:
        scene: what is told.
        interval_s: real time between two events; each is a second of the scene.
        port: of loopback; 0 chooses one.
        token: the admin token; None as if the gateway had none.

    Attributes:
        requests: method, path with query and Authorization of each request, except the events.
        clients: by id, what GET /clients/ID answers.
        errors: what GET /errors answers.
        answers: by method and path, a status and body to answer instead.
        is_silent: whether the streams are open, but nothing comes.
        is_full: whether new streams are refused.
    """

    def __init__(
        self,
        scene: Scene | None = None,
        *,
        interval_s: float = 0.05,
        port: int = 0,
        token: str | None = TOKEN,
    ) -> None:
        self.scene = scene or Scene()
        self.requests: list[tuple[str, str, str]] = []
        self.clients: dict[str, Json] = {}
        self.errors: list[Json] = []
        self.answers: dict[tuple[str, str], tuple[int, Json]] = {}
        self.is_silent = self.is_full = False
        self._has_stopped = False
        self._interval_s = interval_s
        self._token = token
        self._thread = LoopThread("fake admin")
        try:
            self._thread.run(self._start(port))
        except BaseException:
            self._thread.close()
            raise

    def __enter__(self) -> FakeAdmin:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Cut all connections, and listen no more."""
        if not self._has_stopped:
            self._has_stopped = True
            self._thread.run(self._runner.cleanup())
            self._thread.close()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.port}/"

    def change(self, function: Callable[[Json], object]) -> None:
        """Change the status between two events."""
        self._thread.call(function, self.scene.status)

    def asked(self, method: str) -> Iterator[str]:
        """Yield the path of each request of a method so far."""
        return (path for asked, path, _ in self.requests if asked == method)

    async def _start(self, port: int) -> None:
        application = web.Application()
        application.router.add_get("/", self._page)
        application.router.add_get("/events", self._events)
        application.router.add_route("*", "/{path:.*}", self._command)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.port: int = self._runner.addresses[0][1]
        self._pacer = asyncio.create_task(self._pace())

    async def _pace(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            self.scene.step()

    async def _page(self, request: web.Request) -> web.Response:
        page, policy = dashboard.load()
        headers = {"Content-Security-Policy": policy, "Content-Type": "text/html; charset=utf-8"}
        return web.Response(body=page, headers=headers)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if self.is_full:
            raise web.HTTPServiceUnavailable
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                if not self.is_silent:
                    data = json.dumps(self.scene.status)
                    await stream.write(f"event: status\ndata: {data}\n\n".encode())
                await asyncio.sleep(self._interval_s)
        return stream

    async def _command(self, request: web.Request) -> web.Response:
        authorization = request.headers.get("Authorization", "")
        self.requests.append((request.method, request.raw_path, authorization))
        if self._token is None:
            return _error(403, "the gateway was started without --admin-token")
        if authorization != f"Bearer {self._token}":
            return _error(401, "a bearer token is required")
        path = request.raw_path.partition("?")[0]
        if prepared := self.answers.get((request.method, path)):
            return web.json_response(prepared[1], status=prepared[0])
        match request.method, path.split("/")[1:]:
            case "GET", ["errors"]:
                return web.json_response({"errors": self.errors})
            case "GET", ["clients", *segments] if segments:
                id = "/".join(segments)
                absent = {"id": id, "connected": False, "connection": None, "last_close": None}
                return web.json_response(self.clients.get(id, absent))
            case "DELETE", ["clients", *segments] if segments:
                id = "/".join(segments)
                return self._close(id, request)
            case "POST", ["reload"]:
                return web.json_response({}, status=202)
            case "POST", ["workers", number, "drain"]:
                return web.json_response({"worker": int(number)}, status=202)
            case (("POST" | "DELETE"), ["drain"]):
                self.scene.status["draining"] = request.method == "POST"
                return web.json_response({"draining": request.method == "POST"})
        return _error(404, "not found")

    def _close(self, id: str, request: web.Request) -> web.Response:
        client = self.clients.get(id)
        if not client or not client["connected"]:
            return _error(404, "no such client")
        client["last_close"] = {
            "time_s": START_S,
            "worker": 0,
            "generation": client["connection"]["generation"],
            "code": int(request.query["code"]),
            "cause": "closed by request",
            "reason": request.query.get("reason", ""),
            "duration_s": 3.2,
            "messages_received": 5,
            "messages_sent": 6,
        }
        client |= {"connected": False, "connection": None}
        return web.json_response({"closed": True})


def connected(id: str, **changes: Any) -> Json:
    """Return what GET /clients/ID tells of a connected client."""
    connection = {
        "id": id,
        "generation": round(START_S * 1e6),
        "worker": "4f1c2a3b-7-0",
        "remote": "192.0.2.7",
        "subprotocol": "ocpp1.6",
        "messages_received": 5,
        "messages_sent": 6,
        "in_flight": 0,
        "queued": 0,
        "writable": True,
    }
    return {"id": id, "connected": True, "connection": connection, "last_close": None} | changes


def _error(status: int, text: str) -> web.Response:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return web.json_response({"error": text}, status=status, headers=headers)


_TOTALS: Final = (
    *("connections", "connections_opened", "connections_closed"),
    *("messages_received", "messages_sent", "bytes_received", "bytes_sent"),
    *("requests_started", "requests_failed", "requests_succeeded"),
)
_PUSHES: Final = (
    *("ok", "not_found", "stale", "too_slow", "unavailable", "timeout"),
    *("bad_request", "unauthorized", "too_large"),
)
