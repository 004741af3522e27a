"""Tell the API of a disconnect, in the very form in which a worker does it."""

from __future__ import annotations

import contextlib
import math
import ssl
import time
from dataclasses import dataclass
from enum import Enum
from typing import Final

import aiohttp
from aiohttp import hdrs
from ws2api.gateway.http_wire import MAX_REPLY_HEAD_BYTES
from ws2api.gateway.settings import ApiUrl, Settings
from ws2api.gateway.tracer import Tracer
from ws2api.gateway.traces import REQUEST
from yarl import URL

from .disconnect_queue import Disconnect

# What aiohttp adds and a worker does not send.
_NOT_SENT: Final = (hdrs.ACCEPT, hdrs.USER_AGENT)
_UNAVAILABLE: Final = 503


class Verdict(Enum):
    """Say what came of a request."""

    TAKEN = "taken"
    """The API has it."""
    REFUSED = "refused"
    """The API answered, with something else than 2xx: it may be this client's affair."""
    LATE = "late"
    """The API did not answer in time."""
    BROKEN = "broken"
    """The connection ended before the answer, or the API asks for patience: perhaps this
    client's affair, perhaps the API is ending."""
    UNREACHABLE = "unreachable"
    """No connection came about."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Hold a verdict, and for the log what led to it."""

    verdict: Verdict
    reason: str
    status: int = 0
    """That of the answer; 0 when there was none."""


class _Era:
    """Hold the connections that were opened within one time.

    Args:
        ends_at: monotonic time from which on others are opened.
    """

    def __init__(self, session: aiohttp.ClientSession, ends_at: float) -> None:
        self.session = session
        self.ends_at = ends_at
        self.users = 1
        """Requests under way, and the client while this is its present era."""

    async def leave(self) -> None:
        """Count one user less; with the last one the connections end."""
        self.users -= 1
        if not self.users:
            await self.session.close()


class ApiClient:
    """Hold the connections of one reaper to the API. Create it where a loop runs.

    Args:
        settings: the API's address, authorities and timeouts.
        connections: how many there may be.
        tracer: notes each DELETE while somebody wants to see it; None for nobody.
    """

    def __init__(self, settings: Settings, connections: int, tracer: Tracer | None = None) -> None:
        self._settings = settings
        self._connections = connections
        self._tracer = tracer
        self._api = settings.api
        self._max_body_bytes = int(settings.max_message_size)
        self._era = self._begin_era()

    def _begin_era(self) -> _Era:
        """Begin with new connections, to where the name of the API leads now."""
        settings, timeout_s = self._settings, self._settings.api_timeout
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, ssl=_tls(settings)),
            timeout=aiohttp.ClientTimeout(
                total=timeout_s, sock_connect=min(settings.api_connect_timeout, timeout_s)
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_NOT_SENT,
            auto_decompress=False,
            trust_env=False,
            max_line_size=MAX_REPLY_HEAD_BYTES,
            max_field_size=MAX_REPLY_HEAD_BYTES,
        )
        ends_at = time.monotonic() + (settings.api_max_age or math.inf)
        return _Era(session, ends_at)

    async def close(self) -> None:
        """End every connection."""
        await self._era.session.close()

    async def report(self, disconnect: Disconnect) -> Outcome:
        """Send the DELETE of one disconnect; never raises for what an API or a network may do."""
        if self._tracer is None:
            return await self._send_in_era(disconnect)
        began = time.monotonic()
        outcome = await self._send_in_era(disconnect)
        if self._tracer.look():
            self._tracer.note(
                REQUEST,
                "DELETE",
                disconnect.client_id,
                outcome.status,
                took_us=int((time.monotonic() - began) * 1e6),
                request_bytes=len(disconnect.reason),
                reason="" if outcome.verdict is Verdict.TAKEN else outcome.reason,
            )
        return outcome

    async def _send_in_era(self, disconnect: Disconnect) -> Outcome:
        if time.monotonic() >= self._era.ends_at:
            old, self._era = self._era, self._begin_era()
            await old.leave()
        era = self._era
        era.users += 1
        try:
            return await self._send(era.session, disconnect)
        finally:
            await era.leave()

    async def _send(self, session: aiohttp.ClientSession, disconnect: Disconnect) -> Outcome:
        try:
            async with session.delete(
                _url(self._api, disconnect.client_id),
                headers={
                    hdrs.HOST: self._api.host_header,
                    "Ws2api-Generation": str(disconnect.generation),
                    hdrs.ACCEPT_ENCODING: "identity",
                    "Ws2api-Close-Code": str(disconnect.code),
                    hdrs.CONTENT_TYPE: "text/plain; charset=utf-8",
                },
                data=disconnect.reason,
                allow_redirects=False,
            ) as reply:
                outcome = _judge(reply.status)
                # The status is the answer; what is wrong behind it costs the connection only.
                with contextlib.suppress(aiohttp.ClientError, OSError, ValueError):
                    await self._skip_body(reply)
                return outcome
        except aiohttp.ServerTimeoutError as error:  # of connecting; the other is asyncio's own
            return Outcome(Verdict.UNREACHABLE, str(error))
        except TimeoutError:
            return Outcome(Verdict.LATE, "no answer in time")
        except aiohttp.ClientConnectorError as error:
            return Outcome(Verdict.UNREACHABLE, str(error))
        except (aiohttp.ClientConnectionError, OSError) as error:
            return Outcome(Verdict.BROKEN, str(error) or type(error).__name__)
        except (aiohttp.ClientError, ValueError) as error:
            return Outcome(Verdict.REFUSED, " ".join(str(error).split()))

    async def _skip_body(self, reply: aiohttp.ClientResponse) -> None:
        """Read the rest, so that the connection can be used again, unless it is too much."""
        size = 0
        while chunk := await reply.content.readany():
            size += len(chunk)
            if size > self._max_body_bytes:
                reply.close()
                return


def _judge(status: int) -> Outcome:
    text = f"status {status}"
    if 200 <= status < 300:
        return Outcome(Verdict.TAKEN, text, status)
    verdict = Verdict.BROKEN if status == _UNAVAILABLE else Verdict.REFUSED
    return Outcome(verdict, text, status)


def _url(api: ApiUrl, client_id: bytes) -> URL:
    """Put the URL together; the path goes on the wire as it is, byte for byte."""
    host = f"[{api.host}]" if ":" in api.host else api.host
    scheme = "https" if api.tls else "http"
    path = f"{api.path}/{client_id.decode('ascii')}"
    return URL(f"{scheme}://{host}:{api.port}{path}", encoded=True)


def _tls(settings: Settings) -> ssl.SSLContext | bool:
    if not settings.api.tls:
        return True  # aiohttp's word for its default
    return ssl.create_default_context(cafile=str(settings.api_ca) if settings.api_ca else None)
