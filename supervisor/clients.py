"""Find clients and close them for an operator: through Redis, and through the push port.

The admin process holds no socket of a client. Where a client is stands in Redis, and the push port
of any worker reaches it, as it does for the API.
"""

from __future__ import annotations

import asyncio
import re
from bisect import bisect_left
from typing import Any, Final, NamedTuple

import aiohttp
from redis.asyncio import Redis
from ws2api.gateway.disconnects import LEASES
from ws2api.gateway.settings import Address, Settings
from yarl import URL

from .errors import RequestError

MOST_PER_PAGE: Final = 1000
_TIMEOUT_S: Final = 10.0
# What Redis gives as a place in a hash; not str.isdigit, to which a superscript is one too.
_PLACE: Final = re.compile(
    r"(?P<worker>[^:]*):(?P<scan>[0-9]{1,20})(?::(?P<asked>[0-9]{1,4}):(?P<behind>.+))?"
)
# Hashes that hardly any client is in are passed over, but not without end for one page.
_MOST_SCANS: Final = 64


class _Cursor(NamedTuple):
    """Say where a page ends.

    Attributes:
        worker: whose clients come next.
        scan: Redis' place in the hash of them.
        asked: how many it was asked for from there on, when it gave more than there was room for;
            else 0. With another number it would give others.
        behind: the id after which the rest of those, in the order of their ids, comes.
    """

    worker: str
    scan: int = 0
    asked: int = 0
    behind: str = ""

    @classmethod
    def parse(cls, text: str) -> _Cursor:
        """Read what a page has given; empty for the first page."""
        match = _PLACE.fullmatch(text or ":0")
        if match is None or (text and not match["worker"]):
            raise RequestError(400, "no such cursor")
        asked = int(match["asked"] or 0)
        if asked > MOST_PER_PAGE:
            raise RequestError(400, "no such cursor")
        return cls(match["worker"], int(match["scan"]), asked, match["behind"] or "")

    def __str__(self) -> str:
        rest = f":{self.asked}:{self.behind}" if self.behind else ""
        return f"{self.worker}:{self.scan}{rest}"


class Clients:
    """Look clients up.

    Args:
        settings: the options.
        push_address: where the push port listens.
        redis: holds the registry.
    """

    def __init__(self, settings: Settings, push_address: Address, redis: Redis) -> None:
        self._prefix = settings.redis_prefix
        self._redis: Any = redis  # whose stubs do not know that it returns bytes
        host = push_address.host
        if push_address.is_wildcard:
            host = "::1" if ":" in host else "127.0.0.1"
        name = f"[{host}]" if ":" in host else host
        self._push_url = f"http://{name}:{push_address.port}/"
        token = settings.push_token
        self._headers = {"Authorization": f"Bearer {token.get_secret_value()}"} if token else {}
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def page(self, limit: int, cursor: str, worker: str = "") -> dict[str, Any]:
        """Return clients of all workers that share the Redis.

        Args:
            limit: how many at most.
            cursor: of the page before; empty for the first.
            worker: id or number of those whose clients are wanted; empty for all.

        Raises:
            RequestError: if the cursor is none.
        """
        at = _Cursor.parse(cursor)
        async with asyncio.timeout(_TIMEOUT_S):
            names = await self._redis.zrange(self._prefix + LEASES, 0, -1)
            workers = [each for each in sorted(n.decode() for n in names) if _is_of(each, worker)]
            index = bisect_left(workers, at.worker)
            if index < len(workers) and workers[index] != at.worker:
                at = _Cursor(workers[index])  # that of the cursor has ended meanwhile
            found: list[dict[str, Any]] = []
            for _ in range(_MOST_SCANS):
                if index >= len(workers) or len(found) >= limit:
                    break
                clients, following = await self._scan(at, limit - len(found))
                found += clients
                if following is None:
                    index += 1
                    following = _Cursor(workers[index]) if index < len(workers) else at
                at = following
        return {"clients": found, "cursor": str(at) if index < len(workers) else None}

    async def _scan(self, at: _Cursor, limit: int) -> tuple[list[dict[str, Any]], _Cursor | None]:
        """Return clients of one worker from a place on, and where to go on; None: all are told."""
        count = at.asked or limit
        key = f"{self._prefix}w:{at.worker}"
        scan, entries = await self._redis.hscan(key, at.scan, count=count)
        batch = sorted((name, born) for name, born in entries.items() if name.decode() > at.behind)
        clients = [
            {"id": name.decode(), "generation": int(born), "worker": at.worker}
            for name, born in batch[:limit]
        ]
        if len(batch) > limit:  # Redis gives more than it is asked for, all of a small hash
            return clients, at._replace(asked=count, behind=clients[-1]["id"])
        return clients, _Cursor(at.worker, scan) if scan else None

    async def describe(self, client_id: str) -> dict[str, Any] | None:
        """Return what its worker says of a client; None if it is not connected.

        Args:
            client_id: normalised.

        Raises:
            RequestError: if its worker cannot be asked.
        """
        status, body = await self._ask("GET", client_id)
        return body if status == 200 else None

    async def close_client(self, client_id: str, code: str, reason: str) -> bool:
        """Close a client's connection; tell whether there was one.

        Args:
            client_id: normalised.

        Raises:
            RequestError: if its worker cannot be asked, or the code may not be sent.
        """
        status, _ = await self._ask("DELETE", client_id, code=code, reason=reason)
        return status == 200

    async def _ask(self, method: str, client_id: str, **query: str) -> tuple[int, Any]:
        """Ask the push port about a client; return 200 with the JSON, or 404."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
            self._session = aiohttp.ClientSession(timeout=timeout, headers=self._headers)
        url = URL(self._push_url + client_id, encoded=True).update_query(query)
        try:
            async with self._session.request(method, url) as reply:
                if reply.status == 200 and reply.content_type == "application/json":
                    return 200, await reply.json()
                text = (await reply.text()).strip()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise RequestError(503, f"the push port does not answer: {error}") from None
        if reply.status in (200, 404):
            return reply.status, None
        if reply.status in (
            401,
            403,
        ):  # while a reload brings another token; not our caller's fault
            raise RequestError(503, "the push port does not accept the gateway's own --push-token")
        raise RequestError(reply.status, text)


def _is_of(worker: str, wanted: str) -> bool:
    """Tell whether a worker's id is the wanted one, or has its number."""
    return wanted in ("", worker, *worker.split("-")[-2:-1])
