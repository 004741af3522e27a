"""Answer the admin port: health and figures for everybody, clients and changes with a token.

What everybody sees comes from the shared counters and never from a worker, so that it is answered
just as well when one hangs. docs/openapi-admin.yaml says what there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web
from redis import RedisError
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from ws2api.gateway.client_id import normalise_client_id
from ws2api.gateway.errors import HandshakeError
from ws2api.gateway.recent import CloseRecord
from ws2api.gateway.settings import Address, Settings
from ws2api.gateway.traces import EVERYBODY

from . import dashboard
from .clients import MOST_PER_PAGE, Clients
from .errors import RequestError
from .exposition import Exposition
from .health import REDIS_TIMEOUT_S, Health
from .operations import Operations
from .shared_state import SharedState
from .status import Status
from .tail import Tail

MOST_STREAMS: Final = 64
_EVERY_S: Final = 1.0
# A viewer that does not read for so long is gone.
_STREAM_TIMEOUT_S: Final = 10.0
MOST_ERRORS: Final = 100
"""Errors that are told of each worker, and of all together unless more are asked for."""

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class AdminPort:
    """Hold what the handlers look at.

    Args:
        shared: what the workers share with this process.
        settings: the options.
        redis_url: the Redis whose answer /readyz waits for.
        push_address: where the push port listens.
        started_s: Unix time at which the supervisor started.
        instance: what the ids of this supervisor's workers begin with, up to a dash.
        monotonic_us: the clock of the heartbeats, in µs.
    """

    def __init__(
        self,
        shared: SharedState,
        settings: Settings,
        redis_url: str,
        push_address: Address,
        started_s: float,
        instance: str,
        monotonic_us: Callable[[], int] = lambda: time.monotonic_ns() // 1000,
    ) -> None:
        self._shared = shared
        token = settings.admin_token
        self._token = token.get_secret_value().encode() if token else None
        self._exposition = Exposition(shared.counters, started_s)
        # One retry at once: the pooled connection may be one that Redis closed by restarting.
        self._redis = Redis.from_url(
            redis_url,
            socket_timeout=REDIS_TIMEOUT_S,
            socket_connect_timeout=REDIS_TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),
        )
        self._health = Health(
            shared.counters,
            shared.recent,
            self._redis,
            monotonic_us,
            settings.redis_prefix,
            instance,
        )
        self._status_of = Status(shared.counters, self._health, str(settings.api), started_s)
        self._clients = Clients(settings, push_address, self._redis)
        self._operations = Operations(shared, settings)
        self._tails = Tail(shared.traces)
        self._page, self._policy = dashboard.load()
        # What /events sends to all its viewers, and when it was made.
        self._event = b""
        self._event_at = -math.inf
        self._streams = 0

    def application(self) -> web.Application:
        """Create the aiohttp application."""
        application = web.Application()
        router = application.router
        router.add_get("/", self._dashboard)
        router.add_get("/healthz", self._healthz)
        router.add_get("/readyz", self._readyz)
        router.add_get("/status", self._status)
        router.add_get("/metrics", self._metrics)
        # Not HEAD, whose answer would have no end either.
        router.add_get("/events", self._events, allow_head=False)
        for method, path, handler in (
            ("GET", "/errors", self._errors),
            ("GET", "/tail", self._tail),
            ("GET", "/tail/{id:.+}", self._tail),
            ("GET", "/clients", self._list_clients),
            ("GET", "/clients/{id:.+}", self._client),
            ("DELETE", "/clients/{id:.+}", self._close_client),
            ("POST", "/reload", self._reload),
            ("POST", "/drain", self._drain),
            ("DELETE", "/drain", self._drain),
            ("POST", "/workers/{worker}/drain", self._replace),
            ("POST", "/workers/{worker}/profile", self._profile),
        ):
            router.add_route(method, path, self._guarded(handler))
        application.on_cleanup.append(self._close)
        return application

    async def _close(self, _application: web.Application) -> None:
        await self._clients.close()
        await self._redis.aclose()

    # For everybody.

    async def _dashboard(self, _request: web.Request) -> web.Response:
        headers = {
            "Content-Security-Policy": self._policy,
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        return web.Response(
            body=self._page, content_type="text/html", charset="utf-8", headers=headers
        )

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _request: web.Request) -> web.Response:
        findings = await self._health.findings()
        lines = [*(findings or ["ready"]), *self._health.notes()]
        return web.Response(
            status=503 if findings else 200, text="".join(f"{line}\n" for line in lines)
        )

    async def _status(self, _request: web.Request) -> web.Response:
        return web.json_response(await self._status_of.describe())

    async def _metrics(self, request: web.Request) -> web.Response:
        body, content_type = await self._exposition.render(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Send the status each second (WHATWG HTML, 9.2, server-sent events)."""
        if self._streams >= MOST_STREAMS:
            return web.Response(status=503, text="too many viewers\n")
        stream = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        )
        self._streams += 1
        try:
            with contextlib.suppress(ConnectionError):
                await stream.prepare(request)
                while True:
                    async with asyncio.timeout(_STREAM_TIMEOUT_S):
                        await stream.write(await self._current_event())
                    await asyncio.sleep(_EVERY_S)
        except TimeoutError:
            # Cut off: an orderly end would wait for all that was sent to be read.
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._streams -= 1
        return stream

    async def _current_event(self) -> bytes:
        """Return what all viewers of this second get."""
        if time.monotonic() - self._event_at >= _EVERY_S / 2:
            text = json.dumps(await self._status_of.describe())
            self._event = f"event: status\ndata: {text}\n\n".encode()
            self._event_at = time.monotonic()
        return self._event

    # With a token.

    def _guarded(self, handler: _Handler) -> _Handler:
        """Let only those in who know the token, and answer errors as JSON."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            try:
                self._check_token(request)
                return await handler(request)
            except RequestError as error:
                headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
                return web.json_response(
                    {"error": str(error)}, status=error.status, headers=headers
                )
            except (RedisError, OSError, TimeoutError) as error:
                text = f"redis: {' '.join(str(error).split()) or 'no answer in time'}"
                return web.json_response({"error": text}, status=503)

        return guarded

    def _check_token(self, request: web.Request) -> None:
        if self._token is None:
            raise RequestError(403, "the gateway was started without --admin-token")
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        given_bytes = given.strip().encode(errors="surrogateescape")
        is_right = hmac.compare_digest(given_bytes, self._token)
        if scheme.lower() != "bearer" or not is_right:
            raise RequestError(401, "a bearer token is required")

    async def _errors(self, request: web.Request) -> web.Response:
        limit = _limit(request, MOST_ERRORS)
        errors = [
            {
                "time_s": record.time_s,
                "worker": worker,
                "cause": record.cause,
                "client": record.client_id,
                "text": record.text,
            }
            for worker, record in self._shared.recent.latest_errors(MOST_ERRORS)[:limit]
        ]
        return web.json_response({"errors": errors})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        client_id = EVERYBODY
        if "id" in request.match_info:
            client_id = _client_id(request, "/tail/").encode("ascii")
        return await self._tails.stream(request, client_id)

    async def _list_clients(self, request: web.Request) -> web.Response:
        limit = _limit(request, 100)
        query = request.query
        page = await self._clients.page(limit, query.get("cursor", ""), query.get("worker", ""))
        return web.json_response(page)

    async def _client(self, request: web.Request) -> web.Response:
        client_id = _client_id(request)
        connection = await self._clients.describe(client_id)
        last = self._shared.recent.last_close(client_id)
        return web.json_response(
            {
                "id": client_id,
                "connected": connection is not None,
                "connection": connection,
                "last_close": last and _describe_close(*last),
            }
        )

    async def _close_client(self, request: web.Request) -> web.Response:
        query = request.query
        code, reason = query.get("code", "1000"), query.get("reason", "")
        if not await self._clients.close_client(_client_id(request), code, reason):
            raise RequestError(404, "no such client")
        return web.json_response({"closed": True})

    async def _reload(self, _request: web.Request) -> web.Response:
        self._operations.reload()
        return web.json_response({}, status=202)

    async def _drain(self, request: web.Request) -> web.Response:
        on = request.method == "POST"
        self._operations.set_draining(on)
        return web.json_response({"draining": on})

    async def _replace(self, request: web.Request) -> web.Response:
        worker = _worker(request)
        self._operations.replace(worker)
        return web.json_response({"worker": worker}, status=202)

    async def _profile(self, request: web.Request) -> web.Response:
        worker, kind = _worker(request), request.query.get("kind", "cpu")
        seconds = _whole_number(request, "seconds", 10)
        body = await self._operations.profile(worker, kind, seconds)
        suffix = {"cpu": "pstats", "memory": "tracemalloc"}[kind]
        name = f"ws2api-worker-{worker}.{suffix}"
        return web.Response(
            body=body,
            content_type="application/octet-stream",
            headers={"Content-Disposition": f'attachment; filename="{name}"'},
        )


def _whole_number(request: web.Request, name: str, default: int) -> int:
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise RequestError(400, f"{name} must be a whole number")
    return int(text)


def _limit(request: web.Request, default: int) -> int:
    limit = _whole_number(request, "limit", default)
    if not 1 <= limit <= MOST_PER_PAGE:
        raise RequestError(400, f"limit must be from 1 to {MOST_PER_PAGE}")
    return limit


def _worker(request: web.Request) -> int:
    text = request.match_info["worker"]
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise RequestError(404, "no such worker")
    return int(text)


def _client_id(request: web.Request, folder: str = "/clients/") -> str:
    """Return the id, normalised: what is still percent-encoded then is a part of it."""
    sent = request.raw_path.partition("?")[0].partition(folder)[2]
    try:
        # Whether ids may have several segments, the push port knows.
        client_id = normalise_client_id(sent.encode("latin-1", errors="replace"), is_several=True)
        return client_id.decode("ascii")
    except HandshakeError as error:
        raise RequestError(400, str(error)) from None


def _describe_close(worker: int, record: CloseRecord) -> dict[str, Any]:
    return {
        "time_s": record.time_s,
        "worker": worker,
        "generation": record.generation,
        "code": record.code,
        "cause": record.cause,
        "reason": record.reason,
        "duration_s": record.duration_s,
        "messages_received": record.messages_received,
        "messages_sent": record.messages_sent,
    }
